"""Cells: what they train, when they are the same, and that they are kept."""

import json

import jax.numpy as jnp
import pytest

from configs.invariance import get_config
from tests.tools.compared import (
    BUDGET,
    METRIC,
    STEP_SECONDS,
    FakeTrainer,
    finetune,
    named,
    open_cells,
)
from tools.compare.cells import RESULT_FILE
from tools.compare.configs import (
    CommandError,
    cost_digest,
    digest,
    load,
    load_all,
    parse_value,
    with_overrides,
)
from vlp_jax.infra.errors import ConfigError
from vlp_jax.train.config import check_keys
from vlp_jax.train.schedule import Budget, learning_rate, to_steps


def obtain(cells, config, seed=0, fraction=1.0, finetunes=(), **overrides):
    return cells.obtain(
        config,
        budget_seconds=fraction * BUDGET,
        seed=seed,
        overrides=overrides,
        finetunes=finetunes,
    )


def run_config(config, steps=200, **overrides):
    return config.run(steps=steps, seed=1, step_seconds=0.1, save_seconds=5.0, overrides=overrides)


@pytest.mark.parametrize("decay", ["linear", "cosine"])
def test_every_budget_has_a_schedule_of_its_own_that_comes_to_its_end(tmp_path, decay):
    trainer = FakeTrainer()
    cells = open_cells(tmp_path, trainer)
    config = named(**{"schedule.decay": decay, "total_steps": 0, "total_examples": 5e6})
    fractions = (0.25, 0.4, 1 / 1.5, 1.0)
    for fraction in fractions:
        obtain(cells, config, fraction=fraction)
    assert len(trainer.runs) == len(fractions)
    for fraction, (_, run) in zip(fractions, trainer.runs, strict=True):
        check_keys(run)
        steps = to_steps(run, "", "total", Budget(run.data.batch_size, None))
        assert steps == round(fraction * BUDGET / STEP_SECONDS)
        rate = learning_rate(run.schedule, Budget(run.data.batch_size, None, steps))
        rates = rate(jnp.arange(steps))
        warmup = round(run.schedule.warmup_percent / 100 * steps)
        assert int(jnp.argmax(rates)) in (warmup - 1, warmup)
        assert float(rates.max()) == pytest.approx(run.schedule.peak)
        assert float(rates[-1]) < 0.01 * run.schedule.peak


@pytest.mark.parametrize(
    "changes", [{"decay": "constant"}, {"decay": "rsqrt"}, {"final_factor": 0.5}]
)
def test_a_schedule_that_does_not_come_down_is_refused(changes):
    config = named(**{f"schedule.{key}": value for key, value in changes.items()})
    with pytest.raises(ConfigError, match=r"config.schedule.decay: .* Use linear or cosine"):
        run_config(config)
    cooled = named(
        **{f"schedule.{key}": value for key, value in changes.items()},
        **{"schedule.cooldown_percent": 20.0},
    )
    run_config(cooled)


def test_nothing_but_training_is_left_in_the_middle_of_a_run():
    config = named(**{"evals.reconstruction.every_steps": 40, "checkpoint.keep_best": 3})
    with config.config.unlocked():
        config.config.evals.reconstruction.on = "best"
    run = run_config(config, steps=200)
    assert "on" not in run.evals.reconstruction
    assert "every_steps" not in run.evals.reconstruction
    assert run.checkpoint.best_metric == ""
    assert run.checkpoint.every_steps == 50, "5 s of training at 0.1 s"
    assert run.checkpoint.every_percent is None
    assert (run.seed, run.total_steps, run.log.tensorboard) == (1, 200, False)
    assert config.config.evals.reconstruction.every_steps == 40, "the original is not touched"


BANDIT = {"kind": "bandit", "metric": "reconstruction/0.3/loss"}


def test_an_evaluator_that_training_learns_from_stays():
    config = named()
    assert config.teachers == ()
    with config.config.unlocked(), config.config.ignore_type():
        config.config.objectives.flm.corruption_rate = BANDIT
    assert config.teachers == ("reconstruction",)
    assert run_config(config).evals.reconstruction.every_steps == 40


def test_calibration_reads_no_evaluator_and_all_but_keeps_the_parameters():
    config = named(**{"schedule.warmup_steps": 500, "schedule.peak": 1.0})
    run = config.calibration(steps=64, overrides={})
    check_keys(run)
    rate = learning_rate(run.schedule, Budget(16, None, run.total_steps))
    assert float(rate(jnp.int32(63))) == pytest.approx(0.01)
    assert not run.evals


def test_calibration_asks_what_training_learns_from_only_at_its_end():
    config = named()
    with config.config.unlocked(), config.config.ignore_type():
        config.config.objectives.flm.corruption_rate = BANDIT
        config.config.evals.other = {"type": "reconstruction", "every_steps": 1}
    run = config.calibration(steps=64, overrides={})
    assert list(run.evals) == ["reconstruction"]
    assert run.evals.reconstruction.every_steps == run.total_steps
    assert config.config.evals.reconstruction.every_steps == 40, "the original is not touched"


def test_an_override_that_does_not_fit_names_the_key():
    with pytest.raises(ConfigError, match=r"optim.weightdecay: unknown key. Perhaps you mean"):
        run_config(named(), **{"optim.weightdecay": 0.9})
    with pytest.raises(ConfigError, match=r"config.optim.accumulation: 'many' is of another type"):
        run_config(named(), **{"optim.accumulation": "many"})
    with pytest.raises(ConfigError, match=r"config.seed.x: unknown key"):
        run_config(named(), **{"seed.x": 1})


def test_an_evaluator_is_dropped_by_none_but_no_key_that_every_config_has():
    config = named().config
    assert not with_overrides(config, {"evals.reconstruction": None}).evals
    assert config.evals.reconstruction, "of a copy"
    assert with_overrides(config, {"schedule.warmup_percent": None}).schedule.warmup_percent is None
    with pytest.raises(ConfigError, match=r"evals.reconstructed: unknown key"):
        with_overrides(config, {"evals.reconstructed": None})


def test_a_key_that_came_later_counts_only_where_it_changes_the_run():
    """Or every cell of docs/results would have to be trained again."""
    whole = run_config(named())
    with whole.unlocked():
        del whole["compression"], whole.model.image["positions"]
    known = digest(whole)
    assert digest(run_config(named())) == known
    assert digest(run_config(named(**{"model.image.positions": "sincos"}))) != known
    assert digest(run_config(named(**{"compression.tail_percent": 5.0}))) != known


@pytest.mark.parametrize("objective", ["dino", "mim", "moco_v3", "simclr"])
def test_recipes_that_configs_came_to_spell_out_leave_archives_valid(objective):
    config = get_config(objective)
    bare, section = config.copy_and_resolve_references(), config.objectives[objective]
    spelled = {"temperature", "teacher_temperature", "momentum", "kept_share"} & {*section.keys()}
    assert spelled
    with bare.unlocked():
        for key in spelled:
            del bare.objectives[objective][key]
    assert digest(bare) == digest(config)


def test_what_does_not_change_a_run_does_not_change_its_digest():
    same = digest(run_config(named()))
    assert digest(run_config(named(**{"log.every_steps": 7, "name": "other"}))) == same
    for change in ({"model.text.width": 32}, {"data.batch_size": 32}, {"optim.b2": 0.5}):
        assert digest(run_config(named(**change))) != same
    assert digest(run_config(named(), steps=201)) != same
    cost = cost_digest(run_config(named()))
    assert cost_digest(run_config(named(**{"schedule.peak": 9.0, "optim.b2": 0.5}))) == cost
    assert cost_digest(run_config(named(**{"model.text.width": 32}))) != cost


@pytest.mark.parametrize(
    ("objective", "change"),
    [
        ("simclr", {"temperature": 0.05, "augment.scale": (0.3, 1.0)}),
        ("moco_v3", {"momentum": 0.9}),
        ("dino", {"teacher_temperature": 0.02, "augment_small.scale": (0.15, 0.5)}),
    ],
)
def test_what_changes_no_operation_of_an_update_does_not_change_its_cost(objective, change):
    config = get_config(objective)
    keys = {f"objectives.{objective}.{key}": value for key, value in change.items()}
    changed = with_overrides(config, keys)
    assert digest(changed) != digest(config)
    assert cost_digest(changed) == cost_digest(config)
    blurred = {f"objectives.{objective}.augment.blur_sigma": (0.1, 3.0)}
    assert cost_digest(with_overrides(config, blurred)) != cost_digest(config)


def test_the_cost_of_an_update_is_measured_once_for_all_rates_budgets_and_invocations(tmp_path):
    trainer = FakeTrainer()
    cells = open_cells(tmp_path, trainer)
    for rate in (1e-3, 2e-3):
        for fraction in (0.5, 1.0):
            obtain(cells, named(), fraction=fraction, **{"schedule.peak": rate})
    assert len(trainer.calibrations) == 1
    kept = open_cells(tmp_path, trainer, runs=0).calibration(named(), {})
    assert kept.seconds == pytest.approx(STEP_SECONDS)
    assert (kept.min_ms, kept.max_ms) == (pytest.approx(9.0), pytest.approx(12.0))
    obtain(cells, named(**{"model.text.width": 32}))
    assert len(trainer.calibrations) == 2


def test_a_finished_cell_is_kept(tmp_path):
    trainer = FakeTrainer()
    first = obtain(open_cells(tmp_path, trainer), named())
    again = obtain(open_cells(tmp_path, trainer, runs=0), named())
    assert again == first
    assert len(trainer.runs) == 1
    [file] = tmp_path.glob(f"cells/*/{RESULT_FILE}")
    facts = json.loads(file.read_text())
    assert facts["machine"] == trainer.machine
    assert facts["commit"] == "abc"
    assert facts["digest"] == first.digest


def test_figures_that_are_not_finite_survive(tmp_path):
    trainer = FakeTrainer()
    trainer.alter = lambda _, facts: facts | {"metrics": {METRIC: float("nan")}}
    obtain(open_cells(tmp_path, trainer), named())
    kept = obtain(open_cells(tmp_path, trainer, runs=0), named())
    assert kept.measurement.metrics[METRIC] != kept.measurement.metrics[METRIC]


def test_a_cell_of_a_changed_config_or_another_machine_is_left_out_and_said_so(tmp_path):
    trainer = FakeTrainer()
    obtain(open_cells(tmp_path, trainer), named())
    edited = open_cells(tmp_path, trainer)
    obtain(edited, named(skill=2.0))
    assert len(trainer.runs) == 2
    [reason] = edited.left_out()
    assert reason.startswith("1 of other settings")

    other = FakeTrainer("slow chip")
    elsewhere = open_cells(tmp_path, other)
    obtain(elsewhere, named())
    assert len(other.runs) == 1
    assert len(other.calibrations) == 1
    assert elsewhere.left_out() == ["2 of another machine (1 × fast chip)"]


def test_fine_tuning_starts_from_the_cell_and_its_checkpoint_goes_afterwards(tmp_path):
    trainer = FakeTrainer()
    result = obtain(open_cells(tmp_path, trainer), named(), seed=3, finetunes=[finetune()])
    (workdir, _), (tuned_workdir, tuned) = trainer.runs
    assert tuned.init_from == str(workdir.resolve())
    assert tuned.seed == 3
    assert tuned.evals.vqa.every_steps == 5
    assert tuned.checkpoint.best_metric == "vqa/base/accuracy", "it may choose its checkpoint"
    assert tuned.total_steps == 100, "as its own file says"
    assert list(result.finetuning) == ["vqa"]
    assert not (workdir / "checkpoints").exists()
    assert not (tuned_workdir / "checkpoints").exists()


def test_fine_tuning_goes_on_where_the_invocation_before_ended(tmp_path):
    trainer, tunes = FakeTrainer(), [finetune("vqa"), finetune("nlvr2")]
    assert obtain(open_cells(tmp_path, trainer, runs=2), named(), finetunes=tunes) is None
    result = obtain(open_cells(tmp_path, trainer), named(), finetunes=tunes)
    assert list(result.finetuning) == ["vqa", "nlvr2"]
    assert len(trainer.runs) == 3
    # Asked for later, when the checkpoint is gone: the cell is trained again.
    more = [*tunes, finetune("retrieval")]
    assert len(obtain(open_cells(tmp_path, trainer), named(), finetunes=more).finetuning) == 3
    assert len(trainer.runs) == 5


def test_a_result_stays_until_its_run_is_made_again(tmp_path):
    trainer = FakeTrainer()
    first = obtain(open_cells(tmp_path, trainer), named())
    trainer.stop_at = len(trainer.runs)
    assert obtain(open_cells(tmp_path, trainer), named(), finetunes=[finetune()]) is None
    assert obtain(open_cells(tmp_path, trainer, runs=0), named()) == first
    # The signal had it saved in the middle, from where nothing may be fine-tuned.
    (tmp_path / "cells" / first.name / "checkpoints" / "7").mkdir(parents=True)
    trainer.stop_at = None
    made = len(trainer.runs)
    assert obtain(open_cells(tmp_path, trainer), named(), finetunes=[finetune()]) is not None
    assert [config.total_steps for _, config in trainer.runs[made:]] == [1000, 100]


def test_fine_tuning_depends_on_the_cell_but_not_on_where_it_lies(tmp_path):
    trainer = FakeTrainer()
    obtain(open_cells(tmp_path / "old", trainer), named(), finetunes=[finetune()])
    (tmp_path / "old").rename(tmp_path / "new")
    cells = open_cells(tmp_path / "new", trainer, runs=0)
    assert obtain(cells, named(), finetunes=[finetune()]) is not None
    cells = open_cells(tmp_path / "new", trainer)
    obtain(cells, named(skill=2.0), finetunes=[finetune()])
    assert len(trainer.runs) == 4


def test_calibration_has_intervals_of_whole_windows(tmp_path):
    for window, steps, interval in ((32, 64, 32), (32, 256, 64), (128, 256, 128), (32, 193, 64)):
        run = named(**{"data.window_batches": window}).calibration(steps=steps, overrides={})
        assert run.log.every_steps == interval
        assert run.log.every_percent is None
        assert run.total_steps == 6 * interval


def test_a_run_that_stopped_is_not_fine_tuned(tmp_path):
    trainer = FakeTrainer()
    trainer.alter = lambda _, facts: facts | {"status": "stopped", "reason": "diverged"}
    assert obtain(open_cells(tmp_path, trainer), named(), finetunes=[finetune()]) is not None
    assert len(trainer.runs) == 1


def test_a_signal_ends_the_invocation_and_leaves_no_result(tmp_path):
    trainer = FakeTrainer()
    trainer.stop_at = 0
    cells = open_cells(tmp_path, trainer)
    assert obtain(cells, named()) is None
    assert cells.interrupted
    assert obtain(cells, named(), seed=1) is None
    assert len(trainer.runs) == 1
    assert not list(tmp_path.glob(f"cells/*/{RESULT_FILE}"))


def test_config_files(tmp_path):
    file = tmp_path / "method.py"
    file.write_text(
        "from tests.tiny_config import get_config as tiny\n"
        "def get_config(arg=None):\n"
        "    config = tiny()\n"
        "    config.name = str(arg)\n"
        "    return config\n"
    )
    loaded = load(f"{file}:large")
    assert (loaded.label, loaded.config.name) == ("method:large", "large")
    assert load(str(file)).label == "method"
    # A key of all, and the same key of one, which wins wherever it stands.
    keys = {"method:large/data.batch_size": 32, "data.batch_size": 64, "optim.b2": 0.9}
    small, large = load_all([f"{file}:small", f"{file}:large"], keys)
    assert (small.config.data.batch_size, large.config.data.batch_size) == (64, 32)
    assert small.config.optim.b2 == large.config.optim.b2 == 0.9
    with pytest.raises(CommandError, match=r"larg/seed: no config is called larg; there are \['m"):
        load_all([f"{file}:large"], {"larg/seed": 1})
    with pytest.raises(CommandError, match="two configs are called method"):
        load_all([str(file), str(file)])
    with pytest.raises(CommandError, match=r"nowhere.py is no Python file"):
        load("nowhere.py")
    file.write_text("")
    with pytest.raises(CommandError, match="has no get_config"):
        load(str(file))


def test_values_of_the_command_line():
    assert [parse_value(text) for text in ("1", "0.5", "(1, 2)", "True", "linear", "a-b")] == [
        *(1, 0.5, (1, 2), True, "linear", "a-b")
    ]
