"""Model FLOPs by formula against the lowered module's own count, and parameter counts."""

import jax
import jax.numpy as jnp
import pytest
from ml_collections import ConfigDict
from tiny import tiny_config

from vlp_jax.compress.buckets import Bucket
from vlp_jax.data.batch import FIELDS, batch_spec
from vlp_jax.data.vocabulary import Vocabulary
from vlp_jax.models.sizes import build_model, model_config, parameter_table
from vlp_jax.objectives import build_objectives
from vlp_jax.objectives.flm import FLM

TOKENS, IMAGE_SIZE, ROWS = 16, 288, 4
BUCKET = Bucket(TOKENS, IMAGE_SIZE)


def base(vocabulary: int = 50_265, **changes: int) -> tuple[FLM, dict]:
    """The objective at the geometry of the recipe, and the shapes of its parameters."""
    config = model_config("base")
    config.dtype = "float32"
    config.text.dropout = 0.0  # its integer operations are no model FLOPs
    config.update_from_flattened_dict(changes)
    model = build_model(config, vocabulary, 4, IMAGE_SIZE)
    # One chunk holds all rows: a count of the lowered module takes the body of a loop once.
    objective = FLM(model, chunk_rows=10**9)
    params, _ = jax.eval_shape(
        lambda key: objective.init(key, batch_spec(BUCKET, 1)), jax.random.key(0)
    )
    return objective, params


# Of each kind of block some, which are alike, and words so few that blocks still weigh most.
DEPTHS = {
    "image.depth": 3,
    "text.lower_depth": 2,
    "text.upper_depth": 2,
    "reconstructor.depth": 4,
}


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "update"])
def test_formula_matches_the_lowered_module(backward: bool) -> None:
    objective, params = base(10_000, **DEPTHS)

    def loss(params: dict, batch: dict, rng: jax.Array) -> jax.Array:
        return objective.loss(params, {}, batch, rng, BUCKET).loss.sum

    function = jax.value_and_grad(loss) if backward else loss
    lowered = jax.jit(function).lower(params, batch_spec(BUCKET, ROWS), jax.random.key(0))
    counted = lowered.cost_analysis()["flops"] / ROWS
    expected = objective.flops(TOKENS) * (3 if backward else 1)
    assert counted == pytest.approx(expected, rel=0.03)


def test_base_has_the_parameters_of_the_recipe() -> None:
    """About 346M, in these parts (fact sheet of the paper, section 3)."""
    _, params = base()
    table = dict(parameter_table(params))
    assert table["total"] == pytest.approx(346e6, rel=0.01)
    assert table["image_tower"] == pytest.approx(80e6, rel=0.02)
    assert table["text_embedding"] == pytest.approx(39e6, rel=0.02)
    assert table["vocabulary_head"] == pytest.approx(39e6, rel=0.02)
    assert table["total"] == sum(leaf.size for leaf in jax.tree.leaves(params))


def test_flops_grow_with_the_text() -> None:
    config = tiny_config()
    objective = FLM(build_model(config.model, 50, 3, config.data.image_size))
    assert objective.flops(12.0) > objective.flops(11.5) > objective.flops(8.0) > 0


def test_unknown_size_names_the_known() -> None:
    known = r"\['base', 'co_attention_base', 'co_attention_mini', 'co_attention_small', "
    known += r"'co_attention_tiny', 'mini', 'resnet18', 'resnet50', 'shared_base', 'shared_large', "
    known += r"'shared_mini', 'shared_small', 'shared_tiny', 'small', 'tiny', "
    known += r"'towers_base', 'towers_mini', 'towers_small', 'towers_tiny', 'vilt_base'\]"
    with pytest.raises(ValueError, match=f"'huge' is none of {known}"):
        model_config("huge")


def test_parameter_table_depth() -> None:
    params = {"a": {"x": jnp.ones((2, 3)), "y": jnp.ones(4)}, "b": {"z": jnp.ones(5)}}
    assert parameter_table(params) == [("a", 10), ("b", 5), ("total", 15)]
    assert parameter_table(params, depth=2) == [("a/x", 6), ("a/y", 4), ("b/z", 5), ("total", 15)]


SHARED = {
    "mlm": {"rate": 1.0},
    "mlm_of_texts": {"type": "mlm", "rate": 1.0, "with_image": False},
    "ar": {},
    "ar_of_texts": {"type": "ar", "with_image": False},
    "flm": {},
    "itc": {},
    "itm": {},
    "itm_by_text": {"type": "itm", "readout": "bidirectional"},
    "vqa": {"num_classes": 8, "readout": "forward"},
    "nlvr2": {"readout": "query"},
    "mim": {"decoder_depth": 2},  # beside which the crop weighs little
    "mim_with_text": {"type": "mim", "decoder_depth": 1, "with_text": True},
}


@pytest.mark.parametrize("name", SHARED)
def test_formulas_of_a_shared_stack_match_the_lowered_module(name: str) -> None:
    """Images alone, texts alone, pairs as one sequence and in streams, queries."""
    config = model_config("shared_small")
    config.dtype = "float32"
    config.image.depth, config.image.patch_size, config.reconstructor.depth = 4, 16, 2
    model = build_model(config, 1000, 3, 144)
    section = {"chunk_rows": 10**9} if name.partition("_")[0] in ("mlm", "ar", "flm") else {}
    sections = {name: {**section, **SHARED[name]}}
    if name.startswith("itm"):
        sections["itc"] = {}
    built = build_objectives(ConfigDict(sections), model, Vocabulary.of_words(1000, 3))
    [objective] = [one for one in built if one.name == name]
    bucket = Bucket(48, 144)
    spec = batch_spec(bucket, ROWS, (*FIELDS, *objective.extra_fields))
    if "of_texts" in name:
        del spec["image"]
    params, extras = jax.eval_shape(lambda key: objective.init(key, spec), jax.random.key(0))

    def loss(params: dict, batch: dict, rng: jax.Array) -> jax.Array:
        return objective.loss(params, extras, batch, rng, bucket).loss.sum

    lowered = jax.jit(loss).lower(params, spec, jax.random.key(0))
    counted = lowered.cost_analysis()["flops"] / ROWS
    assert counted == pytest.approx(objective.flops(48), rel=0.04)
