"""What downstream tasks on texts have in common: a vector that a model reads, and a head on it."""

import dataclasses
from collections.abc import Mapping

import flax.linen as nn
import jax

from vlp_jax.data.batch import PAIRS, Batch
from vlp_jax.models.encoder import Encoder
from vlp_jax.models.heads import ClassificationHead, apply_head
from vlp_jax.objectives.base import Defaults, Extras, Params, Seen, zeros
from vlp_jax.objectives.readout import Kind, Readout


@dataclasses.dataclass(frozen=True)
class Headed(Defaults):
    """A task whose head lies in the parameters under ``<name>_head``.

    Attributes:
        model: the shared encoder.
        name: key in ``config.objectives``.
    """

    model: Encoder
    name: str

    def __post_init__(self) -> None:
        """Check the keys; every class adds its own."""

    @property
    def head_name(self) -> str:
        """Key of the head's parameters."""
        return f"{self.name}_head"


@dataclasses.dataclass(frozen=True)
class Reading(Headed):
    """A head on the vector of ``objectives.readout``.

    Attributes:
        batch_name: named batch it reads.
        readout: how the model reads, see ``objectives.readout``.
    """

    batch_name: str = PAIRS
    readout: Kind = "query"

    def __post_init__(self) -> None:
        super().__post_init__()
        _ = self.reader  # checks the key

    @property
    def reader(self) -> Readout:
        """The way the vector is read."""
        return Readout(self.readout, f"objectives.{self.name}.readout")

    @property
    def head(self) -> ClassificationHead:
        """From the vector to the outputs; each kind of task has its own."""
        raise NotImplementedError

    def init(
        self, rng: jax.Array, batch_spec: Mapping[str, jax.ShapeDtypeStruct]
    ) -> tuple[Params, Extras]:
        """Parameters of what it reads and of the head; no extras."""
        batch = zeros(batch_spec)

        def forward(model: Encoder) -> jax.Array:
            return self._features(model, batch, None, None)

        features, variables = nn.init_with_output(forward, self.model)(rng)
        head = self.head.init(rng, features)["params"]
        return variables["params"] | {self.head_name: head}, {}

    def outputs(
        self,
        params: Params,
        batch: Batch,
        noise: jax.Array | None = None,
        seen: Seen | None = None,
    ) -> jax.Array:
        """What the head makes of every example: float32 [B, C]."""

        def forward(model: Encoder) -> jax.Array:
            return self._features(model, batch, noise, seen)

        features = nn.apply(forward, self.model)({"params": params})
        return apply_head(self.head, params[self.head_name], features, noise)

    def _features(
        self,
        model: Encoder,
        batch: Batch,
        noise: jax.Array | None,
        seen: Seen | None,
    ) -> jax.Array:
        """The vectors [B, F], by a bound model; each kind of task has its own way."""
        raise NotImplementedError
