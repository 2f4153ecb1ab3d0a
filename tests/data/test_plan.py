import itertools
import pickle

import numpy as np
import pytest

from tests.data.fake import MAX_LENGTH, TOKENIZER, Fake, planned
from vlp_jax.compress.buckets import Bucket
from vlp_jax.data.captions import EncodedCaptions
from vlp_jax.data.eval_plan import EvalPlan
from vlp_jax.data.folder import Folder
from vlp_jax.data.plan import MIXTURE_BLOCK, Plan
from vlp_jax.data.planned import PlannedSource
from vlp_jax.data.scenes import Scenes
from vlp_jax.data.text_edges import batch_maxima, fit_edges
from vlp_jax.data.tokenizer import Tokenizer

EDGES = (8, 12, 16, 24)
FIELDS = ("source", "record", "caption", "length", "position", "valid")


def plan_of(*sources, batch_size=16, seed=0, edges=EDGES, **kwargs):
    return Plan(sources or [planned(Fake())], batch_size, seed, edges, image_size=32, **kwargs)


def assert_same(left, right):
    assert left.bucket == right.bucket
    for field in FIELDS:
        np.testing.assert_array_equal(getattr(left, field), getattr(right, field))


def stream(plan, num_batches):
    """All rows of the first batches, as (source, record, caption) sorted within each window."""
    batches = [plan.batch(t) for t in range(num_batches)]
    return {field: np.concatenate([getattr(b, field) for b in batches]) for field in FIELDS}


def test_a_batch_is_a_pure_function_of_seed_and_step():
    asked_in_order, asked_backwards = plan_of(), plan_of()
    forwards = [asked_in_order.batch(t) for t in range(200)]
    for t in reversed(range(0, 200, 7)):
        assert_same(asked_backwards.batch(t), forwards[t])
        assert_same(pickle.loads(pickle.dumps(asked_backwards)).batch(t), forwards[t])
    other = plan_of(seed=1).batch(3)
    assert not np.array_equal(other.record, forwards[3].record)


def test_the_mean_length_is_that_of_the_texts_that_are_read():
    plan = plan_of(planned(Fake()), planned(Fake(), weight=3.0))
    lengths = stream(plan, 400)["length"]
    assert plan.mean_text_length == pytest.approx(lengths.mean(), rel=0.03)


def test_positions_and_buckets():
    plan = plan_of()
    for t in range(80):
        batch = plan.batch(t)
        np.testing.assert_array_equal(batch.position, t * 16 + np.arange(16))
        assert batch.valid.all()
        assert batch.bucket == plan.bucket(t)
        smallest = next(edge for edge in EDGES if edge >= batch.length.max())
        assert batch.bucket == Bucket(smallest, 32)
        captions = plan.sources[0].captions
        np.testing.assert_array_equal(batch.length, captions.lengths(batch.record, batch.caption))
        assert batch.bucket in plan.buckets()


def test_buckets_that_cannot_occur_are_not_listed():
    plan = plan_of(edges=(8, 16, 24, 64, 128))
    assert [bucket.text_length for bucket in plan.buckets()] == [8, 16, 24]


def test_every_record_once_an_epoch_in_a_new_order():
    size = 64 * 16  # an epoch is a window, so that its records can be told from the next one's
    orders = []
    for seed in (0, 1):
        plan = plan_of(planned(Fake(size)), seed=seed)
        for epoch in range(3):
            window = range(64 * epoch, 64 * (epoch + 1))
            records = np.concatenate([plan.batch(t).record for t in window])
            np.testing.assert_array_equal(np.sort(records), np.arange(size))
            orders.append(tuple(plan._draw(0, np.arange(size * epoch, size * (epoch + 1)))[0]))
    assert len(set(orders)) == len(orders)  # epoch e of one seed is never epoch e' of another


def test_sources_of_equal_size_are_ordered_differently():
    plan = plan_of(planned(Fake(40, "a")), planned(Fake(40, "b")))
    first, second = (plan._draw(source, np.arange(40))[0] for source in (0, 1))
    np.testing.assert_array_equal(np.sort(first), np.sort(second))
    assert not np.array_equal(first, second)


def test_each_caption_is_seen_once_before_any_is_repeated():
    size, source = 20, Fake(20)
    plan = plan_of(planned(source))
    record, caption = plan._draw(0, np.arange(size * 12))
    starts = set()
    for number in range(size):
        seen = caption[record == number]
        count = int(source.num_captions(np.asarray([number]))[0])
        for start in range(0, 12 - count, count):
            assert sorted(seen[start : start + count]) == list(range(count))
        if count == 3:
            starts.add(int(seen[0]))
    assert len(starts) > 1  # not always the first caption first


def test_mixture_is_exact():
    weights = (3.0, 1.0, 1.0)
    plan = plan_of(*(planned(Fake(30 + i, str(i)), weight) for i, weight in enumerate(weights)))
    source, running = plan._mixture(np.arange(3 * MIXTURE_BLOCK))
    for start in range(0, 3 * MIXTURE_BLOCK, MIXTURE_BLOCK):
        counts = np.bincount(source[start : start + MIXTURE_BLOCK])
        np.testing.assert_array_equal(counts, [2160, 720, 720])
    for index in range(3):  # the examples of a source are numbered without a gap
        np.testing.assert_array_equal(
            np.sort(running[source == index]), np.arange((source == index).sum())
        )
    assert not np.array_equal(source[:MIXTURE_BLOCK], source[MIXTURE_BLOCK : 2 * MIXTURE_BLOCK])
    some = np.asarray([9000, 17, 4000])
    np.testing.assert_array_equal(plan._mixture(some)[0], source[some])  # random access


def test_an_unbounded_source_is_read_once():
    plan = plan_of(planned(Fake(None)))
    records = np.concatenate([plan.batch(t).record for t in range(64)])
    np.testing.assert_array_equal(np.sort(records), np.arange(64 * 16))
    assert plan.examples_per_epoch is None
    far = plan.batch(10_000_000)
    assert far.record.min() >= 0


def test_rows_and_batches_are_not_sorted_by_length():
    plan, checked = plan_of(planned(Fake(2000)), batch_size=32), 0
    for batch in map(plan.batch, range(64)):
        lengths, counts = np.unique(batch.length, return_counts=True)
        if len(lengths) > 1 and counts.min() > 3:  # else the order may be sorted by chance
            assert (np.diff(batch.length) < 0).any()
            checked += 1
    assert checked > 10
    means = [plan.batch(t).length.mean() for t in range(32)]
    assert (np.diff(means) < 0).any()
    assert (np.diff(means) > 0).any()


def test_windows_are_sorted_by_length_into_exactly_their_batches():
    plan = plan_of(planned(Fake(2000)), window_batches=40)
    batches = [np.searchsorted(EDGES, plan.batch(t).length) for t in range(40, 80)]
    for shorter, longer in itertools.pairwise(sorted(batches, key=np.mean)):
        assert shorter.max() <= longer.min()  # in edges


def test_guarded_examples_fill_batches_of_their_own():
    """But for one, which others fill up; everything is read all the same."""
    records = np.arange(0, Fake().num_records, 20)
    plain, plan = plan_of(), plan_of(planned(Fake(), guarded=records))
    windows, held, batches = 4, 0, 0
    for window in range(windows):
        steps = range(window * plan.window_batches, (window + 1) * plan.window_batches)
        guarded = [np.isin(plan.batch(t).record, records) for t in steps]
        flags = [plan.bucket(t).guarded for t in steps]
        assert [rows.any() for rows in guarded] == flags
        assert sum(not rows.all() for rows in guarded if rows.any()) <= 1
        assert flags != sorted(flags), "spread over the window"
        ours, theirs = (
            np.concatenate([p.batch(t).record * 8 + p.batch(t).caption for t in steps])
            for p in (plan, plain)
        )
        np.testing.assert_array_equal(np.sort(ours), np.sort(theirs))
        held += sum(rows.sum() for rows in guarded)
        batches += sum(flags)
    assert plan.guarded_share == pytest.approx(
        batches / (windows * plan.window_batches), abs=1.5 / plan.window_batches
    )
    assert held / (windows * plan.window_batches * plan.batch_size) == pytest.approx(0.05, rel=0.2)
    assert plain.guarded_share == 0.0
    assert all(not plain.bucket(t).guarded for t in range(64))


def test_hosts_read_contiguous_rows():
    plan = plan_of(batch_size=12)
    for t in (0, 40):
        whole = plan.batch(t)
        for hosts in (1, 2, 3, 4):
            parts = [plan.rows(t, host, hosts) for host in range(hosts)]
            for field in FIELDS:
                joined = np.concatenate([getattr(part, field) for part in parts])
                np.testing.assert_array_equal(joined, getattr(whole, field))
    with pytest.raises(ValueError, match=r"data\.batch_size=12: 5 hosts do not divide it"):
        plan.rows(0, 0, 5)
    with pytest.raises(ValueError, match="no host 2 among 2"):
        plan.rows(0, 2, 2)


def test_epochs():
    plan = plan_of(planned(Fake(50)), planned(Fake(51, "other")), batch_size=10)
    assert plan.examples_per_epoch == 101


@pytest.mark.parametrize("weight", [0.0, -1.0, float("nan"), float("inf")])
def test_bad_weights_name_the_source(weight):
    with pytest.raises(ValueError, match=r"data\.sources\.b\.weight=.*above 0"):
        plan_of(planned(Fake(name="a")), planned(Fake(name="b"), weight))


def test_bad_numbers_name_their_key():
    with pytest.raises(ValueError, match=r"data\.batch_size=0"):
        plan_of(batch_size=0)
    with pytest.raises(ValueError, match=r"data\.sources\.b\.weight=1e-05: less than one"):
        plan_of(planned(Fake(name="a")), planned(Fake(name="b"), 1e-5))
    with pytest.raises(ValueError, match=r"data\.sources: name at least one"):
        Plan([], 4, 0, EDGES, 32)
    with pytest.raises(ValueError, match=r"data\.sources\.none: the source is empty"):
        plan_of(planned(Fake(0, "none")))
    with pytest.raises(
        ValueError, match=r"data\.text_edges=\(8, 16\): captions have up to 22 tokens"
    ):
        plan_of(edges=(8, 16))
    with pytest.raises(
        ValueError, match=r"data\.text_edges=\(16, 8\): must be positive and increasing"
    ):
        plan_of(edges=(16, 8))
    with pytest.raises(ValueError, match=r"data\.window_batches=31"):
        plan_of(window_batches=31)
    with pytest.raises(ValueError, match=r"seed=-1"):
        plan_of(seed=-1)
    with pytest.raises(IndexError, match="no batch -1"):
        plan_of().batch(-1)


@pytest.mark.parametrize("edges", [EDGES, (24,)])
def test_a_fixed_set_holds_every_record_once(edges):
    plan = EvalPlan(planned(Fake(50), store=False), 37, 8, edges, 32)
    seen = []
    for t in range(plan.num_batches):
        batch = plan.batch(t)
        assert len(batch) == 8
        assert batch.length.max() <= batch.bucket.text_length
        seen += zip(batch.record[batch.valid], batch.caption[batch.valid], strict=True)
    assert sorted(seen) == [(record, 0) for record in range(37)]
    assert plan.num_rows == 37
    assert len(plan.buckets()) <= len(edges)
    with pytest.raises(IndexError, match="the set has"):
        plan.batch(plan.num_batches)


def test_a_fixed_set_larger_than_its_source_is_the_whole_source():
    assert EvalPlan(planned(Fake(5)), 100, 4, EDGES, 32).num_rows == 5
    assert EvalPlan(planned(Fake(None)), 100, 4, EDGES, 32).num_rows == 100
    with pytest.raises(ValueError, match=r"num_examples=0"):
        EvalPlan(planned(Fake(5)), 0, 4, EDGES, 32)


def padding_waste(source, multiple_of, window_batches, max_length, batch_size=64):
    """With six fitted edges, over two windows."""
    texts = (source.caption(r, i) for r in range(min(source.num_records, 1000)) for i in range(5))
    captions = EncodedCaptions(source, Tokenizer.train(texts, 4096), max_length)
    assert captions.num_truncated == 0
    histogram = batch_maxima(captions.histogram(), batch_size, window_batches)
    edges = fit_edges(histogram, 6, multiple_of, captions.longest)
    assert len(edges) <= 6
    plan = plan_of(
        PlannedSource(source, captions),
        batch_size=batch_size,
        edges=edges,
        window_batches=window_batches,
    )
    return plan.padding_waste(2 * window_batches)


@pytest.mark.pack
@pytest.mark.parametrize("multiple_of", [2, 4])
def test_padding_waste_on_the_pack(pack, multiple_of):
    assert padding_waste(Folder(pack, "train"), multiple_of, 64, max_length=40) <= 0.15


@pytest.mark.parametrize(
    ("level", "multiple_of", "window_batches"),
    [("easy", 2, 64), ("easy", 4, 64), ("full", 2, 64), ("full", 4, 128)],
)
def test_padding_waste_on_scenes(level, multiple_of, window_batches):
    source = Scenes("train", level=level, num_records=3000)
    assert padding_waste(source, multiple_of, window_batches, max_length=64) <= 0.15


def test_padding_waste_is_the_share_of_padding():
    plan = plan_of(edges=(24,))
    lengths = stream(plan, 32)["length"]
    assert plan.padding_waste(32) == pytest.approx(1 - lengths.mean() / 24)
    assert MAX_LENGTH == 24
    assert TOKENIZER.vocab_size <= 200
