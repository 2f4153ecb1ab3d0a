"""Successive halving, with a trainer that pretends."""

import json
import math

import pytest

from tests.tools.compared import (
    METRIC,
    STEP_SECONDS,
    FakeTrainer,
    named,
    open_cells,
    settings,
    silent,
)
from tools.compare.configs import CommandError
from tools.compare.search import (
    Axis,
    Trial,
    candidates,
    halve,
    rejected_candidates,
    rung_sizes,
    search,
)
from tools.compare.table import search_page
from vlp_jax.infra.errors import ConfigError


def page(trainer, what, found):
    facts = {"settings": what.to_json(), "search": found, "left_out": [], "overrides": {}}
    facts |= {"machine": trainer.machine, "command": "python -m tools.compare", "written": "now"}
    facts |= {"finetune_overrides": {}}
    return search_page(json.loads(json.dumps(facts, allow_nan=False)))


def test_axes():
    assert Axis.parse("optim.b2:0.9,0.99").values == (0.9, 0.99)
    assert Axis.parse("schedule.decay:linear,cosine").values == ("linear", "cosine")
    assert Axis.parse("data.text_edges:(14,),(8,14)").values == ((14,), (8, 14))
    log = Axis.parse("schedule.peak:log:1e-4:1e-2")
    assert log.draw(0.0) == pytest.approx(1e-4)
    assert log.draw(0.5) == pytest.approx(1e-3)
    whole = Axis.parse("n:int:2:4")
    assert [whole.draw(share) for share in (0.0, 0.34, 0.67, 0.999)] == [2, 3, 4, 4]
    assert Axis.parse("x:lin:-1:1").draw(0.75) == 0.5
    for bad in ("x", "x:", "x:log:0:1", "x:log:2:1", "x:log:1", "x:cubic:1:2", "x:log:a:b"):
        with pytest.raises(ConfigError, match="KEY:A,B,C or KEY:log:LOW:HIGH"):
            Axis.parse(bad)


def test_listed_values_make_a_grid_and_ranges_are_spanned_evenly():
    grid = candidates([Axis.parse("a:1,2"), Axis.parse("b:3,4,5")], trials=99)
    assert len(grid) == 6
    assert {"a": 2, "b": 4} in grid
    axes = [Axis.parse("a:log:1:1024"), Axis.parse("b:x,y")]
    drawn = candidates(axes, trials=10)
    assert drawn == candidates(axes, trials=10), "the same in every invocation"
    assert sorted(int(math.log2(c["a"])) for c in drawn) == list(range(10)), "one in each tenth"
    assert sum(c["b"] == "x" for c in drawn) == 5


def test_rungs():
    assert rung_sizes(9, 3) == [9, 3, 1]
    assert rung_sizes(8, 2) == [8, 4, 2, 1]
    assert rung_sizes(4, 3) == [4, 1]
    assert rung_sizes(1, 3) == [1]
    with pytest.raises(CommandError, match="--halving=1"):
        rung_sizes(4, 1)


def test_the_best_third_goes_on_at_three_times_the_budget():
    asked = []

    def trial(candidate, fraction):
        asked.append((candidate["x"], round(fraction, 6)))
        # At small budgets the 7 leads, at the whole budget the 8 does; the 3 fails.
        score = None if candidate["x"] == 3 else -abs(candidate["x"] - (7 if fraction < 1 else 8))
        return Trial(candidate, score, ())

    rungs = halve([{"x": x} for x in range(9)], 3, trial)
    assert asked == [
        *((x, round(1 / 9, 6)) for x in range(9)),
        *((x, round(1 / 3, 6)) for x in (7, 6, 8)),
        *((x, 1.0) for x in (7,)),
    ]
    assert [len(rung.trials) for rung in rungs] == [9, 3, 1]
    assert rungs[0].trials[-1].candidate == {"x": 3}, "a failure comes last"


def test_a_candidate_that_diverges_for_a_seed_loses_to_one_that_does_not(tmp_path):
    trainer = FakeTrainer()
    trainer.alter = lambda config, facts: (
        facts | {"status": "stopped", "reason": "diverged", "metrics": {}}
        if config.schedule.peak == 2e-3 and config.seed
        else facts
    )
    axes = [Axis.parse("schedule.peak:2e-3,1.9e-3")]
    what = settings(named("a"), seeds=3)
    found = search(what, axes, 2, 9, open_cells(tmp_path, trainer), silent)
    assert found["a"]["best"] == {"schedule.peak": 1.9e-3}


def test_no_candidate_is_tried_twice(tmp_path):
    few = candidates([Axis.parse("optim.accumulation:int:1:3")], trials=9)
    assert few == [{"optim.accumulation": n} for n in (1, 2, 3)]
    many = candidates([Axis.parse("n:int:1:12"), Axis.parse("x:a,b")], trials=11)
    assert len(many) == len({tuple(candidate.items()) for candidate in many}) <= 11
    trainer, axes = FakeTrainer(), [Axis.parse("total_steps:100,200")]
    with pytest.raises(CommandError, match=r"'total_steps': 100.*give a the same run"):
        search(settings(named("a")), axes, 3, 9, open_cells(tmp_path, trainer), silent)
    assert not trainer.calibrations


def test_failures_never_go_on_even_if_that_leaves_fewer():
    def trial(candidate, fraction):
        return Trial(candidate, 1.0 if candidate["x"] == 0 else None, ())

    rungs = halve([{"x": x} for x in range(4)], 2, trial)
    assert [len(rung.trials) for rung in rungs] == [4, 1, 1]


def test_a_rung_that_is_not_complete_ranks_nobody():
    left = iter([1.0, 2.0, 3.0, 4.0, 5.0])

    def trial(candidate, fraction):
        score = next(left, None)
        return None if score is None else Trial(candidate, score, ())

    rungs = halve([{"x": x} for x in range(4)], 2, trial)
    assert len(rungs) == 1


def test_search_grows_over_invocations_and_finds_the_best_rate(tmp_path):
    axes = [Axis.parse("schedule.peak:5e-4,1e-3,2e-3,4e-3,8e-3,1.6e-2,3.2e-2,6.4e-2,0.128")]
    what = settings(named("a"), seeds=1)
    trainer, lengths = FakeTrainer(), []
    for _ in range(9):
        cells = open_cells(tmp_path, trainer, runs=5)
        found = search(what, axes, 3, 9, cells, silent)
        lengths.append(len(found["a"]["rungs"]))
        if found["a"]["complete"]:
            break
    assert lengths == [0, 1, 3]
    assert found["a"]["best"] == {"schedule.peak": 2e-3}
    steps = [config.total_steps for _, config in trainer.runs]
    whole = round(what.budget_seconds / STEP_SECONDS)
    assert steps == [round(whole / 9)] * 9 + [round(whole / 3)] * 3 + [whole], "none twice"
    assert len(trainer.calibrations) == 1

    assert not rejected_candidates(found)
    text = page(trainer, what, found)
    assert "Best: `schedule.peak=0.002`." in text
    assert text.count("| 0.111 |") == 9
    assert METRIC in text


def test_a_search_in_which_all_fail_says_so(tmp_path):
    what, axes = settings(named("a"), seeds=2), [Axis.parse("optim.b2:0.9,0.95,0.99")]
    trainer = FakeTrainer()
    trainer.alter = lambda _, facts: facts | {"status": "stopped", "reason": "diverged"}
    found = search(what, axes, 3, 9, open_cells(tmp_path / "stopped", trainer), silent)
    assert found["a"]["complete"]
    assert found["a"]["best"] is None
    assert len(trainer.runs) == 6
    assert rejected_candidates(found) == {"a": "no candidate's run gives a score"}

    waiting = FakeTrainer()
    waiting.wait = 0.5
    found = search(what, axes, 3, 9, open_cells(tmp_path / "waited", waiting), silent)
    assert found["a"]["complete"]
    assert found["a"]["best"] is None
    assert not waiting.runs
    assert "rejected: an update measured alone waited for input 50.0 %" in page(
        waiting, what, found
    )
    assert "waited for input 50.0 %" in rejected_candidates(found)["a"]


def test_a_key_that_changes_the_cost_is_calibrated_for_itself(tmp_path):
    trainer = FakeTrainer()
    what = settings(named("a"), seeds=1)
    axes = [Axis.parse("data.batch_size:16,32")]
    search(what, axes, 2, 9, open_cells(tmp_path, trainer), silent)
    assert [config.data.batch_size for config in trainer.calibrations] == [16, 32]
