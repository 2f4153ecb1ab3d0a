"""Keys are checked, defaults and shipped configs are frozen, and every shipped config runs."""

import importlib
import json
import pathlib
from typing import Any

import numpy as np
import pytest
from golden import check_golden
from ml_collections import ConfigDict
from tiny import BATCH, VOCABULARY, Run, make_batch, make_program

from configs import invariance, language_objective
from vlp_jax.compress.buckets import Bucket
from vlp_jax.data.batch import batch_spec
from vlp_jax.data.named import batch_sources
from vlp_jax.data.tasks.glue import TASKS
from vlp_jax.infra.errors import ConfigError
from vlp_jax.infra.mesh import global_batch
from vlp_jax.models.sizes import SHARED, build_model, kind_of
from vlp_jax.objectives import build_objectives
from vlp_jax.train.adopted import adopt_model
from vlp_jax.train.config import check_keys, default_config
from vlp_jax.train.schedule import Budget, to_steps
from vlp_jax.train.setup import with_durations

FOLDER = pathlib.Path(__file__).resolve().parents[2] / "configs"
SHIPPED = sorted(
    ".".join(file.relative_to(FOLDER).with_suffix("").parts)
    for file in FOLDER.rglob("*.py")
    if file.stem != "__init__"
)


def shipped(name: str) -> ConfigDict:
    return importlib.import_module(f"configs.{name}").get_config()


def flat(config: ConfigDict) -> dict[str, Any]:
    """Values by dotted key; an empty section is a value."""
    found: dict[str, Any] = {}

    def walk(section: dict[str, Any], prefix: str) -> None:
        for key, value in section.items():
            if isinstance(value, dict) and value:
                walk(value, f"{prefix}{key}.")
            else:
                found[f"{prefix}{key}"] = value

    walk(json.loads(config.to_json_best_effort()), "")
    return dict(sorted(found.items()))


SIZES = ["tiny", "mini", "small", "base", "resnet18", "resnet50"]
SHARED_SIZES = [f"shared_{size}" for size in ("tiny", "mini", "small", "base", "large")]


@pytest.mark.parametrize("size", SIZES + SHARED_SIZES)
def test_default_config_passes_its_own_check(size: str) -> None:
    check_keys(default_config(size))


@pytest.mark.parametrize(
    ("size", "key", "message"),
    [
        ("shared_tiny", "model.text.lower_depth", r"model\.text\.lower_depth: unknown key"),
        ("tiny", "model.text.tied", r"model\.text\.tied: unknown key"),
        ("resnet18", "model.image.depth", r"model\.image\.depth: unknown key"),
        ("tiny", "model.image.stages", r"model\.image\.stages: unknown key"),
    ],
)
def test_a_geometry_has_the_keys_of_its_kind(size: str, key: str, message: str) -> None:
    config = default_config(size)
    with config.unlocked():
        config.update_from_flattened_dict({key: 1})
    with pytest.raises(ConfigError, match=message):
        check_keys(config)


def test_a_type_that_does_not_exist_is_named() -> None:
    config = default_config("shared_tiny")
    config.model.type = "both"
    with pytest.raises(ConfigError, match=r"config\.model\.type: 'both'. Use one of 'two_stacks'"):
        check_keys(config)


@pytest.mark.parametrize("mine", ["tiny", "resnet18", "shared_tiny"])
@pytest.mark.parametrize("theirs", ["base", "resnet50", "shared_base"])
def test_a_geometry_of_any_kind_is_adopted_whole(mine: str, theirs: str) -> None:
    config = default_config(mine)
    config.model.dtype, config.model.attention = "float32", "xla"
    adopt_model(config, json.loads(default_config(theirs).model.to_json_best_effort()))
    expected = default_config(theirs)
    expected.model.dtype, expected.model.attention = "float32", "xla"
    check_keys(config)
    assert config.is_locked
    made, wanted = (build_model(c.model, 50, 3, 224) for c in (config, expected))
    assert made == wanted


def test_of_a_geometry_of_an_earlier_version_what_is_there_is_adopted() -> None:
    config, old = default_config(), default_config("base").model.to_dict()
    del old["image"]["positions"], old["image"]["drop_path"]
    adopt_model(config, old)
    assert (config.model.image.width, config.model.image.positions) == (768, "learned")


def test_golden_default_config() -> None:
    check_golden("config_default", flat(default_config()))


@pytest.mark.parametrize("name", SHIPPED)
def test_golden_shipped_config(name: str) -> None:
    check_golden(f"config_{name}", flat(shipped(name)))


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("optim.weight_decy", r"config.optim.weight_decy: unknown key. .*'weight_decay'"),
        ("modle", r"config.modle: unknown key. Perhaps you mean 'model'"),
        ("model.text.hads", r"config.model.text.hads: unknown key. Perhaps you mean 'heads'"),
        ("mesh.zzz", r"config.mesh.zzz: unknown key. Use one of data, fsdp, model"),
    ],
)
def test_unknown_keys_are_named_with_a_suggestion(path: str, message: str) -> None:
    config = default_config()
    *sections, key = path.split(".")
    target = config
    for section in sections:
        target = target[section]
    with config.unlocked():
        target[key] = 1
    with pytest.raises(ConfigError, match=message):
        check_keys(config)


def test_a_value_in_place_of_a_section_is_refused() -> None:
    config = default_config()
    with config.unlocked(), config.ignore_type():
        config.optim = 3
    with pytest.raises(ConfigError, match=r"config.optim: 3 is no section"):
        check_keys(config)


def test_named_sections_are_open() -> None:
    config = default_config()
    with config.unlocked():
        config.evals.anything = {"type": "whatever"}
        config.optim.groups.head = {"pattern": "head", "rate_factor": 5.0}
    check_keys(config)


def test_a_config_is_locked() -> None:
    with pytest.raises(AttributeError, match="seeed"):
        default_config().seeed = 1


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_config_names_its_command(name: str) -> None:
    """The docstring of a config says how it is run and on what."""
    text = importlib.import_module(f"configs.{name}").__doc__
    assert text is not None
    assert f"configs/{name.replace('.', '/')}.py" in text
    assert "Hardware" in text


@pytest.mark.parametrize("name", ["scenes:flm_bandit", "flm_base:flm_bandit"])
def test_a_bandit_decides_many_times(name: str) -> None:
    """With fewer decisions than some for each rate it would only ever try them."""
    module, argument = name.split(":")
    config = importlib.import_module(f"configs.{module}").get_config(argument)
    rule = config.objectives.language.corruption_rate
    section = with_durations(config.evals[rule.metric.partition("/")[0]])
    total = config.total_steps
    every = to_steps(section, "evals", "every", Budget(config.data.batch_size, None, total))
    assert every is not None
    assert total / every >= 6 * len(rule.arms)


def test_a_percentage_behind_a_language_objective_is_its_rate() -> None:
    assert language_objective("flm0", "c.py") == {"type": "flm", "corruption_rate": 0.0}
    assert language_objective("flm100", "c.py") == {"type": "flm", "corruption_rate": 1.0}
    assert language_objective("mlm15", "c.py") == {"type": "mlm", "rate": 0.15}
    assert language_objective("flm", "c.py") == language_objective("flm30", "c.py")
    for name in ("ar15", "flm_15", "flm101", "mlm", "flm015"):
        with pytest.raises(ValueError, match=rf"c.py: '{name}' is none of .*flmPERCENT"):
            language_objective(name, "c.py")


@pytest.mark.parametrize("task", ["vqa:vqa_v2", "nlvr2:nlvr2", "entailment:snli_ve"])
def test_official_test_splits_are_scored_whole(task: str) -> None:
    name, official = task.split(":")
    module = importlib.import_module(f"configs.transfer.{name}")
    for which, number in ((official, 0), ("pack", 0), ("scenes", 2000)):
        evals = module.get_config(which).evals
        assert evals.test.split == "test"
        assert evals.test.on == "best"
        assert evals.test.num_examples == number
        assert (evals.val.split, evals.val.num_examples) == ("val", 2000)


@pytest.mark.parametrize("name", ["captioning", "retrieval"])
def test_pictures_of_a_listed_test_split_are_scored_whole(name: str) -> None:
    module = importlib.import_module(f"configs.transfer.{name}")
    for which, val, test in (("scenes", 1000, 1000), ("pack", 130, 0), ("coco", 5000, 0)):
        evals = module.get_config(which).evals
        assert (evals.val.num_examples, evals.test.num_examples) == (val, test)


def test_every_task_of_glue_has_a_config() -> None:
    for task in TASKS:
        config = importlib.import_module("configs.transfer.glue").get_config(task)
        check_keys(config)
        assert config.data.sources.sentences.task == task
        classes = 3 if "mnli" in task else 2
        section = {"readout": "auto"}
        section |= {"scale": 5.0} if task == "stsb" else {"num_classes": classes}
        [objective] = config.objectives.values()
        assert objective.to_dict() == section
        # Ten epochs, or where these are more the length of FLAVA's preset.
        assert (config.total_epochs, config.total_steps) in ((10.0, None), (None, 33_112))
        assert (config.evals.val.num_examples, config.evals.test.num_examples) == (2000, 0)
        second = {"test_mismatched"} if task == "mnli" else set()
        assert {section.split for section in config.evals.values()} == {"val", "test"} | second
        assert config.checkpoint.best_metric == "val/score"


@pytest.mark.parametrize("task", ["vqa", "nlvr2", "entailment", "captioning", "retrieval"])
def test_what_a_reader_asks_to_set_is_a_key(task: str) -> None:
    """Its message says to set missing_images, and only keys that are there can be flags."""
    config = importlib.import_module(f"configs.transfer.{task}").get_config("pack")
    [source] = config.data.sources.values()
    assert source.missing_images == "error"


def shrunk(config: ConfigDict) -> ConfigDict:
    """The same run at a size that a test can compile; its kinds of parts stay as they are."""
    for section in config.objectives.values():
        if "readout" in section:
            section.readout = "query"  # `auto` is settled by the run's origin
        if "pool" in section:
            section.pool = "mean"
    block = {"width": 32, "heads": 2, "mlp_width": 64}
    config.model.image.update(**block, depth=1, patch_size=8)
    if kind_of(config.model)[0] == SHARED:
        config.model.reconstructor.depth = 1
    else:
        config.model.text.update(**block, lower_depth=1, upper_depth=1)
        config.model.reconstructor.depth = 2
    if "mim" in config.objectives:
        config.objectives.mim.update(decoder_width=16, decoder_depth=1, decoder_heads=2)
    config.data.image_size = 16
    config.data.batch_size = BATCH
    config.total_steps = 100
    return config


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_config_builds(name: str) -> None:
    config = shrunk(shipped(name))
    check_keys(config)
    program = make_program(config)
    assert program.state_spec.step.shape == ()
    assert {objective.batch_name for objective in program.objectives} == set(batch_sources(config))


@pytest.mark.parametrize("size", ["", "base"])
@pytest.mark.parametrize("objective", ["moco_v3", "simclr", "simsiam", "dino", "mim"])
def test_every_image_objective_has_a_config(objective: str, size: str) -> None:
    config = invariance.get_config(f"{objective},{size}")
    check_keys(config)
    model = build_model(config.model, 50, 3, config.data.image_size)
    [built] = build_objectives(config.objectives, model, VOCABULARY)
    assert built.name == objective
    patches = {"": 64, "base": 196}[size]
    assert model.config.image.view.patches == patches
    assert built.flops(0) > 0


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_config_runs_one_step(name: str) -> None:
    config = shrunk(shipped(name))
    program = make_program(config)
    bucket = tuple((name, Bucket(12, 16)) for name in program.batch_names)
    run = Run(program, program.lower(bucket).compile())
    batches = {}
    for batch, fields in program.fields.items():
        spec = batch_spec(Bucket(12, 16), program.batch_sizes[batch], fields)
        drawn = make_batch() | {"text_document": np.ones((BATCH, 12), np.int32)}
        zeros = {key: np.zeros(leaf.shape, leaf.dtype) for key, leaf in spec.items()}
        batches[batch] = global_batch(
            {key: drawn.get(key, zero) for key, zero in zeros.items()}, program.mesh
        )
    state, metrics = run.step(run.init(), batches, program.moment(0))
    assert int(state.step) == 1
    assert np.isfinite([float(value) for value in metrics.values()]).all()
    assert metrics["skipped"] == 0
