"""Which bucket each update encodes: budgets, kinds, files, and one program each."""

import json
from typing import Any

import chex
import jax
import numpy as np
import pytest
from ml_collections import ConfigDict
from tiny import BUCKET, IMAGE_SIZE, TOKENS, make_batch, make_program, objective_config, tiny_config

from vlp_jax.compress.buckets import Bucket, View, bucket_text, parse_bucket
from vlp_jax.infra.errors import ConfigError
from vlp_jax.infra.mesh import global_batch, make_mesh
from vlp_jax.train import program as program_module
from vlp_jax.train.bucket_schedule import (
    BucketSchedule,
    Resolved,
    count_buckets,
    resolve,
    stages_of,
)
from vlp_jax.train.config import default_config

STEPS = 1000
COSTS = (0.2, 0.5, 1.0)
BUCKETS = ("p16@16", "p8@16k2", "whole")
WHOLE = View.whole(16, 8)
MODEL = {"model": {"image": {"width": 32, "depth": 1}}, "data": {"image_size": 16}}


def section(**values: Any) -> ConfigDict:
    config = default_config().compression
    config.update({"buckets": BUCKETS, "costs": COSTS, "schedule": "staged"} | values)
    return config


def resolved(config: ConfigDict) -> Resolved:
    return resolve(config, WHOLE, 1, lambda views: 0.5 if views else 1.0, MODEL)


def schedule(steps: int = STEPS, seed: int = 0, **values: Any) -> BucketSchedule:
    return resolved(section(**values)).over(steps, seed)


def shares_of_budget(found: BucketSchedule) -> np.ndarray:
    spent = np.diff(found.spent)
    return np.bincount(found.index, spent, len(found.buckets)) / found.spent[-1]


def test_without_a_schedule_every_update_is_whole():
    found = resolved(default_config().compression).over(7, 0)
    assert found.total_steps == 7
    assert not found.compresses
    assert [found.views(step) for step in (0, 6, 99)] == [()] * 3
    np.testing.assert_array_equal(found.spent, np.arange(8))
    assert [found.progress(step) for step in (0, 7, 9)] == [0.0, 1.0, 1.0]


@pytest.mark.parametrize("kind", ["constant", "staged", "reversed", "linear", "random"])
@pytest.mark.parametrize("tail", [0.0, 10.0])
def test_every_kind_spends_the_budget(kind, tail):
    one = {"buckets": ("p16@16",), "costs": (0.2,)} if kind == "constant" else {}
    found = schedule(schedule=kind, tail_percent=tail, **one)
    assert found.spent[-1] == pytest.approx(STEPS, abs=1.0)
    np.testing.assert_allclose(np.diff(found.spent), np.asarray(found.costs)[found.index])
    if tail:
        whole = found.buckets.index(())
        assert shares_of_budget(found)[whole] >= 0.1 - 1e-3
        assert (found.index[-100:] == whole).all()


@pytest.mark.parametrize("kind", ["staged", "reversed", "linear", "random"])
def test_the_shortest_run_has_an_update(kind):
    dear = {"buckets": ("whole", "p4@16"), "costs": (1.0, 4.0)}
    assert schedule(steps=1, schedule=kind, **dear).total_steps >= 1


def test_a_cheap_bucket_has_so_many_more_updates():
    assert schedule(schedule="constant", buckets=("p16@16",), costs=(0.2,)).total_steps == 5 * STEPS


def test_stages_have_their_shares_in_their_order():
    np.testing.assert_allclose(shares_of_budget(schedule()), 1 / 3, atol=2e-3)
    found = schedule(shares=(1, 1, 2))
    np.testing.assert_allclose(shares_of_budget(found), [0.25, 0.25, 0.5], atol=2e-3)
    assert (np.diff(found.index) >= 0).all()
    backwards = schedule(schedule="reversed", shares=(1, 1, 2))
    np.testing.assert_allclose(shares_of_budget(backwards), [0.25, 0.25, 0.5], atol=2e-3)
    assert (np.diff(backwards.index) <= 0).all()


def test_a_linear_schedule_takes_the_nearest_cost():
    found = schedule(schedule="linear")
    for step in range(0, found.total_steps, 37):
        wanted = COSTS[0] + found.progress(step) * (COSTS[-1] - COSTS[0])
        nearest = min(abs(cost - wanted) for cost in COSTS)
        assert abs(found.cost(step) - wanted) <= nearest + 0.01


def test_a_random_schedule_mixes_by_the_seed_alone():
    found = schedule(schedule="random", shares=(1, 2, 1))
    np.testing.assert_allclose(shares_of_budget(found), [0.25, 0.5, 0.25], atol=0.03)
    half = shares_of_budget(schedule(steps=STEPS // 2, schedule="random", shares=(1, 2, 1)))
    np.testing.assert_allclose(half, [0.25, 0.5, 0.25], atol=0.05)
    again = schedule(schedule="random", shares=(1, 2, 1))
    np.testing.assert_array_equal(found.index, again.index)
    other = schedule(schedule="random", shares=(1, 2, 1), seed=1)
    assert (found.index[:100] != other.index[:100]).any()


@pytest.mark.parametrize("text", ["whole", "p16@224", "p16@224k49", "p30@240/p16@224"])
def test_buckets_are_read_as_they_are_written(text):
    assert bucket_text(parse_bucket(text, "k", WHOLE)) == text


@pytest.mark.parametrize("text", ["p8@16", "p8@16k4", "p8@16/p8@16", "whole"])
def test_one_program_has_one_name(text):
    """All of an image at the model's own sizes is the plain update."""
    assert parse_bucket(text, "k", WHOLE) == ()


def test_repeated_views_are_one():
    assert parse_bucket("p16@16/p16@16", "k", WHOLE) == (View.whole(16, 16),)
    assert len(parse_bucket("p8@16/p16@16", "k", WHOLE)) == 2


@pytest.mark.parametrize("kind", ["staged", "reversed", "linear", "random"])
@pytest.mark.parametrize("count", [3, 6, 7, 15])
def test_a_file_is_read_as_it_was_written(tmp_path, kind, count):
    """Also where sums of shares miss 1 by a rounding."""
    file = tmp_path / "schedule.json"
    costs = tuple(0.05 * (number + 1) for number in range(count))
    buckets = tuple(f"p1@{number + 2}" for number in range(count))
    wanted = resolved(section(schedule=kind, buckets=buckets, costs=costs, tail_percent=5.0))
    wanted.write(file, MODEL, {"command": "x"})
    config = default_config().compression
    config.file = str(file)
    found = resolved(config)
    np.testing.assert_array_equal(found.over(STEPS, 3).index, wanted.over(STEPS, 3).index)
    np.testing.assert_array_equal(found.over(STEPS, 3).spent, wanted.over(STEPS, 3).spent)
    assert count_buckets(config) == count
    assert count_buckets(section()) == 3
    assert count_buckets(section(tail_percent=5.0, buckets=("p16@16",))) == 2


def test_a_file_of_another_model_or_a_damaged_one_is_refused(tmp_path):
    file = tmp_path / "schedule.json"
    config = default_config().compression
    config.file = str(file)
    other = {"model": {"image": {"width": 64, "depth": 1}}, "data": {"image_size": 16}}
    Resolved(((),), (1.0,), [(1.0, 0)]).write(file, other, {})
    with pytest.raises(ConfigError, match=r"compression\.file: .* model\.image\.width differ"):
        resolved(config)
    held = json.loads(file.read_text()) | {"made_for": MODEL}
    damages = ({"costs": []}, {"stages": [[0.5, 0]]}, {"stages": [[1.0, 3]]}, {"made_for": 3})
    for damage in ({}, *damages):
        file.write_text(json.dumps(held | damage))
        if not damage:
            resolved(config)
            continue
        with pytest.raises(ConfigError, match=r"config\.compression\.file: "):
            resolved(config)
    with pytest.raises(ConfigError, match=r"compression\.buckets: stands beside"):
        resolved(section(file=str(file), schedule=""))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"schedule": "spiral"}, r"schedule: 'spiral' is no kind"),
        ({"schedule": ""}, r"schedule: is empty, but compression\.buckets is given"),
        ({"buckets": ()}, r"buckets: is empty"),
        ({"buckets": ("p16@16", "p16@16", "whole")}, r"buckets: names one twice"),
        ({"buckets": ("p16@16", "16", "whole")}, r"buckets: '16' is no bucket"),
        ({"buckets": ("p16@16", "p7@16", "whole")}, r"buckets: 'p7@16': patches of 7 px do not"),
        (
            {"buckets": ("p16@16", "p8@16k5", "whole")},
            r"buckets: 'p8@16k5': 5 patches cannot be kept of",
        ),
        ({"buckets": tuple(f"p1@{n}" for n in range(1, 18))}, r"buckets: 17 buckets"),
        ({"buckets": ("p16@16/whole",)}, r"buckets: 'p16@16/whole' is no bucket \(whole stands"),
        ({"buckets": ("p8@16k2/p8@16",)}, r"buckets: 'p8@16k2/p8@16' has 2 views"),
        ({"schedule": "constant"}, r"buckets: 3 of them for 'constant'"),
        ({"schedule": "linear", "shares": (1, 1, 1)}, r"shares: are not read by 'linear'"),
        ({"costs": (1.0,)}, r"costs: 1 costs of 3 buckets"),
        ({"costs": (1.0, 0.0, 1.0)}, r"costs: .* are no costs"),
        ({"costs": (0.1, "a", 1.0)}, r"costs: .* are no costs"),
        ({"costs": (0.1, 0.2, 0.9)}, r"costs: 0.9 for 'whole'"),
        ({"costs": (0.5, 0.2, 1.0), "schedule": "linear"}, r"buckets: their costs .* do not rise"),
        ({"tail_percent": 100.0}, r"tail_percent: 100.0"),
        ({"shares": (1, 2)}, r"shares: .* are no shares of 3"),
        ({"shares": (0, 0, 0)}, r"shares: all are 0"),
    ],
)
def test_bad_schedules_name_the_key(values, message):
    with pytest.raises(ConfigError, match=rf"^config\.compression\.{message}"):
        schedule(**values)


def test_a_random_schedule_has_no_stages():
    with pytest.raises(ConfigError, match="no stages to be written"):
        stages_of(section(schedule="random"), COSTS)


def compressed_config(objective: str = "flm", **overrides: Any) -> ConfigDict:
    return objective_config(
        objective,
        {},
        **{
            "compression.schedule": "staged",
            "compression.buckets": ("p16@16", "p8@16k2", "whole"),
            "total_steps": 30,
        }
        | overrides,
    )


def test_costs_follow_from_flops():
    program = make_program(compressed_config())
    views = [parse_bucket(text, "k", WHOLE) for text in program.config.compression.buckets]
    lengths = {"pairs": 16.0}
    whole = program.flops(lengths)
    for some, cost in zip(views, program.schedule.costs, strict=True):
        bucket = (("pairs", Bucket(16, IMAGE_SIZE, some)),)
        assert cost == pytest.approx(program.flops(lengths, bucket) / whole)
    assert program.schedule.costs[0] < program.schedule.costs[1] < program.schedule.costs[2] == 1.0


def test_rates_are_keyed_on_the_budget():
    program = make_program(compressed_config(**{"schedule.warmup_percent": 0.0}))
    total = program.schedule.total_steps
    assert total > 30
    for step in range(total):
        progress = program.schedule.progress(step)
        moment = program.moment(step)
        assert float(moment.progress) == pytest.approx(progress)
        assert float(moment.cost) == pytest.approx(program.schedule.cost(step))
        assert float(moment.learning_rate) == pytest.approx(1e-3 * (1 - progress), abs=2e-5)


def test_every_bucket_is_traced_once(monkeypatch):
    make_step, made = program_module.make_step, []

    def make_counted(*args):
        chex.clear_trace_counter()
        made.append(chex.assert_max_traces(make_step(*args), n=1))
        return made[-1]

    monkeypatch.setattr(program_module, "make_step", make_counted)
    program = make_program(compressed_config("itc"))
    buckets = program.buckets([BUCKET])
    assert len(buckets) == 3
    compiled = {bucket: program.lower(bucket).compile() for bucket in buckets}
    state = program.init()
    batch = {"pairs": global_batch(make_batch(), program.mesh)}
    seen = set()
    for step in range(program.schedule.total_steps):
        bucket = program.bucket(BUCKET, step)
        state, metrics = compiled[bucket](state, batch, program.moment(step))
        seen.add(bucket)
    assert seen == set(buckets)
    assert len(made) == 3
    assert np.isfinite(float(metrics["loss"]))
    assert int(state.extras["skipped"]) == 0


@pytest.mark.parametrize("objective", ["flm", "itc"])
def test_a_bucket_that_drops_nothing_gives_the_update_of_whole_images(objective):
    config = objective_config(objective, {})
    program = make_program(config)
    batch = {"pairs": global_batch(make_batch(), program.mesh)}
    full = View.whole(IMAGE_SIZE, config.model.image.patch_size)
    results = []
    for views in ((), (full,), (View(IMAGE_SIZE, 8, 2),)):
        bucket = (("pairs", Bucket(TOKENS, IMAGE_SIZE, views)),)
        step = program.lower(bucket).compile()
        results.append(jax.device_get(step(program.init(), batch, program.moment(0))))
    (whole, _), (same, _), (part, metrics) = results
    chex.assert_trees_all_equal(whole.params, same.params)
    assert np.isfinite(metrics["loss"])
    different = jax.tree.map(lambda a, b: (a != b).any(), whole.params, part.params)
    assert any(jax.tree.leaves(different["image_tower"]))


@pytest.mark.slow
def test_micro_batches_drop_what_the_whole_batch_drops():
    """A choice of patches belongs to an example, wherever it lies."""
    states = []
    for accumulation in (1, 4):
        config = objective_config("ar", {}, **{"optim.accumulation": accumulation})
        program = make_program(config)
        bucket = ((BUCKET[0][0], Bucket(TOKENS, IMAGE_SIZE, (View(IMAGE_SIZE, 8, 2),))),)
        batch = {"pairs": global_batch(make_batch(), program.mesh)}
        step = program.lower(bucket).compile()
        states.append(jax.device_get(step(program.init(), batch, program.moment(0))))
    assert states[0][1]["loss"] == pytest.approx(states[1][1]["loss"], rel=1e-5)


@pytest.mark.slow
def test_eight_devices_drop_what_one_drops():
    losses = []
    for mesh in (None, make_mesh(data=4, fsdp=2)):
        program = make_program(objective_config("ar", {}), mesh)
        bucket = (("pairs", Bucket(TOKENS, IMAGE_SIZE, (View(IMAGE_SIZE, 8, 2),))),)
        batch = {"pairs": global_batch(make_batch(), program.mesh)}
        step = program.lower(bucket).compile()
        _, metrics = step(program.init(), batch, program.moment(0))
        losses.append(float(metrics["loss"]))
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_a_schedule_holds_for_its_model_and_data_whatever_the_numerics():
    held = make_program(tiny_config()).made_for
    assert make_program(tiny_config(**{"model.dtype": "bfloat16"})).made_for == held
    for change in ({"model.image.width": 64}, {"data.image_size": 32}):
        assert make_program(tiny_config(**change)).made_for != held


def test_views_that_the_stem_cannot_cut_are_refused():
    overrides = {"compression.buckets": ("p2@16", "whole"), "model.image.stem": "conv"}
    with pytest.raises(ConfigError, match=r"compression\.buckets: patches of 2 px"):
        make_program(compressed_config(**overrides))
