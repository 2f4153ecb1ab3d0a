"""Which patches stay."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vlp_jax.compress.token_dropout import kept_patches, take_patches

KEYS = jax.random.split(jax.random.key(0), 4000)


def test_every_patch_stays_as_often_and_with_any_other():
    kept = np.asarray(kept_patches(KEYS, 9, 4))
    assert (np.diff(kept, axis=1) > 0).all()
    member = np.zeros((len(kept), 9))
    np.put_along_axis(member, kept, 1.0, axis=1)
    np.testing.assert_allclose(member.mean(axis=0), 4 / 9, atol=0.03)
    together = (member.T @ member / len(member))[~np.eye(9, dtype=bool)]
    np.testing.assert_allclose(together, 4 / 9 * 3 / 8, atol=0.03)


def test_nothing_dropped_is_everything_in_order():
    np.testing.assert_array_equal(kept_patches(KEYS[:3], 9, 9), np.tile(np.arange(9), (3, 1)))


def test_the_choice_depends_on_the_key_alone():
    whole, part = kept_patches(KEYS[:8], 16, 5), kept_patches(KEYS[3:5], 16, 5)
    np.testing.assert_array_equal(whole[3:5], part)
    assert (np.asarray(whole[0]) != np.asarray(whole[1])).any()


def test_patches_are_taken_row_by_row():
    x = jnp.arange(2 * 4 * 3).reshape(2, 4, 3)
    taken = take_patches(x, jnp.array([[0, 2], [1, 3]]))
    np.testing.assert_array_equal(taken, [x[0][np.array([0, 2])], x[1][np.array([1, 3])]])


@pytest.mark.parametrize("kept", [0, 10])
def test_impossible_counts_are_refused(kept):
    with pytest.raises(ValueError, match="of 9 patches cannot be kept"):
        kept_patches(KEYS[:1], 9, kept)
