"""What a config compiles to: a sharded state, and one step for every bucket."""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from vlp_jax.compress.buckets import Bucket, StepBucket
from vlp_jax.data.batch import FIELDS, batch_spec
from vlp_jax.data.vocabulary import Vocabulary
from vlp_jax.infra.mesh import batch_sharding, check_batch_size, replicated
from vlp_jax.infra.sharding import shardings
from vlp_jax.models.flops import image_flops
from vlp_jax.models.sizes import build_model
from vlp_jax.objectives import build_objectives
from vlp_jax.train.optim import optimizer
from vlp_jax.train.schedule import Budget, learning_rate
from vlp_jax.train.state import TrainState
from vlp_jax.train.step import StepFunction, init_state, make_step, shared_passes


class Program:
    """The update of a run, before any data is read.

    Attributes:
        objectives: of the run.
        state_spec: shapes, dtypes and shardings of the state.
    """

    def __init__(self, config: ConfigDict, vocabulary: Vocabulary, mesh: Mesh, budget: Budget):
        """Trace the state; nothing is allocated on a device.

        Args:
            config: of the run.
            vocabulary: of the run's tokenizer.
            mesh: of the run.
            budget: of the run, total known.

        Raises:
            ConfigError, ValueError: a key does not fit; the message names it.
        """
        check_batch_size(mesh, config.data.batch_size, config.optim.accumulation)
        self.config = config
        self.mesh = mesh
        model = build_model(
            config.model, vocabulary.size, vocabulary.mask_id, config.data.image_size
        )
        examples = (budget.total_steps or 0) * budget.batch_size
        self.objectives = build_objectives(config.objectives, model, vocabulary, examples)
        self._schedule = learning_rate(config.schedule, budget)
        self._total_steps = budget.total_steps or 1
        spec = jax.eval_shape(self._init, jax.random.key(0))
        self.state_spec: TrainState = jax.tree.map(
            lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
            spec,
            shardings(mesh, spec),
        )
        self._optimizer = optimizer(config.optim, self.state_spec.params)

    def _init(self, key: jax.Array) -> TrainState:
        bucket = Bucket(8, self.config.data.image_size)
        shapes = {
            name: batch_spec(bucket, 1, (*FIELDS, *self.extra_fields)) for name in self.batch_names
        }
        return init_state(
            self.objectives,
            shapes,
            lambda params: optimizer(self.config.optim, params),
            key,
            ema=self.config.optim.ema_decay > 0,
        )

    @property
    def batch_names(self) -> tuple[str, ...]:
        """The named batches that the objectives read, sorted."""
        return tuple(sorted({objective.batch_name for objective in self.objectives}))

    @property
    def extra_fields(self) -> tuple[str, ...]:
        """Names of the arrays that objectives read beside the standard ones."""
        return tuple(sorted({field for o in self.objectives for field in o.extra_fields}))

    @property
    def state_shardings(self) -> Any:
        """The sharding of every leaf of the state."""
        return jax.tree.map(lambda leaf: leaf.sharding, self.state_spec)

    def init(self) -> TrainState:
        """A fresh state, created where it belongs."""
        # The key is an argument, so that runs with other seeds find this program compiled.
        with jax.set_mesh(self.mesh):
            init = jax.jit(self._init, out_shardings=self.state_shardings)
            return init(jax.random.key(self.config.seed))

    def batch_specs(self, bucket: StepBucket) -> dict[str, dict[str, jax.ShapeDtypeStruct]]:
        """Shapes, dtypes and shardings of the global batches of a bucket."""
        sharding = batch_sharding(self.mesh)
        return {
            name: {
                key: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
                for key, leaf in batch_spec(
                    sizes, self.config.data.batch_size, (*FIELDS, *self.extra_fields)
                ).items()
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
            rate = jax.ShapeDtypeStruct((), jnp.float32, sharding=replicated(self.mesh))
            return jitted.lower(self.state_spec, self.batch_specs(bucket), rate)

    @functools.cached_property
    def _rates(self) -> np.ndarray:
        """The learning rate of every step: float32 [total]."""
        return np.asarray(jax.jit(jax.vmap(self._schedule))(jnp.arange(self._total_steps)))

    def learning_rate(self, step: int) -> jax.Array:
        """The rate of an update, where the step wants it; after the last step, that of the last."""
        rate = self._rates[min(step, self._total_steps - 1)]
        return jax.device_put(rate, replicated(self.mesh))

    def observe(self, state: TrainState, values: Mapping[str, float]) -> TrainState:
        """Let objectives learn from an evaluation: their extras after it, where they belong.

        Args:
            state: between two updates.
            values: what the evaluators gave, the same on every host.
        """
        extras = state.extras["objectives"]
        seen = {
            o.name: jax.tree.map(
                lambda new, old: jax.device_put(new, old.sharding),
                o.observe(extras[o.name], values),
                extras[o.name],
            )
            for o in self.objectives
        }
        return state.replace(extras={**state.extras, "objectives": seen})

    def flops(self, text_lengths: Mapping[str, float]) -> float:
        """Model FLOPs of one example in an update: three times the forward pass.

        An image that several objectives share is encoded, and counted, once.

        Args:
            text_lengths: mean tokens of the examples of every named batch.
        """
        total = sum(o.flops(text_lengths[o.batch_name]) for o in self.objectives)
        for shared in shared_passes(self.objectives, self.config.optim.accumulation):
            total -= (len(shared.readers) - 1) * image_flops(shared.model.config)
        return 3.0 * total
