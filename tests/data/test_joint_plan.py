"""Several named batches of one update: which meet, in what sizes, and how they are read."""

import itertools
import pickle

import numpy as np
import pytest

from tests.data.fake import Fake, planned
from vlp_jax.data.joint_plan import JointPlan
from vlp_jax.data.loader import JointLoader, Loader
from vlp_jax.data.plan import Plan

EDGES, COARSE = (6, 8, 10, 12, 14, 16, 20, 24), (8, 16, 24)


class Short(Fake):
    """Captions of 1 to 5 words."""

    def caption(self, record, index):
        return " ".join(super().caption(record, index).split()[: 1 + record % 5])


def plan_of(source, stream="", edges=EDGES, batch_size=16, **kwargs):
    return Plan([source], batch_size, 0, edges, 32, stream=stream, **kwargs)


def joint_of(most=16, **kwargs):
    plans = {
        "pairs": plan_of(planned(Fake()), edges=COARSE, **kwargs),
        "text": plan_of(planned(Fake(90)), "text", batch_size=8, **kwargs),
    }
    return JointPlan(plans, most)


def test_one_batch_is_planned_as_by_itself():
    plan = plan_of(planned(Fake()))
    joint = JointPlan({"pairs": plan})
    for t in range(130):
        [(name, batch)] = joint.batches(t).items()
        assert name == "pairs"
        np.testing.assert_array_equal(batch.record, plan.batch(t).record)
        assert joint.bucket(t) == (("pairs", plan.bucket(t)),)
        assert joint.fingerprint(t) == plan.batch(t).fingerprint()
    assert joint.buckets() == tuple((("pairs", bucket),) for bucket in plan.buckets())
    assert joint.padding_waste(64) == plan.padding_waste(64)
    assert joint.mean_text_lengths == {"pairs": plan.mean_text_length}
    assert (joint.batch_size, joint.examples_per_epoch) == (16, 50)


def test_batches_meet_in_the_order_of_their_lengths():
    """Otherwise a window would have nearly every pair of sizes."""
    joint = joint_of()
    meet = {
        tuple(plan.bucket(t).text_length for plan in joint.plans.values()) for t in range(10 * 64)
    }
    assert len(meet) <= len(EDGES) + 2 * len(COARSE)
    lengths = np.asarray([[b.text_length for _, b in joint.bucket(t)] for t in range(64)])
    assert np.corrcoef(lengths.T)[0, 1] > 0.8


@pytest.mark.parametrize("most", [16, 5, 2, 1])
def test_sizes_are_a_chain_that_holds_every_batch(most):
    joint = joint_of(most)
    chain = [tuple(bucket.text_length for _, bucket in sizes) for sizes in joint.buckets()]
    assert 1 <= len(chain) <= most
    for low, high in itertools.pairwise(chain):
        assert low != high
        assert all(a <= b for a, b in zip(low, high, strict=True))
    for t in range(640):
        sizes = joint.bucket(t)
        assert sizes in joint.buckets()
        for name, batch in joint.batches(t).items():
            assert batch.bucket == dict(sizes)[name]
            assert batch.length.max() <= batch.bucket.text_length


def test_fewer_sizes_pad_more():
    waste = [joint_of(most).padding_waste(64) for most in (16, 5, 2, 1)]
    assert waste == sorted(waste)
    assert waste[0] < waste[-1] / 2


def test_batches_have_draws_of_their_own():
    """Two batches of the same source see other records at one update."""
    source = planned(Fake())
    joint = JointPlan({"pairs": plan_of(source), "text": plan_of(source, "text")})
    same = [
        np.mean(joint.batch("pairs", t).record == joint.batch("text", t).record) for t in range(64)
    ]
    assert np.mean(same) < 0.1


def test_an_update_is_a_pure_function_of_seed_and_step():
    first, again = joint_of(), pickle.loads(pickle.dumps(joint_of()))
    forwards = [first.fingerprint(t) for t in range(130)]
    assert [again.fingerprint(t) for t in reversed(range(130))] == forwards[::-1]
    assert len(set(forwards)) == 130


def test_a_guarded_example_guards_its_whole_update():
    plans = {
        "pairs": plan_of(planned(Fake(200), guarded=np.arange(5)), edges=COARSE),
        "text": plan_of(planned(Short(90)), "text"),
    }
    joint = JointPlan(plans)
    guarded = [any(bucket.guarded for _, bucket in joint.bucket(t)) for t in range(640)]
    assert guarded == [plans["pairs"].bucket(t).guarded for t in range(640)]
    assert np.mean(guarded) == pytest.approx(joint.guarded_share, abs=0.04)


def test_windows_of_two_lengths_do_not_meet():
    plans = {
        "pairs": plan_of(planned(Fake())),
        "text": plan_of(planned(Fake()), "text", window_batches=32),
    }
    with pytest.raises(ValueError, match="windows of one length"):
        JointPlan(plans)


def test_loaders_of_all_batches_step_together():
    joint = JointPlan(
        {
            "pairs": plan_of(planned(Fake(damaged=(3,)))),
            "text": plan_of(planned(Fake(90, damaged=(4, 6))), "text", batch_size=8),
        }
    )

    fields = ("image", "text_ids", "text_length", "position", "valid", "replaced")

    def reader(start):
        return JointLoader(
            {
                name: Loader(
                    member,
                    start,
                    20,
                    threads=0,
                    fields=fields if name == "pairs" else fields[1:],
                )
                for name, member in joint.members.items()
            },
            lambda step: [name for name, _ in joint.bucket(step)],
            range(start, 20),
        )

    with reader(0) as loader:
        whole = list(loader)
        assert loader.step == 20
        # The text batch reads no picture, so that none can be torn.
        assert loader.bad.counts == {"torn picture": loader.bad.total}
        assert loader.bad.total > 0
    with reader(13) as loader:
        rest = list(loader)
    for t, batches in enumerate(whole):
        assert list(batches["text"]) == list(fields[1:])
        for name, bucket in joint.bucket(t):
            assert batches[name]["text_ids"].shape[1] == bucket.text_length
    for left, right in zip(whole[13:], rest, strict=True):
        for name, batch in left.items():
            for field, array in batch.items():
                np.testing.assert_array_equal(array, right[name][field])
