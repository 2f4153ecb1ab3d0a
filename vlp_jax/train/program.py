"""What a config compiles to: a sharded state, and one step for every bucket."""

from collections.abc import Mapping
from typing import Any

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from vlp_jax.compress.buckets import Bucket, StepBucket
from vlp_jax.data.batch import batch_spec
from vlp_jax.infra.mesh import batch_sharding, check_batch_size, replicated
from vlp_jax.infra.sharding import shardings
from vlp_jax.models.sizes import build_model
from vlp_jax.objectives import build_objectives
from vlp_jax.train.optim import optimizer
from vlp_jax.train.schedule import Budget, learning_rate
from vlp_jax.train.state import TrainState
from vlp_jax.train.step import StepFunction, init_state, make_step


class Program:
    """The update of a run, before any data is read.

    Attributes:
        objectives: of the run.
        state_spec: shapes, dtypes and shardings of the state.
    """

    def __init__(
        self, config: ConfigDict, vocab_size: int, mask_id: int, mesh: Mesh, budget: Budget
    ):
        """Trace the state; nothing is allocated on a device.

        Args:
            config: of the run.
            vocab_size: entries of the tokenizer.
            mask_id: its mask token.
            mesh: of the run.
            budget: of the run, total known.

        Raises:
            ConfigError, ValueError: a key does not fit; the message names it.
        """
        check_batch_size(mesh, config.data.batch_size, config.optim.accumulation)
        self.config = config
        self.mesh = mesh
        model = build_model(config.model, vocab_size, mask_id, config.data.image_size)
        self.objectives = build_objectives(config.objectives, model)
        self._rate = learning_rate(config.schedule, budget)
        spec = jax.eval_shape(self._init)
        self.state_spec: TrainState = jax.tree.map(
            lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
            spec,
            shardings(mesh, spec),
        )
        self._optimizer = optimizer(config.optim, self.state_spec.params)

    def _init(self) -> TrainState:
        shapes = {
            objective.batch_name: batch_spec(Bucket(8, self.config.data.image_size), 1)
            for objective in self.objectives
        }
        return init_state(
            self.objectives,
            shapes,
            lambda params: optimizer(self.config.optim, params),
            jax.random.key(self.config.seed),
            ema=self.config.optim.ema_decay > 0,
        )

    @property
    def batch_names(self) -> tuple[str, ...]:
        """The named batches that the objectives read, sorted."""
        return tuple(sorted({objective.batch_name for objective in self.objectives}))

    @property
    def state_shardings(self) -> Any:
        """The sharding of every leaf of the state."""
        return jax.tree.map(lambda leaf: leaf.sharding, self.state_spec)

    def init(self) -> TrainState:
        """A fresh state, created where it belongs."""
        with jax.set_mesh(self.mesh):
            return jax.jit(self._init, out_shardings=self.state_shardings)()

    def batch_specs(self, bucket: StepBucket) -> dict[str, dict[str, jax.ShapeDtypeStruct]]:
        """Shapes, dtypes and shardings of the global batches of a bucket."""
        sharding = batch_sharding(self.mesh)
        return {
            name: {
                key: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
                for key, leaf in batch_spec(sizes, self.config.data.batch_size).items()
            }
            for name, sizes in bucket
        }

    def step(self, bucket: StepBucket) -> StepFunction:
        """The update of a bucket, not compiled."""
        optim = self.config.optim
        return make_step(
            self.objectives,
            {name: section.get("weight", 1.0) for name, section in self.config.objectives.items()},
            self._optimizer,
            self._rate,
            optim.ema_decay,
            optim.accumulation,
            bucket,
        )

    def lower(self, bucket: StepBucket) -> jax.stages.Lowered:
        """Trace and lower the update of a bucket; the state is donated."""
        jitted = jax.jit(
            self.step(bucket),
            donate_argnums=0,
            out_shardings=(self.state_shardings, replicated(self.mesh)),
        )
        with jax.set_mesh(self.mesh):
            return jitted.lower(self.state_spec, self.batch_specs(bucket))

    def flops(self, text_lengths: Mapping[str, float]) -> float:
        """Model FLOPs of one example in an update: three times the forward pass.

        Args:
            text_lengths: mean tokens of the examples of every named batch.
        """
        return 3.0 * sum(o.flops(text_lengths[o.batch_name]) for o in self.objectives)
