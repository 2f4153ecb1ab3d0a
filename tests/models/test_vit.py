"""The image tower under views: nothing compressed, dropped patches, other patch sizes."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import tiny_model

from vlp_jax.compress.buckets import View
from vlp_jax.compress.token_dropout import kept_patches
from vlp_jax.infra.errors import ConfigError
from vlp_jax.models.flops import vit_flops
from vlp_jax.models.layers import BlockConfig
from vlp_jax.models.vit import ViT, ViTConfig

SIZE, PATCH = 32, 8
KEYS = jax.random.split(jax.random.key(3), 2)


def tower(stem="patch", positions="learned", depth=2):
    config = dataclasses.replace(
        tiny_model().config.image,
        image_size=SIZE,
        patch_size=PATCH,
        depth=depth,
        stem=stem,
        positions=positions,
    )
    vit = ViT(config)
    image = jax.random.normal(jax.random.key(0), (2, SIZE, SIZE, 3))
    return vit, vit.init(jax.random.key(1), image), image


@pytest.mark.parametrize("stem", ["patch", "conv"])
@pytest.mark.parametrize("positions", ["learned", "sincos"])
def test_nothing_compressed_is_the_plain_path(stem, positions):
    vit, params, image = tower(stem, positions)
    plain = vit.apply(params, image)
    view = View(SIZE, PATCH, (SIZE // PATCH) ** 2)
    np.testing.assert_array_equal(plain, vit.apply(params, image, None, view, KEYS))


def test_padding_of_the_sequence_has_no_influence(monkeypatch):
    """Nor a gradient of its own: a length that suits the attention kernel changes nothing."""
    vit, params, image = tower()
    view = View(SIZE, PATCH, 5)

    # Squares would do badly: those of a layer norm's results hardly change with what it reads.
    weights = np.random.default_rng(0).standard_normal((2, 6, 32)).astype(np.float32)

    def total(params):
        return (vit.apply(params, image, None, view, KEYS) * weights).sum()

    expected = jax.value_and_grad(total)(params)
    monkeypatch.setattr("vlp_jax.models.vit.padded_length", lambda tokens, *_: tokens + 3)
    padded = jax.value_and_grad(total)(params)
    chex.assert_trees_all_close(padded, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("positions", ["learned", "sincos"])
def test_dropped_patches_have_no_influence_and_the_others_keep_their_places(positions):
    """Without blocks every token is its patch's own: those kept are the plain path's."""
    vit, params, image = tower(positions=positions, depth=0)
    plain, view = vit.apply(params, image), View(SIZE, PATCH, 5)
    tokens = vit.apply(params, image, None, view, KEYS)
    kept = np.asarray(kept_patches(KEYS, view.patches, view.kept))
    for row in range(2):
        np.testing.assert_allclose(tokens[row, 0], plain[row, 0], rtol=1e-6)
        np.testing.assert_allclose(tokens[row, 1:], plain[row, 1 + kept[row]], rtol=1e-5, atol=1e-6)

    def outside(pixels):
        return vit.apply(params, pixels, None, view, KEYS).sum()

    touched = np.abs(np.asarray(jax.grad(outside)(image)[0])).sum(axis=-1)
    touched = touched.reshape(4, PATCH, 4, PATCH).sum(axis=(1, 3)).reshape(-1) > 0
    assert set(np.flatnonzero(touched)) <= set(kept[0])


def test_attention_sees_the_kept_patches_alone():
    """With blocks: the same tokens as if the others had never been there."""
    vit, params, image = tower(depth=2)
    view = View(SIZE, PATCH, 5)
    kept = np.asarray(kept_patches(KEYS, view.patches, view.kept))
    hidden = np.ones((2, 4, 4), bool).reshape(2, -1)
    np.put_along_axis(hidden, kept, False, axis=1)
    noise = jnp.asarray(hidden.reshape(2, 4, 1, 4, 1, 1) * 100.0)
    other = image + jnp.broadcast_to(noise, (2, 4, PATCH, 4, PATCH, 3)).reshape(image.shape)
    np.testing.assert_array_equal(
        vit.apply(params, image, None, view, KEYS), vit.apply(params, other, None, view, KEYS)
    )


def test_larger_patches_of_an_enlarged_image_give_the_tokens_of_the_image():
    """Each patch enlarged by itself, bilinearly: the kernel's pseudo-inverse undoes it."""
    vit, params, image = tower(depth=1)
    patches = image.reshape(2, 4, PATCH, 4, PATCH, 3).transpose(0, 1, 3, 2, 4, 5)
    large = jax.image.resize(patches, (2, 4, 4, 12, 12, 3), "linear", antialias=False)
    enlarged = large.transpose(0, 1, 3, 2, 4, 5).reshape(2, 48, 48, 3)
    tokens = vit.apply(params, enlarged, None, View.whole(48, 12), KEYS)
    np.testing.assert_allclose(tokens, vit.apply(params, image), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("view", "tokens", "gmac"),
    [
        # Fact sheet of accelerated invariance pretraining, section 6.
        (View.whole(224, 16), 197, 17.56),
        (View.whole(240, 20), 145, 12.84),
        (View.whole(240, 24), 101, 8.90),
        (View.whole(240, 30), 65, 5.73),
        (View.whole(240, 40), 37, 3.30),
        (View.whole(240, 48), 26, 2.35),
        (View(224, 16, 147), 148, 0.745 * 17.56),
        (View(224, 16, 98), 99, 0.496 * 17.56),
        (View(224, 16, 49), 50, 0.251 * 17.56),
        (View(224, 16, 19), 20, 0.104 * 17.56),
        (View(240, 30, 32), 33, 0.168 * 17.56),
        (View(240, 40, 18), 19, 0.100 * 17.56),
    ],
)
def test_tokens_and_flops_of_the_fact_sheet(view, tokens, gmac):
    """The sheet projects every patch; here those that are dropped cost nothing."""
    base = ViTConfig(BlockConfig(768, 12, 3072), depth=12, patch_size=16, image_size=224)
    dropped = (view.patches - view.kept) * view.patch_size**2 * 3 * 768 / 1e9
    assert view.tokens == tokens
    assert vit_flops(base, view) / 2e9 + dropped == pytest.approx(gmac, rel=0.006)


@pytest.mark.parametrize("view", [View(SIZE, PATCH, 9), View.whole(48, 12), View.whole(48, 4)])
def test_flops_of_a_view_are_those_of_the_lowered_module(view):
    """As far as they lie in products: against the whole image, whose other operations are alike."""
    vit, params, _ = tower(depth=2)

    def counted(view):
        image = jnp.zeros((128, view.image_size, view.image_size, 3))
        keys = jax.random.split(KEYS[0], 128)
        encode = jax.jit(lambda p, x, k: vit.apply(p, x, None, view, k))
        return encode.lower(params, image, keys).cost_analysis()["flops"]

    expected = vit_flops(vit.config, view) / vit_flops(vit.config)
    assert counted(view) / counted(vit.config.view) == pytest.approx(expected, rel=0.1)


def test_views_that_cannot_be_encoded_are_refused():
    vit, params, image = tower("conv")
    with pytest.raises(ValueError, match="needs keys"):
        vit.apply(params, image, None, View(SIZE, PATCH, 3))
    with pytest.raises(ValueError, match="for a view of 48 px"):
        vit.apply(params, image, None, View.whole(48, 12))
    with pytest.raises(ConfigError, match=r"compression\.buckets: patches of 2 px"):
        vit.config.check_view(View.whole(SIZE, 2), "compression.buckets")
