"""Floating-point operations of each part, by formula: two for every multiply-add of a product.

Norms, activations, softmax and dropout are left out, as is usual for model FLOPs. Held against the
lowered module's own count in ``tests/models/test_flops.py``.
"""

from vlp_jax.compress.buckets import View
from vlp_jax.models.image_tower import ImageTowerConfig
from vlp_jax.models.layers import BlockConfig
from vlp_jax.models.resnet import ResNetConfig
from vlp_jax.models.vision_language import VisionLanguageConfig
from vlp_jax.models.vit import CONV_STRIDE, ViTConfig


def block_flops(
    config: BlockConfig, queries: float, self_keys: float = 0, context_keys: float = 0
) -> float:
    """Forward FLOPs of one block for one example.

    Args:
        config: geometry.
        queries: tokens that pass through the block, all streams together.
        self_keys: tokens each query meets in self-attention; 0: none.
        context_keys: tokens each query meets in cross-attention, projected once; 0: none.
    """
    width, mlp = config.width, config.mlp_width
    macs = queries * 2 * width * mlp
    if self_keys:
        macs += queries * 4 * width * width + 2 * queries * self_keys * width
    if context_keys:
        macs += queries * 2 * width * width + context_keys * 2 * width * width
        macs += 2 * queries * context_keys * width
    return 2.0 * macs


def vit_flops(config: ViTConfig, view: View | None = None) -> float:
    """Forward FLOPs of an image tower for one image, or for what a view encodes of it."""
    width, view = config.block.width, view or config.view
    stem = 0.0
    patch, channels = view.patch_size, 3
    if config.stem == "conv":
        side, inputs = view.image_size, 3
        for features in (width // 4, width // 2):
            side //= 2
            stem += 2.0 * side * side * 9 * inputs * features
            inputs = features
        patch, channels = patch // CONV_STRIDE, inputs
    stem += 2.0 * view.kept * patch * patch * channels * width
    return stem + config.depth * block_flops(config.block, view.tokens, view.tokens)


def resnet_flops(config: ResNetConfig, view: View | None = None) -> float:
    """Forward FLOPs of a convolutional tower for one image, or for a smaller one."""
    side, inputs = (view or config.view).image_size, config.channels
    macs = 3.0 * inputs * (3 * side) ** 2
    if config.stem == "conv7":
        macs = 3.0 * inputs * (7 * (side // 2)) ** 2
        side //= 4
    for stage, depth in enumerate(config.stages):
        inner, outputs = config.features(stage)
        for layer in range(depth):
            before, stride = side, 2 if stage and not layer else 1
            side //= stride
            shortcut = inputs * outputs if inputs != outputs or stride > 1 else 0
            if config.bottleneck:
                macs += before**2 * inputs * inner
                macs += side**2 * (9 * inner * inner + inner * outputs + shortcut)
            else:
                macs += side**2 * (9 * inputs * inner + 9 * inner * outputs + shortcut)
            inputs = outputs
    return 2.0 * macs


def tower_flops(config: ImageTowerConfig, view: View | None = None) -> float:
    """Forward FLOPs of an image tower of either kind for one image, or for what a view encodes."""
    if isinstance(config, ResNetConfig):
        return resnet_flops(config, view)
    return vit_flops(config, view)


def image_flops(config: VisionLanguageConfig, view: View | None = None) -> float:
    """Forward FLOPs of encoding one image: the tower, and the projection of its tokens."""
    image = config.image
    projection = 2.0 * (view or image.view).tokens * image.width * config.text.width
    return tower_flops(image, view) + projection


def text_flops(
    config: VisionLanguageConfig, tokens: float, streams: int, view: View | None = None
) -> float:
    """Forward FLOPs of both halves of the text stack for one example.

    Args:
        config: geometry.
        tokens: of the text.
        streams: of the text.
        view: what is encoded of the image; None: everything.
    """
    text, image = config.text, config.image
    rows, image_tokens = streams * tokens, (view or image.view).tokens
    projections = 2.0 * text.width * (rows * text.width + image_tokens * image.width)
    lower = config.lower_depth * block_flops(text, rows, tokens)
    upper = config.upper_depth * block_flops(text, rows, tokens, image_tokens)
    return projections + lower + upper


def reconstructor_flops(config: VisionLanguageConfig, queries: float, keys: float) -> float:
    """Forward FLOPs of the reconstructor for ``queries`` queries over ``keys`` states."""
    text = config.text
    projection = 2.0 * queries * text.width * text.width
    return projection + config.reconstructor_depth * block_flops(text, queries, context_keys=keys)


def vocabulary_flops(config: VisionLanguageConfig, rows: float) -> float:
    """Forward FLOPs of the vocabulary head for ``rows`` predictions."""
    width = config.text.width
    return 2.0 * rows * width * (width + config.padded_vocab_size)
