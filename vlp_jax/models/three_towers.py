"""A tower for images, one for texts, and one that reads what both have made of a pair.

After FLAVA (arXiv 2112.04482; its code as read for the fact sheet of MoMo, sections 1 and 7), for
comparison with the shared stack: a ViT, a text tower of pre-LN blocks, and a fusion tower over the
image's and the text's tokens, which a linear map each takes there. An image alone never leaves its
tower, and a text alone neither; a pair runs all three.

What is otherwise than in FLAVA is as in the shared stack, so that the towers alone make the
difference: patches at fixed sine-cosine positions, one vocabulary head, tied to the table of
tokens, for texts with and without images, and no poolers. The vector of a pair is read at <s> of
the text or by a query (``objectives.readout``), so that a class token of the fusion tower, which
FLAVA has, would be read by nobody. Unlike in FLAVA's code, the fusion tower does not see padding.

How a pair meets in the fusion tower follows from what the text may see of itself
(``models.pairs``): bidirectional, both are one sequence; forward and reverse, the image does not
see the text. A stream is known by its mask alone.

With ``fusion="co_attention"`` the fusion tower is that of METER (arXiv 2111.02387; fact sheet of
PCETL, section 2): the image and the text each have a stream of blocks of their own, whose
cross-attention reads the other stream as it was before the layer. METER gives its heads the first
tokens of both streams side by side; here a linear map of the image's is added to every token of the
text, which is the same to the first layer of a head, so that heads read a text as of any model. As
the image sees the whole text, there are no streams that see one side. METER's blocks have their
norms after the sums, ours before, as in the other towers.

Prompts (``models.tuning``) are those of the baselines of PCETL (code of APT, arXiv 2306.15706, for
METER). Deep ones are further keys of cross-attention, so that a block reads them with the other
stream. Shallow ones are tokens of both streams of co-attention, or of the one sequence of a merged
tower. For METER's 6 layers, 577 + 40 tokens and 200 prompts our shapes give:

* shallow: 2 x 200 x 768 = 0.31M parameters and 28.67G multiply-adds, where the table (fact sheet,
  section 4) has 0.30M and 28.71G. Prompts of one stream alone would be 0.15M and 13.97G.
* deep: 12 x 200 x 768 = 1.84M parameters, as in the table. That has 6.53G multiply-adds, where the
  shapes give 3.97G, and so they do of the published code: keys and values of the prompts, 2.83G,
  which are the same for all examples, and 1.14G of reading them. The table's figure would be met
  (6.52G) by queries of the prompts, which nobody needs, and by reading them in both attentions; its
  5.14G for ViLT is met by such queries at the 243 tokens that its adapters were counted at.

In that code prompts come first and heads read the first token of a stream, which with shallow ones
is a prompt. Here heads read the tokens that they read without prompts.
"""

import dataclasses
from collections.abc import Sequence
from typing import ClassVar, Literal, get_args

import jax
import jax.numpy as jnp
from flax import linen as nn

from vlp_jax.compress.buckets import View
from vlp_jax.infra.errors import ConfigError
from vlp_jax.models.block import Block
from vlp_jax.models.dense import Dense
from vlp_jax.models.dropout import noise_of
from vlp_jax.models.encoder import padded_vocabulary
from vlp_jax.models.layers import BlockConfig, Memory, Noise, norm
from vlp_jax.models.masks import with_keys_before
from vlp_jax.models.pairs import (
    JOINT,
    Pair,
    PairEncoder,
    project_beside,
    read_as_one,
    read_beside,
)
from vlp_jax.models.pooling import Pool, pooled
from vlp_jax.models.tuning import Prompt, stack_of
from vlp_jax.models.vit import ViTConfig

Fusion = Literal["merged", "co_attention"]  # the first where the config does not say


@dataclasses.dataclass(frozen=True)
class ThreeTowersConfig:
    """Geometry of the whole model.

    Attributes:
        image: the image tower, as wide as the others.
        text: what the blocks of the text tower, of the fusion tower and of the reconstructor share.
        text_depth: blocks of the text tower, 1 or more.
        fusion_depth: blocks of the fusion tower, 1 or more; of co-attention, of each stream.
        reconstructor_depth: 1 or more, at most the depth of the text and of the fusion tower; the
            reconstructor reads the states of the last so many blocks of the one that ends.
        vocab_size: entries of the tokenizer.
        max_positions: rows of the position table.
        mask_id: token whose embedding starts every reconstruction query.
        tied: the vocabulary head reads the table of tokens.
        fusion: ``merged`` or ``co_attention``, see the module's docstring.
    """

    image: ViTConfig
    text: BlockConfig
    text_depth: int
    fusion_depth: int
    reconstructor_depth: int
    vocab_size: int
    max_positions: int
    mask_id: int
    tied: bool = True
    fusion: Fusion = "merged"

    marks_text: ClassVar[bool] = False  # towers and projections of their own tell it

    def __post_init__(self) -> None:
        if "post" in (self.image.block.norm, self.text.norm):
            raise ValueError("the three towers of a model have norm='pre'")
        if self.image.width != self.text.width:
            raise ValueError(
                f"model.image.width={self.image.width} must be "
                f"model.text.width={self.text.width}: heads read features of every tower"
            )
        if self.fusion not in get_args(Fusion):
            raise ValueError(f"model.fusion.type={self.fusion!r} is none of {get_args(Fusion)}")
        for key in ("text_depth", "fusion_depth"):
            if getattr(self, key) < 1:
                name = key.replace("_", ".")
                raise ValueError(f"model.{name}={getattr(self, key)} must be 1 or more")
        if not 1 <= self.reconstructor_depth <= min(self.text_depth, self.fusion_depth):
            raise ValueError(
                f"model.reconstructor.depth={self.reconstructor_depth} must be 1 or more, and at "
                f"most model.text.depth={self.text_depth} and "
                f"model.fusion.depth={self.fusion_depth}"
            )

    @property
    def co_attention(self) -> bool:
        """Whether the image and the text each have a stream in the fusion tower."""
        return self.fusion == "co_attention"

    @property
    def stacks(self) -> dict[str, tuple[str, ...]]:
        """Three, or four where the fusion tower has two streams."""
        fusion = {"fusion_tower": stack_of("fusion_tower/block", self.fusion_depth)}
        if self.co_attention:
            fusion = {
                f"fusion_{stream}": stack_of(f"fusion_tower/{stream}_block", self.fusion_depth)
                for stream in ("image", "text")
            }
        text = stack_of("text_tower/block", self.text_depth)
        return {"image_tower": self.image.blocks, "text_tower": text, **fusion}

    @property
    def fusion_stacks(self) -> tuple[str, ...]:
        """Those of the fusion tower."""
        return tuple(name for name in self.stacks if name.startswith("fusion"))

    @property
    def text_blocks(self) -> int:
        """Those of the text and of the fusion tower."""
        return self.text_depth + self.fusion_depth

    @property
    def padded_vocab_size(self) -> int:
        """``vocab_size`` rounded up to a multiple of 128."""
        return padded_vocabulary(self.vocab_size)


class Tower(nn.Module):
    """Blocks of self-attention and a final norm; parameters are named as those of ``ViT``."""

    config: BlockConfig
    depth: int

    def setup(self) -> None:
        """Name the blocks and the final norm."""
        for layer in range(self.depth):
            setattr(self, f"block_{layer:02d}", Block(self.config))
        self.norm = norm(self.config)

    @property
    def blocks(self) -> tuple[Block, ...]:
        """The blocks, in their order."""
        return tuple(getattr(self, f"block_{layer:02d}") for layer in range(self.depth))


class MergedTower(Tower):
    """A fusion tower that reads a text and its image as one sequence."""

    def __call__(
        self, text: jax.Array, mask: jax.Array, image: jax.Array, noise: Noise = None
    ) -> Pair:
        """Read texts with their image; arguments as of ``CoAttentionTower``."""
        of_image, states = read_as_one(self.blocks, text, mask, image, noise)
        return Pair(self.norm(of_image), states, self.norm(states[-1]))


class CoAttentionTower(nn.Module):
    """Two streams of blocks, each of which reads the other as it was before the layer.

    Of the blocks of a layer neither waits for the other. After the last, heads read the text with
    what the image's class token has become.
    """

    config: BlockConfig
    depth: int

    def setup(self) -> None:
        """Name the blocks and the norms of either stream."""
        for layer in range(self.depth):
            for stream in ("image", "text"):
                block = Block(self.config, cross_attention=True)
                setattr(self, f"{stream}_block_{layer:02d}", block)
        self.image_norm = norm(self.config)
        self.text_norm = norm(self.config)
        self.image_to_text = Dense(self.config.width, dtype=self.config.dtype)

    @property
    def layers(self) -> tuple[tuple[Block, Block], ...]:
        """Of each layer the block of the image and that of the text."""
        return tuple(
            (getattr(self, f"image_block_{layer:02d}"), getattr(self, f"text_block_{layer:02d}"))
            for layer in range(self.depth)
        )

    def __call__(
        self, text: jax.Array, mask: jax.Array, image: jax.Array, noise: Noise = None
    ) -> Pair:
        """Read texts with their image.

        Args:
            text: [B, S, N, D], S texts of one image.
            mask: bool [B, S, N, N], of the texts, all tokens of which see one another. Those that
                the first does not see are padding.
            image: [B, I, D].
            noise: of the dropout, or None.
        """
        streams, count = text.shape[:2], image.shape[1]
        image = jnp.broadcast_to(image[:, None], (*streams, *image.shape[1:])).astype(text.dtype)
        # A text and its image are an example by themselves: each pair has its own context.
        real = mask[:, :, 0].reshape(-1, 1, text.shape[2])
        of_text = real.sum(axis=(1, 2), dtype=jnp.int32)
        x, y = text.reshape(-1, *text.shape[2:]), image.reshape(-1, *image.shape[2:])
        seen = jnp.broadcast_to(real, (len(y), count, real.shape[-1]))
        noise_of_image, noise_of_text = noise_of(noise, "image"), noise_of(noise, "text")
        states = []
        for of_image, reader in self.layers:
            x, y = (
                reader(x, context=y, tokens=of_text, noise=noise_of_text),
                of_image(y, context=x, context_mask=seen, tokens=count, noise=noise_of_image),
            )
            states.append(x.reshape(*streams, *x.shape[1:]))
        y = self.image_norm(y).reshape(*streams, *y.shape[1:])
        last = self.text_norm(states[-1]) + self.image_to_text(y[:, :, :1])
        return Pair(y, tuple(states), last)


class ThreeTowers(PairEncoder):
    """Image tower, text tower, fusion tower, reconstructor and vocabulary head."""

    config: ThreeTowersConfig

    def setup(self) -> None:
        """Name the submodules; linen creates the parameters of those that are called."""
        super().setup()
        c = self.config
        self.text_tower = Tower(c.text, c.text_depth)
        self.image_to_fusion = Dense(c.text.width, dtype=c.text.dtype)
        self.text_to_fusion = Dense(c.text.width, dtype=c.text.dtype)
        fusion = CoAttentionTower if c.co_attention else MergedTower
        self.fusion_tower = fusion(c.text, c.fusion_depth)
        prompts = c.text.tuning.shallow_prompts if c.co_attention else 0
        self.text_prompt = Prompt(prompts, c.text.width, c.text.dtype) if prompts else None

    def encode_image(
        self,
        image: jax.Array,
        noise: Noise = None,
        view: View | None = None,
        keys: jax.Array | None = None,
    ) -> jax.Array:
        """Image tokens as their tower makes them: [B, S, S, 3] -> [B, I, D]; see ``ViT``.

        Not yet projected, for ``image_feature`` reads them as well.
        """
        return self.image_tower(image, noise, view, keys)

    def image_feature(
        self, tokens: jax.Array, noise: Noise = None, pool: Pool = "class"
    ) -> jax.Array:
        """Of what the image tower has made: [B, I, D] -> [B, D]."""
        del noise
        return pooled(tokens, pool)

    def encode_text_lower(
        self,
        ids: jax.Array,
        mask: jax.Array,
        noise: Noise = None,
        positions: jax.Array | None = None,
    ) -> tuple[jax.Array, ...]:
        """The blocks of the text tower; see ``Encoder``."""
        x = self._embedded(ids, mask.shape[1], noise, positions)
        states = []
        for block in self.text_tower.blocks:
            x = block(x, mask=mask, noise=noise)
            states.append(x)
        return tuple(states)

    def encode_text_upper(
        self,
        lower: jax.Array,
        mask: jax.Array,
        image: jax.Array | None,
        streams: tuple[str, ...],
        noise: Noise = None,
    ) -> tuple[tuple[jax.Array, ...], jax.Array]:
        """The fusion tower; see ``Encoder`` and the module's docstring.

        Without an image there are no further blocks: heads read the text tower after its norm.

        Raises:
            ValueError: some streams see one side and others both.
            ConfigError: they see one side, and the fusion tower is one of co-attention.
        """
        if len({stream == JOINT for stream in streams}) > 1:
            raise ValueError(f"{streams} do not see an image in one way")
        if image is None:
            return (), self.text_tower.norm(lower)
        if JOINT in streams:
            pair = self.encode_pair(lower, mask, image, noise)
            return pair.blocks, pair.text
        blocks = self._one_sided_blocks()
        text, image = self._enter_upper(lower, streams), self._enter_fusion(image)
        states = read_beside(blocks, text, mask, image, noise)
        return states, self._leave_upper(states[-1])

    def project_image(self, image: jax.Array) -> tuple[Memory, ...]:
        """What every block of the fusion tower reads beside a text; see ``Encoder``."""
        return project_beside(self._one_sided_blocks(), self._enter_fusion(image))

    def encode_pair(
        self, lower: jax.Array, mask: jax.Array, image: jax.Array, noise: Noise = None
    ) -> Pair:
        """Texts and their image in the fusion tower: one sequence each, or two streams.

        Args:
            lower: [B, S, N, D], last of the states of ``encode_text_lower``; S texts of one image.
            mask: bool [B, S, N, N], of the texts: all tokens of one see one another. Those that its
                first token does not see are padding.
            image: [B, I, D] from ``encode_image``.
            noise: of the dropout, or None.
        """
        text, count = self._enter_upper(lower, (JOINT,)), image.shape[1]
        text, mask, prompts = self._text_with_prompts(text, mask)
        pair = self.fusion_tower(text, mask, self._enter_fusion(image), noise)
        states = tuple(state[:, :, prompts:] for state in pair.blocks)
        return Pair(pair.image[:, :, :count], states, pair.text[:, :, prompts:])

    def _text_blocks(self) -> tuple[Sequence[Block], Sequence[Block]]:
        return self.text_tower.blocks, self._one_sided_blocks()

    def _one_sided_blocks(self) -> Sequence[Block]:
        """Those of the fusion tower, for streams that the image does not see."""
        if self.config.co_attention:
            raise ConfigError(
                "model.fusion.type",
                "'co_attention': its image sees the whole text, so that no row of a text can be "
                "kept from what follows it",
                "Use objectives and readouts of type 'bidirectional' (mlm, itc, itm, mim), or "
                "model.fusion.type='merged'",
            )
        return self.fusion_tower.blocks

    def _enter_upper(self, lower: jax.Array, streams: tuple[str, ...]) -> jax.Array:
        del streams  # known by their masks alone
        return self.text_to_fusion(self.text_tower.norm(lower))

    def _enter_fusion(self, image: jax.Array) -> jax.Array:
        """What the fusion tower is given of an image: [B, I, D] -> [B, I + P, D]."""
        return self._with_prompts(self.image_to_fusion(image))

    def _text_with_prompts(
        self, text: jax.Array, mask: jax.Array
    ) -> tuple[jax.Array, jax.Array, int]:
        """Before a text that has a stream to itself, the shallow prompts of that stream.

        They come first, as padding comes last.

        Args:
            text: [B, S, N, D].
            mask: bool [B, S, N, N].

        Returns:
            [B, S, P + N, D], bool [B, S, P + N, P + N], and P.
        """
        if self.text_prompt is None:
            return text, mask, 0
        prompts = self.text_prompt().astype(text.dtype)
        before = jnp.broadcast_to(prompts[None, None], (*text.shape[:2], *prompts.shape))
        x = jnp.concatenate([before, text], axis=2)
        # All see what the first token of the text does, and the prompts.
        seen = with_keys_before(mask[:, :, :1], len(prompts))
        return x, jnp.broadcast_to(seen, (*x.shape[:3], x.shape[2])), len(prompts)

    def _leave_upper(self, x: jax.Array) -> jax.Array:
        return self.fusion_tower.norm(x)
