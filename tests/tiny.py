"""The smallest run that has every part: shared by the tests of models, objectives and training."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from vlp_jax.compress.buckets import Bucket, StepBucket
from vlp_jax.data.batch import FIELDS, HostBatch, batch_spec
from vlp_jax.data.vocabulary import Vocabulary
from vlp_jax.infra.mesh import global_batch, make_mesh
from vlp_jax.models.shared import SharedModel
from vlp_jax.models.sizes import build_model, model_config
from vlp_jax.models.three_towers import ThreeTowers
from vlp_jax.models.vision_language import VisionLanguageModel
from vlp_jax.objectives.base import Objective
from vlp_jax.train.config import default_config
from vlp_jax.train.program import Program
from vlp_jax.train.schedule import Budget
from vlp_jax.train.state import TrainState

VOCAB = 50
MASK_ID = 3
VOCABULARY = Vocabulary.of_words(VOCAB, MASK_ID)
IMAGE_SIZE = 16
TOKENS = 12
BATCH = 16
BUCKET: StepBucket = (("pairs", Bucket(TOKENS, IMAGE_SIZE)),)


def tiny_config(**overrides: Any) -> ConfigDict:
    """Width 32, two heads, one block in each part, float32, no dropout.

    Args:
        overrides: values by dotted key, such as ``**{"optim.accumulation": 2}``.
    """
    config = default_config("tiny")
    block = {"width": 32, "heads": 2, "mlp_width": 64}
    config.model.image.update(**block, depth=1, patch_size=8, stem="patch")
    config.model.text.update(**block, lower_depth=1, upper_depth=1)
    config.model.dtype = "float32"
    config.data.batch_size = BATCH
    config.data.image_size = IMAGE_SIZE
    config.total_steps = 100
    with config.unlocked():
        config.objectives.flm = {"weight": 1.0, "corruption_rate": 0.3}
    config.update_from_flattened_dict(overrides)
    return config


def objective_config(name: str, section: Mapping[str, Any], **overrides: Any) -> ConfigDict:
    """``tiny_config`` with one objective, of these settings, in place of FLM.

    Updates of FLM are the slowest to compile: a test that is not of it had better take another.
    """
    config = tiny_config(**overrides)
    with config.unlocked():
        config.objectives = {name: dict(section)}
    return config


def tiny_model(**overrides: Any) -> VisionLanguageModel:
    """The model of ``tiny_config``; overrides are keys of ``config.model``."""
    config = tiny_config(**{f"model.{key}": value for key, value in overrides.items()})
    model = build_model(config.model, VOCAB, MASK_ID, IMAGE_SIZE)
    assert isinstance(model, VisionLanguageModel)
    return model


def shared_config(**overrides: Any) -> ConfigDict:
    """As ``tiny_config``, of a shared stack of two blocks."""
    config = tiny_config()
    with config.unlocked():
        config.model = default_config("shared_tiny").model
    size = {"width": 32, "heads": 2, "mlp_width": 64, "depth": 2, "patch_size": 8}
    config.model.image.update(size)
    config.model.text.max_positions = 64
    config.model.reconstructor.depth = 1
    config.model.dtype = "float32"
    config.update_from_flattened_dict(overrides)
    return config


def shared_model(**overrides: Any) -> SharedModel:
    """The model of ``shared_config``; overrides are keys of ``config.model``."""
    config = shared_config(**{f"model.{key}": value for key, value in overrides.items()})
    model = build_model(config.model, VOCAB, MASK_ID, IMAGE_SIZE)
    assert isinstance(model, SharedModel)
    return model


def towers_config(co_attention: bool = False, **overrides: Any) -> ConfigDict:
    """``config.model`` of three tiny towers; overrides are keys of it."""
    config = model_config("co_attention_tiny" if co_attention else "towers_tiny")
    block = {"width": 32, "heads": 2, "mlp_width": 64, "depth": 1}
    config.image.update(block, patch_size=8)
    config.text.update(block, max_positions=64)
    config.reconstructor.depth = 1
    config.dtype = "float32"
    config.update_from_flattened_dict(overrides)
    return config


def towers_model(co_attention: bool = False, **overrides: Any) -> ThreeTowers:
    """The model of ``towers_config``."""
    model = build_model(towers_config(co_attention, **overrides), VOCAB, MASK_ID, IMAGE_SIZE)
    assert isinstance(model, ThreeTowers)
    return model


def make_batch(
    lengths: list[int] | None = None,
    tokens: int = TOKENS,
    image_size: int = IMAGE_SIZE,
    seed: int = 0,
    vocab: int = VOCAB,
) -> HostBatch:
    """A random batch: <s> = 0, </s> = 2, padding = 1, words from 4 up.

    Args:
        lengths: n of every row; by default ``BATCH`` rows of 3 to ``tokens``.
        tokens: N.
        image_size: in pixels.
        seed: of ids and pixels.
        vocab: ids stay below it.
    """
    draw = np.random.default_rng(seed)
    if lengths is None:
        lengths = draw.integers(3, tokens + 1, BATCH).tolist()
    rows = len(lengths)
    ids = draw.integers(4, vocab, (rows, tokens), np.int32)
    ids[:, 0] = 0
    for row, length in enumerate(lengths):
        ids[row, length - 1] = 2
        ids[row, length:] = 1
    return {
        "image": draw.integers(0, 256, (rows, image_size, image_size, 3), np.uint8),
        "text_ids": ids,
        "text_length": np.array(lengths, np.int32),
        "position": np.arange(rows, dtype=np.int32),
        "valid": np.ones(rows, np.bool_),
        "replaced": np.zeros(rows, np.int32),
    }


def one_device() -> Mesh:
    """A mesh of one device."""
    return make_mesh(devices=jax.devices()[:1])


def make_program(config: ConfigDict, mesh: Mesh | None = None) -> Program:
    """The program of a config, on one device by default."""
    budget = Budget(config.data.batch_size, None, config.total_steps)
    return Program(config, VOCABULARY, one_device() if mesh is None else mesh, budget)


@dataclasses.dataclass
class Run:
    """A program with its compiled update."""

    program: Program
    step: jax.stages.Compiled

    def init(self) -> TrainState:
        """A fresh state."""
        return self.program.init()

    def __call__(
        self, state: TrainState, *batches: HostBatch
    ) -> tuple[TrainState, dict[str, float]]:
        """Apply one update for each batch; the state passed in is donated."""
        for batch in batches:
            moment = self.program.moment(int(state.step))
            batches = {"pairs": global_batch(batch, self.program.mesh)}
            state, metrics = self.step(state, batches, moment)
        return state, {name: float(value) for name, value in metrics.items()}


def compile_run(config: ConfigDict, mesh: Mesh | None = None) -> Run:
    """Compile the update of ``BUCKET``."""
    program = make_program(config, mesh)
    return Run(program, program.lower(BUCKET).compile())


def lowered_flops(objective: Objective, bucket: Bucket) -> float:
    """What the lowered loss of an objective counts for an example, the gradient not included."""
    spec = batch_spec(bucket, 4, (*FIELDS, *objective.extra_fields))
    params, extras = jax.eval_shape(lambda key: objective.init(key, spec), jax.random.key(0))

    def loss(params: Any, batch: Any, key: jax.Array) -> jax.Array:
        return objective.loss(params, extras, batch, key, bucket).loss.sum

    counted = jax.jit(loss).lower(params, spec, jax.random.key(0)).cost_analysis()
    return counted["flops"] / 4
