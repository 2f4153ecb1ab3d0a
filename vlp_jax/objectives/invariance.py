"""Invariance to augmentations: SimCLR, SimSiam and MoCo v3 over the shared image tower.

Two random views of every image pass the image tower, which lies in the parameters where every
other objective looks for it, so that a run of theirs can start from it. Recipes: fact sheet of
accelerated invariance pretraining, section 7.

What each pass encodes may be compressed (``vlp_jax.compress``): a bucket's first view is that of
the query, the second that of the key, whose network is a moving average and is not trained
(MoCo v3); in SimCLR and SimSiam they are the first and the second picture. The same crop is made at
the size that each pass encodes.
"""

import abc
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import optax

from vlp_jax.compress.buckets import Bucket, View, view_of
from vlp_jax.data.augment import Recipe
from vlp_jax.data.batch import PAIRS, Batch
from vlp_jax.infra.errors import ConfigError
from vlp_jax.models.encoder import Encoder
from vlp_jax.models.flops import tower_flops
from vlp_jax.models.heads import ProjectionHead, PrototypeHead, unit
from vlp_jax.models.vit import ViTConfig
from vlp_jax.objectives.base import (
    PROGRESS,
    Defaults,
    Extras,
    LossOutput,
    Mean,
    Params,
    Seen,
    batch_noise,
    seen_part,
)
from vlp_jax.objectives.similarity import info_nce, nt_xent, spread, valid_mean
from vlp_jax.objectives.tower import (
    check_no_dropout,
    check_share,
    encode,
    init_tower,
    random_pixels,
    side_by_side,
    size_seen,
    statistics,
    tower_params,
    view_recipe,
)

_PATHS = 0xD9  # folded into a picture's key for the paths that are dropped

Embedded = tuple[jax.Array, ...]
Embeddings = tuple[Embedded, Params]  # with the parameters, whose statistics the passes renew
Compared = tuple[jax.Array, Mapping[str, Mean]]


class Drawn(NamedTuple):
    """What a pass embeds: the arguments of ``Objective.loss`` of these names."""

    batch: Batch
    rng: jax.Array
    bucket: Bucket
    train: bool


class Look(NamedTuple):
    """What the tower reads of every image.

    Attributes:
        picture: which random view of it.
        seen: what is encoded of that; None: all, at the tower's own size.
    """

    picture: int
    seen: Seen | None

    @property
    def view(self) -> View | None:
        """Its sizes; None: the tower's own."""
        return self.seen.view if self.seen else None


class Heads(NamedTuple):
    """What an objective puts on the class token.

    Attributes:
        projector: to the space that is compared.
        predictor: from the query's embedding to the key's; None: there is none.
    """

    projector: ProjectionHead | PrototypeHead
    predictor: ProjectionHead | None


@dataclasses.dataclass(frozen=True)
class Invariance(Defaults, abc.ABC):
    """Two views of an image, embedded by the tower and a projector.

    Attributes:
        model: the shared encoder, of which only the image tower is used.
        name: key in ``config.objectives``.
        batch_name: named batch it reads.
        hidden_dim: of the heads.
        embedding_dim: of the projector's output.
        augment: keys of ``data.augment.Recipe`` for both views.
        augment_second: the same for the second view alone.
    """

    model: Encoder
    name: str
    batch_name: str = PAIRS
    hidden_dim: int = 4096
    embedding_dim: int = 256
    augment: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    augment_second: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    splittable: ClassVar[bool] = False
    views: ClassVar[int] = 2
    # What the recipe of a view is where the config does not say otherwise.
    widths: ClassVar[tuple[str, ...]] = ("hidden_dim", "embedding_dim")
    first_recipe: ClassVar[Recipe] = Recipe()
    second_recipe: ClassVar[Recipe] = Recipe()

    def __post_init__(self) -> None:
        for key in self.widths:
            width = getattr(self, key)
            if not isinstance(width, int) or isinstance(width, bool) or width < 1:
                raise ConfigError(
                    f"objectives.{self.name}.{key}", f"{width!r} features", "Use 1 or more"
                )
        check_no_dropout(self.model, self.name)
        _ = self.recipes  # checks its keys

    @property
    def recipes(self) -> tuple[Recipe, ...]:
        """How each of the two pictures is made; the last counts for those beyond."""
        key = f"objectives.{self.name}.augment"
        return (
            view_recipe(self.first_recipe, self.augment, key),
            view_recipe(
                self.second_recipe, {**self.augment, **self.augment_second}, f"{key}_second"
            ),
        )

    @property
    @abc.abstractmethod
    def heads(self) -> Heads:
        """Its heads."""

    @abc.abstractmethod
    def embeddings(self, params: Params, target: Params, drawn: Drawn) -> Embeddings:
        """Unit vectors that ``compare`` takes, float32 [B, E] each; both views' come first.

        Args:
            params: of the run.
            target: what makes the keys, see ``renewed``.
            drawn: what is embedded.
        """

    @abc.abstractmethod
    def compare(self, embedded: Embedded, valid: jax.Array) -> Compared:
        """The loss of every image, float32 [B], and figures to log."""

    def renewed(self, params: Params, extras: Extras, drawn: Drawn) -> tuple[Extras, Params]:
        """Extras after this update, and the parameters that make its keys."""
        del drawn
        return extras, params

    def loss(
        self,
        params: Params,
        extras: Extras,
        batch: Batch,
        rng: jax.Array,
        bucket: Bucket,
        train: bool = True,
    ) -> LossOutput:
        """Mean over the valid images of what ``compare`` gives."""
        drawn, valid = Drawn(batch, rng, bucket, train), batch["valid"]
        extras, target = self.renewed(params, extras, drawn)
        embedded, params = self.embeddings(params, target, drawn)
        losses, metrics = self.compare(embedded, valid)
        apart = jnp.square(embedded[0] - embedded[1]).sum(axis=1)
        metrics = {
            **metrics,
            "embedding_std": spread(embedded[0], valid),
            "alignment": valid_mean(jax.lax.stop_gradient(apart), valid),
        }
        return LossOutput(valid_mean(losses, valid), extras, metrics, statistics(params))

    def init(
        self, rng: jax.Array, batch_spec: Mapping[str, jax.ShapeDtypeStruct]
    ) -> tuple[Params, Extras]:
        """Parameters of the tower and the heads; no extras."""
        params, tokens = init_tower(self.model, rng, batch_spec)
        feature = tokens[:, 0]
        for index, (kind, head) in enumerate(self.heads._asdict().items(), start=1):
            if head is not None:
                key = jax.random.fold_in(rng, index)
                feature, own = head.init_with_output(key, feature)
                params[self._key(kind)] = own["params"]
        return params, {}

    def flops(self, text_length: float, bucket: Bucket | None = None) -> float:
        """Forward FLOPs of one example's two views."""
        del text_length
        return sum(self._pass_flops(view_of(bucket, index), trained=True) for index in (0, 1))

    def _pass_flops(self, view: View | None, trained: bool) -> float:
        """Of one view; the predictor follows a trained network alone."""
        image, heads = self.model.config.image, self.heads
        total = tower_flops(image, view) + heads.projector.flops(image.width)
        if trained and heads.predictor is not None:
            total += heads.predictor.flops(self.embedding_dim)
        return total

    def _key(self, kind: str) -> str:
        """Key of a head's parameters."""
        return f"{self.name}_{kind}"

    def _look(self, drawn: Drawn, picture: int, index: int, salt: int = 0) -> Look:
        """What a bucket leaves to read of a picture.

        Args:
            drawn: what is embedded.
            picture: 0 or 1, which random view of the image.
            index: of the bucket's views, what is encoded of it.
            salt: for a second pass over the same picture, which drops other patches.
        """
        batch, rng, bucket, train = drawn
        key = jax.random.fold_in(jax.random.fold_in(rng, picture), salt)
        return Look(picture, seen_part(key, batch, bucket, train, index))

    def _project(
        self, params: Params, drawn: Drawn, looks: Sequence[Look], trained: bool = True
    ) -> tuple[list[jax.Array], Params]:
        """Embed pictures of every image: float32 [B, E] each, and the parameters after them.

        Pictures of the same sizes pass a transformer together, which takes a third fewer kernels
        for an update of MoCo v3 (docs/perf.md). Batch norms read one picture at a time: a ResNet's,
        and those of the projector.

        Args:
            params: of the tower and the projector.
            drawn: what is embedded.
            looks: what is read of every image.
            trained: whether the passes have a gradient; those without drop no paths.
        """
        passes: list[list[Look]] = []
        together = isinstance(self.model.config.image, ViTConfig)
        for look in looks:
            if together and passes and passes[-1][0].view == look.view:
                passes[-1].append(look)
            else:
                passes.append([look])
        embedded = []
        for part in passes:
            features, params = self._encode(params, drawn, part, trained)
            embedded += [self._head("projector", params, feature) for feature in features]
        return embedded, params

    def _encode(
        self, params: Params, drawn: Drawn, looks: Sequence[Look], trained: bool
    ) -> tuple[list[jax.Array], Params]:
        """Class tokens [B, D] of pictures of the same sizes, by one pass of the tower."""
        image = self.model.config.image
        pixels, first = [], jax.random.fold_in(drawn.rng, looks[0].picture)
        for picture, seen in looks:
            key = jax.random.fold_in(drawn.rng, picture)
            recipe = self.recipes[min(picture, len(self.recipes) - 1)]
            pixels.append(random_pixels(drawn.batch, key, recipe, size_seen(image, seen), image))
        seen = None
        if (view := looks[0].view) is not None:
            seen = Seen(view, side_by_side([look.seen.keys for look in looks if look.seen]))
        drops = bool(drawn.train and trained and image.drop_path)
        noise = batch_noise(jax.random.fold_in(first, _PATHS), drawn.batch, train=drops)
        tokens, params = encode(image, params, side_by_side(pixels), noise, seen, drawn.train)
        features = tokens[:, 0].reshape(-1, len(looks), tokens.shape[-1])
        return [features[:, index] for index in range(len(looks))], params

    def _head(self, kind: str, params: Params, x: jax.Array) -> jax.Array:
        head: ProjectionHead | PrototypeHead = getattr(self.heads, kind)
        return jnp.asarray(head.apply({"params": params[self._key(kind)]}, x))

    def _mlp(self, layers: int, last_norm: bool, hidden_dim: int | None = None) -> ProjectionHead:
        dtype = self.model.config.image.dtype
        width = self.hidden_dim if hidden_dim is None else hidden_dim
        return ProjectionHead(layers, width, self.embedding_dim, last_norm, dtype)


@dataclasses.dataclass(frozen=True)
class SimCLR(Invariance):
    """Each view against all others of the global batch (arXiv 2002.05709).

    Attributes:
        temperature: of the softmax.
    """

    temperature: float = 0.1

    first_recipe = second_recipe = Recipe(saturation=0.4, blur=0.5)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_temperature(self, "temperature")

    @property
    def heads(self) -> Heads:
        """A projector of three layers."""
        return Heads(self._mlp(3, last_norm=False), None)

    def embeddings(self, params: Params, target: Params, drawn: Drawn) -> Embeddings:
        """Unit vectors of both views: float32 [B, E] each."""
        del target
        looks = [self._look(drawn, 0, 0), self._look(drawn, 1, 1)]
        (one, other), params = self._project(params, drawn, looks)
        return (unit(one), unit(other)), params

    def compare(self, embedded: Embedded, valid: jax.Array) -> Compared:
        """Mean cross-entropy of both views of every image."""
        one, other = embedded
        sides = [
            nt_xent(a @ b.T / self.temperature, a @ a.T / self.temperature, valid)
            for a, b in ((one, other), (other, one))
        ]
        (first, right), (second, also_right) = sides
        return (first + second) / 2, {"accuracy": valid_mean((right + also_right) / 2, valid)}


@dataclasses.dataclass(frozen=True)
class SimSiam(Invariance):
    """Each view's prediction against the other view, without negatives (arXiv 2011.10566).

    Attributes:
        predictor_dim: hidden width of the predictor.
    """

    hidden_dim: int = 2048
    embedding_dim: int = 2048
    predictor_dim: int = 512

    widths = ("hidden_dim", "embedding_dim", "predictor_dim")
    first_recipe = second_recipe = Recipe(scale=(0.2, 1.0), saturation=0.4, blur=0.5)

    @property
    def heads(self) -> Heads:
        """A projector of three layers, a predictor of two that is narrow in the middle."""
        predictor = self._mlp(2, last_norm=False, hidden_dim=self.predictor_dim)
        return Heads(self._mlp(3, last_norm=True), predictor)

    def embeddings(self, params: Params, target: Params, drawn: Drawn) -> Embeddings:
        """Embeddings of both views, then their predictions: unit vectors, float32 [B, E] each."""
        del target
        looks = [self._look(drawn, 0, 0), self._look(drawn, 1, 1)]
        (one, other), params = self._project(params, drawn, looks)
        predicted = [self._head("predictor", params, z) for z in (one, other)]
        return tuple(unit(x) for x in (one, other, *predicted)), params

    def compare(self, embedded: Embedded, valid: jax.Array) -> Compared:
        """Mean of the negative cosines of both directions."""
        del valid
        one, other, from_one, from_other = embedded
        one, other = jax.lax.stop_gradient((one, other))
        cosines = (from_one * other).sum(axis=1) + (from_other * one).sum(axis=1)
        return -cosines / 2, {}


@dataclasses.dataclass(frozen=True)
class Momentum(Invariance):
    """Two networks, one of which is the moving average of the other and makes its keys.

    The extras hold ``target``, the moving average of tower and projector, float32; it is renewed in
    each update before the keys are made.

    Attributes:
        momentum: of the moving average at first; it rises to 1 along a cosine over the budget.
    """

    momentum: float = 0.99

    def __post_init__(self) -> None:
        super().__post_init__()
        check_share(self, "momentum")

    def init(
        self, rng: jax.Array, batch_spec: Mapping[str, jax.ShapeDtypeStruct]
    ) -> tuple[Params, Extras]:
        """Parameters as of the base; the moving average starts from them."""
        params, _ = super().init(rng, batch_spec)
        return params, {"target": jax.tree.map(jnp.copy, self._averaged(params))}

    def renewed(self, params: Params, extras: Extras, drawn: Drawn) -> tuple[Extras, Params]:
        """The moving average, renewed; outside training the parameters themselves make the keys.

        There, they come without the average of their run.
        """
        if not drawn.train:
            return extras, self._averaged(params)
        momentum = self.momentum_at(drawn.batch.get(PROGRESS, 0.0))
        new = jax.lax.stop_gradient(self._averaged(params))
        target = optax.incremental_update(new, extras["target"], 1.0 - momentum)
        return {**extras, "target": target}, target

    def started_from(self, params: Params, extras: Extras) -> Extras:
        """The moving average starts from the parameters that were read."""
        return {**extras, "target": jax.tree.map(jnp.copy, self._averaged(params))}

    def momentum_at(self, progress: jax.Array | float) -> jax.Array:
        """Of the moving average, at a share of the budget: float32 []."""
        return jnp.asarray(1.0 - optax.cosine_decay_schedule(1.0 - self.momentum, 1)(progress))

    def flops(self, text_length: float, bucket: Bucket | None = None) -> float:
        """Forward FLOPs of two queries; keys have no backward pass, so that a third of them counts.

        (An update is counted as three times this.)
        """
        del text_length
        query = self._pass_flops(view_of(bucket, 0), trained=True)
        return 2 * query + 2 * self._pass_flops(view_of(bucket, 1), trained=False) / 3

    def _keys(self, target: Params, drawn: Drawn) -> list[jax.Array]:
        """What the moving average makes of both pictures, without a gradient: [B, E] each."""
        looks = [self._look(drawn, picture, 1, salt=1) for picture in (0, 1)]
        keys, _ = self._project(jax.lax.stop_gradient(target), drawn, looks, trained=False)
        return list(jax.lax.stop_gradient(keys))

    def _averaged(self, params: Params) -> Params:
        """What the moving average is of."""
        head = self._key("projector")
        return {**tower_params(params), head: params[head]}


@dataclasses.dataclass(frozen=True)
class MoCoV3(Momentum):
    """Queries of a trained network against keys of its moving average (arXiv 2104.02057).

    Both directions count.

    Attributes:
        temperature: of the softmax.
    """

    temperature: float = 0.2

    second_recipe = Recipe(blur=0.1, solarize=0.2)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_temperature(self, "temperature")

    @property
    def heads(self) -> Heads:
        """A projector of three layers and a predictor of two, each with a last norm."""
        return Heads(self._mlp(3, last_norm=True), self._mlp(2, last_norm=True))

    def embeddings(self, params: Params, target: Params, drawn: Drawn) -> Embeddings:
        """Queries of both pictures, then their keys: unit vectors, float32 [B, E] each."""
        looks = [self._look(drawn, picture, 0) for picture in (0, 1)]
        projected, params = self._project(params, drawn, looks)
        queries = [self._head("predictor", params, z) for z in projected]
        keys = self._keys(target, drawn)
        return tuple(unit(x) for x in (*queries, *keys)), params

    def compare(self, embedded: Embedded, valid: jax.Array) -> Compared:
        """Sum of both directions' cross-entropies, times twice the temperature."""
        one, other, key_one, key_other = embedded
        first, right = info_nce(one @ key_other.T / self.temperature, valid)
        second, also_right = info_nce(other @ key_one.T / self.temperature, valid)
        accuracy = valid_mean((right + also_right) / 2, valid)
        return 2 * self.temperature * (first + second), {"accuracy": accuracy}


def check_temperature(objective: Invariance, key: str) -> None:
    """Raise a ConfigError that names the key where its value is no temperature."""
    value = getattr(objective, key)
    if not 0.0 < value < float("inf"):
        raise ConfigError(
            f"objectives.{objective.name}.{key}",
            f"{value} is no temperature",
            "Use a number above 0",
        )
