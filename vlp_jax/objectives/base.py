"""The objective contract: pure functions over a parameter tree."""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple, Protocol

import flax.linen as nn
import jax

from vlp_jax.compress.buckets import Bucket, View, view_of
from vlp_jax.data.augment import normalize, resize
from vlp_jax.data.batch import Batch
from vlp_jax.infra.errors import ConfigError
from vlp_jax.models.dropout import dropout_noise
from vlp_jax.models.encoder import Encoder
from vlp_jax.models.flops import image_flops
from vlp_jax.models.layers import Noise

Params = Any  # nested dict of float32 arrays
Extras = Any  # nested dict of whatever an objective carries beside its parameters

# Key of a batch whose image the update has encoded: [B, I, D]. The host never sends it.
IMAGE_TOKENS = "image_tokens"
# Key of the share of the budget that is spent, float32 [], in the batches of an update. The host
# never sends it; where it is absent, as in evaluations, nothing is spent.
PROGRESS = "progress"

_SEEN = 0x5EE  # folded into a step's key for the choice of patches


class Mean(NamedTuple):
    """A mean in two parts, so that micro-batches and devices divide by the global weight.

    Attributes:
        sum: float32 [].
        weight: float32 [], what the sum is divided by once all parts are added up.
    """

    sum: jax.Array
    weight: jax.Array


class LossOutput(NamedTuple):
    """What an objective returns for a batch or a part of one.

    Attributes:
        loss: the loss as a sum and a weight; the weight depends on the batch alone, never on the
            parameters.
        extras: new extras, same structure as those passed in.
        metrics: named means to log.
        statistics: top-level entries of the parameters that the pass has renewed without a
            gradient; they replace those of the state, whatever the optimiser makes of them. Only
            of an objective that is not splittable.
    """

    loss: Mean
    extras: Extras
    metrics: Mapping[str, Mean]
    statistics: Params = {}  # noqa: RUF012 (never changed)


class Pass(Protocol):
    """What can be computed of a batch once for several objectives; equal ones are one.

    Attributes:
        key: of the batch, under which the objectives find what it gave.
    """

    @property
    def key(self) -> str: ...  # noqa: D102

    def __call__(
        self, params: Params, batch: Batch, noise: Noise = None, seen: "Seen | None" = None
    ) -> Any:
        """What the batch has under ``key``, or else computed.

        Args:
            params: of the run.
            batch: its arrays, and what the passes before gave.
            noise: of the dropout, or None.
            seen: what is encoded of the images; None: everything.
        """
        ...

    def flops(self, text_length: float, bucket: Bucket | None = None) -> float:
        """Forward FLOPs of one example, which every objective counts in its own."""
        ...


class Objective(Protocol):
    """A loss over one named batch.

    Attributes:
        name: key in ``config.objectives``; prefix of its metrics.
        batch_name: which of the run's named batches it reads.
        splittable: False where examples of a batch are coupled (contrastive losses, batch
            statistics), so that gradient accumulation must not cut the batch.
        extra_fields: keys of ``data.batch.EXTRA_FIELDS`` that it reads.
        views: how many views of a bucket it tells apart.
        served: key of its extras that hold what takes the place of parameters of the same name
            where the model is used: by evaluators, and by runs that start from this one. Empty:
            nothing does.
        passes: what its loss computes of the batch, through these alone, where the batch does not
            have it; objectives of one batch then share each. One may read those before it.
    """

    @property
    def name(self) -> str: ...  # noqa: D102
    @property
    def batch_name(self) -> str: ...  # noqa: D102
    @property
    def splittable(self) -> bool: ...  # noqa: D102
    @property
    def extra_fields(self) -> tuple[str, ...]: ...  # noqa: D102
    @property
    def views(self) -> int: ...  # noqa: D102
    @property
    def served(self) -> str: ...  # noqa: D102
    @property
    def passes(self) -> "tuple[Pass, ...]": ...  # noqa: D102
    @classmethod
    def learns_from(cls, section: Mapping[str, Any]) -> tuple[str, ...]:
        """Figures of evaluators that ``observe`` waits for, such as ``reconstruction/0.3/loss``.

        Args:
            section: of the objective in the config.
        """
        ...

    def init(
        self, rng: jax.Array, batch_spec: Mapping[str, jax.ShapeDtypeStruct]
    ) -> tuple[Params, Extras]:
        """Parameters and extras for batches of the given shapes."""
        ...

    def flops(self, text_length: float, bucket: Bucket | None = None) -> float:
        """Forward FLOPs of one example by itself; an update is counted as three times that.

        Args:
            text_length: real tokens of the text.
            bucket: whose views are encoded; None: whole images.
        """
        ...

    def loss(
        self,
        params: Params,
        extras: Extras,
        batch: Batch,
        rng: jax.Array,
        bucket: Bucket,
        train: bool = True,
    ) -> LossOutput:
        """Loss and metrics of a batch; ``rng`` is the step's key."""
        ...

    def observe(self, extras: Extras, values: Mapping[str, float]) -> Extras:
        """New extras, on the host, after evaluators gave ``values`` (the same on every host)."""
        ...

    def started_from(self, params: Params, extras: Extras) -> Extras:
        """Extras of a run that starts from parameters other than those of ``init``."""
        ...


class Defaults:
    """What most objectives have in common; see ``Objective``."""

    splittable: ClassVar[bool] = True
    extra_fields: ClassVar[tuple[str, ...]] = ()
    views: ClassVar[int] = 1
    served: ClassVar[str] = ""

    @property
    def passes(self) -> "tuple[Pass, ...]":
        """Nothing is shared."""
        return ()

    @classmethod
    def learns_from(cls, section: Mapping[str, Any]) -> tuple[str, ...]:
        """No figure of an evaluator."""
        del section
        return ()

    def observe(self, extras: Extras, values: Mapping[str, float]) -> Extras:
        """Learn nothing from evaluators."""
        del values
        return extras

    def started_from(self, params: Params, extras: Extras) -> Extras:
        """The same, for they are not made of the parameters."""
        del params
        return extras


def example_keys(rng: jax.Array, positions: jax.Array) -> jax.Array:
    """One key an example, from its global position: keys do not depend on how a batch is cut.

    Args:
        rng: key of the step.
        positions: int32 [B].

    Returns:
        keys [B].
    """
    return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(rng, positions)


def batch_noise(rng: jax.Array, batch: Batch, train: bool) -> jax.Array | None:
    """The dropout noise of a batch, its own for every micro-batch; None where nothing is dropped.

    Args:
        rng: key of the step and the objective.
        batch: or a part of it.
        train: False: no dropout.
    """
    return dropout_noise(jax.random.fold_in(rng, batch["position"][0])) if train else None


class Seen(NamedTuple):
    """What a pass of the image tower encodes of every image of a batch.

    Attributes:
        view: its sizes.
        keys: PRNG keys [B], by which patches are dropped.
    """

    view: View
    keys: jax.Array


def seen_part(
    rng: jax.Array, batch: Batch, bucket: Bucket, train: bool, index: int = 0
) -> Seen | None:
    """What a batch's bucket leaves to encode; None: everything, as always outside training.

    Args:
        rng: key of the step and the objective.
        batch: or a part of it.
        bucket: of the batch.
        train: False: everything.
        index: of the objective's view.
    """
    view = view_of(bucket, index)
    if view is None or not train:
        return None
    key = jax.random.fold_in(jax.random.fold_in(rng, _SEEN), index)
    return Seen(view, example_keys(key, batch["position"]))


def encode_seen(model: Encoder, image: jax.Array, noise: Noise, seen: Seen | None) -> jax.Array:
    """Encode what is seen of the pixels: uint8 [B, H, W, 3] -> [B, I, D]."""
    pixels = normalize(image)
    if seen is None:
        return model.encode_image(pixels, noise)
    return model.encode_image(resize(pixels, seen.view.image_size), noise, *seen)


def image_tokens(model: Encoder, batch: Batch, noise: Noise, seen: Seen | None = None) -> jax.Array:
    """Tokens of the batch's image: those that the update made for several objectives, or new ones.

    Args:
        model: bound.
        batch: or a part of it.
        noise: of the dropout, or None; not used where the tokens are there.
        seen: what is encoded; None: everything. Not used where the tokens are there.

    Returns:
        [B, I, D], the class token first.
    """
    if IMAGE_TOKENS in batch:
        return batch[IMAGE_TOKENS]
    return encode_seen(model, batch["image"], noise, seen)


def encode_image(
    model: Encoder,
    params: Params,
    batch: Batch,
    noise: Noise,
    seen: Seen | None = None,
) -> jax.Array:
    """``image_tokens`` by a model that is not bound."""

    def forward(model: Encoder) -> jax.Array:
        return image_tokens(model, batch, noise, seen)

    return nn.apply(forward, model)({"params": params})


@dataclasses.dataclass(frozen=True)
class ImagePass:
    """A ``Pass``: ``encode_image``.

    Attributes:
        model: by which.
    """

    model: Encoder
    key: ClassVar[str] = IMAGE_TOKENS

    def __call__(
        self, params: Params, batch: Batch, noise: Noise = None, seen: Seen | None = None
    ) -> jax.Array:
        """Tokens of the images, [B, I, D]."""
        return encode_image(self.model, params, batch, noise, seen)

    def flops(self, text_length: float, bucket: Bucket | None = None) -> float:
        """Forward FLOPs of one image."""
        return image_flops(self.model.config, view_of(bucket))


def check_image(name: str, with_image: bool, spec: Mapping[str, Any]) -> None:
    """Refuse a batch without images for an objective that reads texts with theirs.

    Args:
        name: of the objective.
        with_image: its key.
        spec: of the batch.

    Raises:
        ConfigError: names the key and the remedy.
    """
    if with_image and "image" not in spec:
        raise ConfigError(
            f"objectives.{name}.with_image",
            "True, but its batch has texts alone",
            "Set it to False, or read a batch with images",
        )


def check_pictures(name: str, spec: Mapping[str, Any]) -> None:
    """Refuse a batch without images for an objective that cannot do without.

    Args:
        name: of the objective.
        spec: of the batch.

    Raises:
        ConfigError: names the objective and the remedy.
    """
    if "image" not in spec:
        raise ConfigError(
            f"objectives.{name}",
            "reads texts with images, but its batch has texts alone",
            "Read a batch with images, or use text_classification or text_regression",
        )


def zeros(spec: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, jax.Array]:
    """A batch of zeros, to trace the creation of parameters with."""
    return {name: jax.numpy.zeros(leaf.shape, leaf.dtype) for name, leaf in spec.items()}
