"""Which parameters each method trains, on every model, and what a run of it leaves alone."""

import re

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import (
    BUCKET,
    make_batch,
    make_program,
    objective_config,
    shared_config,
    towers_config,
)

from configs.transfer import classification, vqa
from vlp_jax.infra.errors import ConfigError
from vlp_jax.infra.sharding import by_path
from vlp_jax.models.similarity import cosines
from vlp_jax.models.sizes import build_model
from vlp_jax.models.tuning import is_added
from vlp_jax.models.tuning_config import units_among
from vlp_jax.objectives.tower import encode
from vlp_jax.train.config import check_keys
from vlp_jax.train.optim import rate_factors
from vlp_jax.train.search import Search
from vlp_jax.train.setup import plain
from vlp_jax.transfer.methods import METHODS, method_of, set_method

SECTION = {"num_classes": 4, "readout": "bidirectional"}
ALWAYS = re.compile("^vqa_head/|(type|stream|modality)_embedding$|/image_to_text/")
MODELS = {
    "two_stacks": None,
    "shared": lambda: shared_config().model,
    "three_towers": towers_config,
    "co_attention": lambda: towers_config(co_attention=True),
}


def config_of(name, method):
    config = objective_config("vqa", SECTION)
    if MODELS[name] is not None:
        with config.unlocked():
            config.model = MODELS[name]()
    set_method(config, method)
    return config


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", MODELS)
def test_what_is_trained(name, method):
    """Of a base that no method changes: heads always, biases, what is added, or all of it."""
    config = config_of(name, method)
    config.search.method = ""  # of so few units nothing can be chosen
    check_keys(config)
    program = make_program(config)
    factors = by_path(rate_factors(config.optim, program.state_spec.params))
    plain = by_path(make_program(config_of(name, "full")).state_spec.params)
    assert {path for path in factors if not is_added(path)} == set(plain)
    trained = {path for path, factor in factors.items() if factor}
    always = {path for path in plain if ALWAYS.search(path)}
    assert always <= trained
    added = {path for path in factors if is_added(path)}
    expected = {
        "full": set(plain),
        "head": set(),
        "bitfit": {path for path in plain if path.endswith("bias")},
    }
    # Switches are set by what searches, and have no gradient.
    moved = {path for path in added if not path.endswith("_kept")}
    assert trained - always == expected.get(method, moved) - always
    assert bool(added) == (method not in expected)
    sizes = {path: leaf.size for path, leaf in by_path(program.state_spec.params).items()}
    assert program.trained_parameters == sum(sizes[path] for path in trained)


def test_an_update_moves_what_is_trained_and_nothing_else():
    """The second update moves what reads a fresh zero, too."""
    config = config_of("co_attention", "adapter")
    program = make_program(config)
    update = program.lower(BUCKET).compile()
    state = program.init()
    begun = by_path(jax.device_get(state.params))
    fields = {
        "answer": np.tile(np.arange(10, dtype=np.int32) % 4, (16, 1)),
        "answer_score": np.full((16, 10), 0.5, np.float32),
    }
    for step in (50, 51):
        batches = program.batches({"pairs": {**make_batch(seed=step), **fields}})
        state, metrics = update(state, batches, program.moment(step))
    assert np.isfinite(metrics["loss"])
    after = by_path(jax.device_get(state.params))
    factors = by_path(rate_factors(config.optim, program.state_spec.params))
    for path, leaf in begun.items():
        assert np.array_equal(after[path], leaf) != bool(factors[path]), path


def test_a_config_takes_a_method():
    config = vqa.get_config("scenes,co_attention_mini,lora")
    check_keys(config)
    assert config.model.tuning.lora.rank == 4
    assert config.model.fusion.type == "co_attention"
    assert config.optim.groups.frozen.rate_factor == 0
    assert "tuning" not in vqa.get_config("scenes").model
    assert vqa.get_config("scenes,,head").model.image.width == 384
    searches = [vqa.get_config(f"scenes,,{method}").search for method in ("das", "adapter")]
    assert [(search.skipped, search.prior) for search in searches] == [(2, 1.0), (0, 0.0)]
    with pytest.raises(ValueError, match=r"scenes,,prefix: write .* METHOD one of full, head"):
        vqa.get_config("scenes,,prefix")
    with pytest.raises(ConfigError, match=r"method: 'prefix'\. Use one of full"):
        set_method(config, "prefix")


@pytest.mark.parametrize("size", ["small", "co_attention_mini"])
def test_a_search_has_units_to_choose_among(size):
    config = vqa.get_config(f"scenes,{size},das")
    model = build_model(config.model, 100, 0, config.data.image_size)
    units = units_among(model.config, config.model.tuning.gated, "model.tuning.gated")
    search = Search.of(config.search, dict.fromkeys(units, 0.1), {"train"}, 240)
    assert search.choice.count < len(units)


@pytest.mark.parametrize("size", ["small", "shared_small", "towers_mini", "co_attention_mini"])
def test_a_search_by_images_alone_has_the_units_that_they_pass(size):
    """All of them, whether the tower runs in a model or by itself; others save nothing there."""
    config = classification.get_config(f"scenes,{size},das")
    model = build_model(config.model, 100, 0, 32)
    units = units_among(model.config, config.model.tuning.gated, "model.tuning.gated")
    assert units == model.config.stacks["image_tower"]
    pixels = jnp.asarray(np.random.default_rng(0).normal(size=(2, 32, 32, 3)), jnp.float32)
    params = jax.jit(nn.init(lambda one: one.image_feature(one.encode_image(pixels)), model))(
        jax.random.key(0)
    )["params"]
    alone = jax.jit(lambda: cosines(units, lambda: encode(model.config.image, params, pixels)))()
    image = nn.apply(lambda one: one.image_feature(one.encode_image(pixels)), model)
    inside = jax.jit(lambda: cosines(units, lambda: image({"params": params})))()
    chex.assert_trees_all_close(alone, inside, atol=1e-4)
    costs = {**dict.fromkeys(units, 0.1), "text": 0.0}
    with pytest.raises(ConfigError, match=r"gated: text: without them no FLOPs are saved"):
        Search.of(config.search, costs, {"train"}, 240)


def test_nothing_is_tuned_that_images_alone_do_not_pass():
    for method in ("adapter", "lora", "deep_prompt"):
        config = classification.get_config(f"scenes,,{method}")
        model = build_model(config.model, 100, 0, 32)
        assert model.config.text.tuning.placed == model.config.stacks["image_tower"]
    with pytest.raises(ValueError, match=r"scenes,,shallow_prompt: .* Use deep_prompt"):
        classification.get_config("scenes,,shallow_prompt")


@pytest.mark.parametrize("method", METHODS)
def test_a_method_is_told_from_its_config(method):
    config = config_of("two_stacks", method)
    assert config.checkpoint.tunables_only == (method != "full")
    assert method_of(plain(config)) == method
    config.model.tuning.skip = ("text_upper_0/mlp",)
    assert method_of(plain(config)) == f"{method}, 1 skipped"
    config.model.tuning.adapter.kind, config.model.tuning.adapter.scale = "parallel", 3.0
    assert method_of(plain(config)) == "own, 1 skipped"


def test_a_config_without_tuning_trains_all():
    assert method_of(plain(objective_config("vqa", SECTION))) == "full"


def test_a_method_takes_the_place_of_another():
    config = config_of("two_stacks", "lora")
    set_method(config, "full")
    assert "frozen" not in config.optim.groups
    assert config.model.tuning.lora.rank == 0
