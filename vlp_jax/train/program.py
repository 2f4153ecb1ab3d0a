"""What a config compiles to: a sharded state, and one step for every bucket."""

import dataclasses
import itertools
import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from vlp_jax.compress.buckets import Bucket, StepBucket, Views, bucket_label
from vlp_jax.data.batch import Batch, HostBatch, batch_spec
from vlp_jax.data.build import batch_fields
from vlp_jax.data.named import batch_section
from vlp_jax.data.vocabulary import Vocabulary
from vlp_jax.infra.mesh import batch_sharding, check_batch_size, global_batch, replicated
from vlp_jax.infra.sharding import by_path, leaf_path, shardings
from vlp_jax.models.encoder import Encoder
from vlp_jax.models.sizes import build_model
from vlp_jax.objectives import build_objectives
from vlp_jax.objectives.base import Objective
from vlp_jax.train.bucket_schedule import Resolved, resolve
from vlp_jax.train.mixture import Mixture
from vlp_jax.train.optim import optimizer, rate_factors, trained_only
from vlp_jax.train.schedule import TEXT_LENGTH, Budget, learning_rate
from vlp_jax.train.search import Search
from vlp_jax.train.stages import Stages, stage_of
from vlp_jax.train.state import TrainState
from vlp_jax.train.step import (
    Batches,
    GradientFunction,
    Moment,
    StepFunction,
    init_state,
    make_gradient,
    make_step,
    ratio,
    shared_passes,
)


class Program:
    """The update of a run, before any data is read.

    Attributes:
        vocabulary: of the run's tokenizer.
        objectives: of the run.
        compression: the buckets of the run and what they cost.
        schedule: which bucket each update encodes, as far as it is decided.
        longest: updates of the run, at most.
        full_steps: the budget, in updates of whole images.
        decided: buckets of the parts of an online schedule, as far as they are decided.
        state_spec: shapes, dtypes and shardings of the state.
        batch_sizes: rows of every named batch.
        fields: the arrays of every named batch, see ``data.batch``.
        mixture: by which the weights of batches change; None: they are fixed.
        stages: of the run; None: it has one.
        search: of units that a task does without; None: nothing is searched for.
        trained_parameters: how many parameters have a gradient.
        frozen: paths of those that have none.
    """

    def __init__(
        self,
        config: ConfigDict,
        vocabulary: Vocabulary,
        mesh: Mesh,
        budget: Budget,
        kept: Resolved | None = None,
        guarded: float = 0.0,
    ):
        """Trace the state; nothing is allocated on a device.

        Args:
            config: of the run.
            vocabulary: of the run's tokenizer.
            mesh: of the run.
            budget: of the run; ``total_steps`` counts updates of whole images, see
                ``train.bucket_schedule``.
            kept: the schedule of buckets that the run was begun with; None: that of the config.
            guarded: share of the updates that encode whole images, for some of theirs are guarded.

        Raises:
            ConfigError, ValueError: a key does not fit; the message names it.
        """
        self.config = config
        self.mesh = mesh
        self.vocabulary = vocabulary
        self._model = model = self._built(config.model)
        self.objectives = build_objectives(config.objectives, model, vocabulary)
        sections = {name: batch_section(config, name) for name in self.batch_names}
        for section in sections.values():
            check_batch_size(mesh, section.batch_size, config.optim.accumulation, section.key)
        self.batch_sizes = {name: section.batch_size for name, section in sections.items()}
        self.mixture = Mixture.of(config.mixture, self.batch_names)
        self.stages = Stages.of(config.stages, self.batch_names)
        self._batch_weights = {name: section.weight for name, section in sections.items()}
        self.fields = {name: self._fields(name) for name in self.batch_names}
        self.compression = kept or dataclasses.replace(
            resolve(
                config.compression,
                model.config.image.view,
                max(objective.views for objective in self.objectives),
                lambda views: self._relative_flops(views, budget.text_lengths),
                self.made_for,
            ),
            guarded=guarded,
        )
        for view in itertools.chain.from_iterable(self.compression.buckets):
            model.config.image.check_view(view, "compression.buckets")
        self.full_steps = budget.total_steps or 1
        self.schedule = self.compression.over(self.full_steps, config.seed)
        self.decided: tuple[int, ...] = ()
        self.longest = self.schedule.total_steps
        self.search = self._search_of(budget.text_lengths) if config.search.method else None
        self._learning_rate = learning_rate(config.schedule, budget)
        self._rates: np.ndarray | None = None  # of every update of the schedule, once asked for
        spec = jax.eval_shape(self._init, jax.random.key(0))
        self.state_spec: TrainState = jax.tree.map(
            lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
            spec,
            shardings(mesh, spec),
        )
        params = self.state_spec.params
        self._optimizer = optimizer(config.optim, params)
        self._factors = rate_factors(config.optim, params)
        self.frozen = frozenset(path for path, f in by_path(self._factors).items() if not f)
        self.trained_parameters = _size(trained_only(params, self._factors))
        self._trained_share = self.trained_parameters / _size(params)

    def _init(self, key: jax.Array) -> TrainState:
        bucket = Bucket(8, self.config.data.image_size)
        shapes = {name: batch_spec(bucket, 1, fields) for name, fields in self.fields.items()}
        return init_state(
            self.objectives,
            shapes,
            lambda params: optimizer(self.config.optim, params),
            key,
            ema=self.config.optim.ema_decay > 0,
            decisions=self.compression.decisions,
            mixture=self.mixture,
            stages=self.stages,
            search=self.search,
        )

    def _built(self, section: ConfigDict) -> Encoder:
        words = self.vocabulary
        return build_model(section, words.size, words.mask_id, self.config.data.image_size)

    def objectives_with(self, tuning: ConfigDict) -> tuple[Objective, ...]:
        """The run's objectives, on its model with another section ``config.model.tuning``."""
        section = ConfigDict({**self.config.model.to_dict(), "tuning": tuning.to_dict()})
        return build_objectives(self.config.objectives, self._built(section), self.vocabulary)

    def loss(
        self,
        params: Any,
        extras: Mapping[str, Any],
        batches: Batches,
        bucket: StepBucket,
        key: jax.Array,
        train: bool = False,
        objectives: Sequence[Objective] = (),
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """The loss as a run weighs it, and the metrics of its objectives, without their gradient.

        Args:
            params: of the model.
            extras: of the objectives, by name.
            batches: whole, by name.
            bucket: their sizes.
            key: PRNG key of what is drawn.
            train: whether there is dropout.
            objectives: the same ones of another model; empty: those of the run.

        Returns:
            Float32 [] each.
        """
        sizes, total = dict(bucket), jnp.zeros(())
        metrics: dict[str, jax.Array] = {}
        for number, one in enumerate(objectives or self.objectives):
            weight = self.config.objectives[one.name].get("weight", 1.0)
            output = one.loss(
                params,
                extras[one.name],
                batches[one.batch_name],
                jax.random.fold_in(key, number),
                sizes[one.batch_name],
                train=train,
            )
            total += weight * self._batch_weights[one.batch_name] * ratio(output.loss)
            metrics |= {f"{one.name}/{k}": ratio(mean) for k, mean in output.metrics.items()}
        return total, metrics

    def _search_of(self, known: Mapping[str, float]) -> Search:
        """What ``config.search`` says, with what each unit costs of the forward pass."""
        lengths = {name: known.get(name, TEXT_LENGTH) for name in self.batch_names}
        whole, costs = self.forward_flops(lengths), {}
        for unit in self._model.config.text.tuning.gated:
            tuning = ConfigDict(self.config.model.tuning.to_dict())
            tuning.update(skip=(*tuning.skip, unit), gated=())
            without = self.objectives_with(tuning)
            costs[unit] = 1.0 - self.forward_flops(lengths, objectives=without) / whole
        splits = {source.get("split", "train") for source in self.config.data.sources.values()}
        return Search.of(self.config.search, costs, splits, self.full_steps)

    @property
    def made_for(self) -> dict[str, Any]:
        """What the costs of a schedule hold for: model, objectives and image size."""
        model = json.loads(self.config.model.to_json_best_effort())
        kinds = {
            name: section.get("type", name) for name, section in self.config.objectives.items()
        }
        return {
            "model": {k: v for k, v in model.items() if k not in ("dtype", "attention")},
            "objectives": kinds,
            "data": {"image_size": self.config.data.image_size},
        }

    def image_tokens(self, step: int) -> int:
        """Tokens of an image that update ``step`` encodes, of its first view."""
        views = self.schedule.views(step)
        return (views[0] if views else self._model.config.image.view).tokens

    @property
    def batch_names(self) -> tuple[str, ...]:
        """The named batches that the objectives read, sorted."""
        return tuple(sorted({objective.batch_name for objective in self.objectives}))

    def examples(self, names: Iterable[str]) -> int:
        """Rows of these named batches together."""
        return sum(self.batch_sizes[name] for name in names)

    def _fields(self, name: str) -> tuple[str, ...]:
        mine = [objective for objective in self.objectives if objective.batch_name == name]
        extra = sorted({field for objective in mine for field in objective.extra_fields})
        return (*batch_fields(self.config, name), *extra)

    @property
    def state_shardings(self) -> Any:
        """The sharding of every leaf of the state."""
        return jax.tree.map(lambda leaf: leaf.sharding, self.state_spec)

    def init(self, given: Collection[str] = ()) -> TrainState:
        """A fresh state, created where it belongs.

        Args:
            given: paths of parameters whose values come from elsewhere. They are zeros here: of a
                run that starts from another, most of what is compiled would draw what is then
                thrown away.
        """

        def fresh(key: jax.Array) -> TrainState:
            state = self._init(key)

            def kept(path: Any, leaf: jax.Array) -> jax.Array:
                return jnp.zeros_like(leaf) if leaf_path(path) in given else leaf

            return self.started_from(jax.tree_util.tree_map_with_path(kept, state.params), state)

        # The key is an argument, so that runs with other seeds find this program compiled.
        with jax.set_mesh(self.mesh):
            init = jax.jit(fresh if given else self._init, out_shardings=self.state_shardings)
            return init(jax.random.key(self.config.seed))

    def started_from(self, params: Any, state: TrainState) -> TrainState:
        """A fresh state with other parameters, and all that is made of them made of these."""
        own = state.extras["objectives"]
        started = {o.name: o.started_from(params, own[o.name]) for o in self.objectives}
        extras = {**state.extras, "objectives": started}
        if extras["ema"]:
            extras = {**extras, "ema": jax.tree.map(jnp.copy, params)}
        return state.replace(params=params, extras=extras)

    @property
    def moment_spec(self) -> Moment:
        """Shapes, dtypes and shardings of ``moment``."""
        number = jax.ShapeDtypeStruct((), jnp.float32, sharding=replicated(self.mesh))
        return Moment._make([number] * len(Moment._fields))

    def batch_specs(
        self, bucket: StepBucket, rows: Mapping[str, int] | None = None
    ) -> dict[str, dict[str, jax.ShapeDtypeStruct]]:
        """Shapes, dtypes and shardings of the global batches of a bucket.

        Args:
            bucket: of the batches.
            rows: of every named batch; None: as many as the run's have.
        """
        rows, sharding = rows or self.batch_sizes, batch_sharding(self.mesh)
        return {
            name: {
                key: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
                for key, leaf in batch_spec(sizes, rows[name], self.fields[name]).items()
            }
            for name, sizes in bucket
        }

    def gradient(self, bucket: StepBucket) -> GradientFunction:
        """The gradient of a bucket's loss, not compiled."""
        return make_gradient(
            self.objectives,
            {name: section.get("weight", 1.0) for name, section in self.config.objectives.items()},
            self.config.optim.accumulation,
            bucket,
            self._batch_weights,
            self.config.optim.sequential and len(bucket) > 1,
            self._factors,
            self.search,
        )

    def step(self, bucket: StepBucket) -> StepFunction:
        """The update of a bucket, not compiled."""
        decay = self.config.optim.ema_decay
        return make_step(self.gradient(bucket), self._optimizer, decay, self.search)

    def lower(self, bucket: StepBucket) -> jax.stages.Lowered:
        """Trace and lower the update of a bucket; the state is donated."""
        jitted = jax.jit(
            self.step(bucket),
            donate_argnums=0,
            out_shardings=(self.state_shardings, replicated(self.mesh)),
        )
        with jax.set_mesh(self.mesh):
            return jitted.lower(self.state_spec, self.batch_specs(bucket), self.moment_spec)

    def bucket(self, planned: StepBucket, step: int) -> StepBucket:
        """What update ``step`` is compiled for: the sizes of its batches, and its views."""
        guarded = any(sizes.guarded for _, sizes in planned)
        return self.with_views(planned, () if guarded else self.schedule.views(step))

    def with_views(self, planned: StepBucket, views: Views) -> StepBucket:
        """The key of an update that encodes these views of the images of its batches."""
        return tuple(
            (
                name,
                dataclasses.replace(
                    sizes, views=views if "image" in self.fields[name] else (), guarded=False
                ),
            )
            for name, sizes in planned
        )

    def buckets(self, planned: Sequence[StepBucket]) -> tuple[StepBucket, ...]:
        """Every bucket of the run: its batches' sizes with each of the views they may meet."""
        views = {self.schedule.buckets[number] for number in np.unique(self.schedule.index)}
        if self.compression.decisions:
            views = set(self.schedule.buckets)
        if self.compression.guarded:
            views.add(())
        return tuple(self.with_views(sizes, some) for some in sorted(views) for sizes in planned)

    def label(self, bucket: StepBucket) -> str:
        """A short name of a bucket, with those of its batches if the run has several."""
        return bucket_label(bucket, named=len(self.batch_names) > 1)

    def follow(self, state: TrainState) -> None:
        """Take up what the state has decided of an online schedule."""
        if not self.compression.decisions:
            return
        numbers = jax.device_get(state.extras["decided"]).tolist()
        self.decided = tuple(number for number in numbers if number >= 0)
        self.schedule = self.compression.over(self.full_steps, self.config.seed, self.decided)
        self._rates = None

    def batches(self, host: Mapping[str, HostBatch]) -> dict[str, Batch]:
        """Host batches by name, put on the devices."""
        return {name: global_batch(batch, self.mesh) for name, batch in host.items()}

    def moment(self, step: int) -> Moment:
        """Where the run stands at an update, on its devices; after the last, as at the last."""
        step = min(step, self.schedule.total_steps - 1)
        if self._rates is None:
            spent = jnp.asarray(self.schedule.spent[:-1], jnp.float32)
            self._rates = np.asarray(jax.jit(jax.vmap(self._learning_rate))(spent))
        schedule = self.schedule
        progress, cost = np.float32(schedule.progress(step)), np.float32(schedule.cost(step))
        numbers = (self._rates[step], progress, cost)
        return Moment(*jax.device_put(numbers, replicated(self.mesh)))

    def served(self, state: TrainState) -> Any:
        """The parameters that evaluators see.

        The moving average where there is one, and what objectives put in the place of parameters
        (``Objective.served``).
        """
        params = state.extras["ema"] or state.params
        for name, key in self.served_extras.items():
            params = {**params, **state.extras["objectives"][name][key]}
        return params

    @property
    def served_extras(self) -> dict[str, str]:
        """Objective -> key of its extras that take the place of parameters, where there are any."""
        return {o.name: o.served for o in self.objectives if o.served}

    def observe(self, state: TrainState, values: Mapping[str, float]) -> TrainState:
        """Let objectives, mixture and stages learn from an evaluation: extras, where they belong.

        Args:
            state: between two updates.
            values: what the evaluators gave, the same on every host.
        """
        extras = state.extras["objectives"]
        new: dict[str, Any] = {}
        stage = following = stage_of(state.extras)
        if self.stages is not None:
            new["stage"] = self.stages.observe(state.extras["stage"], values)
            following = stage_of(new)
        if self.mixture is not None:
            read = self.batch_names if self.stages is None else self.stages.batches[stage]
            weighed = self.mixture.observe(state.extras["mixture"], values, read)
            new["mixture"] = weighed if following == stage else self.mixture.init()
        moved = {
            name: jax.device_put(tree, jax.tree.map(lambda leaf: leaf.sharding, state.extras[name]))
            for name, tree in new.items()
        }
        seen = {
            o.name: jax.tree.map(
                lambda new, old: jax.device_put(new, old.sharding),
                o.observe(extras[o.name], values),
                extras[o.name],
            )
            for o in self.objectives
        }
        return state.replace(extras={**state.extras, "objectives": seen, **moved})

    def flops(self, text_lengths: Mapping[str, float], bucket: StepBucket | None = None) -> float:
        """Model FLOPs of an example in an update, mean over its batches.

        Two forward passes, one of which is the gradient of what passes through, and a third for
        that of the parameters, of which it is as large a part as is trained.

        Args:
            text_lengths: mean tokens of the examples of every named batch.
            bucket: whose batches are read and whose views are encoded; None: all, and whole images.
        """
        return (2.0 + self._trained_share) * self.forward_flops(text_lengths, bucket)

    def forward_flops(
        self,
        text_lengths: Mapping[str, float],
        bucket: StepBucket | None = None,
        objectives: Sequence[Objective] = (),
    ) -> float:
        """Of one forward pass; what several objectives share is counted once.

        Args:
            text_lengths: see ``flops``.
            bucket: see there.
            objectives: the same ones of another model; empty: those of the run.
        """
        objectives = objectives or self.objectives
        sizes: dict[str, Bucket | None] = dict(bucket or dict.fromkeys(self.batch_names))
        total = sum(
            self.batch_sizes[o.batch_name]
            * o.flops(text_lengths[o.batch_name], sizes[o.batch_name])
            for o in objectives
            if o.batch_name in sizes
        )
        for shared in shared_passes(objectives, self.config.optim.accumulation):
            if shared.batch_name in sizes:
                name, again = shared.batch_name, len(shared.readers) - 1
                once = shared.computed.flops(text_lengths[name], sizes[name])
                total -= again * once * self.batch_sizes[name]
        return total / self.examples(sizes)

    def _relative_flops(self, views: Views, known: Mapping[str, float]) -> float:
        """FLOPs of an update of these views, as a share of one of whole images."""
        lengths = {name: known.get(name, TEXT_LENGTH) for name in self.batch_names}
        size = self.config.data.image_size
        sizes = tuple((name, Bucket(round(length), size)) for name, length in lengths.items())
        whole = self.forward_flops(lengths)
        return self.forward_flops(lengths, self.with_views(sizes, views)) / whole


def _size(tree: Any) -> int:
    """Numbers in all leaves."""
    return sum(leaf.size for leaf in jax.tree.leaves(tree))
