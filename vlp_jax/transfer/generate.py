"""Captions from the forward stream of a model: greedy and beam search over a key-value cache.

    search = caption_search(tokenizer, max_length=24, beams=4)
    captions = generate(model, params, batch["image"], search)
    tokenizer.decode(captions.ids[0, 0])                              # the best one of image 0

A caption is a row of tokens as in a batch: ``<s>``, words, ``</s>``, padding, of at most
``max_length`` tokens. Its score is the log-probability of all tokens after ``<s>`` divided by their
number to the power of ``length_penalty``. Probabilities are those of the model over the tokens that
a caption is made of (all but special tokens, ``</s>`` excepted). The rules of length only leave
tokens out: before ``min_length`` there is no ``</s>``, and the last place holds nothing else. So
every caption is complete, and its score is that of the whole.

Search is deterministic; of equal scores the lower id wins, then the earlier caption.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from vlp_jax.data.augment import normalize
from vlp_jax.data.tokenizer import Tokenizer
from vlp_jax.infra.mesh import BATCH_AXES
from vlp_jax.infra.sharding import constrain_batch
from vlp_jax.models.decoding import (
    ImageMemory,
    Params,
    TextCache,
    cast_kernels,
    decode_token,
    empty_cache,
    encode_image,
    project_image,
)
from vlp_jax.models.encoder import Encoder


@dataclasses.dataclass(frozen=True)
class Search:
    """How captions are looked for; static, one program is compiled for each.

    Attributes:
        bos_id: token every caption starts with.
        eos_id: token every caption ends with.
        pad_id: token behind the end.
        forbidden: ids that no caption holds after ``bos_id``: the special tokens.
        max_length: most tokens of a caption, ``bos_id`` and ``eos_id`` included.
        min_length: fewest tokens, both included; 3 leaves out the empty caption.
        beams: captions kept at a time and returned; 1: greedy search.
        length_penalty: power of the length that scores are divided by; 0: not at all, 1: the mean
            over tokens.
    """

    bos_id: int
    eos_id: int
    pad_id: int
    forbidden: tuple[int, ...]
    max_length: int
    min_length: int = 3
    beams: int = 1
    length_penalty: float = 0.0

    def __post_init__(self) -> None:
        if not 2 <= self.min_length <= self.max_length:
            raise ValueError(
                f"min_length={self.min_length} and max_length={self.max_length}: give "
                "2 <= min_length <= max_length; <s> and </s> count"
            )
        if self.beams < 1:
            raise ValueError(f"beams={self.beams}: give 1 (greedy search) or more")
        if self.length_penalty < 0:
            raise ValueError(
                f"length_penalty={self.length_penalty}: give 0 or more; more favours long captions"
            )
        if self.eos_id in self.forbidden:
            raise ValueError(f"forbidden holds eos_id={self.eos_id}: no caption could end")


def caption_search(
    tokenizer: Tokenizer,
    max_length: int,
    min_length: int = 3,
    beams: int = 1,
    length_penalty: float = 0.0,
) -> Search:
    """The search for captions in the words of a tokenizer; see ``Search``."""
    t = tokenizer
    return Search(
        bos_id=t.bos_id,
        eos_id=t.eos_id,
        pad_id=t.pad_id,
        forbidden=(t.pad_id, t.bos_id, t.unk_id, t.mask_id),
        max_length=max_length,
        min_length=min_length,
        beams=beams,
        length_penalty=length_penalty,
    )


class Captions(NamedTuple):
    """Captions of a batch of images, the best of each image first.

    Attributes:
        ids: int32 [B, K, T], padded.
        length: int32 [B, K], tokens of each caption, ``<s>`` and ``</s>`` included.
        score: float32 [B, K]; -inf (and length 0) where an image has fewer than K captions, as
            can be with a tiny vocabulary.
    """

    ids: jax.Array
    length: jax.Array
    score: jax.Array


@functools.partial(jax.jit, static_argnames=("model", "search"))
def generate(model: Encoder, params: Params, image: jax.Array, search: Search) -> Captions:
    """Caption images.

    Args:
        model: the model.
        params: its parameters.
        image: uint8 [B, S, S, 3].
        search: how.

    Raises:
        ValueError: the model has fewer positions than ``search.max_length``.
    """
    tokens = encode_image(model, params, normalize(image))
    run = greedy_search if search.beams == 1 else beam_search
    return run(model, params, tokens, search)


class _Decoder(NamedTuple):
    """What stays the same while captions grow."""

    model: Encoder
    params: Params
    memory: ImageMemory
    search: Search

    def __call__(
        self, ids: jax.Array, position: jax.Array, cache: TextCache
    ) -> tuple[jax.Array, jax.Array, TextCache]:
        """What may follow.

        Args:
            ids: int32 [B, K, T], the texts so far.
            position: int32 [], place of their last token.
            cache: of the tokens before it.

        Returns:
            Logits of the next token, float32 [B, K, V], -inf where it may not follow; what turns
            them into log-probabilities when subtracted, [B, K, 1]; and the cache with the last
            token.
        """
        s = self.search
        last = jax.lax.dynamic_index_in_dim(ids, position, axis=-1, keepdims=False)
        logits, cache = decode_token(self.model, self.params, last, position, cache, self.memory)
        vocabulary = jnp.arange(logits.shape[-1])
        in_captions = vocabulary < self.model.config.vocab_size
        in_captions &= ~jnp.isin(vocabulary, jnp.array(s.forbidden, jnp.int32))
        logits = jnp.where(in_captions[None, None], logits, -jnp.inf)
        log_total = jax.nn.logsumexp(logits, axis=-1, keepdims=True)
        is_end = vocabulary == s.eos_id
        length = position + 2  # with the token that follows
        allowed = jnp.where(is_end, length >= s.min_length, length < s.max_length)
        return jnp.where(allowed[None, None], logits, -jnp.inf), log_total, cache

    def score(self, log_prob: jax.Array, length: jax.Array) -> jax.Array:
        """Scores of captions of some length, ``<s>`` and ``</s>`` included."""
        return log_prob / (length - 1).astype(jnp.float32) ** self.search.length_penalty

    def start(self, batch: int) -> jax.Array:
        """Texts that are only begun: int32 [B, K, T]."""
        s = self.search
        ids = jnp.full((batch, s.beams, s.max_length), s.pad_id, jnp.int32)
        return constrain_batch(ids.at[:, :, 0].set(s.bos_id))


def _begin(
    model: Encoder, params: Params, image: jax.Array, search: Search
) -> tuple[_Decoder, TextCache]:
    params = cast_kernels(model, params)
    cache = empty_cache(model.config, image.shape[0], search.beams, search.max_length)
    return _Decoder(model, params, project_image(model, params, image), search), cache


class _Greedy(NamedTuple):
    """State of the greedy search; ``length`` is 0 while a caption grows."""

    position: jax.Array
    ids: jax.Array  # [B, 1, T]
    length: jax.Array  # [B, 1]
    log_prob: jax.Array  # [B, 1]
    cache: TextCache


def greedy_search(model: Encoder, params: Params, image: jax.Array, search: Search) -> Captions:
    """Take the likeliest token at each place.

    Args:
        model: the model.
        params: its parameters.
        image: [B, I, D] from ``models.decoding.encode_image``.
        search: how; one beam.

    Returns:
        One caption an image.

    Raises:
        ValueError: more than one beam, or more tokens than the model has positions for.
    """
    if search.beams != 1:
        raise ValueError(f"beams={search.beams}: greedy search has 1; use beam_search")
    decoder, cache = _begin(model, params, image, search)

    def growing(state: _Greedy) -> jax.Array:
        return (state.position < search.max_length - 1) & (state.length == 0).any()

    def grow(state: _Greedy) -> _Greedy:
        logits, log_total, cache = decoder(state.ids, state.position, state.cache)
        ended = state.length > 0
        place = state.position + 1
        token = jnp.where(ended, search.pad_id, logits.argmax(axis=-1))
        gain = logits.max(axis=-1) - log_total[..., 0]
        return _Greedy(
            position=place,
            ids=_put(state.ids, token, place),
            length=jnp.where(token == search.eos_id, place + 1, state.length),
            log_prob=state.log_prob + jnp.where(ended, 0.0, gain),
            cache=cache,
        )

    ids = decoder.start(cache[0].key.shape[0])
    nothing = jnp.zeros_like(ids[..., 0])
    state = _Greedy(jnp.zeros((), jnp.int32), ids, nothing, nothing.astype(jnp.float32), cache)
    state = jax.lax.while_loop(growing, grow, state)
    return Captions(state.ids, state.length, decoder.score(state.log_prob, state.length))


class _Beams(NamedTuple):
    """State of the beam search: K growing texts, and the K best captions that have ended."""

    position: jax.Array
    ids: jax.Array  # [B, K, T]
    log_prob: jax.Array  # [B, K], -inf for a beam that holds no text
    cache: TextCache
    ended: Captions


def beam_search(model: Encoder, params: Params, image: jax.Array, search: Search) -> Captions:
    """Grow the K likeliest texts of each image until K captions have ended.

    Of the 2 K best continuations of the growing texts, those among the first K that end are
    captions, and the first K that do not end grow on (each text has one continuation that ends,
    so there are as many). An image with K captions is done. A beam of 1 is the greedy search.

    Args:
        model: the model.
        params: its parameters.
        image: [B, I, D] from ``models.decoding.encode_image``.
        search: how; ``search.beams`` is K.

    Raises:
        ValueError: more tokens than the model has positions for.
    """
    decoder, cache = _begin(model, params, image, search)
    beams = search.beams

    def done(state: _Beams) -> jax.Array:
        return jnp.isfinite(state.ended.score).all(axis=-1)

    def growing(state: _Beams) -> jax.Array:
        return (state.position < search.max_length - 1) & ~done(state).all()

    def grow(state: _Beams) -> _Beams:
        logits, log_total, cache = decoder(state.ids, state.position, state.cache)
        place = state.position + 1
        # The best of each text first, then the best of all. Sums may round to ties which the
        # logits of one text do not have, and their order is kept in this way.
        best, token = _top_k(logits, min(2 * beams, logits.shape[-1]))
        total = _flat(state.log_prob[:, :, None] + (best - log_total))
        total, index = _top_k(total, 2 * beams)
        parent = index // best.shape[-1]
        token = _take(_flat(token), index)
        ids = _put(_take(state.ids, parent), token, place)
        is_end = token == search.eos_id

        counts = is_end & (jnp.arange(2 * beams) < beams)[None] & ~done(state)[:, None]
        score = decoder.score(total, place + 1)
        new = Captions(ids, jnp.full_like(token, place + 1), jnp.where(counts, score, -jnp.inf))
        live_total, live = _top_k(jnp.where(is_end, -jnp.inf, total), beams)
        return _Beams(
            position=place,
            ids=_take(ids, live),
            log_prob=live_total,
            cache=jax.tree.map(lambda kept: _take(kept, _take(parent, live)), cache),
            ended=_best(state.ended, new),
        )

    ids = decoder.start(cache[0].key.shape[0])
    log_prob = jnp.zeros(ids.shape[:2]).at[:, 1:].set(-jnp.inf)  # all texts are the same at first
    none = Captions(
        jnp.full_like(ids, search.pad_id),
        jnp.zeros_like(ids[..., 0]),
        jnp.full_like(log_prob, -jnp.inf),
    )
    state = _Beams(jnp.zeros((), jnp.int32), ids, log_prob, cache, none)
    return jax.lax.while_loop(growing, grow, state).ended


def _best(old: Captions, new: Captions) -> Captions:
    """The K best of K captions and some new ones, best first; the older of two equals."""
    both = Captions(*(jnp.concatenate(parts, axis=1) for parts in zip(old, new, strict=True)))
    score, index = _top_k(both.score, old.score.shape[1])
    return Captions(_take(both.ids, index), _take(both.length, index), score)


def _top_k(x: jax.Array, count: int) -> tuple[jax.Array, jax.Array]:
    """The largest along the last dimension and their places, [B, ...]; the first of two equals.

    Where a mesh is set, each shard looks through its own rows: the partitioner, left alone, would
    gather all rows on every device.
    """

    def local(x: jax.Array) -> tuple[jax.Array, jax.Array]:
        values, places = jax.lax.top_k(x, count)
        return values, places

    if jax.sharding.get_abstract_mesh().empty:
        return local(x)
    rows = PartitionSpec(BATCH_AXES)
    return jax.shard_map(local, in_specs=rows, out_specs=rows, check_vma=False)(x)


def _put(ids: jax.Array, token: jax.Array, place: jax.Array) -> jax.Array:
    """Texts [B, K, T] with a token each, [B, K], at a place []."""
    return jax.lax.dynamic_update_index_in_dim(ids, token, place, axis=-1)


def _take(rows: jax.Array, index: jax.Array) -> jax.Array:
    """Rows of every example: [B, N, ...], int32 [B, K] -> [B, K, ...]."""
    return jax.vmap(lambda rows, index: rows[index])(rows, index)


def _flat(x: jax.Array) -> jax.Array:
    """[B, K, N] -> [B, K * N]."""
    return x.reshape(x.shape[0], -1)
