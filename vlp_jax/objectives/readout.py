"""One vector for a text, with an image or alone, read in the way that pretraining has trained."""

import dataclasses
from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp

from vlp_jax.compress.buckets import View
from vlp_jax.infra.errors import ConfigError
from vlp_jax.models.encoder import Encoder, EncoderConfig, TextStates
from vlp_jax.models.flops import reconstructor_flops, text_flops
from vlp_jax.models.layers import Noise
from vlp_jax.models.masks import bidirectional_mask, forward_mask, token_mask, two_stream_mask

Kind = Literal["query", "bidirectional", "forward"]

# The readout that each pretraining objective has trained.
READOUT_OF: dict[str, Kind] = {
    "flm": "query",
    "mlm": "bidirectional",
    "prefix_lm": "forward",
    "ar": "forward",
}


class EncodedText(NamedTuple):
    """A text before it has met an image, to be paired with several.

    Attributes:
        lengths: int32 [B].
        lower: states of the lower half, [B, S, N, D] each.
    """

    lengths: jax.Array
    lower: tuple[jax.Array, ...]

    def rows(self, index: jax.Array) -> "EncodedText":
        """The texts of these rows: int32 [B'] -> B' texts."""
        return jax.tree.map(lambda x: x[index], self)


@dataclasses.dataclass(frozen=True)
class Readout:
    """Where the vector comes from.

    * ``query`` (FLM): the reconstructor's query for position 0, which reads every state of both
      streams. The other queries are not computed: queries do not see one another.
    * ``bidirectional`` (MLM): row <s> of a text whose tokens all see one another.
    * ``forward`` (AR, PrefixLM): row </s> of the forward stream, the only one that sees all.

    Attributes:
        kind: one of these.
        key: config key, for messages.
    """

    kind: Kind
    key: str

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise ConfigError(
                self.key, f"{self.kind!r} is no readout", f"Use one of {', '.join(get_args(Kind))}"
            )

    @property
    def streams(self) -> int:
        """In how many streams a text is read."""
        return 2 if self.kind == "query" else 1

    def encode(
        self, model: Encoder, ids: jax.Array, lengths: jax.Array, noise: Noise
    ) -> EncodedText:
        """The part that no image enters: int32 [B, N], int32 [B]."""
        return EncodedText(
            lengths, model.encode_text_lower(ids, self._mask(lengths, ids.shape[1]), noise)
        )

    def read(
        self, model: Encoder, text: EncodedText, image: jax.Array | None, noise: Noise
    ) -> jax.Array:
        """The vector of each text with its image, or alone.

        Args:
            model: bound.
            text: B texts.
            image: [B / G, I, D] from ``encode_image``; G texts in a row are read with each image,
                whose keys and values are computed once for all of them. None: texts alone, by a
                model that reads them so.
            noise: of the dropout, or None.

        Returns:
            [B, D].
        """
        lengths, lower = text
        tokens = lower[-1].shape[2]
        mask = self._mask(lengths, tokens)
        streams = ("forward", "reverse") if self.kind == "query" else (self.kind,)
        # The texts of an image pass through the blocks as so many more streams of one example.
        rows = len(lengths) if image is None else len(image)
        joined, together = len(lengths) // rows, (rows, -1)
        upper, last = model.encode_text_upper(
            lower[-1].reshape(*together, *lower[-1].shape[2:]),
            mask.reshape(*together, *mask.shape[2:]),
            image,
            streams * joined,
            noise,
        )
        upper, last = jax.tree.map(lambda x: x.reshape(lower[-1].shape), (upper, last))
        if self.kind == "bidirectional":
            return last[:, 0, 0]
        if self.kind == "forward":
            end = (lengths - 1)[:, None, None]
            return jnp.take_along_axis(last[:, 0], end, axis=1)[:, 0]
        real = token_mask(lengths, tokens)
        visible = jnp.concatenate([real, real], axis=1)[:, None]
        states = TextStates(lower, upper, last)
        return model.reconstruct(jnp.zeros(1, jnp.int32), states, visible, noise)[:, 0]

    def flops(
        self,
        config: EncoderConfig,
        text_length: float,
        view: View | None = None,
        *,
        with_image: bool = True,
    ) -> float:
        """Forward FLOPs of one text with one image, without ``flops.image_input_flops``.

        Args:
            config: geometry.
            text_length: real tokens of the text.
            view: what is encoded of the image; None: everything.
            with_image: False: of the text alone.
        """
        joint = self.kind == "bidirectional"
        total = text_flops(
            config, text_length, self.streams, view, joint=joint, with_image=with_image
        )
        if self.kind == "query":
            total += reconstructor_flops(config, 1, keys=2 * text_length)
        return total

    def _mask(self, lengths: jax.Array, tokens: int) -> jax.Array:
        if self.kind == "query":
            return two_stream_mask(lengths, tokens)
        mask = bidirectional_mask if self.kind == "bidirectional" else forward_mask
        return mask(lengths, tokens)[:, None]
