"""The comparison and its page, with a trainer that pretends."""

import json
import math
import pathlib
import shutil
import sys

import pytest
from PIL import Image

from tests.tools.compared import (
    BUDGET,
    METRIC,
    STEP_SECONDS,
    FakeTrainer,
    finetune,
    named,
    open_cells,
    settings,
    silent,
)
from tools.compare import __main__ as command
from tools.compare.archive import pack, unpack
from tools.compare.comparison import compare, grid_of_rates, missing
from tools.compare.configs import CommandError, load
from tools.compare.metrics import Metric
from tools.compare.plot import draw
from tools.compare.records import Group
from tools.compare.table import comparison_page
from vlp_jax.infra.errors import ConfigError
from vlp_jax.infra.preemption import ExitCode


def run(folder, trainer, what, runs=math.inf):
    return compare(what, open_cells(folder, trainer, runs), silent)


def page(facts):
    """The page as the command writes it."""
    machine = {"device_kind": "fast chip", "device_count": 1}
    context = {"command": "python -m tools.compare", "written": "now", "machine": machine}
    context |= {"overrides": {}, "finetune_overrides": {}, "left_out": []}
    return comparison_page(facts | context, None)


def test_a_config_that_learns_twice_as_fast_needs_half_of_everything(tmp_path):
    what = settings(named("slow"), named("fast", 2.0))
    facts = run(tmp_path, FakeTrainer(), what)
    times = facts["time_to_score"][METRIC]
    assert times["baseline"] == "slow"
    assert times["score"] == pytest.approx(0.6 - 0.05 + 0.0005)
    for cost in ("seconds", "samples", "flops"):
        assert times["configs"]["slow"][cost]["share"] == pytest.approx(1.0)
        assert times["configs"]["fast"][cost]["share"] == pytest.approx(0.5)
    text = page(facts)
    assert "| fast | 2 | 50 % |" in text
    assert "2.00 ×" in text


def test_the_baseline_is_the_best_of_those_named_and_waited_for(tmp_path):
    trainer = FakeTrainer()
    what = settings(named("a"), named("b", 2.0), named("c", 4.0), baselines=("a", "b"))
    # Seven runs: all small budgets of seed 0, and the whole budgets of a and b but not c.
    partial = run(tmp_path, trainer, what, runs=4)
    assert not partial["time_to_score"], "b may still be better"
    times = run(tmp_path, trainer, what)["time_to_score"][METRIC]
    assert times["baseline"] == "b"
    assert times["configs"]["a"]["seconds"]["share"] is None
    assert times["configs"]["c"]["seconds"]["share"] == pytest.approx(0.5)


def test_less_is_better_for_a_loss(tmp_path):
    loss = Metric.parse("reconstruction/base/loss")
    assert loss.sign == -1
    assert Metric.parse("x/accuracy").sign == 1
    assert Metric.parse("x/accuracy:min") == Metric("x/accuracy", -1)
    with pytest.raises(CommandError, match=":max"):
        Metric.parse("x:lowest")
    what = settings(named("slow"), named("fast", 2.0), metrics=(loss,), rates=("x1", "x2"))
    facts = run(tmp_path, FakeTrainer(), what)
    times = facts["time_to_score"][loss.name]
    assert times["score"] == pytest.approx(1 - 0.6 - 0.0005)
    assert times["configs"]["fast"]["seconds"]["share"] == pytest.approx(0.5)


@pytest.mark.parametrize("fraction", [0.01, 1.0])
def test_the_best_rate_of_a_small_equal_grid_is_used_at_all_budgets(tmp_path, fraction):
    trainer = FakeTrainer()
    own = {"a": 1e-3, "b": 4e-3}
    configs = [named(label, ord(label), **{"schedule.peak": own[label]}) for label in own]
    what = settings(*configs, rates=("x0.5", "x1", "x2"), tune_fraction=fraction)
    facts = run(tmp_path, trainer, what)
    assert {label: rates["chosen"] for label, rates in facts["rates"].items()} == {
        **{"a": 2e-3, "b": 2e-3}
    }
    tuning = trainer.runs[:6]
    assert {config.total_steps for _, config in tuning} == {1000 * fraction}
    assert {config.seed for _, config in tuning} == {0}
    assert all(config.schedule.peak == 2e-3 for _, config in trainer.runs[6:])
    assert len(facts["rows"]) == facts["planned"] == len(trainer.runs) == 2 * (2 + 4)
    text = page(facts)
    assert f"by seed 0 at {fraction:g} of the budget" in text
    assert text.count("used; at the edge of the grid") == 2
    assert "cells are there" not in text


def test_only_baselines_have_the_whole_budget_where_others_are_to_be_faster(tmp_path):
    trainer = FakeTrainer()
    what = settings(
        *(named(label, speed) for label, speed in {"a": 1.0, "b": 4.0, "c": 0.9}.items()),
        fractions=(0.01, 0.4, 1.0),
        others_until=0.4,
        tune_fraction=0.4,
        rates=("x1", "x2"),
    )
    facts = run(tmp_path, trainer, what)
    trained = {(row["config"], row["fraction"]) for row in facts["rows"]}
    assert trained == {("a", 1.0), *((label, part) for label in "abc" for part in (0.01, 0.4))}
    assert len(facts["rows"]) == facts["planned"] == len(trainer.runs) == 7 + 5 + 5
    shares = facts["time_to_score"][METRIC]["configs"]
    assert shares["b"]["seconds"]["share"] == pytest.approx(0.25, rel=0.2)
    text = page(facts)
    assert "cells are there" not in text
    assert "configs that are no baseline: up to 0.4 of the whole budget" in text
    assert "| c | 2 | not in 40 % |" in text


def test_with_one_rate_nothing_waits_for_the_first_cell():
    """Workers start all cells at once; with two rates, only those that choose between them."""
    for rates, seeds in (("x1",), {0, 1}), (("x1", "x2"), {0}):
        what = settings(named("a"), rates=rates, seeds=2)
        grid = {"a": grid_of_rates(rates, 1e-3)}
        assert {cell.seed for cell in missing(what, grid, {})} == seeds


def test_two_labels_of_one_config_share_its_runs(tmp_path):
    trainer = FakeTrainer()
    facts = run(tmp_path, trainer, settings(named("a"), named("b")))
    assert len(trainer.runs) == 4
    assert len(facts["rows"]) == facts["planned"] == 8
    curves = facts["curves"][METRIC]
    assert len(curves["b"]) == 2
    assert curves["a"] == curves["b"]


def test_rates_are_numbers_or_factors():
    assert grid_of_rates(["x0.5", "3e-3"], 1e-3) == [5e-4, 3e-3]
    for bad in (["fast"], ["-1"], ["x0"], ["x1", "0.001"], ["nan"]):
        with pytest.raises(CommandError, match="--rates"):
            grid_of_rates(bad, 1e-3)


def test_the_table_grows_over_invocations_to_that_of_a_single_one(tmp_path):
    what = settings(named("a"), named("b", 2.0), rates=("x1", "x2"))
    whole = run(tmp_path / "whole", FakeTrainer(), what)
    trainer, sizes = FakeTrainer(), []
    for _ in range(20):
        facts = run(tmp_path / "grown", trainer, what, runs=3)
        sizes.append(len(facts["rows"]))
        page(facts)
        if sizes[-1] == facts["planned"]:
            break
    assert sizes == [3, 6, 9, 10]
    assert len(trainer.runs) == 10, "no run twice"
    assert facts == whole
    partial = run(tmp_path / "early", FakeTrainer(), what, runs=3)
    assert partial["rates"]["a"]["chosen"] == 2e-3
    assert partial["rates"]["b"]["chosen"] is None, "half of its grid is no choice"
    assert "3 of 10 cells are there" in page(partial)


def test_no_time_at_all_gives_an_empty_table(tmp_path):
    trainer = FakeTrainer()
    facts = run(tmp_path, trainer, settings(named("a")), runs=0)
    assert facts["rows"] == []
    assert not trainer.calibrations
    assert "0 of 4 cells are there" in page(facts)


def test_a_config_that_waits_for_input_when_alone_is_rejected_and_not_trained(tmp_path):
    trainer = FakeTrainer()

    def calibrate(config, workdir, alone=trainer.calibrate):
        trainer.wait = 0.031 if config.data.batch_size == 32 else 0.03
        return alone(config, workdir)

    trainer.calibrate = calibrate
    facts = run(tmp_path, trainer, settings(named("a"), named("b", **{"data.batch_size": 32})))
    assert {config.data.batch_size for _, config in trainer.runs} == {16}
    assert len(facts["rows"]) == facts["planned"] == 4
    assert facts["curves"][METRIC]["b"] == []
    assert list(facts["time_to_score"][METRIC]["configs"]) == ["a"]
    text = page(facts)
    assert "b is rejected, none of its cells counts" in text
    assert "waited for input 3.1 % of the time, more than 3.0 %" in text
    assert "cells are there" not in text


def test_with_its_baseline_rejected_nothing_is_compared(tmp_path):
    trainer = FakeTrainer()
    trainer.wait = 0.5
    facts = run(tmp_path, trainer, settings(named("a")))
    assert not trainer.runs
    assert facts["time_to_score"] == {}
    assert facts["rates"]["a"]["chosen"] is None
    page(facts)


def test_a_diverged_rate_is_not_chosen(tmp_path):
    trainer = FakeTrainer()

    def diverge(config, facts):
        if config.schedule.peak == 2e-3:
            facts |= {"status": "stopped", "reason": "loss not finite", "metrics": {}}
        if config.schedule.peak == 4e-3:
            facts |= {"metrics": {METRIC: math.nan}}
        return facts

    trainer.alter = diverge
    facts = run(tmp_path, trainer, settings(named("a"), rates=("x1", "x2", "x4")))
    assert facts["rates"]["a"]["chosen"] == 1e-3
    text = page(facts)
    assert "stopped: loss not finite" in text
    assert f"stopped: {METRIC} not finite" in text
    json.dumps(facts, allow_nan=False)


def test_seconds_are_updates_times_the_calibrated_cost_whatever_the_cells_log(tmp_path):
    trainer = FakeTrainer()
    trainer.step = 3.7 * STEP_SECONDS  # others use the device
    facts = run(tmp_path, trainer, settings(named("a")))
    for row in facts["rows"]:
        assert row["seconds"] == pytest.approx(row["steps"] * STEP_SECONDS)
        assert row["seconds"] == pytest.approx(row["asked_seconds"])
        assert row["wall_seconds"] == pytest.approx(3.7 * row["seconds"])
    assert facts["curves"][METRIC]["a"][-1]["seconds"] == pytest.approx(BUDGET)
    text = page(facts)
    assert "Seconds are updates times the time of an update measured alone" in text
    assert (
        "| a | 10.00 | 9.00 to 12.00 (3) | – | 0.00 % | 7.0 | 1,600 | 0.001 | 37.00 | 0.0 |" in text
    )


def test_a_budget_of_hardly_any_update_is_refused(tmp_path):
    trainer = FakeTrainer()
    with pytest.raises(
        CommandError, match=r"0.05 s are 5 updates of a, at 10 ms each; give a long"
    ):
        run(tmp_path, trainer, settings(named("a"), fractions=(0.005, 1.0)))
    assert not trainer.runs


def test_compiling_and_fine_tuning_are_reported_and_not_counted(tmp_path):
    what = settings(
        named("a"),
        finetunes=(finetune(),),
        metrics=(Metric("vqa/base/accuracy", 1),),
        tune_metric=Metric("vqa/base/accuracy", 1),
    )
    facts = run(tmp_path, FakeTrainer(), what)
    last = facts["rows"][-1]
    assert last["seconds"] == pytest.approx(BUDGET)
    assert last["compile_seconds"] == 3.0
    assert last["finetune_seconds"] == pytest.approx(1.0)
    assert list(last["scores"]) == ["vqa/base/accuracy"]
    assert "| 7.0 | 1,600 | 0.001 | 10.00 | 1.0 |" in page(facts)


def test_rates_that_pretraining_chooses_are_fine_tuned_at_the_best_one_alone(tmp_path):
    trainer = FakeTrainer()
    what = settings(
        named("a"),
        named("b", skill=0.5),
        finetunes=(finetune(),),
        rates=("1e-3", "2e-3", "4e-3"),
        metrics=(Metric("vqa/base/accuracy", 1),),
    )
    facts = run(tmp_path, trainer, what)
    assert {rates["chosen"] for rates in facts["rates"].values()} == {2e-3}
    tuning = [row for row in facts["rows"] if row["status"] == "tuning"]
    assert len(tuning) == 2 * 3
    assert all(set(row["scores"]) == {METRIC} for row in tuning)
    tuned = [config for _, config in trainer.runs if "vqa" in config.evals]
    assert len(tuned) == 2 * 2 * 2
    # The run that chose the rate is fine-tuned, not trained again.
    assert len(trainer.runs) == len(tuned) + 2 * (2 * 2 + 2)
    assert len(facts["rows"]) == facts["planned"]
    assert [point["seeds"] for point in facts["curves"]["vqa/base/accuracy"]["a"]] == [[0, 1]] * 2
    assert not list(tmp_path.glob("**/checkpoints"))
    assert "| a | 0.002 | 60.0 % | used |" in page(facts)


def test_rates_that_one_task_chooses_are_fine_tuned_for_no_other_but_at_the_best(tmp_path):
    trainer = FakeTrainer()
    what = settings(
        named("a"),
        finetunes=(finetune("vqa"), finetune("nlvr2")),
        rates=("1e-3", "2e-3", "4e-3"),
        metrics=(Metric("vqa/base/accuracy", 1), Metric("nlvr2/base/accuracy", 1)),
        tune_metric=Metric("vqa/base/accuracy", 1),
    )
    for runs in (4, 3, 20):  # the choice is made in the second invocation, and its end is nlvr2
        facts = run(tmp_path, trainer, what, runs=runs)
    of = {
        task: [config for _, config in trainer.runs if task in config.evals]
        for task in ("reconstruction", "vqa", "nlvr2")
    }
    assert {task: len(runs) for task, runs in of.items()} == {
        **{"reconstruction": 3 + 3, "vqa": 3 + 3, "nlvr2": 4}
    }
    tuning = [row for row in facts["rows"] if row["status"] == "tuning"]
    assert [list(row["scores"]) for row in tuning] == [["vqa/base/accuracy"]] * 3
    assert len(facts["rows"]) == facts["planned"] == 3 + 4
    assert not list(tmp_path.glob("**/checkpoints"))


def test_a_metric_that_no_run_can_have_is_refused_before_any_run(tmp_path):
    trainer = FakeTrainer()
    for what in (
        settings(named("a"), metrics=(Metric("vqa/accuracy", 1),)),
        settings(named("a"), finetunes=(finetune("vqa"),), metrics=(Metric("nlvr2/f1", 1),)),
        settings(named("a"), tune_metric=Metric("vqa/accuracy", 1)),
    ):
        with pytest.raises(ConfigError, match=r"config.evals.*needs this evaluator"):
            run(tmp_path, trainer, what)
    assert not trainer.runs
    with pytest.raises(ConfigError, match=r"'reconstruction/f1' is no figure of a. Use one of"):
        run(tmp_path, trainer, settings(named("a"), metrics=(Metric("reconstruction/f1", 1),)))


def test_figures_of_the_pretraining_run_stand_beside_those_of_fine_tuning(tmp_path):
    tunes = (finetune("vqa"), finetune("nlvr2"))
    names = ("reconstruction/base/loss", "vqa/base/accuracy", "nlvr2/base/accuracy")
    what = settings(
        named("a"), finetunes=tunes, metrics=tuple(Metric.parse(name) for name in names)
    )
    facts = run(tmp_path, FakeTrainer(), what)
    assert set(facts["rows"][0]["scores"]) == {METRIC, *names}
    assert list(facts["curves"]) == list(names)


def test_a_figure_of_two_runs_is_refused_and_has_a_longer_name(tmp_path):
    tunes = (finetune("vqa", evaluator="test"), finetune("nlvr2", evaluator="test"))
    name = "test/base/accuracy"
    with pytest.raises(ConfigError, match=r"several runs: vqa, nlvr2. Write vqa/test/base/acc"):
        run(
            tmp_path,
            FakeTrainer(),
            settings(named("a"), finetunes=tunes, metrics=(Metric(name, 1),)),
        )
    trainer = FakeTrainer()
    trainer.alter = lambda config, facts: (
        facts | {"metrics": dict.fromkeys(facts["metrics"], 0.1 * config.total_steps)}
    )
    tunes = (finetune("vqa", evaluator="test"), finetune("nlvr2", 3, evaluator="test"))
    full = ("vqa/" + name, "nlvr2/" + name, "pretraining/" + METRIC)
    what = settings(named("a"), finetunes=tunes, metrics=tuple(Metric(n, 1) for n in full))
    facts = run(tmp_path, trainer, what)
    last = facts["rows"][-1]["scores"]
    assert [last[n] for n in full] == pytest.approx([10.0, 0.3, 100.0])


def test_labels_with_colons_and_modes_are_told_apart():
    name = "nlvr2:scenes/test/accuracy"
    assert Metric.parse(name) == Metric(name, 1)
    assert Metric.parse(f"{name}:min") == Metric(name, -1)


def test_groups_of_all_configs_stand_side_by_side_with_their_worst_gap(tmp_path):
    trainer = FakeTrainer()

    def with_groups(config, facts):
        evaluator = next(iter(config.evals))
        red = 0.5 + 0.1 * config.seed
        groups = (
            Group(evaluator, "colour", "blue", 40, 0.8),
            Group(evaluator, "colour", "red", 60, red),
            Group(evaluator, "text", "how many", 100, 0.7),
        )
        gap = {f"{evaluator}/worst_gap/colour": 100 * (0.8 - red)}
        return facts | {"groups": groups, "metrics": facts["metrics"] | gap}

    trainer.alter = with_groups
    what = settings(named("a"), named("b", 2.0), finetunes=(finetune("vqa", evaluator="test"),))
    facts = run(tmp_path, trainer, what)
    assert list(facts["groups"]) == ["reconstruction", "vqa/test"]
    blue, red, gap, text = facts["groups"]["vqa/test"]
    assert (blue["value"], red["value"], text["attribute"]) == ("blue", "red", "text")
    assert red["configs"]["a"]["mean"] == pytest.approx(0.55)
    assert red["configs"]["b"]["deviation"] == pytest.approx(0.1 / math.sqrt(2))
    assert (gap["attribute"], gap["value"], gap["examples"]) == ("colour", None, None)
    assert gap["configs"]["a"]["mean"] == pytest.approx(25.0)
    words = page(facts)
    assert "### vqa/test" in words
    assert "| by | group | examples | a | b |" in words
    assert "| colour | red | 60 | 55.0 % ± 7.1 | 55.0 % ± 7.1 |" in words
    assert "| colour | worst gap |  | 25.0 points ± 7.1 | 25.0 points ± 7.1 |" in words
    assert facts == run(tmp_path, FakeTrainer(), what), "groups are kept with their cells"
    assert "Scores by group" not in page(
        run(tmp_path / "none", FakeTrainer(), settings(named("a")))
    )


def test_what_pretraining_is_worth_is_told_in_deviations(tmp_path):
    name = "vqa/base/accuracy"
    trainer = FakeTrainer()

    def pretrained_is_better(config, facts):
        if config.init_from and name in facts["metrics"]:
            facts["metrics"][name] += 0.01
        return facts

    trainer.alter = pretrained_is_better
    model = {"model.text.width": 96, "model.dtype": "bfloat16", "tokenizer.vocab_size": 300}
    what = settings(
        named("a", **model),
        finetunes=(finetune("vqa"), finetune("nlvr2")),
        metrics=(Metric(METRIC, 1), Metric(name, 1)),
        scratch=True,
    )
    partly = run(tmp_path, trainer, what, runs=2 * 2 * 3 + 3)
    assert partly["planned"] == 2 * 2 + 2
    assert partly["scratch"][name]["seeds"] == [0], "the second has not got all of its runs"
    facts = run(tmp_path, trainer, what)
    assert list(facts["scratch"]) == [name], "pretraining has figures of its own"
    assert facts["scratch"][name]["seeds"] == [0, 1]
    scratch = [config for _, config in trainer.runs if "vqa" in config.evals][-1]
    assert (scratch.init_from, scratch.adopt_model) == ("", False)
    assert scratch.model.text.width == 96
    assert scratch.model.dtype == "float32", "its own, as where it takes over a geometry"
    assert scratch.tokenizer.vocab_size == 300, "it is judged with the tokenizer of pretraining"
    assert len(trainer.runs) == 2 * 2 * 3 + 2 * 2, "the second invocation made what was missing"
    # Means are 0.01 apart; the seeds of both differ by 0.001 and so deviate by 0.0007.
    assert "[+14.1] |" in page(facts).split("## What pretraining is worth")[1]
    assert "What pretraining" not in page(run(tmp_path, trainer, settings(named("a", **model))))


def test_a_control_is_shown_and_not_compared_by(tmp_path):
    control = Metric.parse("reconstruction/base/loss:show")
    what = settings(
        named("a"), named("b", 2.0), metrics=(Metric(METRIC, 1), control), baselines=("a",)
    )
    facts = run(tmp_path, FakeTrainer(), what)
    assert list(facts["time_to_score"]) == [METRIC]
    assert facts["settings"]["metrics"] == {METRIC: "max", control.name: "show"}
    whole = facts["curves"][control.name]["a"][-1]
    assert whole["mean"] == pytest.approx(1 - facts["curves"][METRIC]["a"][-1]["mean"])
    text = page(facts)
    assert f"{control.name} (shown only)" in text
    assert f"## Score at each budget: {control.name}" in text
    assert text.count("## Time to the score of") == 1
    draw(facts, tmp_path / "plot.png")
    with Image.open(tmp_path / "plot.png") as picture:
        assert picture.width > 2 * picture.height, "one row of axes"


@pytest.mark.parametrize("flags", ["--metric=a/b:show", "--metric=a/b --tune_metric=c/d:show"])
def test_nothing_is_chosen_by_what_is_only_shown(tmp_path, capsys, flags):
    arguments = ["configs/demo.py", "--budget_seconds=9", f"--out={tmp_path}", *flags.split()]
    assert command.main(arguments) == ExitCode.BAD_INPUT
    assert "drop :show" in capsys.readouterr().err


def test_scratch_needs_something_to_tune_and_one_geometry(tmp_path):
    trainer = FakeTrainer()
    with pytest.raises(CommandError, match="needs a --finetune config"):
        run(tmp_path, trainer, settings(named("a"), scratch=True))
    two = (named("a"), named("b", **{"model.text.width": 96}))
    with pytest.raises(CommandError, match="a and b differ in `model`"):
        run(tmp_path, trainer, settings(*two, finetunes=(finetune("vqa"),), scratch=True))
    assert not trainer.runs


def test_a_config_that_diverges_at_every_rate_is_not_waited_for(tmp_path):
    trainer = FakeTrainer()

    def diverge(config, facts):
        if config.schedule.peak > 1e-2:
            facts |= {"status": "stopped", "reason": "loss not finite", "metrics": {}}
        return facts

    trainer.alter = diverge
    wild = named("wild", **{"schedule.peak": 0.1})
    facts = run(tmp_path, trainer, settings(named("a"), wild, rates=("x1", "x2")))
    assert len(facts["rows"]) == facts["planned"] == 5 + 2
    text = page(facts)
    assert "cells are there" not in text
    assert "wild is rejected, none of its cells counts: no rate of the grid gives a score" in text


def test_a_saturated_baseline_is_told_and_the_smallest_budget_is_an_upper_bound(tmp_path):
    trainer = FakeTrainer()
    trainer.alter = lambda config, facts: (
        facts | {"metrics": {METRIC: 0.5}} if config.optim.weight_decay == 1.0 else facts
    )
    facts = run(tmp_path, trainer, settings(named("flat"), named("b", 2.0)))
    text = page(facts)
    assert "**flat itself reaches this score in ≤ 1 % of its time" in text
    assert "| flat | 2 | ≤ 1 % | ≤ 1 % | 100 % |" in text
    rising = page(run(tmp_path / "rising", FakeTrainer(), settings(named("a"))))
    assert "itself reaches" not in rising
    assert "| a | 2 | 100 % | 100 % | 100 % |" in rising


def test_what_larger_budgets_may_still_reach_is_not_called_out_of_reach(tmp_path):
    what = settings(named("a"), named("b", 1.5), fractions=(0.01, 1.0), seeds=1)
    trainer = FakeTrainer()
    text = page(run(tmp_path, trainer, what, runs=3))
    assert "| b | 1 | not yet |" in text
    slow = settings(named("a"), named("b", 0.5), fractions=(0.01, 1.0), seeds=1)
    assert "| b | 1 | not reached |" in page(run(tmp_path / "slow", trainer, slow))


def test_a_baseline_that_diverges_leaves_the_comparison_to_the_others(tmp_path):
    trainer = FakeTrainer()
    trainer.alter = lambda config, facts: (
        facts | {"status": "stopped", "reason": "diverged"}
        if config.optim.weight_decay == 4.0
        else facts
    )
    what = settings(named("a"), named("bad", 4.0), named("c", 2.0), baselines=("a", "bad"))
    facts = run(tmp_path, trainer, what)
    assert facts["time_to_score"][METRIC]["baseline"] == "a"
    assert "bad is rejected, none of its cells counts, and it is no baseline" in page(facts)


def test_a_control_that_is_not_finite_costs_a_run_nothing_else(tmp_path):
    trainer, control = FakeTrainer(), Metric.parse("reconstruction/base/ctl:show")
    trainer.alter = lambda config, facts: (
        facts | {"metrics": facts["metrics"] | {control.name: 0.1 if config.seed else math.nan}}
    )
    facts = run(tmp_path, trainer, settings(named("a"), metrics=(Metric(METRIC, 1), control)))
    assert {row["status"] for row in facts["rows"]} == {"counted"}
    assert [point["seeds"] for point in facts["curves"][control.name]["a"]] == [[1], [1]]
    page(facts)
    chooses = settings(
        named("a"), metrics=(Metric(METRIC, 1), control), tune_metric=Metric(control.name, 1)
    )
    facts = run(tmp_path / "chooses", trainer, chooses)
    assert {row["status"] for row in facts["rows"] if not row["seed"]} == {"stopped"}


def test_cells_that_another_host_claims_are_told_with_the_remedy(tmp_path):
    trainer, what, said = FakeTrainer(), settings(named("a")), []
    run(tmp_path, trainer, what)
    (cell, *_) = sorted((tmp_path / "cells").iterdir())
    (cell / "result.json").unlink()
    claim = {"host": "job-17", "pid": 5, "started": 0.0, "group": 5}
    (cell / "claim.json").write_text(json.dumps(claim))
    cells = open_cells(tmp_path, trainer)
    cells._say = said.append
    assert len(compare(what, cells, silent)["rows"]) == 3
    (text,) = said
    assert "is left to process 5 of job-17; if that has died, delete" in text
    assert text.endswith(str(cell / "claim.json"))


def test_choosing_by_a_test_split_is_told(tmp_path):
    name = "test/base/accuracy"
    tune = finetune("vqa", evaluator="test")
    with tune.config.unlocked():
        tune.config.evals.test.split = "test"
        tune.config.evals.val = {"type": "task", "split": "val"}

    def text(**changes):
        what = settings(named("a"), finetunes=(tune,), metrics=(Metric(name, 1),), **changes)
        return page(run(tmp_path, FakeTrainer(), what))

    on_test = {"tune_metric": Metric(name, 1)}
    words = f"{name} has chosen and is of a test split"
    assert words in text(rates=("x1", "x2"), **on_test)
    assert words not in text(**on_test), "with one rate nothing is chosen"
    assert words not in text(rates=("x1", "x2"))


def test_worst_gaps_are_to_be_small_and_gaps_from_a_control_large(tmp_path):
    assert Metric.parse("vqa/test/worst_gap/colour").sign == -1
    assert Metric.parse("reconstruction/grounding_gap").sign == 1
    metrics = (Metric(METRIC, 1), Metric("reconstruction/base/loss", -1))
    text = page(run(tmp_path, FakeTrainer(), settings(named("a"), metrics=metrics)))
    assert f"- metrics: {METRIC} (more is better), reconstruction/base/loss (less is" in text


def test_faults_of_configs_show_before_any_run(tmp_path):
    trainer = FakeTrainer()
    typo = finetune()
    with typo.config.unlocked():
        typo.config.optim.wieght_decay = 0.1
    with pytest.raises(ConfigError, match=r"config.optim.wieght_decay: unknown key"):
        run(tmp_path, trainer, settings(named("a"), finetunes=(typo,)))
    with pytest.raises(CommandError, match=r"'fast' is no rate"):
        run(tmp_path, trainer, settings(named("a"), rates=("x1", "fast")))
    with pytest.raises(ConfigError, match=r"config.schedule.decay: 'constant'"):
        run(tmp_path, trainer, settings(named("a"), named("b", **{"schedule.decay": "constant"})))
    assert not trainer.calibrations


def test_runs_are_called_as_the_table_calls_them(tmp_path):
    trainer = FakeTrainer()
    what = settings(named("a"), named("b"), finetunes=(finetune(),), scratch=True)
    run(tmp_path, trainer, what)
    assert {config.name for _, config in trainer.runs} == {"a", "vqa"}, "a and b are the same"
    assert [config.name for config in trainer.calibrations] == ["a"]


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("config.optim.wieght_decay = 0.1", 'line 4: Key "wieght_decay" does not exist'),
        ("config.total_steps = 'many'", "line 4: .*(total_steps|str)"),
        ("config.seed = int(arg)", "line 4: invalid literal for int"),
    ],
)
def test_a_config_file_that_fails_is_told_with_its_line(tmp_path, body, message):
    file = tmp_path / "typo.py"
    file.write_text(
        "from tests.tiny_config import get_config as tiny\n"
        f"def get_config(arg=None):\n    config = tiny()\n    {body}\n    return config\n"
    )
    with pytest.raises(CommandError, match=rf"typo.py:x: {message}"):
        load(f"{file}:x")


def test_cells_of_several_commits_are_told(tmp_path):
    trainer, what = FakeTrainer(), settings(named("a"))
    run(tmp_path, trainer, what, runs=2)
    trainer.commit = "def"
    assert "of several versions or commits" in page(run(tmp_path, trainer, what))


@pytest.fixture
def shell(monkeypatch, tmp_path):
    """Runs the command with the fake trainer; returns its exit code."""
    trainer = FakeTrainer()
    monkeypatch.setattr(command, "Trainer", lambda: trainer)
    file = tmp_path / "tiny.py"
    source = pathlib.Path(__file__).parent.parent / "tiny_config.py"
    file.write_text(source.read_text())

    def call(*flags):
        return command.main([*flags, f"--out={tmp_path / 'out'}"])

    call.trainer, call.config, call.out = trainer, str(file), tmp_path / "out"
    call.tune = str(tmp_path / "tune.py")
    pathlib.Path(call.tune).write_text(source.read_text())
    return call


@pytest.mark.parametrize("search", [(), ("--search=optim.b2:0.9,0.95",)])
def test_the_command_says_which_configs_are_rejected(shell, capsys, search):
    shell.trainer.wait = 0.5
    flags = [shell.config, "--budget_seconds=8", f"--metric={METRIC}", *search]
    assert shell(*flags) == ExitCode.OK
    said = capsys.readouterr().out
    assert "is rejected, none of its cells counts: an update measured alone waited" in said


def test_the_command_writes_table_plot_and_numbers(shell, capsys):
    flags = [shell.config, "--budget_seconds=8", "--seeds=2", f"--metric={METRIC}"]
    assert shell(*flags, "--set=optim.b2=0.9", "--rates=x1,x2") == ExitCode.OK
    assert {config.optim.b2 for _, config in shell.trainer.runs} == {0.9}
    facts = json.loads((shell.out / "compare.json").read_text())
    assert facts["settings"]["fractions"] == [1 / 4, 1 / 2.5, 1 / 1.5, 1.0]
    assert facts["overrides"] == {"optim.b2": 0.9}
    text = (shell.out / "compare.md").read_text()
    assert facts["command"] in text
    assert "![Score against seconds, samples and FLOPs](compare.png)" in text
    picture = (shell.out / "compare.png").read_bytes()
    assert picture.startswith(b"\x89PNG")
    assert len(picture) > 20_000

    (shell.out / "compare.md").unlink()
    (shell.out / "compare.png").unlink()
    assert shell("--report_only") == ExitCode.OK
    assert (shell.out / "compare.md").read_text() == text
    assert (shell.out / "compare.png").read_bytes() == picture
    assert len(shell.trainer.runs) == 9, "a report trains nothing"


def test_keys_are_set_for_fine_tuning_alone(shell):
    flags = [shell.config, "--budget_seconds=8", f"--metric=pretraining/{METRIC}"]
    flags += [f"--finetune={shell.tune}", "--set_finetune=total_steps=7", "--fractions=1"]
    assert shell(*flags) == ExitCode.OK
    assert [config.total_steps for _, config in shell.trainer.runs] == [800, 7]
    assert "keys set for fine-tuning: total_steps 7" in (shell.out / "compare.md").read_text()


def test_without_matplotlib_all_else_is_written(shell, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    loaded = [
        name for name in sys.modules if name.startswith(("matplotlib.", "tools.compare.plot"))
    ]
    for name in loaded:
        monkeypatch.delitem(sys.modules, name)
    shell(shell.config, "--budget_seconds=8", f"--metric={METRIC}")
    assert "--report_only" in capsys.readouterr().out
    assert "![" not in (shell.out / "compare.md").read_text()
    assert not (shell.out / "compare.png").exists()


def test_max_seconds_of_zero_only_writes_the_table(shell):
    flags = [shell.config, "--budget_seconds=8", f"--metric={METRIC}"]
    assert shell(*flags, "--max_seconds=0") == ExitCode.OK
    assert not shell.trainer.runs
    assert "0 of 4 cells are there" in (shell.out / "compare.md").read_text()


@pytest.mark.parametrize("name", ["cells.jsonl", "cells.jsonl.gz"])
def test_an_archive_carries_finished_cells_to_another_folder(shell, tmp_path, name):
    archive = tmp_path / "kept" / name
    flags = [shell.config, "--budget_seconds=8", f"--metric={METRIC}", f"--archive={archive}"]
    shell.trainer.stop_at = 2
    assert shell(*flags) == ExitCode.PREEMPTED
    shell.trainer.stop_at = None
    shutil.rmtree(shell.out)
    assert shell(*flags) == ExitCode.OK
    assert len(shell.trainer.runs) == 5, "the third was cut short, and no other is run twice"
    assert len(shell.trainer.calibrations) == 1
    facts, data = json.loads((shell.out / "compare.json").read_text()), archive.read_bytes()
    shutil.rmtree(shell.out)
    assert shell(*flags, "--max_seconds=0") == ExitCode.OK
    assert json.loads((shell.out / "compare.json").read_text())["rows"] == facts["rows"]
    assert archive.read_bytes() == data


def test_an_archive_adds_and_changes_nothing_that_is_there(tmp_path):
    trainer, what = FakeTrainer(), settings(named("a"))
    run(tmp_path / "one", trainer, what)
    pack(tmp_path / "one", tmp_path / "cells.jsonl")
    changed, missing_one = sorted((tmp_path / "one").glob("cells/*/result.json"))[:2]
    changed.write_text("{}")
    text = missing_one.read_text()
    missing_one.unlink()
    unpack(tmp_path / "cells.jsonl", tmp_path / "one")
    assert changed.read_text() == "{}"
    assert json.loads(missing_one.read_text()) == json.loads(text)


def test_an_archive_keeps_what_another_folder_has_added(tmp_path):
    archive, trainer = tmp_path / "cells.jsonl.gz", FakeTrainer()
    for label, skill in (("one", 1.0), ("two", 2.0), ("one", 1.0)):
        run(tmp_path / label, trainer, settings(named("a", skill)))
        pack(tmp_path / label, archive)
    unpack(archive, tmp_path / "all")
    assert len(trainer.runs) == len(list((tmp_path / "all").glob("cells/*/result.json"))) == 8


@pytest.mark.parametrize(
    "line",
    [
        "{",
        "[]",
        '{"file": "cells/a/result.json"}',
        '{"file": "cells/../../result.json", "content": {}}',
        '{"file": "cells/a/log.txt", "content": {}}',
        '{"file": "/tmp/cells/a/result.json", "content": {}}',
        '{"file": "a/cells/b/result.json", "content": {}}',
    ],
)
def test_a_damaged_archive_is_told_and_nothing_of_it_is_used(shell, capsys, tmp_path, line):
    archive = tmp_path / "cells.jsonl"
    archive.write_text('{"file": "cells/b/result.json", "content": {}}\n' + line + "\n")
    flags = [shell.config, "--budget_seconds=8", f"--metric={METRIC}", f"--archive={archive}"]
    assert shell(*flags) == ExitCode.BAD_INPUT
    assert f"{archive} is damaged or no archive" in capsys.readouterr().err
    assert not shell.out.exists()
    archive.with_suffix(".gz").write_bytes(b"no gzip")
    assert shell(*flags, f"--archive={archive.with_suffix('.gz')}") == ExitCode.BAD_INPUT


def test_the_table_of_another_machine_is_not_replaced_by_an_empty_one(shell, capsys):
    flags = [shell.config, "--budget_seconds=8", f"--metric={METRIC}"]
    assert shell(*flags) == ExitCode.OK
    text = (shell.out / "compare.json").read_text()
    shell.trainer.machine = {**shell.trainer.machine, "device_kind": "other"}
    shell.trainer.stop_at = len(shell.trainer.runs)  # in its first cell there
    assert shell(*flags) == ExitCode.BAD_INPUT
    assert "is of another machine" in capsys.readouterr().err
    scratch = [f"--finetune={shell.tune}", "--scratch", f"--metric=tune/{METRIC}"]
    assert shell(*flags, *scratch) == ExitCode.BAD_INPUT
    assert (shell.out / "compare.json").read_text() == text
    shell.trainer.stop_at = None
    assert shell(*flags) == ExitCode.OK
    assert json.loads((shell.out / "compare.json").read_text())["left_out"]


def test_the_table_of_another_machine_can_be_written_anywhere(shell, capsys, tmp_path):
    flags = [shell.config, "--budget_seconds=8", f"--metric=tune/{METRIC}", "--scratch"]
    flags += [f"--finetune={shell.tune}", f"--archive={tmp_path / 'cells.jsonl'}"]
    assert shell(*flags) == ExitCode.OK
    facts = json.loads((shell.out / "compare.json").read_text())
    trained, measured = len(shell.trainer.runs), dict(shell.trainer.machine)
    shutil.rmtree(shell.out)
    shell.trainer.machine = {**measured, "device_kind": "other"}
    assert shell(*flags, "--max_seconds=0", "--workers=2") == ExitCode.OK
    again = json.loads((shell.out / "compare.json").read_text())
    assert (again["rows"], again["machine"]) == (facts["rows"], measured)
    assert again["left_out"] == []
    assert len(shell.trainer.runs) == trained

    # Of two machines, this one's cells come first; a third would have to guess.
    assert shell(*flags) == ExitCode.OK
    assert shell(*flags, "--max_seconds=0") == ExitCode.OK
    mixed = json.loads((shell.out / "compare.json").read_text())
    assert mixed["machine"]["device_kind"] == "other"
    assert "of another machine (1 × fast chip)" in mixed["left_out"][0]
    shell.trainer.machine = {**measured, "device_kind": "third"}
    assert shell(*flags, "--max_seconds=0") == ExitCode.BAD_INPUT
    assert "are of several machines (1 × fast chip, 1 × other)" in capsys.readouterr().err


def test_a_page_of_another_version_is_not_written_in_part(shell, capsys):
    shell.out.mkdir()
    (shell.out / "compare.json").write_text('{"settings": {}}')
    assert shell("--report_only") == ExitCode.BAD_INPUT
    assert "repeat the command that wrote it, with --max_seconds=0" in capsys.readouterr().err


def test_which_way_a_figure_is_better_is_said_once(shell):
    flags = [shell.config, "--budget_seconds=8", f"--metric={METRIC}:min", "--fractions=1"]
    flags += [f"--tune_metric={METRIC}", "--rates=5e-4,2e-3"]
    assert shell(*flags) == ExitCode.OK
    facts = json.loads((shell.out / "compare.json").read_text())
    assert next(iter(facts["rates"].values()))["chosen"] == 5e-4, "the lower score"
    assert (
        f"the best by {METRIC} (less is better) is used" in (shell.out / "compare.md").read_text()
    )


def test_a_run_that_fails_costs_no_other_its_place_in_the_table(shell, capsys):
    flags = [shell.config, "--budget_seconds=8", f"--metric={METRIC}", "--seeds=2"]

    def fail(config, facts):
        if (config.total_steps, config.seed) == (320, 0):
            raise RuntimeError("RESOURCE_EXHAUSTED")
        return facts

    shell.trainer.alter = fail
    assert shell(*flags) == ExitCode.FAILED
    assert "RESOURCE_EXHAUSTED" in (error := capsys.readouterr().err)
    assert "tiny, seed 0) is left out" in error
    assert "7 of 8 cells are there" in (shell.out / "compare.md").read_text()
    (failed,) = [
        path.parent
        for path in shell.out.glob("cells/*/checkpoints")
        if not (path.parent / "result.json").exists()
    ]
    shutil.rmtree(failed)
    shell.trainer.alter = lambda _, facts: facts
    assert shell(*flags) == ExitCode.OK
    assert len(shell.trainer.runs) == 9


def test_a_signal_still_leaves_a_table_and_its_exit_code(shell):
    shell.trainer.stop_at = 2
    flags = [shell.config, "--budget_seconds=8", f"--metric={METRIC}"]
    assert shell(*flags) == ExitCode.PREEMPTED
    assert "2 of 4 cells are there" in (shell.out / "compare.md").read_text()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--metric=x/y"], "--budget_seconds and --metric are needed"),
        (["--metric=vqa/y", "--budget_seconds=8"], "needs this evaluator"),
        (["--metric=reconstruction/y", "--budget_seconds=8", "--baseline=b"], "no config; use one"),
        (["--metric=a/y", "--budget_seconds=8", "--fractions=1/2"], "the largest of them 1"),
        (["--metric=a/y", "--budget_seconds=8", "--fractions=1,half"], "--fractions=1,half"),
        (["--metric=a/y", "--budget_seconds=8", "--set=optim.b2"], "write --set=KEY=VALUE"),
        (["--metric=a/y", "--budget_seconds=8", "--set_finetune=x"], "--set_finetune=KEY=VALUE"),
        (["--metric=a/y", "--budget_seconds=8", "--devices=0,1"], "give --workers=2 or more"),
        (["--metric=a/y", "--budget_seconds=8", "--set=optim.b3=1"], "config.optim.b3: unknown"),
        (["--metric=a/y", "--budget_seconds=8", "--search=optim.b2"], "KEY:log:LOW:HIGH"),
        (["--metric=a/y", "--budget_seconds=8", "--tune_fraction=0.3"], "use one of 0.25, 0.4"),
        (["--metric=a/y:min", "--budget_seconds=8", "--tune_metric=a/y:max"], "says min of it"),
        (["--metric=a/y", "--budget_seconds=8", "--others_until=0.3"], "use one of 0.25, 0.4"),
        (
            ["--metric=a/y", "--budget_seconds=8", "--others_until=1/2.5", "--rates=x1,x2"],
            "at which rates are compared; lower the latter",
        ),
        (
            ["--metric=a/y", "--budget_seconds=8", "--others_until=1/2.5", "--scratch"],
            "leave --others_until",
        ),
        (
            ["--metric=a/y", "--budget_seconds=8", "--search=optim.b2:0.9,0.95", "--rates=x1,x2"],
            "--search=schedule.peak:... searches rates",
        ),
        (["--report_only"], "neither compare.json nor search.json"),
    ],
)
def test_bad_commands_say_what_to_do(shell, capsys, flags, message):
    assert shell(shell.config, *flags) == ExitCode.BAD_INPUT
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error
    assert not shell.trainer.runs
