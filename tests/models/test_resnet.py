"""ResNet against NumPy and the public code, its size and FLOPs, and what it refuses."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vlp_jax.compress.buckets import View
from vlp_jax.infra.errors import ConfigError
from vlp_jax.models.flops import resnet_flops
from vlp_jax.models.resnet import ResNet, ResNetConfig, max_pool

KEY = jax.random.key(0)
RESNET50 = ResNetConfig(224)
SMALL = {"stages": (1, 1), "channels": 4, "stem": "conv3"}


def variables_of(config, size=None):
    """Random ones: scales of zero would hide the branches."""
    size = size or config.image_size
    shapes = jax.eval_shape(ResNet(config).init, KEY, jnp.zeros((1, size, size, 3)))
    draw = np.random.default_rng(0)

    def leaf(path, shape):
        values = draw.normal(size=shape.shape) / np.sqrt(np.prod(shape.shape[:-1], initial=1.0))
        positive = path[-1].key in ("var", "scale")
        return jnp.asarray(0.5 + np.abs(values) if positive else values, jnp.float32)

    return jax.tree_util.tree_map_with_path(leaf, shapes)


def convolved(x, kernel, stride):
    side = kernel.shape[0]
    x = np.pad(x, ((0, 0), *[(side // 2, side // 2)] * 2, (0, 0)))
    windows = np.lib.stride_tricks.sliding_window_view(x, (side, side), axis=(1, 2))
    return np.einsum("bhwcij,ijco->bhwo", windows[:, ::stride, ::stride], kernel)


class Reference:
    """The definition in float64; ``train`` reads the batch's own mean and variance."""

    def __init__(self, variables, train):
        self.params, self.statistics = variables["params"], variables["batch_stats"]
        self.train, self.renewed = train, {}

    def norm(self, x, *path):
        params, running = self.params, self.statistics
        for key in path:
            params, running = params[key], running[key]
        mean, var = (np.asarray(running[k], np.float64) for k in ("mean", "var"))
        if self.train:
            batch = x.mean(axis=(0, 1, 2)), x.var(axis=(0, 1, 2))
            self.renewed[path] = (0.9 * mean + 0.1 * batch[0], 0.9 * var + 0.1 * batch[1])
            mean, var = batch
        scale, bias = (np.asarray(params[k], np.float64) for k in ("scale", "bias"))
        return (x - mean) / np.sqrt(var + 1e-5) * scale + bias

    def conv(self, x, *path, stride=1):
        params = self.params
        for key in path:
            params = params[key]
        return convolved(x, np.asarray(params["kernel"], np.float64), stride)

    def __call__(self, image, config):
        relu = lambda x: np.maximum(x, 0.0)  # noqa: E731
        x = relu(self.norm(self.conv(np.asarray(image, np.float64), "conv"), "norm"))
        for stage in range(len(config.stages)):
            name, stride = f"stage_{stage}_block_00", 2 if stage else 1
            sides = (1, stride, 1) if config.bottleneck else (stride, 1)
            y = x
            for i, s in enumerate(sides):
                y = self.norm(self.conv(y, name, f"conv_{i}", stride=s), name, f"norm_{i}")
                y = relu(y) if i < len(sides) - 1 else y
            if "shortcut_conv" in self.params[name]:
                x = self.conv(x, name, "shortcut_conv", stride=stride)
                x = self.norm(x, name, "shortcut_norm")
            x = relu(x + y)
        grid = x.reshape(len(x), -1, x.shape[-1])
        return np.concatenate([grid.mean(axis=1, keepdims=True), grid], axis=1)


@pytest.mark.parametrize("side", [8, 7])
def test_the_maximum_of_slices_is_that_of_windows(side):
    x = jax.random.normal(KEY, (2, side, side, 3))

    def by_windows(x):
        return nn.max_pool(x, (3, 3), (2, 2), ((1, 1), (1, 1)))

    def by_slices(x):
        return max_pool(max_pool(x, axis=1), axis=2)

    np.testing.assert_array_equal(by_slices(x), by_windows(x))
    slopes = jnp.cos(jnp.arange(3.0))[None, None, None]
    one, other = (
        jax.grad(lambda x, f=f: (f(x) * slopes).sum())(x) for f in (by_slices, by_windows)
    )
    np.testing.assert_allclose(one, other, rtol=1e-6)


@pytest.mark.parametrize("train", [False, True], ids=["running", "batch"])
@pytest.mark.parametrize("bottleneck", [False, True], ids=["basic", "bottleneck"])
def test_tokens_and_statistics_equal_the_definition(bottleneck, train):
    config = ResNetConfig(8, bottleneck=bottleneck, **SMALL)
    variables = variables_of(config)
    image = jax.random.normal(KEY, (3, 8, 8, 3))
    found, renewed = ResNet(config).apply(variables, image, train=train, mutable=["batch_stats"])
    reference = Reference(variables, train)
    np.testing.assert_allclose(found, reference(image, config), rtol=1e-4, atol=1e-4)
    assert found.shape == (3, config.tokens, config.width)
    assert bool(reference.renewed) == train
    for path, (mean, var) in reference.renewed.items():
        leaf = renewed["batch_stats"]
        for key in path:
            leaf = leaf[key]
        np.testing.assert_allclose(leaf["mean"], mean, rtol=1e-3, atol=1e-5)
        np.testing.assert_allclose(leaf["var"], var, rtol=1e-3, atol=1e-5)


def test_resnet50_has_the_published_size():
    """25.56M parameters with the classifier's 2.05M; 4.09 GMACs, of which that has 2M."""
    shapes = jax.eval_shape(ResNet(RESNET50).init, KEY, jnp.zeros((1, 224, 224, 3)))
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes["params"])) == 23_508_032
    assert resnet_flops(RESNET50) / 2 == pytest.approx(4.087e9, rel=1e-3)
    assert (RESNET50.width, RESNET50.tokens, RESNET50.patch_size) == (2048, 50, 32)
    assert (ResNetConfig(64, (2, 2, 2, 2), 64, False, "conv3").width) == 512


@pytest.mark.parametrize(
    "config",
    [
        ResNetConfig(64, (2, 1), 8),
        ResNetConfig(64, (2, 1), 8, bottleneck=False, stem="conv3"),
        ResNetConfig(64, (1, 1, 1), 8, bottleneck=False),
    ],
    ids=["bottleneck", "conv3", "basic"],
)
def test_flops_equal_the_count_of_the_lowered_module(config):
    """Up to what a window beyond the image's edge would have multiplied, and the norms."""
    shapes = jax.eval_shape(ResNet(config).init, KEY, jnp.zeros((1, 64, 64, 3)))
    image = jax.ShapeDtypeStruct((4, 64, 64, 3), jnp.float32)
    lowered = jax.jit(ResNet(config).apply).lower(shapes, image)
    counted = lowered.cost_analysis()["flops"] / 4
    if config.stem == "conv7":  # as a kernel of 4 x 4 x 16, with the zeros in it
        counted -= 2 * (4 * 4 * 16 - 7 * 7 * 3) * config.channels * 32**2
    assert counted == pytest.approx(resnet_flops(config), rel=0.12)
    half = View.whole(32, config.patch_size)
    assert resnet_flops(config, half) == pytest.approx(resnet_flops(config) / 4)


@pytest.mark.torch
@pytest.mark.slow
@pytest.mark.parametrize("kind", ["bottleneck", "basic"])
def test_live_reference(kind):
    """A random model of the public code, with its weights copied."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    channels = 16
    config = ResNetConfig(64, (2, 1), channels, kind == "bottleneck")
    factor = 4 if kind == "bottleneck" else 1
    torch.manual_seed(0)
    model = transformers.ResNetModel(
        transformers.ResNetConfig(
            embedding_size=channels,
            hidden_sizes=[channels * factor, 2 * channels * factor],
            depths=[2, 1],
            layer_type=kind,
        )
    ).eval()
    state = model.state_dict()
    generator = torch.Generator().manual_seed(1)
    for value in state.values():
        if value.ndim == 1:  # scales, biases and statistics, which are 1 and 0 at first
            value.copy_(0.5 + torch.rand(value.shape, generator=generator))
    params, statistics = {}, {}

    def take(prefix, target, source):
        kernel = state[f"{source}.convolution.weight"].numpy().transpose(2, 3, 1, 0)
        norm = {k: state[f"{source}.normalization.{k}"].numpy() for k in ("weight", "bias")}
        running = {k: state[f"{source}.normalization.running_{k}"].numpy() for k in ("mean", "var")}
        conv, own = target
        at, there = (
            (params, statistics)
            if not prefix
            else (
                params.setdefault(prefix, {}),
                statistics.setdefault(prefix, {}),
            )
        )
        at[conv] = {"kernel": kernel}
        at[own] = {"scale": norm["weight"], "bias": norm["bias"]}
        there[own] = running

    take("", ("conv", "norm"), "embedder.embedder")
    for stage, depth in enumerate(config.stages):
        for layer in range(depth):
            ours = f"stage_{stage}_block_{layer:02d}"
            theirs = f"encoder.stages.{stage}.layers.{layer}"
            for i in range(3 if config.bottleneck else 2):
                take(ours, (f"conv_{i}", f"norm_{i}"), f"{theirs}.layer.{i}")
            if f"{theirs}.shortcut.convolution.weight" in state:
                take(ours, ("shortcut_conv", "shortcut_norm"), f"{theirs}.shortcut")
    image = np.random.default_rng(0).normal(size=(2, 64, 64, 3)).astype(np.float32)
    with torch.no_grad():
        expected = model(torch.from_numpy(image.transpose(0, 3, 1, 2)))
    variables = {"params": params, "batch_stats": statistics}
    found = np.asarray(ResNet(config).apply(variables, jnp.asarray(image)))
    grid = expected.last_hidden_state.numpy().transpose(0, 2, 3, 1)
    np.testing.assert_allclose(found[:, 1:], grid.reshape(2, -1, config.width), atol=1e-3)
    np.testing.assert_allclose(found[:, 0], expected.pooler_output[:, :, 0, 0].numpy(), atol=1e-3)


@pytest.mark.parametrize(
    ("view", "message"),
    [
        (View(224, 32, 20), "p32@224k20 drops patches"),
        (View.whole(224, 16), "p16@224: patches of 16 px, .* stride of 32"),
    ],
)
def test_views_that_a_convolution_cannot_encode_are_refused(view, message):
    with pytest.raises(ConfigError, match=rf"compression\.buckets: {message}"):
        RESNET50.check_view(view, "compression.buckets")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"image_size": 100}, r"data\.image_size=100 is no multiple of 32"),
        ({"stages": ()}, r"model\.image\.stages=\(\)"),
        ({"stages": (1, 0)}, r"model\.image\.stages=\(1, 0\)"),
        ({"channels": 0}, r"model\.image\.channels=0"),
        ({"stem": "patch"}, r"model\.image\.stem='patch'"),
    ],
)
def test_bad_geometry_names_the_key(arguments, message):
    with pytest.raises(ValueError, match=message):
        ResNetConfig(**{"image_size": 64, **arguments})
