"""The block of every transformer of the project: attentions, feed-forward, and how it is tuned."""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp

from vlp_jax.infra.sharding import constrain_batch
from vlp_jax.models.layers import (
    Attention,
    BlockConfig,
    KeyValue,
    Memory,
    Mlp,
    Noise,
    drop,
    norm,
    row_major,
)
from vlp_jax.models.masks import with_keys_before
from vlp_jax.models.tuning import (
    PARTS,
    Adapter,
    Part,
    Prompt,
    kept_name,
    replacement_name,
    unit_name,
)


class Block(nn.Module):
    """Self-attention, cross-attention, feed-forward; either attention may be absent.

    ``x`` may carry an inner axis of streams [B, S, N, D]. Self-attention stays within a stream.
    Cross-attention flattens the streams into one run of queries [B, S * N, D], so that the keys
    and values of a shared context are computed once.

    Parts of it that ``config.tuning`` skips are not there; of those that it gates, the parameter
    ``PART_kept`` tells whether they are (1) or what stands in their place (0). ``with_kept`` of
    ``transfer.units`` sets these.

    Prompts of its own are further keys: of the context where it has cross-attention, or else beside
    the keys of self-attention. They are the same for all examples, and are projected once.
    """

    config: BlockConfig
    self_attention: bool = True
    cross_attention: bool = False

    def setup(self) -> None:
        """Name the branches that are there and their norms, and what tuning has added."""
        c = self.config
        block, tuning = "/".join(self.path), c.tuning
        units = {part: unit_name(block, part) for part in PARTS}
        self.skipped = frozenset(part for part in PARTS if units[part] in tuning.skipped)
        gated = [part for part in PARTS if units[part] in tuning.gated]
        attends = not self.skipped & {"block", "attention"}
        self.attends_self = self.self_attention and attends
        self.attends_context = self.cross_attention and attends
        self.feeds = not self.skipped & {"block", "mlp"}
        lora, self.heads = tuning.lora_at(block), tuning.heads_at(block, c.heads)
        prompts = tuning.prompts_at(block)
        self.prompt = Prompt(prompts, c.width, c.dtype) if prompts else None
        if self.attends_self:
            self.attend_self = Attention(c, self.heads, lora, name="self_attention")
            self.self_attention_norm = norm(c)
        if self.attends_context:
            self.attend_context = Attention(c, self.heads, lora, name="cross_attention")
            self.cross_attention_norm = norm(c)
            if c.norm == "pre":
                self.context_norm = norm(c)
        if self.feeds:
            self.mlp = Mlp(c, tuning.channels_at(block, c.mlp_width))
            self.mlp_norm = norm(c)
        there = {
            "self_attention": self.attends_self,
            "cross_attention": self.attends_context,
            "mlp": self.feeds,
        }
        self.adapters = {
            branch: Adapter(
                added.width,
                c.width,
                c.dtype,
                c.norm_eps if added.norm else None,
                added.scale,
                name=f"{branch}_adapter",
            )
            for branch, present in there.items()
            if present and (added := tuning.adapter_at(block, branch)) is not None
        }
        attentions = self.self_attention + self.cross_attention
        self.replacements = {
            part: Adapter(width, c.width, c.dtype, c.norm_eps, name=replacement_name(part))
            for part in PARTS
            if (part in self.skipped or part in gated)
            and (width := tuning.replacement_at(part, attentions))
        }
        self.kept = {
            part: self.param(kept_name(part), nn.initializers.ones_init(), ()) for part in gated
        }

    def __call__(
        self,
        x: jax.Array,
        *,
        mask: jax.Array | None = None,
        context: jax.Array | None = None,
        context_mask: jax.Array | None = None,
        noise: Noise = None,
        tokens: int | jax.Array | None = None,
        own: KeyValue | None = None,
        beside: KeyValue | None = None,
    ) -> jax.Array:
        """Apply the block.

        Args:
            x: [B, N, D] or [B, S, N, D].
            mask: bool, over the tokens of one stream: [B or 1, (S,) N, N].
            context: [B, K, D], read by cross-attention.
            context_mask: bool [B or 1, S * N or N, K].
            noise: of the dropout, or None.
            tokens: real ones of a stream, those beyond are padding: one number for all or int32 [B]
                (of streams [B, S]); None: all.
            own: ``project(x)``, where it was made before; not with ``beside``.
            beside: of ``project``, [B, K, H, d]: other tokens of an example, and the block's
                prompts, which self-attention of every stream reads beside the stream's own. None:
                there are no other tokens.

        Returns:
            Same shape as ``x``.
        """
        if self.cross_attention and context is None:
            raise ValueError("a block with cross-attention needs a context")

        def attend(x: jax.Array) -> jax.Array:
            if self.attends_self:
                h = self._enter("self_attention", x)
                others = self._prompts_beside_own() if own is None and beside is None else beside
                if own is None and others is None:
                    out = self.attend_self(h, None, mask, noise, tokens)
                else:
                    read = self.attend_self.project(h) if own is None else own
                    read = _beside(others, read)
                    further = read.key.shape[-3] - h.shape[-2]
                    real = None if tokens is None else tokens + further
                    out = self.attend_self.read(h, read, _seeing(mask, further), noise, real)
                x = self._leave("self_attention", x, out, noise)
            if self.attends_context and context is not None:
                read = self.project_context(context)
                further = read.key.shape[-3] - context.shape[-2]
                x = self._read_context(x, read, _seeing(context_mask, further), noise)
            return x

        return self._parts(x, attend, noise)

    def project(self, x: jax.Array) -> KeyValue:
        """What self-attention reads of tokens: [..., N, D] -> [..., P + N, H, d] each.

        First come the keys and values of the P prompts of the block that self-attention reads.
        Where self-attention is skipped nothing is read: none of either.
        """
        if not self.attends_self:
            return self._nothing(x)
        own = self.attend_self.project(self._enter("self_attention", x))
        return _beside(self._prompts_beside_own(), own)

    def project_context(self, context: jax.Array) -> KeyValue:
        """What cross-attention reads of a context: [B, K, D] -> [B, P + K, H, d] each.

        First come the keys and values of the P prompts of the block. Where cross-attention is
        skipped nothing is read: none of either.
        """
        if not self.attends_context:
            return self._nothing(context)

        def project(tokens: jax.Array) -> KeyValue:
            entering = self.context_norm(tokens) if self.config.norm == "pre" else tokens
            return self.attend_context.project(entering)

        prompts = None if self.prompt is None else project(self.prompt()[None])
        return _beside(prompts, project(context))

    def decode(
        self, x: jax.Array, position: jax.Array, past: Memory, context: Memory | None = None
    ) -> tuple[jax.Array, Memory]:
        """Apply the block to one more token of every stream, without dropout.

        The token sees itself and those before it, as in a causal mask.

        Args:
            x: [B, S, 1, D], the token at ``position``.
            position: int32 [].
            past: [B, S, H, T, d], keys and values of the tokens before ``position``; what follows
                them is not read.
            context: [B, H, I, d], one for all streams of an example: of ``project_context``; of a
                block without cross-attention of ``project``, which self-attention reads beside the
                stream's own tokens. None: there is none; prompts are projected anew then, which XLA
                takes out of a loop over tokens.

        Returns:
            [B, S, 1, D], and ``past`` with the token in its place.
        """

        def attend(x: jax.Array) -> jax.Array:
            nonlocal past
            if self.attends_self:
                h = self._enter("self_attention", x)
                past = past.write(self.attend_self.project(h), position)
                seen = (jnp.arange(past.key.shape[-2]) <= position)[None, None, None, :]
                beside = None if self.cross_attention else context
                if beside is None and (prompts := self._prompts_beside_own()) is not None:
                    shape = (len(x), *prompts.key.shape[1:])
                    beside = Memory.of(KeyValue(*(jnp.broadcast_to(k, shape) for k in prompts)))
                out = self.attend_self.recall(h, past, seen, beside)
                x = self._leave("self_attention", x, out, None)
            if self.attends_context:
                if context is None:
                    raise ValueError("a block with cross-attention needs a context")
                h = self._enter("cross_attention", x)
                flat = h.reshape(h.shape[0], -1, h.shape[-1])
                out = self.attend_context.recall(flat, context).reshape(h.shape)
                x = self._leave("cross_attention", x, out, None)
            return x

        return self._parts(x, attend, None), past

    def _prompts_beside_own(self) -> KeyValue | None:
        """Of the prompts that self-attention reads, for all examples: [1, P, H, d] each."""
        if self.prompt is None or self.cross_attention:
            return None
        return self.attend_self.project(self._enter("self_attention", self.prompt()[None]))

    def _nothing(self, x: jax.Array) -> KeyValue:
        c = self.config
        empty = jnp.zeros((*x.shape[:-2], 0, self.heads, c.head_width), c.dtype)
        return KeyValue(empty, empty)

    def _parts(
        self, x: jax.Array, attend: Callable[[jax.Array], jax.Array], noise: Noise
    ) -> jax.Array:
        """Both parts of the block, or what stands in the place of either, or of all of it."""

        def run(x: jax.Array) -> jax.Array:
            x = self._part("attention", x, attend)
            return self._part("mlp", x, lambda x: self._feed_forward(x, noise))

        return constrain_batch(self._part("block", x, run))

    def _part(self, part: Part, x: jax.Array, run: Callable[[jax.Array], jax.Array]) -> jax.Array:
        """A part, or what stands in its place: the tokens as they are, and an adapter of them."""
        if part not in self.skipped and part not in self.kept:
            return run(x)
        instead = x
        if part in self.replacements:
            instead = row_major(x + self.replacements[part](x))
        if part in self.skipped:
            return instead
        return jnp.where(self.kept[part] > 0, run(x), instead)

    def _read_context(
        self, x: jax.Array, context: KeyValue, mask: jax.Array | None, noise: Noise
    ) -> jax.Array:
        h = self._enter("cross_attention", x)
        flat = h.reshape(h.shape[0], -1, h.shape[-1])
        out = self.attend_context.read(flat, context, mask, noise).reshape(h.shape)
        return self._leave("cross_attention", x, out, noise)

    def _feed_forward(self, x: jax.Array, noise: Noise) -> jax.Array:
        if not self.feeds:
            return x
        return self._leave("mlp", x, self.mlp(self._enter("mlp", x)), noise)

    def _enter(self, name: str, x: jax.Array) -> jax.Array:
        """What a branch reads of the residual stream."""
        return self._norm(name)(x) if self.config.norm == "pre" else x

    def _leave(self, name: str, x: jax.Array, out: jax.Array, noise: Noise) -> jax.Array:
        """Add what a branch has made of it."""
        c = self.config
        if name in self.adapters:
            added = self.adapters[name](out if c.tuning.serial else x)
            out = out + added
        out = drop(self, name, out, c.dropout, noise)
        if noise is not None and c.drop_path:
            ones = jnp.ones((len(out),) + (1,) * (out.ndim - 1), out.dtype)
            out = out * drop(self, f"{name}_path", ones, c.drop_path, noise)
        x = row_major(x + out)
        return row_major(self._norm(name)(x)) if c.norm == "post" else x

    def _norm(self, branch: str) -> nn.LayerNorm:
        return getattr(self, f"{branch}_norm")


def _beside(others: KeyValue | None, own: KeyValue) -> KeyValue:
    """Keys and values of both, the others' first: [B or 1, K, H, d], [B, (S,) N, H, d] each."""
    if others is None:
        return own
    lead = own.key.shape[:-3]

    def spread(x: jax.Array) -> jax.Array:
        x = x[:, None] if own.key.ndim > x.ndim else x  # the same for every stream
        return jnp.broadcast_to(x, (*lead, *x.shape[-3:]))

    return KeyValue(
        *(jnp.concatenate([spread(x), y], axis=-3) for x, y in zip(others, own, strict=True))
    )


def _seeing(mask: jax.Array | None, further: int) -> jax.Array | None:
    return mask if mask is None or not further else with_keys_before(mask, further)
