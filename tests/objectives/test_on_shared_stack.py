"""Every objective runs on a shared stack as it is, alone and with others, on any devices."""

import chex
import jax
import numpy as np
import pytest
from ml_collections import ConfigDict
from tiny import (
    BATCH,
    BUCKET,
    VOCABULARY,
    compile_run,
    make_batch,
    shared_config,
    shared_model,
)

from vlp_jax.data.batch import FIELDS, batch_spec
from vlp_jax.infra.mesh import make_mesh
from vlp_jax.infra.sharding import by_path
from vlp_jax.objectives import OBJECTIVES, build_objectives, captioner

NEEDED = {
    "vqa": {"num_classes": 4},
    "entailment": {"num_classes": 3, "readout": "bidirectional"},
    "image_classification": {"num_classes": 3},
    "mim": {"decoder_width": 16, "decoder_depth": 1, "decoder_heads": 2, "with_text": True},
    "itm": {"readout": "forward"},
    "text_classification": {"num_classes": 3, "readout": "bidirectional"},
}


@pytest.mark.parametrize("name", sorted(OBJECTIVES))
def test_every_objective_has_a_loss_and_its_gradient(name):
    """Traced, not compiled: shapes fit, and the gradient is a tree of parameters of the model."""
    model = shared_model()
    config = ConfigDict({name: NEEDED.get(name, {})})
    if name == "itm":
        config.itc = {}
    built = {one.name: one for one in build_objectives(config, model, VOCABULARY)}
    objective, [(_, sizes)] = built[name], BUCKET
    spec = batch_spec(sizes, BATCH, (*FIELDS, *objective.extra_fields))
    params, extras = jax.eval_shape(lambda key: objective.init(key, spec), jax.random.key(0))

    def total(params, extras, batch, key):
        return objective.loss(params, extras, batch, key, sizes).loss.sum

    gradient = jax.eval_shape(jax.grad(total), params, extras, spec, jax.random.key(0))
    assert jax.tree.map(np.shape, gradient) == jax.tree.map(np.shape, params)
    assert {"class_token", "modality_embedding", "block_01"} <= params["image_tower"].keys()
    assert objective.flops(10) > 0


@pytest.mark.slow
def test_eight_devices_equal_one():
    """One sequence, streams beside an image, and an image alone, of one shared embedding."""
    config = shared_config()
    with config.unlocked():
        config.objectives = {"ar": {}, "itc": {"embedding_dim": 16}, "mlm": {}}
    results = []
    for mesh in (None, make_mesh(data=4, fsdp=2)):
        run = compile_run(config, mesh)
        state, metrics = run(run.init(), make_batch())
        results.append((jax.device_get(state.params), metrics))
    for name, value in results[0][1].items():
        assert results[1][1][name] == pytest.approx(value, rel=2e-4, abs=1e-5), name
    chex.assert_trees_all_close(results[0][0], results[1][0], atol=2e-4)
    assert "image_projection" not in results[0][0]
    assert not any(path.startswith("text_lower") for path in by_path(results[0][0]))


def test_captions_are_grown_by_what_has_read_images():
    sections = {"ar": {}, "flm": {}, "mlm": {}, "text": {"type": "ar", "with_image": False}}
    sections["halves"] = {
        "type": "flm",
        "loss_weights": {"forward": 0.0, "reverse": 1.0, "reconstruction": 1.0},
    }
    model = shared_model()
    objectives = build_objectives(ConfigDict(sections), model, VOCABULARY)
    grown_by = {one.name: captioner(one) for one in objectives}
    assert grown_by == {"ar": model, "flm": model, "mlm": None, "text": None, "halves": None}
