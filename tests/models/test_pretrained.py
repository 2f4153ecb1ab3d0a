"""Imported weights give the outputs of the reference implementation; what does not fit is named."""

import dataclasses
import json
import pathlib
import pickle
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from public_weights import (
    FED,
    FOLDER,
    SPECIALS,
    VOCAB,
    Arrays,
    blank,
    config_for,
    golden,
    load_maker,
    model_for,
    shapes_of,
    to_npz,
    to_open_clip,
    to_timm,
)

from vlp_jax.data.augment import normalize
from vlp_jax.infra.errors import ConfigError
from vlp_jax.models.pretrained import (
    PIXELS,
    Converted,
    Metadata,
    Weights,
    WeightsError,
    check_vocabulary,
    convert_image,
    convert_text,
    load_metadata,
    load_parameters,
    merge,
    read_weights,
    save_parameters,
)
from vlp_jax.models.pretrained.resize import resize_grid
from vlp_jax.models.shared import SharedConfig, SharedModel
from vlp_jax.models.vision_language import VisionLanguageModel

TOLERANCE = {"rtol": 0, "atol": 1e-5}
IMAGE_FAMILIES = ("clip", "vit", "mae")
OTHER_NAMINGS: dict[str, tuple[str, Callable[[Arrays], Arrays]]] = {
    "open_clip": ("clip", to_open_clip),
    "timm": ("vit", to_timm),
    "npz": ("vit", to_npz),
    "mae_authors": ("mae", to_timm),
}


def weights_of(family: str, change: Callable[[Arrays], Arrays] = dict) -> Weights:
    read = read_weights(FOLDER / f"{family}.safetensors")
    return Weights(read.file, change(read.arrays), {})


def image_of(weights: Weights, model: VisionLanguageModel) -> Converted:
    # A ViT in a naming of torch does not say how pixels were normalised; MAE's decoder does.
    vit = {"vit.layernorm.weight", "norm.weight"} & weights.arrays.keys()
    mae = any(name.startswith("decoder") for name in weights.arrays)
    stated = PIXELS["half"] if vit and not mae else None
    return convert_image(weights, model.config, FED, stated)


def tower(model: VisionLanguageModel, params: Any, image: np.ndarray) -> jax.Array:
    def forward(model: VisionLanguageModel, image: jax.Array) -> jax.Array:
        return model.image_tower(normalize(image))

    return jax.jit(nn.apply(forward, model))({"params": params}, image)


def lower_states(model: VisionLanguageModel, params: Any, reference: Arrays) -> jax.Array:
    def forward(model: VisionLanguageModel, ids: jax.Array, mask: jax.Array) -> jax.Array:
        return model.encode_text_lower(ids, mask)[-1][:, 0]

    seen = np.arange(reference["ids"].shape[1]) < reference["length"][:, None]
    mask = np.broadcast_to(seen[:, None, None], (*seen.shape[:1], 1, *2 * seen.shape[1:]))
    return jax.jit(nn.apply(forward, model))({"params": params}, reference["ids"], mask)


def check_image(weights: Weights, family: str, reference: Arrays) -> None:
    model = model_for(config_for(family))
    fresh = blank(model)
    params, _ = merge(fresh, image_of(weights, model).fit(shapes_of(fresh))[0])
    out = tower(model, params, reference["image"])
    np.testing.assert_allclose(out, reference["image_states"], **TOLERANCE)


def check_text(weights: Weights, family: str, reference: Arrays) -> None:
    model = model_for(config_for(text=family))
    fresh = blank(model)
    converted = convert_text(weights, model.config, SPECIALS[family], mlm_head=True)
    params, _ = merge(fresh, converted.fit(shapes_of(fresh))[0])
    real = np.arange(reference["ids"].shape[1]) < reference["length"][:, None]
    states = lower_states(model, params, reference)
    np.testing.assert_allclose(states[real], reference["states"][real], **TOLERANCE)

    def head(model: VisionLanguageModel, last: jax.Array) -> tuple[jax.Array, ...]:
        return model.predict_vocabulary(last)

    features, kernel, bias = nn.apply(head, model)({"params": params}, reference["last"])
    logits = (np.asarray(features) @ kernel + bias)[..., : model.config.vocab_size]
    np.testing.assert_allclose(logits[real], reference["logits"][real], **TOLERANCE)


@pytest.mark.parametrize("family", IMAGE_FAMILIES)
def test_image_tower_equals_the_reference(family: str) -> None:
    check_image(weights_of(family), family, golden(family))


@pytest.mark.parametrize("family", ["vit", "mae"])
def test_a_shared_stack_takes_an_image_tower(family: str) -> None:
    """The vector that marks images starts at zero: the tokens are the reference's."""
    image = dataclasses.replace(model_for(config_for(family)).config.image, modality=True)
    model = SharedModel(SharedConfig(image, 1, VOCAB, max_positions=16, mask_id=3))
    weights, reference, fresh = weights_of(family), golden(family), blank(model)
    params, _ = merge(fresh, image_of(weights, model).fit(shapes_of(fresh))[0])
    np.testing.assert_allclose(
        tower(model, params, reference["image"]), reference["image_states"], **TOLERANCE
    )


@pytest.mark.parametrize("name", OTHER_NAMINGS)
def test_other_namings_give_the_same_parameters(name: str) -> None:
    family, change = OTHER_NAMINGS[name]
    model = model_for(config_for(family))
    expected = image_of(weights_of(family), model).params
    params = image_of(weights_of(family, change), model).params
    assert params.keys() == expected.keys()
    for path, array in params.items():
        np.testing.assert_array_equal(array, expected[path], err_msg=path)


@pytest.mark.parametrize("family", ["roberta", "bert"])
def test_text_blocks_and_head_equal_the_reference(family: str) -> None:
    check_text(weights_of(family), family, golden(family))


@pytest.mark.torch
@pytest.mark.slow
@pytest.mark.parametrize("family", ["clip", "vit", "mae", "roberta", "bert"])
def test_live_reference(family: str, tmp_path: pathlib.Path) -> None:
    """Other random models than the goldens, saved as a folder with its settings."""
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    model, reference = load_maker().FAMILIES[family](seed=17)
    model.save_pretrained(tmp_path)
    weights = read_weights(tmp_path)
    assert weights.settings["model_type"].replace("_", "").endswith(family)
    if family in SPECIALS:
        check_text(weights, family, reference)
    else:
        check_image(weights, family, reference)


@pytest.mark.parametrize(("name", "side"), [("smaller", 3), ("larger", 6)])
def test_other_image_sizes_equal_the_reference(name: str, side: int) -> None:
    """Bicubic positions, the class token apart, as the reference interpolates them."""
    reference = golden("clip")
    model = model_for(config_for(**{"data.image_size": 4 * side}))
    fresh = blank(model)
    arrays, report = image_of(weights_of("clip"), model).fit(shapes_of(fresh))
    (row,) = report.of("resized")
    assert row.parameter == "image_tower/position_embedding"
    assert row.note == f"4 x 4 -> {side} x {side}, bicubic"
    out = tower(model, merge(fresh, arrays)[0], reference[name])
    np.testing.assert_allclose(out, reference[f"{name}_states"], **TOLERANCE)


def test_resizing_keeps_what_it_must() -> None:
    table = np.random.default_rng(0).normal(size=(1, 17, 3)).astype(np.float32)
    np.testing.assert_array_equal(resize_grid(table, 17), table)
    np.testing.assert_array_equal(resize_grid(table, 50)[:, 0], table[:, 0])
    np.testing.assert_allclose(resize_grid(np.ones((1, 10, 2)), 26), 1.0, atol=1e-6)
    for turn in (np.flipud, np.fliplr, lambda grid: grid.swapaxes(0, 1)):

        def turned(table: np.ndarray, turn: Any = turn) -> np.ndarray:
            side = round((table.shape[1] - 1) ** 0.5)
            cells = turn(table[0, 1:].reshape(side, side, -1)).reshape(side * side, -1)
            return np.concatenate([table[0, :1], cells])[None]

        np.testing.assert_allclose(
            resize_grid(turned(table), 50), turned(resize_grid(table, 50)), atol=1e-6
        )


def test_pixel_conventions_are_those_of_the_batches() -> None:
    assert PIXELS["clip"] == FED


@pytest.mark.parametrize("name", [*IMAGE_FAMILIES, *OTHER_NAMINGS, *SPECIALS])
def test_report_names_every_tensor_once(name: str) -> None:
    family, change = OTHER_NAMINGS.get(name, (name, dict))
    weights = weights_of(family, change)
    if name in SPECIALS:
        model = model_for(config_for(text=family))
        converted = convert_text(weights, model.config, SPECIALS[family])
    else:
        model = model_for(config_for(family))
        converted = image_of(weights, model)
    shapes = shapes_of(blank(model))
    arrays, report = converted.fit(shapes)
    assert sorted(row.parameter for row in report.rows if row.parameter) == sorted(shapes)
    assert {row.parameter for row in report.of("used") + report.of("resized")} == set(arrays)
    assert all(row.sources for row in report.of("used"))
    assert not any(row.sources for row in report.of("new"))
    unused = [row.sources[0] for row in report.of("unused")]
    used = {source for row in report.rows if row.parameter for source in row.sources}
    assert sorted([*unused, *used]) == sorted(weights.arrays)


def test_a_last_block_and_other_towers_are_left_out() -> None:
    model = model_for(config_for())
    report = image_of(weights_of("clip"), model).fit(shapes_of(blank(model)))[1]
    unused = {row.sources[0].rpartition(".layers.")[0] for row in report.of("unused")}
    assert {"vision_model.encoder", "text_model.encoder"} < unused
    last = [r.sources[0] for r in report.of("unused") if r.sources[0].startswith("vision_model")]
    assert len(last) == 16
    assert all(".layers.2." in name for name in last)


def test_half_precision_and_old_names_of_norms() -> None:
    weights = weights_of("bert")
    model = model_for(config_for(text="bert"))
    expected = convert_text(weights, model.config, SPECIALS["bert"]).params
    old = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace(
            "LayerNorm.bias", "LayerNorm.beta"
        ): array.astype(ml_dtypes.bfloat16)
        for name, array in weights.arrays.items()
    }
    converted = convert_text(Weights(weights.file, old, {}), model.config, SPECIALS["bert"])
    assert converted.params.keys() == expected.keys()
    for path, array in converted.params.items():
        assert array.dtype == np.float32
        np.testing.assert_allclose(array, expected[path], rtol=2**-7, atol=1e-2)


def test_a_file_without_prefix_is_recognised() -> None:
    weights = weights_of("roberta")
    bare = {
        name.removeprefix("roberta."): array
        for name, array in weights.arrays.items()
        if name.startswith("roberta.")
    }
    model = model_for(config_for())
    expected = convert_text(weights, model.config, SPECIALS["roberta"])
    converted = convert_text(Weights(weights.file, bare, {}), model.config, SPECIALS["roberta"])
    assert converted.family == expected.family == "RoBERTa"
    for path, array in converted.params.items():
        np.testing.assert_array_equal(array, expected.params[path])


def without(*names: str) -> Callable[[Arrays], Arrays]:
    return lambda arrays: {k: v for k, v in arrays.items() if not k.startswith(names)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without("vision_model.post_layernorm"), "2 tensors are missing: vision_model.post_layern"),
        (without("vision_model.embeddings.class"), "missing: vision_model.embeddings.class_embed"),
        (without("vision_model.encoder.layers.0.mlp.fc1"), r"missing: .*layers\.0\.mlp\.fc1"),
        (without("vision_model"), "no image tower of CLIP, ViT or MAE"),
    ],
)
def test_damaged_or_foreign_towers_are_refused(change: Any, message: str) -> None:
    model = model_for(config_for())
    with pytest.raises(WeightsError, match=f"clip.safetensors: .*{message}"):
        image_of(weights_of("clip", change), model)


def test_a_tensor_that_clip_always_has_cannot_be_configured_away() -> None:
    """Without the check, the config that the error asks for gives a tower with other outputs."""
    weights = weights_of("clip", without("vision_model.pre_layrnorm"))
    with pytest.raises(WeightsError, match=r"2 tensors are missing: vision_model\.pre_layrnorm"):
        image_of(weights, model_for(config_for()))
    with pytest.raises(ConfigError, match=r"model\.image\.pre_norm: is False"):
        image_of(weights, model_for(config_for(**{"model.image.pre_norm": False})))


def added(name: str, *shape: int) -> Callable[[Arrays], Arrays]:
    return lambda arrays: {**arrays, name: np.ones(shape, np.float32)}


@pytest.mark.parametrize(
    ("family", "change", "message"),
    [
        ("timm", added("blocks.0.ls1.gamma", 16), r"hold 1 tensors .*blocks\.0\.ls1\.gamma"),
        ("timm", added("blocks.1.attn.q_norm.weight", 8), r"hold 1 tensors .*q_norm"),
        ("timm", added("blocks.0.1.mlp.fc1.weight", 24, 16), r"hold 1 tensors .*blocks\.0\.1"),
        ("timm", added("patch_embed.proj.weight", 16, 1, 4, 4), r"proj\.weight reads \[1, 4, 4\]"),
        ("timm", added("pos_embed", 1, 17, 15), r"pos_embed \[1, 17, 15\] cannot become"),
        ("timm", without("blocks."), r"blocks named blocks\.0"),
        ("npz", added("embedding/kernel", 1, 1, 1024, 16), r"kernel reads \[1024, 1, 1\]"),
        ("npz", added("Transformer/encoderblock_0/x", 2), r"hold 1 tensors .*block_0/x"),
    ],
)
def test_towers_of_another_architecture_are_refused(
    family: str, change: Callable[[Arrays], Arrays], message: str
) -> None:
    naming = OTHER_NAMINGS[family][1]
    weights = weights_of("vit", lambda arrays: change(naming(arrays)))
    with pytest.raises(WeightsError, match=f"of another architecture: .*{message}"):
        image_of(weights, model_for(config_for("vit")))


def test_a_resnet_of_clip_is_refused() -> None:
    arrays = {"visual.conv1.weight": np.ones((32, 3, 3, 3), np.float32)}
    weights = Weights(FOLDER / "rn50.safetensors", arrays, {})
    with pytest.raises(WeightsError, match=r"another architecture: .*transformer\.resblocks\.0"):
        convert_image(weights, model_for(config_for()).config, FED)


@pytest.mark.parametrize("part", ["crossattention.self.query", "attention.self.distance_embedding"])
def test_text_blocks_of_another_architecture_are_refused(part: str) -> None:
    name = f"roberta.encoder.layer.1.{part}.weight"
    weights = weights_of("roberta", added(name, 16, 16))
    with pytest.raises(WeightsError, match=f"another architecture: .*{name}"):
        convert_text(weights, text_config(), SPECIALS["roberta"])


def test_clip_in_the_naming_of_timm_has_no_bias_of_patches() -> None:
    norm = np.arange(32, dtype=np.float32).reshape(2, 16)

    def to_clip(arrays: Arrays) -> Arrays:
        rest = without("patch_embed.proj.bias")(to_timm(arrays))
        return {**rest, "norm_pre.weight": norm[0], "norm_pre.bias": norm[1]}

    weights = weights_of("vit", to_clip)
    model = model_for(config_for("vit", **{"model.image.pre_norm": True}))
    params = convert_image(weights, model.config, FED, PIXELS["clip"]).params
    np.testing.assert_array_equal(params["image_tower/pre_norm/scale"], norm[0])
    assert not params["image_tower/patch_embedding/bias"].any()


def test_the_encoder_of_mae_alone_is_known_by_its_settings() -> None:
    weights = weights_of("mae", without("decoder."))
    model = model_for(config_for("mae"))
    settings = {"model_type": "vit_mae"}
    converted = convert_image(Weights(weights.file, weights.arrays, settings), model.config, FED)
    assert converted.family == "MAE (transformers)"
    np.testing.assert_array_equal(
        converted.params["image_tower/patch_embedding/kernel"],
        image_of(weights_of("mae"), model).params["image_tower/patch_embedding/kernel"],
    )


def test_heads_and_activations_that_nothing_states_are_noted() -> None:
    def notes(family: str, change: Callable[[Arrays], Arrays] = dict) -> str:
        return " ".join(image_of(weights_of(family, change), model_for(config_for(family))).notes)

    assert "config.model.image.heads is 2" in notes("vit")
    assert "heads" not in notes("vit", to_npz)  # the shapes there tell
    assert "LAION" in notes("clip", to_open_clip)


@pytest.mark.parametrize(
    ("overrides", "key"),
    [
        ({"model.image.width": 32}, "model.image.width"),
        ({"model.image.mlp_width": 32}, "model.image.mlp_width"),
        ({"model.image.patch_size": 8}, "model.image.patch_size"),
        ({"model.image.depth": 4}, "model.image.depth"),
        ({"model.image.pre_norm": False}, "model.image.pre_norm"),
        ({"model.image.stem": "conv"}, "model.image.stem"),
    ],
)
def test_another_geometry_names_the_key(overrides: dict[str, Any], key: str) -> None:
    model = model_for(config_for(**overrides))
    with pytest.raises(ConfigError, match=f"config.{key}: is .*clip.safetensors"):
        image_of(weights_of("clip"), model)


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        ({"vision_config": {"num_attention_heads": 4}}, "model.image.heads"),
        ({"vision_config": {"hidden_act": "gelu"}}, "model.image.activation"),
    ],
)
def test_settings_beside_the_file_are_checked(settings: dict[str, Any], key: str) -> None:
    weights = weights_of("clip")
    model = model_for(config_for())
    with pytest.raises(ConfigError, match=f"config.{key}"):
        image_of(Weights(weights.file, weights.arrays, settings), model)


def test_what_shapes_do_not_show_is_noted() -> None:
    config = config_for(**{"model.image.activation": "gelu", "model.image.norm_eps": 1e-6})
    notes = " ".join(image_of(weights_of("clip"), model_for(config)).notes)
    assert "activation is 'gelu'" in notes
    assert "usually trained with 'quick_gelu'" in notes
    assert "norm_eps is 1e-06; in training it was 1e-05" in notes


def test_unknown_normalisation_of_pixels_is_asked_for() -> None:
    model = model_for(config_for("vit"))
    with pytest.raises(WeightsError, match="--pixels=half"):
        convert_image(weights_of("vit", to_timm), model.config, FED)


def text_config(**overrides: Any) -> Any:
    return model_for(config_for(**overrides)).config


def test_another_vocabulary_is_refused() -> None:
    weights, specials = weights_of("roberta"), SPECIALS["roberta"]
    smaller = Weights(
        weights.file,
        {k: v[:50] if "word_embeddings" in k else v for k, v in weights.arrays.items()},
        {},
    )
    with pytest.raises(ConfigError, match=r"tokenizer.path: .* 50 tokens, the tokenizer 60"):
        convert_text(smaller, text_config(), specials)
    with pytest.raises(ConfigError, match=r"its pad token has number 0, .* has 1"):
        convert_text(weights, text_config(), {**specials, "pad": 0})
    with pytest.raises(ConfigError, match=r"model.text.norm: is 'pre'"):
        convert_text(weights, text_config(**{"model.text.norm": "pre"}), specials)
    with pytest.raises(ConfigError, match=r"model.text.lower_depth: is 4, .* has 3 blocks"):
        convert_text(weights, text_config(**{"model.text.lower_depth": 4}), specials)
    with pytest.raises(WeightsError, match="neither RoBERTa nor BERT"):
        convert_text(weights_of("vit"), text_config(), specials)
    missing = Weights(weights.file, without("roberta.embeddings.word")(weights.arrays), {})
    with pytest.raises(WeightsError, match=r"missing: roberta.embeddings.word_embeddings.weight"):
        convert_text(missing, text_config(), specials)
    headless = weights_of(
        "bert", lambda there: {k: v for k, v in there.items() if not k.startswith("cls.")}
    )
    with pytest.raises(WeightsError, match=r"without the head of its pretraining.*--mlm_head out"):
        convert_text(headless, text_config(), SPECIALS["bert"], mlm_head=True)


def test_pickles_and_damaged_files_are_refused(tmp_path: pathlib.Path) -> None:
    def file(name: str, content: bytes) -> pathlib.Path:
        (tmp_path / name).write_bytes(content)
        return tmp_path / name

    for name in ("pytorch_model.bin", "vit.pth", "model.pt", "model.pkl"):
        with pytest.raises(WeightsError, match=f"{name}: a pickle.*weights_only=True"):
            read_weights(file(name, pickle.dumps({"weight": 1})))
    with pytest.raises(WeightsError, match="no kind of weights"):
        read_weights(file("model.h5", b"HDF"))
    with pytest.raises(FileNotFoundError, match=r"model\.safetensors not found"):
        read_weights(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"there is model\.pkl, model\.pt, pytorch_model"):
        read_weights(tmp_path)
    whole = (FOLDER / "vit.safetensors").read_bytes()
    for content in (whole[:100], whole[:-4], b""):
        with pytest.raises(WeightsError, match=r"cut\.safetensors: damaged"):
            read_weights(file("cut.safetensors", content))
    with pytest.raises(WeightsError, match=r"cut\.npz: damaged"):
        read_weights(file("cut.npz", b"PK\x03\x04 and no more"))
    np.savez(tmp_path / "objects.npz", array=np.array([{"a": 1}], object))
    with pytest.raises(WeightsError, match=r"objects\.npz: .*pickled"):
        read_weights(tmp_path / "objects.npz")


def test_a_model_in_several_files_is_read_by_its_index(tmp_path: pathlib.Path) -> None:
    arrays = {name: np.full(2, i, np.float32) for i, name in enumerate("abc")}
    files = {"model-00001-of-00002.safetensors": "ab", "model-00002-of-00002.safetensors": "c"}
    for file, names in files.items():
        safetensors.numpy.save_file({n: arrays[n] for n in names}, tmp_path / file)
    index = tmp_path / "model.safetensors.index.json"
    where = {name: file for file, names in files.items() for name in names}

    def write(weight_map: Any) -> None:
        index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))

    write(where)
    found = read_weights(tmp_path)
    assert found.file == index
    assert found.arrays.keys() == arrays.keys()
    assert all(np.array_equal(found.arrays[name], arrays[name]) for name in arrays)
    write({**where, "d": next(iter(files))})
    with pytest.raises(WeightsError, match="1 tensors are in none of its files: d"):
        read_weights(tmp_path)
    write({**where, "d": "model-00003-of-00003.safetensors"})
    with pytest.raises(WeightsError, match=r"model-00003-of-00003\.safetensors, which it names"):
        read_weights(tmp_path)
    write({})
    with pytest.raises(WeightsError, match="no `weight_map`"):
        read_weights(tmp_path)
    # A file of the whole model comes first, as with the library that writes such folders.
    safetensors.numpy.save_file(arrays, tmp_path / "model.safetensors")
    assert read_weights(tmp_path).file.name == "model.safetensors"


def test_npz_is_read(tmp_path: pathlib.Path) -> None:
    arrays = to_npz(weights_of("vit").arrays)
    np.savez(tmp_path / "vit.npz", **arrays)
    read = read_weights(tmp_path / "vit.npz").arrays
    assert read.keys() == arrays.keys()
    assert all((read[name] == arrays[name]).all() for name in arrays)
    # NumPy forgets the name of a dtype that it does not know, and keeps two bytes.
    half = {name: array.astype(ml_dtypes.bfloat16) for name, array in arrays.items()}
    np.savez(tmp_path / "half.npz", **half)
    for name, array in read_weights(tmp_path / "half.npz").arrays.items():
        assert array.dtype == ml_dtypes.bfloat16
        np.testing.assert_array_equal(array, half[name])


def tokenizer_json(*words: str) -> str:
    vocabulary = {word: number for number, word in enumerate(words)}
    return json.dumps({"model": {"vocab": vocabulary}, "added_tokens": []})


def test_our_files_round_trip_exactly(tmp_path: pathlib.Path) -> None:
    draw = np.random.default_rng(0).normal(size=(3, 4)).astype(np.float32)
    params = {"a/kernel": draw.T, "a/bias": draw[0], "b": draw.astype(ml_dtypes.bfloat16)[:, ::2]}
    params["scale"] = draw[0, 0, None].reshape(())
    metadata = Metadata(
        {"model": {"text": {"width": 3}}}, tokenizer_json("é"), 7, {"loss": 0.1}, {"run": "x"}
    )
    file = tmp_path / "new" / "model.safetensors"
    save_parameters(file, params, metadata)
    for path in (file, file.parent):
        loaded = load_parameters(path)
        assert loaded.keys() == params.keys()
        for name, array in loaded.items():
            assert (array.dtype, array.shape) == (params[name].dtype, params[name].shape)
            np.testing.assert_array_equal(array, params[name])
        assert load_metadata(path) == metadata
    assert [p.name for p in file.parent.iterdir()] == ["model.safetensors"]
    (tmp_path / "plain").touch()
    assert file.stat().st_mode == (tmp_path / "plain").stat().st_mode
    with pytest.raises(WeightsError, match=r"End it in \.safetensors"):
        save_parameters(tmp_path / "model.npz", params, metadata)
    with pytest.raises(WeightsError, match=r"tools\.import_weights"):
        load_parameters(FOLDER / "clip.safetensors")


def test_vocabularies_are_compared_token_by_token() -> None:
    def check(theirs: str, ours: str) -> None:
        check_vocabulary(Metadata({}, theirs), ours, "file")

    check(tokenizer_json("a", "b"), tokenizer_json("a", "b"))
    check("", tokenizer_json("a", "b"))
    with pytest.raises(ConfigError, match=r"token 1 is 'c' there and 'b' in this run"):
        check(tokenizer_json("a", "c"), tokenizer_json("a", "b"))
    with pytest.raises(ConfigError, match=r"3 tokens, not 2; token 2 is 'c' there and 'absent'"):
        check(tokenizer_json("a", "b", "c"), tokenizer_json("a", "b"))


TREE = {
    "image_tower": {"norm": np.zeros(4, np.float32), "position_embedding": np.zeros((1, 10, 4))},
    "text_embedding": {"position": {"embedding": jnp.zeros((5, 4))}},
    "text_lower_0": {"kernel": np.zeros((4, 4), np.float32)},
    "text_lower_1": {"kernel": np.zeros((4, 4), np.float32)},
    "head": np.zeros(3, np.float32),
}
LOADED = {
    "image_tower/norm": np.ones(4),
    "image_tower/position_embedding": np.ones((1, 5, 4)),
    "text_embedding/position/embedding": np.ones((3, 4)),
    "text_lower_0/kernel": np.ones((4, 4)),
    "text_lower_1/kernel": np.ones((4, 4)),
    "reconstructor_lower_0/kernel": np.ones((4, 4)),
}


def test_merge_uses_resizes_and_reports() -> None:
    merged, report = merge(TREE, LOADED)
    assert jax.tree.structure(merged) == jax.tree.structure(TREE)
    assert report.summary() == "3 used, 2 resized, 1 new, 1 unused"
    assert [row.parameter for row in report.of("new")] == ["head"]
    assert [row.parameter for row in report.of("unused")] == ["reconstructor_lower_0/kernel"]
    np.testing.assert_array_equal(merged["text_lower_1"]["kernel"], 1.0)
    assert merged["text_lower_1"]["kernel"].dtype == np.float32
    np.testing.assert_allclose(merged["image_tower"]["position_embedding"], np.ones((1, 10, 4)))
    rows = merged["text_embedding"]["position"]["embedding"]
    np.testing.assert_array_equal(rows[:, 0], [1, 1, 1, 0, 0])  # the rest stays fresh
    assert merged["head"] is TREE["head"]
    longer = {**LOADED, "text_embedding/position/embedding": np.arange(28.0).reshape(7, 4)}
    rows = merge(TREE, longer)[0]["text_embedding"]["position"]["embedding"]
    np.testing.assert_array_equal(rows, np.arange(20.0).reshape(5, 4))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"text_lower_1/kernel": None}, "1 parameters of the model are missing: text_lower_1/ker"),
        ({"text_lower_2/kernel": np.ones((4, 4))}, "1 parameters have no place .*text_lower_2"),
        ({"text_lower_0/kernel": np.ones((4, 5))}, r"text_lower_0/kernel \[4, 5\] instead of \[4,"),
        ({"image_tower/position_embedding": np.ones((1, 4, 4))}, "no square grid"),
        ({"image_tower/position_embedding": np.ones((1, 5, 6))}, r"\[1, 5, 6\] instead of"),
    ],
)
def test_merge_is_strict(change: dict[str, Any], message: str) -> None:
    loaded = {path: array for path, array in (LOADED | change).items() if array is not None}
    with pytest.raises(WeightsError, match=f"run.safetensors: .*{message}"):
        merge(TREE, loaded, "run.safetensors")


def test_merge_refuses_another_model() -> None:
    with pytest.raises(WeightsError, match="of another architecture: it holds resnet"):
        merge(TREE, {"resnet/stem": np.ones(3)})
