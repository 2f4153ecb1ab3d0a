"""Golden parameter trees and shardings: a checkpoint stays readable, a plan stays a plan."""

from typing import Any

import jax
import pytest
from golden import check_golden

from vlp_jax.compress.buckets import Bucket
from vlp_jax.data.batch import batch_spec
from vlp_jax.infra.mesh import make_mesh
from vlp_jax.infra.sharding import describe, leaf_path
from vlp_jax.models.sizes import build_model, model_config
from vlp_jax.objectives.flm import FLM

SIZES = {  # pixels, vocabulary
    "tiny": (32, 8192),
    "small": (64, 8192),
    "base": (288, 50_265),
    "shared_tiny": (32, 8192),
    "towers_tiny": (32, 8192),
}


def parameter_shapes(size: str) -> Any:
    """Shapes of all parameters that FLM makes at a named size."""
    image_size, vocab_size = SIZES[size]
    flm = FLM(build_model(model_config(size), vocab_size, 4, image_size))
    spec = batch_spec(Bucket(8, image_size), 1)
    return jax.eval_shape(lambda key: flm.init(key, spec)[0], jax.random.key(0))


@pytest.mark.parametrize("size", SIZES)
def test_golden_parameters(size: str) -> None:
    leaves = jax.tree_util.tree_leaves_with_path(parameter_shapes(size))
    tree = {leaf_path(path): [leaf.dtype.name, *leaf.shape] for path, leaf in leaves}
    check_golden(f"params_{size}", tree)


def test_golden_sharding() -> None:
    mesh = make_mesh(data=2, fsdp=4)
    described = describe(mesh, parameter_shapes("base"))
    check_golden("sharding_base_2x4x1", {path: spec for path, _, spec in described})
    whole = sum(spec == () for _, _, spec in described)
    assert 0 < whole < len(described)
