"""From a finished run to a smaller one that starts from it, and to its weights in eight bits."""

import json
import re
import shutil

import jax
import numpy as np
import pytest
from tiny_config import get_config

from tools.evaluate_quantized import evaluate_quantized
from tools.evaluate_quantized import main as evaluate_main
from tools.finished import set_up_again
from tools.prune_weights import main, measure
from vlp_jax.infra.preemption import ExitCode
from vlp_jax.infra.sharding import by_path
from vlp_jax.models.pretrained import WeightsError, load_metadata, load_parameters
from vlp_jax.models.tuning import BRANCHES
from vlp_jax.models.tuning_config import tuning_config
from vlp_jax.predict import Predictor
from vlp_jax.train.initial import read_origin
from vlp_jax.train.setup import prepare
from vlp_jax.transfer.methods import set_method
from vlp_jax.transfer.quantize import dequantized, quantized
from vlp_jax.transfer.structured import importance

CUT = ("--heads=0.5", "--mlp=0.25", "--blocks=all")


def run_config(**changes):
    """Of a tuned run with an evaluator of a test split."""
    config = get_config()
    with config.unlocked():
        config.objectives = {"ar": {}, "itc": {"embedding_dim": 8}}
        val = {"type": "heldout", "source": "scenes", "num_examples": 32, "num_draws": 1}
        val["objective"] = "ar"
        config.evals = {"val": val, "test": {**val, "split": "test", "on": "best"}}
    config.checkpoint.best_metric = "val/loss"
    set_method(config, "adapter")
    config.update_from_flattened_dict(changes)
    return config


def save(config, workdir):
    """A run that stopped before its first update, whose adapters do something all the same."""
    setup = prepare(config, workdir)
    state, _ = setup.first_state()
    draw = np.random.default_rng(0)
    moved = jax.tree.map(
        lambda leaf: leaf + 0.05 * draw.normal(size=leaf.shape).astype(leaf.dtype), state.params
    )
    state = state.replace(params=moved, extras={**state.extras, "ema": moved})
    with setup.open_checkpoints() as checkpoints:
        left_out = setup.tunables.left_out
        checkpoints.save(0, state, {"val/loss": 1.0}, setup.checkpoint_extra(), left_out)
        checkpoints.wait()
    return setup


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("finished") / "run"
    save(run_config(), workdir)
    return workdir


@pytest.fixture(scope="module")
def file(run):
    """What the tool makes of it, by gradients."""
    out = run.parent / "pruned.safetensors"
    main([f"--checkpoint={run}", f"--out={out}", *CUT, "--batches=2"])
    return out


def failing(capsys, command, *arguments):
    with pytest.raises(SystemExit) as stopped:
        command(list(arguments))
    assert stopped.value.code == ExitCode.BAD_INPUT
    return capsys.readouterr().err


def test_the_file_is_a_smaller_model(run, file):
    whole, small = by_path(read_origin(run).params()), load_parameters(file)
    assert set(whole) == set(small)
    for block in ("image_tower/block_00", "text_lower_0", "text_upper_0"):
        assert whole[f"{block}/self_attention/query/kernel"].shape == (16, 2, 8)
        assert small[f"{block}/self_attention/query/kernel"].shape == (16, 1, 8)
        assert small[f"{block}/self_attention/out/kernel"].shape == (1, 8, 16)
        assert (small[f"{block}/mlp/in/bias"].size, whole[f"{block}/mlp/in/bias"].size) == (24, 32)
    metadata = load_metadata(file)
    assert metadata.config["model"]["tuning"]["prune"] == {
        "heads": 0.5,
        "mlp": 0.25,
        "blocks": "all",
    }
    assert metadata.sources["pruned"] == "by gradients of 2 batches"
    # What stays is an excerpt, and everything else is as it was.
    kept = small["text_lower_0/mlp/in/bias"]
    assert set(kept.tolist()) < set(whole["text_lower_0/mlp/in/bias"].tolist())
    for path in ("text_lower_0/mlp_norm/scale", "text_upper_0/mlp_adapter/up/kernel"):
        np.testing.assert_array_equal(small[path], whole[path])


@pytest.mark.slow
def test_importance_is_a_mean_over_batches_of_the_run(run, tmp_path):
    setup = set_up_again(read_origin(run), "latest", tmp_path)
    assert not setup.config.optim.groups
    one, two = measure(setup, 1), measure(setup, 2)
    assert {branch.rpartition("/")[2] for branch in one} == set(BRANCHES)
    for branch, scores in one.items():
        assert np.isfinite(scores).all()
        assert scores.max() > 0
        assert not np.array_equal(scores, two[branch])
    again = measure(setup, 2)
    jax.tree.map(np.testing.assert_array_equal, two, again)
    norms = importance(read_origin(run).params())
    assert any((np.argsort(norms[b]) != np.argsort(two[b])).any() for b in two)


@pytest.mark.slow
def test_magnitude_reads_no_data(run, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("tools.prune_weights.set_up_again", None)
    out = tmp_path / "by_magnitude.safetensors"
    main([f"--checkpoint={run}", f"--out={out}", "--mlp=0.25", "--batches=0"])
    assert "1 blocks with 2 of 2 heads, 24 of 32 channels, by magnitude" in capsys.readouterr().out
    small = load_parameters(out)
    assert small["text_lower_0/mlp/in/bias"].size == 32  # the fusion alone, as the run is tuned
    [kept] = {small["text_upper_0/mlp/in/bias"].size}
    assert kept == 24
    # Further, from the file itself.
    further = tmp_path / "further.safetensors"
    main([f"--checkpoint={out}", f"--out={further}", "--mlp=0.5", "--heads=0.5", "--batches=0"])
    assert load_parameters(further)["text_upper_0/mlp/in/bias"].size == 16


@pytest.mark.slow
@pytest.mark.parametrize("blocks", ["fusion", "all"])
def test_a_run_starts_from_it(file, tmp_path, blocks):
    """The cut is adopted, whichever blocks have adapters."""
    config = run_config(init_from=str(file), adopt_model=True, **{"model.tuning.blocks": blocks})
    config.model.image.width = config.model.text.width = 32  # adopted, too
    setup = prepare(config, tmp_path)
    assert setup.config.model.tuning.prune.to_dict() == {"heads": 0.5, "mlp": 0.25, "blocks": "all"}
    assert setup.config.model.tuning.blocks == blocks
    state, report = setup.first_state()
    new = {row.parameter for row in report.of("new")}
    assert bool(new) == (blocks == "all")
    assert all("_adapter/" in path for path in new)
    leaves = by_path(jax.device_get(state.params))
    for path, array in load_parameters(file).items():
        np.testing.assert_array_equal(leaves[path], array)
    begun = json.loads((tmp_path / "config.json").read_text())
    assert begun["model"]["tuning"]["prune"]["heads"] == 0.5


@pytest.mark.slow
def test_a_run_that_has_begun_keeps_its_cut(file, tmp_path):
    save(run_config(init_from=str(file), adopt_model=True), tmp_path)
    again = prepare(run_config(init_from=str(file), adopt_model=True), tmp_path)
    assert again.origin is None
    assert again.config.model.tuning.prune.mlp == 0.25


def test_what_does_not_fit_is_told_by_its_key(run, file, tmp_path):
    with pytest.raises(
        WeightsError,
        match=r"config\.model\.tuning\.prune\.heads=0\.5 and not 0\.0, .*tuning\.prune\.mlp=0\.25 "
        r"and not 0\.0.*adopt_model=True",
    ):
        prepare(run_config(init_from=str(file)), tmp_path)
    changes = {"model.tuning.prune.heads": 0.5, "model.tuning.prune.blocks": "all"}
    for adopted in (False, True):  # a whole model has no cut that could be adopted
        config = run_config(init_from=str(run), adopt_model=adopted, **changes)
        with pytest.raises(
            WeightsError,
            match=r"config\.model\.tuning\.prune\.heads=0\.0 and not 0\.5.*tools\.prune_weights",
        ):
            prepare(config, tmp_path)


@pytest.mark.slow
def test_weights_that_know_of_no_tuning_are_whole(run, tmp_path):
    """As those of earlier versions, whose section lacks the cut or is not there."""
    origin = read_origin(run)
    section = tuning_config()
    section.prune.heads = 0.5
    model = {**origin.config["model"], "tuning": section.to_dict()}
    shapes = dict.fromkeys(origin.arrays, (1,))
    for tuning in ({"blocks": "fusion"}, None):
        made = {key: value for key, value in origin.config["model"].items() if key != "tuning"}
        made |= {"tuning": tuning} if tuning else {}
        earlier = origin.__class__(
            **{**vars(origin), "config": {**origin.config, "model": made}},
        )
        with pytest.raises(WeightsError, match=r"tuning\.prune\.heads=0\.0 and not 0\.5"):
            earlier.check_fit(shapes, model)


@pytest.mark.slow
def test_scores_in_eight_bits(run, file, tmp_path, capsys):
    """Of the evaluators of test splits; figures differ a little and the run stays as it is."""
    before = sorted(path.name for path in run.iterdir())
    out = tmp_path / "scores.json"
    evaluate_main([str(run), "--checkpoint=best", f"--out={out}"])
    printed = capsys.readouterr().out
    assert "largest difference: " in printed
    found = json.loads(out.read_text())
    assert set(found["figures"]) == {"test/loss", "test/loss_train", "test/gap_loss"}
    of_float, of_int8 = found["figures"]["test/loss"]
    assert 0 < abs(of_float - of_int8) < 0.05 * of_float
    assert found["kernels"][1] < 0.35 * found["kernels"][0]  # channels here have 16 weights
    saved = found["kernels"][0] - found["kernels"][1]
    assert found["parameters"][0] - found["parameters"][1] == saved
    assert sorted(path.name for path in run.iterdir()) == before
    cut = evaluate_quantized(file, evaluators=("val",))
    assert set(cut.figures) == {"val/loss", "val/loss_train", "val/gap_loss"}
    assert cut.parameters[0] < found["parameters"][0]


@pytest.mark.slow
def test_the_predictor_reads_both(run, file):
    picture = np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)
    for path in (run, file):
        whole, small = Predictor.load(path), Predictor.load(path, quantize="int8")
        expected = quantized(read_origin(path).params())
        jax.tree.map(np.testing.assert_array_equal, small.params, expected)
        one, other = (p.embed_images([picture]) for p in (whole, small))
        assert 0 < np.abs(one - other).max() < 0.05
        whole.params = dequantized(small.params)
        np.testing.assert_allclose(whole.embed_images([picture]), other, atol=1e-6)
    with pytest.raises(ValueError, match=r"quantize='int4' is none of"):
        Predictor.load(run, quantize="int4")


@pytest.mark.slow
def test_tunables_are_completed_by_their_base(run, tmp_path, capsys):
    """Wherever that lies now, by every tool and the predictor."""
    first, base, tuned = (tmp_path / name for name in ("first", "base", "tuned"))
    shutil.copytree(run, first)
    setup = save(run_config(init_from=str(first), adopt_model=True), tuned)
    assert setup.tunables.left_out
    whole = read_origin(tuned).arrays
    first.rename(base)
    out = tmp_path / "pruned.safetensors"
    arguments = [f"--checkpoint={tuned}", f"--out={out}", *CUT, "--batches=1"]
    assert re.search(
        r"--base: .* made on .*first.* cannot be read", failing(capsys, main, *arguments)
    )
    main([*arguments, f"--base={base}"])
    assert not load_metadata(out).base
    assert set(load_parameters(out)) == set(whole)
    error = failing(capsys, evaluate_main, str(tuned), "--evals=val")
    assert re.search(r"--base: .* cannot be read", error)
    evaluate_main([str(tuned), "--evals=val", f"--base={base}"])
    assert "val/loss" in capsys.readouterr().out
    small = Predictor.load(tuned, base=str(base), quantize="int8")
    expected = quantized(read_origin(tuned, base=str(base)).params())
    jax.tree.map(np.testing.assert_array_equal, small.params, expected)


@pytest.mark.slow
def test_a_run_of_a_search_is_what_it_has_chosen(tmp_path):
    """It draws no units once more; nor does the run that follows look for the choice."""
    parts = ("attention", "mlp")
    gated = {"model.tuning.gated": tuple(f"fusion/{part}" for part in parts)}
    save(run_config(**gated), tmp_path / "run")
    searched = read_origin(tmp_path / "run")
    searched.config["search"].update(method="random", skipped=1)
    program = set_up_again(searched, "latest", tmp_path / "again").program
    assert program.search is None
    leaves = by_path(program.state_spec.params)
    assert {f"text_upper_0/{part}_kept" for part in parts} <= set(leaves)
    save(run_config(**{"model.tuning.skip": ("text_upper_0/attention",)}), tmp_path / "next")
    followed = read_origin(tmp_path / "next")
    followed.config["skip_from"] = str(tmp_path / "gone")
    setup = set_up_again(followed, "latest", tmp_path / "once_more")
    assert tuple(setup.config.model.tuning.skip) == ("text_upper_0/attention",)


def test_bad_input(run, file, tmp_path, capsys):
    out = f"--out={tmp_path / 'x.safetensors'}"
    for arguments, message in (
        ((f"--checkpoint={run}", f"--out={file}", *CUT), r"is there already"),
        ((f"--checkpoint={run}", out), r"--heads, --mlp: nothing is to be cut"),
        ((f"--checkpoint={run}", out, "--heads=1"), r"heads=1.0 is no share"),
        ((f"--checkpoint={run}", out, "--heads=0.1"), r"--heads: 0.1 of the 2 of"),
        ((f"--checkpoint={run}", out, "--mlp=0.5", "--blocks=x"), r"--blocks: 'x' matches no"),
        ((f"--checkpoint={tmp_path}", out, *CUT), r"--checkpoint: .* is neither a run's"),
        ((f"--checkpoint={run}", out, *CUT, "--which=7"), r"step 7"),
        ((f"--checkpoint={run}", out, *CUT, "--batches=-1"), r"--batches=-1 must be 0 or more"),
        ((f"--checkpoint={file}", out, "--mlp=0.25", "--batches=0"), r"has 1 and is to have 2"),
    ):
        assert re.search(message, failing(capsys, main, *arguments))
    error = failing(capsys, evaluate_main, str(run), "--evals=absent")
    assert re.search(r"evals\.absent: .* has no evaluator of that name", error)
    error = failing(capsys, evaluate_main, str(run), "--checkpoint=7")
    assert "step 7" in error


def test_a_run_without_a_test_split_needs_names(tmp_path, capsys):
    config = run_config()
    with config.unlocked():
        del config.evals.test
    save(config, tmp_path / "run")
    error = failing(capsys, evaluate_main, str(tmp_path / "run"))
    assert re.search(r'--evals: .* has no evaluator with on="best"\. Name some of val\.', error)
