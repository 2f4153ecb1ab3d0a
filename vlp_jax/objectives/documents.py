"""Where the tokens of a batch of texts lie in their documents.

A row of a batch is one text, or, where the batch has ``text_document``, a run of several that were
packed into it, each from its <s> to its </s>. What a language objective does with a text it does
with each document of a row as if it had a row of its own: tokens see those of their document alone,
and positions begin again with every document.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from vlp_jax.data.batch import Batch

# Key of a batch: int32 [B, N], 1 for the tokens of a row's first document, 2 for those of its
# second, ..., and 0 for padding.
DOCUMENT = "text_document"


class Documents(NamedTuple):
    """Of every token its place in its document; axes of 1 where all tokens of a row agree.

    Attributes:
        position: int32 [1 or B, N], 0 for <s>.
        start: int32 [1 or B, 1 or N], place in the row of its document's <s>.
        length: int32 [B, 1 or N], tokens of its document, <s> and </s> included.
        number: int32 [B, N], see ``DOCUMENT``; None: a row is one text.
    """

    position: jax.Array
    start: jax.Array
    length: jax.Array
    number: jax.Array | None = None

    @property
    def positions(self) -> jax.Array | None:
        """What models take for positions: None where they are the places."""
        return None if self.number is None else self.position

    def within(self, mask: jax.Array) -> jax.Array:
        """A mask bool [B, ..., N, N] without what lies in other documents."""
        if self.number is None:
            return mask
        same = self.number[:, :, None] == self.number[:, None, :]
        same &= (self.number > 0)[:, None, :]
        return mask & same.reshape(len(same), *(1,) * (mask.ndim - 3), *same.shape[1:])


def documents_of(batch: Batch) -> Documents:
    """Where the tokens of a batch lie."""
    tokens = batch["text_ids"].shape[1]
    place = jnp.arange(tokens)[None]
    if DOCUMENT not in batch:
        return Documents(place, jnp.zeros((1, 1), jnp.int32), batch["text_length"][:, None])
    number = batch[DOCUMENT]
    edge = jnp.full((len(number), 1), -1, number.dtype)  # differs from every document
    first = number != jnp.concatenate([edge, number[:, :-1]], axis=1)
    last = number != jnp.concatenate([number[:, 1:], edge], axis=1)
    start = jax.lax.cummax(jnp.where(first, place, 0), axis=1)
    end = jax.lax.cummin(jnp.where(last, place, tokens), axis=1, reverse=True)
    length = jnp.where(number > 0, end + 1 - start, 0)
    return Documents(place - start, start, length, number)
