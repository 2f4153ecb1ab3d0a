"""Checkpoints of tunables alone: all that reads them finds the base, or says what is amiss."""

import dataclasses
import json
import pathlib
import re
import shutil
from collections.abc import Iterator

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict
from tiny_config import get_config

from tools.export_weights import export_weights
from tools.export_weights import main as export_main
from tools.tuning_costs import main as costs_main
from vlp_jax.infra import sharding
from vlp_jax.infra.checkpoint_reader import load_params
from vlp_jax.infra.errors import ConfigError
from vlp_jax.infra.manifest import read_manifest
from vlp_jax.infra.preemption import ExitCode
from vlp_jax.infra.sharding import by_path
from vlp_jax.models.pretrained import load_parameters
from vlp_jax.models.tuning_config import tuning_config
from vlp_jax.predict import Predictor
from vlp_jax.train.base import Base, fingerprint
from vlp_jax.train.initial import Origin, read_origin
from vlp_jax.train.loop import train
from vlp_jax.train.setup import Setup, prepare
from vlp_jax.train.tunables import _base

TOTAL = 6
# All but adapters: also the head, which no base has.
FROZEN = {"pattern": "^(?!.*_adapter/)", "rate_factor": 0.0}


def small(**changes: object) -> ConfigDict:
    config = get_config()
    config.optim.ema_decay = 0.0
    config.checkpoint.best_metric = ""
    with config.unlocked():
        config.evals = {}
        config.objectives = {"mlm": {}}
    config.update_from_flattened_dict(changes)
    return config


def tuned(base: pathlib.Path | str, **changes: object) -> ConfigDict:
    config = small(
        **{
            "init_from": str(base),
            "adopt_model": True,
            "total_steps": TOTAL,
            "optim.ema_decay": 0.9,
            "checkpoint.every_steps": 2,
            "checkpoint.keep_latest": 9,
            "checkpoint.tunables_only": True,
            "mesh.fsdp": 2,
        }
    )
    with config.unlocked():
        config.objectives = {"itc": {"embedding_dim": 8}}
        config.model.tuning = tuning_config()
        config.model.tuning.adapter.kind = "serial"
        config.model.tuning.blocks = "all"
        config.optim.groups.frozen = FROZEN
    config.update_from_flattened_dict(changes)
    return config


def save(config: ConfigDict, workdir: pathlib.Path) -> Setup:
    """A run that stopped before its first update."""
    setup = prepare(config, workdir)
    with setup.open_checkpoints() as checkpoints:
        state, left_out = setup.first_state()[0], setup.tunables.left_out
        checkpoints.save(0, state, {}, setup.checkpoint_extra(), left_out)
    return setup


@pytest.fixture(autouse=True, scope="module")
def _sharded() -> object:
    """Over the fsdp axis, also what is as small as here."""
    usual = sharding.fsdp_rules
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sharding, "fsdp_rules", lambda: usual(16))
        yield


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    workdir = tmp_path_factory.mktemp("base")
    save(small(), workdir)
    return workdir


@pytest.fixture(scope="module")
def run(base: pathlib.Path, tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    workdir = tmp_path_factory.mktemp("tuned")
    assert train(prepare(tuned(base), workdir)) == ExitCode.OK
    return workdir


@pytest.fixture(scope="module")
def whole(base: pathlib.Path, tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """The same run with whole checkpoints."""
    workdir = tmp_path_factory.mktemp("whole")
    config = tuned(base, **{"checkpoint.tunables_only": False})
    assert train(prepare(config, workdir)) == ExitCode.OK
    return workdir


@pytest.fixture
def unmoved(base: pathlib.Path, tmp_path: pathlib.Path) -> tuple[pathlib.Path, pathlib.Path]:
    """A run that has just begun, and a base of its own."""
    own = tmp_path / "base"
    shutil.copytree(base, own)
    save(tuned(own), tmp_path / "run")
    return tmp_path / "run", own


class Judge:
    """An evaluator that keeps what it was given."""

    figures = ("accuracy",)

    def run(self, params: object, step: int = 0) -> Iterator[tuple[str, float]]:
        self.seen = by_path(jax.device_get(params))
        yield "accuracy", 1.0


def same(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert found.keys() == expected.keys()
    for path, array in expected.items():
        assert found[path].dtype == array.dtype, path
        assert found[path].tobytes() == array.tobytes(), path


def stored(workdir: pathlib.Path, step: int = TOTAL) -> dict[str, object]:
    return read_manifest(workdir / "checkpoints" / str(step)).arrays


def size(workdir: pathlib.Path) -> int:
    files = read_manifest(workdir / "checkpoints" / str(TOTAL)).files
    return sum(count for count, _ in files.values())


def test_what_the_base_has_is_left_out_and_nothing_else(base, run, whole):
    """Fresh frozen leaves, here those of the head, are in no base."""
    lacking = stored(whole).keys() - stored(run).keys()
    shared = {path for path in read_origin(base).arrays if "vocabulary_head" not in path}
    there = {p.removeprefix("params/") for p in stored(whole) if p.startswith("params/")}
    shared &= there
    assert lacking == {f"{place}/{p}" for p in shared for place in ("params", "extras/ema")}
    fresh = [path for path in stored(run) if path.startswith("params/") and "head" in path]
    assert fresh
    assert size(run) < 0.8 * size(whole)


def test_base_and_tunables_are_the_run_bit_for_bit(run, whole):
    same(read_origin(run).arrays, read_origin(whole).arrays)
    same(read_origin(run, "2").arrays, read_origin(whole, "2").arrays)
    begun, ended = read_origin(run, "2").arrays, read_origin(run).arrays
    moved = {path for path in ended if not np.array_equal(begun[path], ended[path])}
    assert moved
    assert all("_adapter/" in path for path in moved)


def test_a_resumed_run_is_the_same_bit_for_bit(run, whole, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(run, workdir, ignore=shutil.ignore_patterns("metrics.jsonl"))
    for step in (4, TOTAL):
        shutil.rmtree(workdir / "checkpoints" / str(step))
    base = read_origin(run).base.where
    assert train(prepare(tuned(base), workdir)) == ExitCode.OK
    assert stored(workdir) == stored(run)
    for subtree in ("params", "extras", "opt_state"):
        again, expected = (
            by_path(load_params(place / "checkpoints", TOTAL, subtree).state)
            for place in (workdir, run)
        )
        same(again, expected)
    same(read_origin(workdir).arrays, read_origin(whole).arrays)


@pytest.mark.slow
def test_a_run_goes_on_on_a_base_that_was_moved_and_names_its_new_place(unmoved):
    workdir, old = unmoved
    new = old.with_name("moved")
    old.rename(new)
    setup = prepare(tuned(old, init_base=str(new), total_steps=2), workdir)
    setup.config.checkpoint.best_metric = "val/accuracy"
    val, test = Judge(), Judge()
    setup = dataclasses.replace(
        setup,
        evaluators={"val": val, "test": test},
        eval_steps={"val": None, "test": None},
        on_best=frozenset({"test"}),
    )
    assert train(setup) == ExitCode.OK
    found = read_origin(workdir)
    assert found.base.where == str(new)
    same(val.seen, found.arrays)
    same(test.seen, found.arrays)  # read from the best checkpoint and its base


def test_the_report_tells_sizes_and_costs(base, run, whole, capsys):
    facts, all_of_it = (json.loads((workdir / "run.json").read_text()) for workdir in (run, whole))
    told = r"\d+(\.\d)? [kM]B of tunables, base of \d+(\.\d)? [kM]B: "
    assert re.fullmatch(told + re.escape(str(base)), facts["checkpoint"])
    assert re.fullmatch(r"\d+(\.\d)? [kM]B", all_of_it["checkpoint"])
    [costs] = facts["costs"]
    assert costs["checkpoint_bytes"] == size(run)
    origin = read_origin(run)
    assert costs["base_bytes"] == sum(origin.arrays[p].nbytes for p in origin.base.arrays)
    adapters = [array.size for path, array in origin.arrays.items() if "_adapter/" in path]
    assert costs["trained_parameters"] == costs["without_heads_parameters"] == sum(adapters)
    # ITC reads the image's block and the text's lower one: two bottlenecks each, of width 2.
    config = json.loads((run / "config.json").read_text())
    tokens = 5 + prepare(small(), base).budget.text_lengths["pairs"]
    assert config["model"]["image"]["width"] == 16
    assert costs["extra_macs"] == pytest.approx(tokens * 2 * 2 * 16 * 2)
    assert costs["extra_flops"] == 2 * costs["extra_macs"]
    extra = costs["extra_flops"] / (costs["forward_flops"] - costs["extra_flops"])
    assert costs["extra_share"] == pytest.approx(extra)
    assert costs["update_bytes"] > 0
    assert costs["update_seconds"] > 0
    assert costs["device_peak_bytes"] is None  # the allocator of a CPU does not count
    costs_main([str(run), str(whole), "--json"])
    rows = json.loads(capsys.readouterr().out)
    assert [row["workdir"] for row in rows] == [str(run), str(whole)]
    assert rows[0]["method"] == "own"  # it freezes the head
    assert rows[0]["extra_share"] == costs["extra_share"]
    assert rows[1]["base_bytes"] == 0


def test_the_predictor_and_a_next_run_read_both(run, whole, base, tmp_path):
    one, other = Predictor.load(run), Predictor.load(whole)
    picture = np.full((20, 20, 3), 90, np.uint8)
    np.testing.assert_array_equal(one.embed_images([picture]), other.embed_images([picture]))
    setup = prepare(tuned(run), tmp_path / "next")
    same(by_path(jax.device_get(setup.first_state()[0].params)), read_origin(whole).arrays)
    # What comes from the base of the base is looked for there: no chain of them.
    assert setup.tunables.base.where == str(base)
    assert not any("_adapter" in path for path in setup.tunables.left_out)


@pytest.mark.slow
def test_a_moved_base_is_named_to_all_that_read(unmoved, tmp_path):
    run, old = unmoved
    expected = read_origin(run).arrays
    new = old.with_name("moved")
    old.rename(new)
    same(read_origin(run, base=str(new)).arrays, expected)
    assert Predictor.load(run, base=str(new)).tokenizer.vocab_size
    setup = prepare(tuned(run, init_base=str(new)), tmp_path / "next")
    assert setup.tunables.base.where == str(new)
    with pytest.raises(ConfigError, match=rf"config\.init_base: {old} is no base of {new}, which"):
        read_origin(new, base=str(old))


def test_a_base_that_is_gone_is_told_before_anything_is_computed(unmoved):
    run, base = unmoved
    shutil.rmtree(base)
    told = (
        rf"config\.init_base: {run}/checkpoints/0 holds tunables alone, made on {base} \(step 0\) "
        rf"with SHA-256 [0-9a-f]{{12}}, and {base} cannot be read: .*{base} is neither a run's "
        r"workdir.* Give the workdir, checkpoint or parameter file in which that base lies now"
    )
    with pytest.raises(ConfigError, match=told):
        read_origin(run)
    with pytest.raises(ConfigError, match=told):
        train(prepare(tuned(base), run))
    assert not (run / "run.json").exists()


def test_another_base_is_refused(unmoved, tmp_path):
    run, base = unmoved
    other, smaller = tmp_path / "other", tmp_path / "smaller"
    save(small(seed=1), other)
    save(small(**{"model.image.mlp_width": 16}), smaller)
    made = rf"{run}/checkpoints/0 holds tunables alone, made on {base} \(step 0\).*"
    with pytest.raises(ConfigError, match=rf"{made}and {other} has other values: SHA-256 \w{{12}}"):
        read_origin(run, base=str(other))
    with pytest.raises(ConfigError, match=rf"{made}and in {smaller}, image_tower.* and not \["):
        train(prepare(tuned(base, init_base=str(smaller)), run))


@pytest.mark.slow
def test_the_step_of_the_base_counts_and_not_its_latest(unmoved):
    """A base that was trained further lies beside itself as long as its step is kept."""
    run, base = unmoved
    expected = read_origin(run).arrays
    setup = prepare(small(), base)
    with setup.open_checkpoints() as checkpoints:
        state = setup.first_state()[0]
        further = state.replace(params=jax.tree.map(lambda leaf: leaf + 1, state.params))
        checkpoints.save(5, further, {}, setup.checkpoint_extra())
    same(read_origin(run).arrays, expected)
    shutil.rmtree(base / "checkpoints" / "0")
    with pytest.raises(ConfigError, match=r"no checkpoint of step 0; there are 5\. Give the"):
        read_origin(run)


def test_whole_checkpoints_where_there_is_nothing_to_leave_out(base, tmp_path, caplog):
    with pytest.raises(ConfigError, match=r"checkpoint\.tunables_only: no parameter is frozen"):
        prepare(small(**{"checkpoint.tunables_only": True}), tmp_path / "all")
    scratch = save(tuned(""), tmp_path / "scratch")
    assert not scratch.tunables.left_out
    save(tuned(base, **{"checkpoint.tunables_only": False}), tmp_path / "begun")
    setup = prepare(tuned(base), tmp_path / "begun")
    with setup.open_checkpoints() as checkpoints:
        restored = checkpoints.restore_latest(setup.program.state_spec, setup.tunables.elsewhere)
    setup.tunables.follow(restored.extra)
    assert not setup.tunables.left_out
    assert "the last checkpoint of this run is whole" in caplog.text


@pytest.mark.slow
def test_exported_tunables_are_read_with_their_base(unmoved, tmp_path, capsys):
    run, base = unmoved
    expected = read_origin(run)
    whole = load_parameters(export_weights(run, tmp_path / "whole"))
    same(whole, expected.arrays)
    export_main([str(run), f"--out={tmp_path / 'own'}", "--tunables"])
    file = tmp_path / "own" / "model.safetensors"
    assert f"wrote {file} (" in capsys.readouterr().out
    assert load_parameters(file).keys() == expected.arrays.keys() - expected.base.arrays.keys()
    assert file.stat().st_size < (tmp_path / "whole" / "model.safetensors").stat().st_size
    found = read_origin(file)
    same(found.arrays, expected.arrays)
    assert found.base == expected.base
    card = (tmp_path / "own" / "README.md").read_text()
    assert f"are those of `{base} (step 0)`, with the SHA-256 `{expected.base.sha256}`" in card
    new = base.with_name("moved")
    base.rename(new)
    same(read_origin(file, base=str(new)).arrays, expected.arrays)
    with pytest.raises(
        ConfigError, match=rf"init_base: {file} holds tunables alone, made on {base}"
    ):
        Predictor.load(file)
    with pytest.raises(SystemExit):
        export_main([str(run), f"--out={tmp_path / 'again'}"])
    assert f"error: --base: {run}/checkpoints/0 holds tunables" in capsys.readouterr().err
    with pytest.raises(ValueError, match=r"--tunables: .* holds all of its parameters"):
        export_weights(new, tmp_path / "third", tunables=True)


def test_what_moves_without_a_gradient_is_saved():
    """Statistics of a residual network and switches of units; and what was not taken as it is."""
    shapes = {
        "image_tower/kernel": (2, 3),
        "image_tower_statistics/mean": (3,),
        "text_upper_0/block_kept": (),
        "image_tower/position_embedding": (1, 5, 3),
        "answers_head/kernel": (3, 2),
    }
    specs = {path: jax.ShapeDtypeStruct(shape, np.float32) for path, shape in shapes.items()}
    arrays = {path: np.ones(shape, np.float32) for path, shape in shapes.items()}
    del arrays["answers_head/kernel"]  # fresh
    arrays["image_tower/position_embedding"] = np.ones((1, 2, 3), np.float32)  # was resized
    base = _base(Origin("run", 7, arrays, {}, "", ()), specs, shapes)
    assert set(base.arrays) == {"image_tower/kernel"}
    assert (base.where, base.step, base.size) == ("run", 7, 24)
    assert Base.from_json(json.loads(json.dumps(base.to_json()))) == base
    assert _base(Origin("run", 7, {}, {}, "", ()), specs, shapes) is None


def test_a_fingerprint_is_of_names_shapes_types_and_bytes():
    arrays = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.ones(1, np.float32)}
    changed = [
        {**arrays, "a": arrays["a"].reshape(3, 2)},
        {**arrays, "b": np.ones(1, np.float64)},
        {"c": arrays["a"], "b": arrays["b"]},
        {**arrays, "a": arrays["a"] + np.float32(1e-6)},
    ]
    assert len({fingerprint(one) for one in (arrays, *changed)}) == 5
    turned = np.asfortranarray(arrays["a"])
    assert fingerprint({"b": arrays["b"], "a": turned}) == fingerprint(arrays)
    assert fingerprint({"half": np.ones((), jax.numpy.bfloat16)})
