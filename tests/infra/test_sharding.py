"""Rules decide by path and shape, alike for parameters and whatever mirrors them."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec

from vlp_jax.infra import mesh as mesh_lib
from vlp_jax.infra import sharding
from vlp_jax.infra.errors import ConfigError
from vlp_jax.infra.sharding import Rule


@pytest.fixture(scope="module")
def mesh():
    return mesh_lib.make_mesh(data=2, fsdp=4)


def params():
    def leaf(*shape):
        return jax.ShapeDtypeStruct(shape, jnp.float32)

    return {
        "block": {"kernel": leaf(256, 1024), "scan_kernel": leaf(6, 512, 512), "bias": leaf(1024)},
        "head": {"decoder_kernel": leaf(512, 384), "decoder_bias": leaf(384)},
        "odd": {"kernel": leaf(255, 1023)},
        "token": {"embedding": leaf(384, 4096)},
        "type": {"embedding": leaf(6, 4096)},
    }


EXPECTED = [
    ("block/bias", (1024,), ()),
    ("block/kernel", (256, 1024), (None, "fsdp")),
    ("block/scan_kernel", (6, 512, 512), (None, None, "fsdp")),
    ("head/decoder_bias", (384,), ()),
    ("head/decoder_kernel", (512, 384), (None, "fsdp")),  # the vocabulary, not the larger 512
    ("odd/kernel", (255, 1023), ()),
    ("token/embedding", (384, 4096), ("fsdp",)),  # the vocabulary, not the larger 4096
    ("type/embedding", (6, 4096), ()),  # never along the width, even if the rows do not divide
]


def test_default_rules(mesh):
    assert sharding.describe(mesh, params()) == EXPECTED
    specs = sharding.shardings(mesh, params())
    found = [leaf.spec for leaf in jax.tree.leaves(specs)]
    assert found == [PartitionSpec(*spec) for _, _, spec in EXPECTED]


def test_optimiser_state_follows_its_parameters(mesh):
    specs = sharding.shardings(mesh, params())
    state = jax.eval_shape(optax.adamw(1e-3).init, params())
    adam = sharding.shardings(mesh, state)[0]
    chex.assert_trees_all_equal(adam.mu, specs)
    chex.assert_trees_all_equal(adam.nu, specs)
    assert adam.count.spec == PartitionSpec()


def test_without_an_fsdp_axis_everything_is_replicated():
    specs = sharding.shardings(mesh_lib.make_mesh(), params())
    assert {leaf.spec for leaf in jax.tree.leaves(specs)} == {PartitionSpec()}


def test_the_first_match_wins_and_no_match_replicates(mesh):
    rules = [Rule("^block/kernel$", ("fsdp", "data")), Rule("kernel", (None, "fsdp"))]
    specs = sharding.shardings(mesh, params()["block"] | {"block": params()["block"]}, rules)
    assert specs["block"]["kernel"].spec == PartitionSpec("fsdp", "data")
    assert specs["kernel"].spec == PartitionSpec(None, "fsdp")
    assert specs["bias"].spec == PartitionSpec()


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (Rule("odd", ("fsdp",)), "odd/kernel.*4 parts.*255"),
        (Rule("bias", (None, "fsdp")), "only the shape"),
    ],
)
def test_a_rule_that_does_not_fit_is_refused(mesh, rule, message):
    with pytest.raises(ConfigError, match=message):
        sharding.shardings(mesh, params(), [rule])


def test_constrain_batch_spreads_the_rows(mesh):
    rows = mesh_lib.batch_sharding(mesh)

    def step(x):
        return sharding.constrain_batch(jnp.tile(x, (16, 1)))

    row = jax.device_put(np.ones((1, 4), np.float32), mesh_lib.replicated(mesh))
    with jax.set_mesh(mesh):
        assert jax.jit(step)(row).sharding.is_equivalent_to(rows, 2)
    assert jax.jit(step)(np.ones((1, 4), np.float32)).shape == (16, 4)


def test_sharded_equals_replicated(mesh):
    """One SGD step of a two-layer network is the same with FSDP and without."""
    rng = np.random.default_rng(0)
    weights = {
        "in": {"kernel": rng.normal(size=(32, 64)).astype(np.float32)},
        "out": {"kernel": rng.normal(size=(64, 16)).astype(np.float32)},
    }
    x = rng.normal(size=(8, 32)).astype(np.float32)

    def loss(w, x):
        hidden = sharding.constrain_batch(jnp.tanh(x @ w["in"]["kernel"]))
        return jnp.mean((hidden @ w["out"]["kernel"]) ** 2)

    def update(w, x):
        return jax.tree.map(lambda p, g: p - 0.1 * g, w, jax.grad(loss)(w, x))

    specs = sharding.shardings(mesh, weights, sharding.fsdp_rules(min_size=1))
    assert specs["in"]["kernel"].spec == PartitionSpec(None, "fsdp")
    batch = mesh_lib.global_batch({"x": x}, mesh)["x"]
    with jax.set_mesh(mesh):
        sharded = jax.jit(update, out_shardings=specs)(jax.device_put(weights, specs), batch)
    chex.assert_trees_all_close(sharded, jax.jit(update)(weights, x), rtol=1e-5, atol=1e-6)
