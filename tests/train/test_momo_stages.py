"""Stages of the shared encoder start from one another with every tensor as it was."""

import importlib
from typing import Any

import jax
import numpy as np
import pytest

from vlp_jax.infra.errors import ConfigError
from vlp_jax.infra.sharding import by_path
from vlp_jax.models.pretrained import WeightsError
from vlp_jax.train.initial import read_origin
from vlp_jax.train.setup import Setup, prepare


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """A few sentences; with the words of scenes among them."""
    folder = tmp_path_factory.mktemp("texts")
    lines = [f"the old captain saw {n} red ships and a blue square" for n in range(400)]
    (folder / "prose.txt").write_text("\n".join(lines))
    return folder


def stage_config(stage: int, texts: Any, argument: str = "scenes,shared_tiny") -> Any:
    """The shipped config, in which the texts are those of a folder."""
    config = importlib.import_module(f"configs.momo.stage{stage}").get_config(argument)
    config.model.dtype = "float32"
    config.model.image.update(width=16, heads=2, mlp_width=32, depth=2, patch_size=8)
    config.model.text.max_positions = 64
    config.data.image_size = 16
    config.data.batch_size = 16
    config.data.window_batches = 32
    config.total_steps = 4
    config.tokenizer.vocab_size = 300
    with config.unlocked():
        config.evals = {}
        for section in config.data.sources.values():
            if section.type == "scenes":
                section.num_records = 64
        if "prose" in config.data.sources:
            del config.data.sources["phrases"]
            config.data.sources.prose.update(root=str(texts), files="*.txt")
            config.data.batches.text.update(max_text_length=32, text_edges=(32,))
        for name in {"mim", "images"} & set(config.objectives):
            config.objectives[name].update(decoder_width=8, decoder_depth=1, decoder_heads=2)
    return config


def begin(config: Any, workdir: Any, init_from: Any = "") -> tuple[Setup, dict[str, np.ndarray]]:
    """A run that has saved its first state, and that state's parameters by path."""
    config.init_from = str(init_from)
    setup = prepare(config, workdir)
    state, _ = setup.first_state()
    # Other values than a fresh state of this seed would have.
    state = state.replace(params=_moved(state.params))
    with setup.open_checkpoints() as checkpoints:
        checkpoints.save(0, state, {}, setup.checkpoint_extra())
        checkpoints.wait()
    return setup, {path: np.asarray(leaf) for path, leaf in by_path(state.params).items()}


def _moved(params: Any) -> Any:
    return jax.tree.map(lambda leaf: leaf + 0.125, params)


def started(config: Any, workdir: Any, init_from: Any) -> tuple[dict[str, np.ndarray], Any]:
    """The parameters that a run begins with, and what became of every tensor."""
    config.init_from = str(init_from)
    state, report = prepare(config, workdir).first_state()
    return {path: np.asarray(leaf) for path, leaf in by_path(state.params).items()}, report


@pytest.fixture(scope="module")
def first(texts, tmp_path_factory):
    folder = tmp_path_factory.mktemp("stage1")
    return folder, *begin(stage_config(1, texts), folder)


@pytest.fixture(scope="module")
def second(first, texts, tmp_path_factory):
    folder = tmp_path_factory.mktemp("stage2")
    return folder, *begin(stage_config(2, texts), folder, first[0])


def test_stage_two_keeps_the_stack_and_the_decoder_bit_for_bit(first, texts, tmp_path):
    folder, _, before = first
    assert {path.split("/")[0] for path in before} == {"image_tower", "mim_decoder"}
    params, report = started(stage_config(2, texts), tmp_path, folder)
    assert {row.parameter for row in report.of("used")} == set(before)
    for path, array in before.items():
        np.testing.assert_array_equal(params[path], array, err_msg=path)
    new = {row.parameter.split("/")[0] for row in report.of("new")}
    assert new == {"text_embedding", "vocabulary_head", "stream_embedding"}
    assert not report.of("unused")


@pytest.mark.slow
def test_stage_two_has_words_of_its_own(first, second):
    """Stage 1 has read no word: its tokenizer is of captions alone, and says nothing."""
    _, setup, _ = second
    pieces = [s.tokenizer.encode(["captain"], 16)[0].size for s in (setup, first[1])]
    assert pieces[0] < pieces[1]


@pytest.mark.slow
def test_stage_three_keeps_all_of_stage_two(second, texts, tmp_path):
    folder, setup, before = second
    config = stage_config(3, texts)
    params, report = started(config, tmp_path, folder)
    for path, array in before.items():
        np.testing.assert_array_equal(params[path], array, err_msg=path)
    assert {row.parameter.split("/")[0] for row in report.of("new")} == {
        "contrastive_head",
        "matching_head",
    }
    # The moments of the optimiser are fresh, and so is the warm-up.
    again = prepare(stage_config(3, texts), tmp_path / "again")
    assert again.tokenizer.to_json() != ""
    assert setup.tokenizer.to_json() == read_origin(folder).tokenizer


def test_images_alone_in_stage_three_go_on_with_their_decoder(second, texts, tmp_path):
    folder, _, before = second
    config = stage_config(3, texts, "scenes,shared_tiny,mlm15,mim+images")
    params, _ = started(config, tmp_path, folder)
    assert {path.split("/")[0] for path in params} >= {"mim_decoder"}
    assert not any(path.startswith("images_decoder") for path in params)
    for path in params:
        if path.startswith("mim_decoder"):
            np.testing.assert_array_equal(params[path], before[path], err_msg=path)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_every_batch_has_its_weight_and_rows_by_flags(stage):
    config = importlib.import_module(f"configs.momo.stage{stage}").get_config("folder,shared_tiny")
    config.data.batch_size = 64
    for section in config.data.batches.values():  # of which a flag can set what is there
        assert (section.weight, section.batch_size) == (1.0, 64)
        section.update(weight=2.0, batch_size=32)
    assert config.data.batch_size == 64


@pytest.mark.slow
def test_language_of_a_stage_may_be_free_language_modeling(second, texts, tmp_path):
    folder, _, before = second
    config = stage_config(3, texts, "scenes,shared_tiny,flm30,language+itc")
    config.model.reconstructor.depth = 1
    params, report = started(config, tmp_path, folder)
    for path in before.keys() & params.keys():
        np.testing.assert_array_equal(params[path], before[path], err_msg=path)
    assert "reconstructor_0" in {row.parameter.split("/")[0] for row in report.of("new")}
    assert params.keys().isdisjoint({path for path in before if path.startswith("mim_decoder")})


@pytest.mark.parametrize(
    ("size", "told"),
    [
        ({"width": 32, "mlp_width": 64}, r"image\.width=16 and not 32, .*differ in shape.*model"),
        ({"depth": 3}, r"image\.depth=\d and not 3, so that \d+ parameters of the .* missing"),
    ],
)
def test_a_stage_of_another_geometry_is_refused(first, texts, tmp_path, size, told):
    config = stage_config(2, texts)
    config.model.image.update(size)
    config.init_from = str(first[0])
    with pytest.raises(WeightsError, match=rf"made with config\.model\.{told}"):
        prepare(config, tmp_path)


def test_texts_without_text_are_refused(texts, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "prose.txt").write_text("\n\n")
    config = stage_config(2, tmp_path / "empty")
    with pytest.raises(ConfigError, match=r"data\.sources\.prose.*no usable text"):
        prepare(config, tmp_path / "run")


def test_words_and_pictures_do_not_share_a_batch(texts, tmp_path):
    config = stage_config(2, texts)
    config.data.sources.prose.batch = "images"
    with config.unlocked():
        del config.data.batches["text"]
    config.objectives.text.batch = "images"
    with pytest.raises(ConfigError, match=r"prose\.batch: it has no pictures"):
        prepare(config, tmp_path)
