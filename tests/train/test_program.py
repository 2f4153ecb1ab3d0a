"""One trace a bucket, refusals before any device time, and FLOPs."""

from typing import Any

import chex
import jax
import pytest
from tiny import BATCH, IMAGE_SIZE, TOKENS, make_program, tiny_config

from vlp_jax.compress.buckets import Bucket, StepBucket
from vlp_jax.infra.errors import ConfigError
from vlp_jax.infra.mesh import make_mesh
from vlp_jax.models.flops import image_flops
from vlp_jax.objectives.flm import FLM
from vlp_jax.train import program as program_module

LENGTHS = (8, TOKENS)


def bucket_of(tokens: int) -> StepBucket:
    return (("pairs", Bucket(tokens, IMAGE_SIZE)),)


def test_one_trace_a_bucket(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither the step nor the loss inside it is traced twice; buckets differ in their shapes."""
    make_step, loss = program_module.make_step, FLM.loss
    steps, losses = [], []

    def make_counted(*args: Any) -> Any:
        chex.clear_trace_counter()  # it counts by name, and every step is called `step`
        steps.append(chex.assert_max_traces(make_step(*args), n=1))
        return steps[-1]

    def counted_loss(self: FLM, params: Any, extras: Any, batch: Any, *rest: Any) -> Any:
        losses.append(batch["text_ids"].shape)
        return loss(self, params, extras, batch, *rest)

    monkeypatch.setattr(program_module, "make_step", make_counted)
    monkeypatch.setattr(FLM, "loss", counted_loss)
    program = make_program(tiny_config())
    lowered = [program.lower(bucket_of(tokens)) for tokens in LENGTHS]
    assert len(steps) == 2
    assert losses == [(BATCH, tokens) for tokens in LENGTHS]
    for tokens, module in zip(LENGTHS, lowered, strict=True):
        assert f"tensor<{BATCH}x{tokens}xi32>" in module.as_text()


def test_state_is_traced_and_not_allocated() -> None:
    program = make_program(tiny_config(), make_mesh(data=2, fsdp=4))
    for leaf in jax.tree.leaves(program.state_spec):
        assert isinstance(leaf, jax.ShapeDtypeStruct)
        assert leaf.sharding.mesh.shape == {"data": 2, "fsdp": 4, "model": 1}
    specs = program.batch_specs(bucket_of(TOKENS))["pairs"]
    assert specs["text_ids"].shape == (BATCH, TOKENS)
    assert specs["image"].sharding.shard_shape(specs["image"].shape)[0] == BATCH // 8


def test_extras_follow_the_config() -> None:
    assert make_program(tiny_config()).state_spec.extras["ema"] == {}
    state = make_program(tiny_config(**{"optim.ema_decay": 0.9})).state_spec
    chex.assert_trees_all_equal_shapes(state.extras["ema"], state.params)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"data.batch_size": 12}, r"config.data.batch_size: 12 rows .* Use a multiple of 8"),
        ({"optim.accumulation": 4}, r"config.data.batch_size: 16 rows .* 4 micro-batches"),
        ({"objectives.flm.corruption_rate": 2.0}, r"config.objectives.flm.corruption_rate: 2.0"),
        ({"data.image_size": 20}, r"data.image_size=20"),
        ({"schedule.decay": "none"}, r"config.schedule.decay"),
    ],
)
def test_misfits_name_the_key(overrides: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_program(tiny_config(**overrides), make_mesh())


def test_config_error_is_a_value_error() -> None:
    assert issubclass(ConfigError, ValueError)


def test_flops_are_those_of_the_objectives() -> None:
    program = make_program(tiny_config())
    (flm,) = program.objectives
    assert program.flops({"pairs": 9.5}) == 3 * flm.flops(9.5)


@pytest.mark.parametrize(("accumulation", "passes"), [(1, 1), (2, 2)])
def test_flops_count_a_shared_pass_once(accumulation: int, passes: int) -> None:
    """FLM encodes the image itself where it is split into micro-batches; ITC and ITM embed once."""
    config = tiny_config(**{"optim.accumulation": accumulation})
    with config.unlocked():
        config.objectives = {name: {} for name in ("flm", "itc", "itm")}
    program = make_program(config)
    image = image_flops(program.objectives[0].model.config)
    texts = sum(objective.flops(9.5) - image for objective in program.objectives)
    texts -= program.objectives[1].dual_encoder.flops(9.5)
    assert program.flops({"pairs": 9.5}) == pytest.approx(3 * (texts + passes * image), rel=1e-12)
