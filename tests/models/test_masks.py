"""Attention masks against their definition, pair by pair."""

import jax.numpy as jnp
import numpy as np

from vlp_jax.models.masks import (
    bidirectional_mask,
    forward_mask,
    reverse_mask,
    token_mask,
    two_stream_mask,
)

LENGTHS, TOKENS = (5, 3, 1, 0), 5


def test_masks_match_their_definition() -> None:
    lengths = jnp.array(LENGTHS)
    real = np.asarray(token_mask(lengths, TOKENS))
    both = np.asarray(bidirectional_mask(lengths, TOKENS))
    forward = np.asarray(forward_mask(lengths, TOKENS))
    reverse = np.asarray(reverse_mask(lengths, TOKENS))
    for row, length in enumerate(LENGTHS):
        for i in range(TOKENS):
            assert real[row, i] == (i < length)
            for j in range(TOKENS):
                inside = i < length and j < length
                assert both[row, i, j] == inside
                assert forward[row, i, j] == (inside and j <= i)
                assert reverse[row, i, j] == (inside and j >= i)


def test_streams_are_stacked_inside() -> None:
    lengths = jnp.array(LENGTHS)
    both = two_stream_mask(lengths, TOKENS)
    assert both.shape == (len(LENGTHS), 2, TOKENS, TOKENS)
    np.testing.assert_array_equal(both[:, 0], forward_mask(lengths, TOKENS))
    np.testing.assert_array_equal(both[:, 1], reverse_mask(lengths, TOKENS))
