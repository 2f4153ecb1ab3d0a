"""Round trips are bitwise on any topology; damage is named and the checkpoint before it is used."""

import json
import logging
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import chex
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from vlp_jax.infra import checkpoint_reader, manifest, sharding
from vlp_jax.infra import mesh as mesh_lib
from vlp_jax.infra.checkpoint import Checkpoints
from vlp_jax.infra.checkpoint_reader import load_params
from vlp_jax.infra.errors import ConfigError
from vlp_jax.infra.manifest import CheckpointMismatchError, DamagedCheckpointError


@flax.struct.dataclass
class State:
    step: jax.Array
    params: dict
    opt_state: tuple
    key: jax.Array


def make_state(seed=0, step=0, width=64):
    """Every kind of leaf that a training state has, on one device."""
    rng = np.random.default_rng(seed)
    params = {
        "dense": {"kernel": jnp.asarray(rng.normal(size=(width, 64)), jnp.float32)},
        "half": jnp.asarray(rng.normal(size=(64, width)), jnp.bfloat16),
        "counts": jnp.asarray(rng.integers(0, 100, size=(8,)), jnp.int32),
    }
    floats = {"dense": params["dense"], "half": params["half"]}
    optimiser = optax.chain(optax.clip(1.0), optax.adamw(1e-3))
    return State(
        step=jnp.int32(step),
        params=params,
        opt_state=optimiser.init(floats),
        key=jax.random.key(seed),
    )


def placed(state, devices, **axes):
    mesh = mesh_lib.make_mesh(devices=jax.devices()[:devices], **axes)
    return jax.device_put(state, sharding.shardings(mesh, state, sharding.fsdp_rules(min_size=1)))


def abstract(state):
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
    )


def assert_bitwise(actual, expected):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)

    def raw(leaf):
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return str(leaf.dtype), np.asarray(jax.random.key_data(leaf)).tobytes()
        return str(leaf.dtype), np.asarray(leaf).tobytes()

    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert a.shape == b.shape
        assert raw(a) == raw(b)


def write(directory, states, **options):
    with Checkpoints(directory, **options) as checkpoints:
        for step, state in states.items():
            checkpoints.save(step, state, extra={"step": step})


@pytest.mark.parametrize(
    "target", [{"devices": 8, "fsdp": 4}, {"devices": 4, "fsdp": 2}, {"devices": 1}]
)
def test_round_trip_is_bitwise_on_any_topology(tmp_path, target):
    state = placed(make_state(), 8, fsdp=8)
    wanted = abstract(placed(make_state(seed=1), **target))
    extra = {"config": {"seed": 1}, "tokenizer": '{"ä": 1}'}
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.save(7, state, extra=extra)
        restored = checkpoints.restore_latest(wanted)
    assert (restored.step, restored.extra) == (7, extra)
    assert_bitwise(restored.state, state)
    for leaf, want in zip(jax.tree.leaves(restored.state), jax.tree.leaves(wanted), strict=True):
        assert leaf.sharding.is_equivalent_to(want.sharding, leaf.ndim)


def test_an_abstract_state_without_shardings_goes_to_one_device(tmp_path):
    state = make_state()
    write(tmp_path, {1: state})
    with Checkpoints(tmp_path) as checkpoints:
        restored = checkpoints.restore_latest(jax.eval_shape(make_state))
    assert_bitwise(restored.state, state)
    assert restored.state.step.devices() == {jax.devices()[0]}


def test_nothing_there(tmp_path):
    with Checkpoints(tmp_path / "new") as checkpoints:
        assert checkpoints.restore_latest(jax.eval_shape(make_state)) is None
        assert checkpoints.latest_path is None


def test_donating_the_state_after_save_does_not_change_what_is_saved(tmp_path):
    update = jax.jit(lambda tree: jax.tree.map(lambda x: x + 1, tree), donate_argnums=0)
    state = placed({"w": jnp.zeros((2048, 1024)), "step": jnp.int32(0)}, 8, fsdp=4)
    wanted = abstract(state)
    with Checkpoints(tmp_path) as checkpoints, jax.transfer_guard("disallow"):
        for step in range(3):
            checkpoints.save(step, state)
            for _ in range(5):
                state = update(state)
        checkpoints.wait()
        restored = checkpoints.restore_latest(wanted)
        assert restored.step == 2
        values = jax.device_get(restored.state)
        np.testing.assert_array_equal(values["w"], np.full((2048, 1024), 10, np.float32))
        assert values["step"] == 10


@pytest.mark.parametrize(("mode", "best"), [("max", 2), ("min", 3)])
def test_the_best_and_the_latest_are_kept_across_runs(tmp_path, mode, best):
    scores = {1: 0.5, 2: 0.9, 3: 0.1, 4: float("nan"), 5: 0.3, 6: 0.4}
    options = {"keep_latest": 1, "best_metric": "acc", "best_mode": mode}
    for steps in ((1, 2, 3), (4, 5, 6)):  # two processes, as far as the directory can tell
        with Checkpoints(tmp_path, **options) as checkpoints:
            for step in steps:
                checkpoints.save(step, make_state(step), {"acc": scores[step], "loss": 1.0})
        assert load_params(tmp_path, "best").step == best
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted({"6", str(best)})
    assert load_params(tmp_path).step == 6


def test_a_checkpoint_without_metrics_is_no_candidate_for_the_best(tmp_path):
    with Checkpoints(tmp_path, keep_latest=1, best_metric="acc") as checkpoints:
        checkpoints.save(1, make_state(), {"acc": 0.1})
        checkpoints.save(2, make_state())
        checkpoints.save(3, make_state())
    assert {path.name for path in tmp_path.iterdir()} == {"1", "3"}


def test_a_checkpoint_may_be_ranked_after_it_was_saved(tmp_path):
    with Checkpoints(tmp_path, keep_latest=1, best_metric="acc") as checkpoints:
        checkpoints.save(1, make_state(), {"acc": 0.1})
        checkpoints.save(2, make_state())
        checkpoints.rank(2, {"acc": 0.9})
        checkpoints.save(3, make_state(), {"acc": 0.5})
    assert load_params(tmp_path, "best").step == 2
    with Checkpoints(tmp_path, keep_latest=1, best_metric="acc") as checkpoints:
        checkpoints.save(4, make_state(), {"acc": 0.6})
    assert {path.name for path in tmp_path.iterdir()} == {"2", "4"}


def test_a_checkpoint_that_lacks_the_best_metric_is_saved_and_told(tmp_path, caplog):
    with Checkpoints(tmp_path, best_metric="acc") as checkpoints:
        assert checkpoints.save(1, make_state(), {"recall": 0.1, "loss": 2.0})
    assert "best_metric: 'acc' is not among the metrics of step 1 (loss, recall)" in caplog.text
    assert load_params(tmp_path).step == 1
    with pytest.raises(FileNotFoundError, match="no ranked checkpoint"):
        load_params(tmp_path, "best")


def test_the_best_is_that_of_the_metric_the_run_ranks_by_now(tmp_path):
    """Resumed with another metric, a run must not weigh a loss against an accuracy."""
    scores = {1: {"acc": 0.9, "loss": 1.0}, 2: {"acc": 0.1, "loss": 0.1}, 3: {"acc": 0.2}}
    with Checkpoints(tmp_path, keep_latest=3, best_metric="loss", best_mode="min") as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, make_state(), scores[step])
    assert load_params(tmp_path, "best").step == 2
    with Checkpoints(tmp_path, keep_latest=3, best_metric="acc") as checkpoints:
        checkpoints.save(3, make_state(), scores[3])
    assert load_params(tmp_path, "best").step == 1
    assert load_params(tmp_path, "best", ranking=("loss", "min")).step == 2
    with Checkpoints(tmp_path, keep_latest=3, best_metric="loss", best_mode="min") as checkpoints:
        checkpoints.rank(3, {"acc": 0.2, "loss": 0.5})
    assert load_params(tmp_path, "best").step == 2, "ranked again by the metric of today"


def test_bad_options_are_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"checkpoint\.keep_latest"):
        Checkpoints(tmp_path, keep_latest=0)
    with pytest.raises(ConfigError, match=r"checkpoint\.best_mode"):
        Checkpoints(tmp_path, best_mode="most")


def test_saving_a_step_twice_keeps_the_first(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.save(1, make_state(0))
        assert not checkpoints.save(1, make_state(1))
        restored = checkpoints.restore_latest(jax.eval_shape(make_state))
    assert_bitwise(restored.state, make_state(0))


@pytest.fixture(scope="module")
def two_checkpoints(tmp_path_factory):
    directory = tmp_path_factory.mktemp("two")
    write(directory, {1: make_state(1), 2: make_state(2)})
    return directory


def largest_file(root):
    return max((p for p in root.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


def truncate(root):
    path = largest_file(root / "state")
    path.write_bytes(path.read_bytes()[:-100])


def flip_a_bit(root):
    path = largest_file(root / "state")
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def empty_directory(root):
    shutil.rmtree(root)
    root.mkdir()


DAMAGE = {
    "truncated array": (truncate, "bytes instead of"),
    "flipped bit": (flip_a_bit, "has changed"),
    "missing array": (lambda root: largest_file(root / "state").unlink(), "missing"),
    "missing metadata": (lambda root: (root / "state" / "_METADATA").unlink(), "_METADATA"),
    "missing extra": (lambda root: shutil.rmtree(root / "extra"), "extra"),
    "missing manifest": (lambda root: (root / "manifest.json").unlink(), "incomplete"),
    "half a manifest": (lambda root: (root / "manifest.json").write_text('{"step":'), "manifest"),
    "half-written directory": (empty_directory, "incomplete"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_newest_checkpoint_is_named_and_the_one_before_it_used(
    two_checkpoints, tmp_path, caplog, kind
):
    directory = tmp_path / "run"
    shutil.copytree(two_checkpoints, directory)
    damage, message = DAMAGE[kind]
    damage(directory / "2")
    with caplog.at_level(logging.WARNING, checkpoint_reader.__name__):
        assert load_params(directory).step == 1  # reads, and renames nothing
        assert (directory / "2").exists()
        caplog.clear()
        with Checkpoints(directory) as checkpoints:
            restored = checkpoints.restore_latest(jax.eval_shape(make_state))
            assert checkpoints.save(2, make_state(3))  # the step is free again
    assert restored.step == 1
    assert_bitwise(restored.state, make_state(1))
    assert str(directory / "2") in caplog.text
    assert message in caplog.text
    assert (directory / "damaged-2").is_dir()
    assert load_params(directory).step == 2


def test_all_damaged_is_an_error_with_the_remedy(two_checkpoints, tmp_path):
    directory = tmp_path / "run"
    shutil.copytree(two_checkpoints, directory)
    for step in "12":
        truncate(directory / step)
    for _ in range(2):  # nothing is renamed, so a second start does not begin from scratch
        with Checkpoints(directory) as checkpoints:
            with pytest.raises(DamagedCheckpointError, match="move it away") as error:
                checkpoints.restore_latest(jax.eval_shape(make_state))
            assert str(directory) in str(error.value)
    with pytest.raises(DamagedCheckpointError, match="every checkpoint"):
        load_params(directory)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda s: s.replace(params=s.params | {"half": jax.ShapeDtypeStruct((2,), jnp.int8)}),
            r"1 arrays differ:\n  params/half: bfloat16\[64, 64\] in .*, int8\[2\] in this run",
        ),
        (
            lambda s: s.replace(params=s.params | {"new": s.step}),
            r"params/new: nothing in the checkpoint, int32\[\] in this run",
        ),
        (lambda s: s.replace(opt_state=()), "opt_state/1/0/count: .*, nothing in this run"),
    ],
)
def test_a_state_of_another_structure_is_refused(two_checkpoints, tmp_path, change, message):
    directory = tmp_path / "run"
    shutil.copytree(two_checkpoints, directory)
    with (
        Checkpoints(directory) as checkpoints,
        pytest.raises(CheckpointMismatchError, match=message),
    ):
        checkpoints.restore_latest(change(jax.eval_shape(make_state)))
    assert (directory / "2").exists()  # it is not damaged


def test_params_are_read_without_the_state(two_checkpoints):
    loaded = load_params(two_checkpoints)
    expected = jax.device_get(make_state(2).params)
    assert (loaded.step, loaded.extra) == (2, {"step": 2})
    assert all(type(leaf) is np.ndarray for leaf in jax.tree.leaves(loaded.state))
    chex.assert_trees_all_equal(loaded.state, expected)
    assert loaded.state["half"].dtype == jnp.bfloat16
    assert load_params(two_checkpoints / "1").step == 1
    assert load_params(two_checkpoints, 1).step == 1
    moments = load_params(two_checkpoints, subtree="opt_state/1/0/mu")
    assert moments.state["dense"]["kernel"].shape == (64, 64)


@pytest.mark.parametrize("step", ["latest", 2])
def test_every_file_is_verified_once(two_checkpoints, monkeypatch, step):
    """Also where the first subtree asked for is not there: large files take a while."""
    calls = []

    def counting(root, names):
        calls.append(root)
        return checksums(root, names)

    checksums = manifest.checksums
    monkeypatch.setattr(manifest, "checksums", counting)
    loaded = load_params(two_checkpoints, step, ("extras/ema", "params"))
    chex.assert_trees_all_equal(loaded.state, jax.device_get(make_state(2).params))
    assert calls == [two_checkpoints / "2"]


def test_params_that_are_not_there(two_checkpoints, tmp_path):
    with pytest.raises(FileNotFoundError, match="no checkpoint of step 9; there are 2, 1"):
        load_params(two_checkpoints, 9)
    with pytest.raises(FileNotFoundError, match="holds no ranked checkpoint"):
        load_params(two_checkpoints, "best")
    with pytest.raises(FileNotFoundError, match="holds no checkpoint"):
        load_params(tmp_path)
    with pytest.raises(CheckpointMismatchError, match=r"no 'ema'.*key, opt_state, params, step"):
        load_params(two_checkpoints, subtree="ema")
    with pytest.raises(CheckpointMismatchError, match="no 'ema' or 'mean'"):
        load_params(two_checkpoints, subtree=("ema", "mean"))


SAVER = """
import sys
import jax.numpy as jnp
import numpy as np
from vlp_jax.infra.checkpoint import Checkpoints
random = np.random.default_rng(0).bytes(2**26)  # does not compress, so that it takes a while
state = {"params": {"w": jnp.asarray(np.frombuffer(random, np.float32).reshape(4096, 4096))}}
checkpoints = Checkpoints(sys.argv[1])
checkpoints.save(1, state)
checkpoints.wait()
checkpoints.save(2, state)
print("saving", flush=True)
checkpoints.wait()
"""


def test_kill_in_the_middle_of_a_save_leaves_the_one_before(tmp_path):
    with subprocess.Popen(
        [sys.executable, "-c", SAVER, str(tmp_path)], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout.readline() == "saving\n"
        time.sleep(0.02)
        os.kill(process.pid, signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    left = {path.name for path in tmp_path.iterdir()}
    assert "2" not in left, "the kill came too late to test anything"
    assert any(name.startswith("2.") for name in left)
    wanted = {"params": {"w": jax.ShapeDtypeStruct((4096, 4096), jnp.float32)}}
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.restore_latest(wanted).step == 1
        assert checkpoints.save(2, {"params": {"w": jnp.ones((2, 2))}})
    assert {path.name for path in tmp_path.iterdir()} == {"1", "2"}


def test_the_manifest_lists_every_file_and_array(two_checkpoints):
    manifest = json.loads((two_checkpoints / "2" / "manifest.json").read_text())
    root = pathlib.Path(two_checkpoints / "2")
    files = {p.relative_to(root).as_posix() for p in root.rglob("*") if p.is_file()}
    assert {name for name in files if "/" in name} == set(manifest["files"])
    assert manifest["arrays"]["params/half"] == [[64, 64], "bfloat16"]
    assert manifest["arrays"]["key"] == [[], "key<fry>"]
