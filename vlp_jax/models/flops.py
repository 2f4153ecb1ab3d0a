"""Floating-point operations of each part, by formula: two for every multiply-add of a product.

Norms, activations, softmax and dropout are left out, as is usual for model FLOPs. Held against the
lowered module's own count in ``tests/models/test_flops.py``.
"""

from collections.abc import Sequence

from vlp_jax.compress.buckets import View
from vlp_jax.models.encoder import EncoderConfig
from vlp_jax.models.image_tower import ImageTowerConfig
from vlp_jax.models.layers import BlockConfig
from vlp_jax.models.resnet import ResNetConfig
from vlp_jax.models.shared import SharedConfig
from vlp_jax.models.three_towers import ThreeTowersConfig
from vlp_jax.models.tuning import PARTS, Part, unit_name
from vlp_jax.models.tuning_config import block_config
from vlp_jax.models.vision_language import VisionLanguageConfig
from vlp_jax.models.vit import CONV_STRIDE, ViTConfig


def block_flops(
    config: BlockConfig,
    queries: float,
    self_keys: float = 0,
    context_keys: float = 0,
    block: str = "",
) -> float:
    """Forward FLOPs of one block for one example.

    Low-rank updates count nothing: they are merged into the weights for inference. Of prompts their
    being read counts: what is read of them is the same for all examples, see ``prompt_flops``.

    Args:
        config: geometry.
        queries: tokens that pass through the block, all streams together.
        self_keys: tokens each query meets in self-attention; 0: none.
        context_keys: tokens each query meets in cross-attention, projected once; 0: none.
        block: its path in the model, by which tuning knows it.
    """
    width, tuning = config.width, config.tuning
    attentions = bool(self_keys) + bool(context_keys)

    def bottleneck(hidden: float) -> float:
        return 2 * queries * width * hidden

    def adapter(branch: str) -> float:
        added = tuning.adapter_at(block, branch)
        return bottleneck(added.width) if added else 0.0

    heads = tuning.heads_at(block, config.heads) * config.head_width
    channels = tuning.channels_at(block, config.mlp_width)
    macs = {"attention": 0.0, "mlp": queries * 2 * width * channels + adapter("mlp")}
    if self_keys:
        macs["attention"] += queries * 4 * width * heads + 2 * queries * self_keys * heads
        macs["attention"] += adapter("self_attention")
    if context_keys:
        macs["attention"] += queries * 2 * width * heads + context_keys * 2 * width * heads
        macs["attention"] += 2 * queries * context_keys * heads + adapter("cross_attention")
    macs["attention"] += 2 * queries * tuning.prompts_at(block) * heads
    skipped: list[Part] = [p for p in PARTS if unit_name(block, p) in tuning.skipped]
    instead = sum(bottleneck(tuning.replacement_at(part, attentions)) for part in skipped)
    if "block" in skipped:
        return 2.0 * instead
    return 2.0 * (instead + sum(cost for part, cost in macs.items() if part not in skipped))


def stack_flops(
    config: BlockConfig,
    blocks: Sequence[str],
    queries: float,
    self_keys: float = 0,
    context_keys: float = 0,
) -> float:
    """Forward FLOPs of blocks one after the other, by their paths; see ``block_flops``."""
    return sum(block_flops(config, queries, self_keys, context_keys, block) for block in blocks)


def prompt_flops(config: EncoderConfig) -> float:
    """Forward FLOPs of the keys and values of all deep prompts, once for all examples of a batch.

    Of all blocks; objectives that do not run some of these project fewer.
    """
    prompts = config.text.tuning.prompts_at
    return sum(
        read_flops(block_config(config, block), (block,), prompts(block))
        for blocks in config.stacks.values()
        for block in blocks
    )


def stem_flops(config: ViTConfig, view: View | None = None) -> float:
    """Forward FLOPs of embedding one image, or what a view encodes of it."""
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
    return stem + 2.0 * view.kept * patch * patch * channels * width


def vit_flops(config: ViTConfig, view: View | None = None) -> float:
    """Forward FLOPs of an image tower for one image, or for what a view encodes of it."""
    tokens = (view or config.view).tokens
    return stem_flops(config, view) + stack_flops(config.block, config.blocks, tokens, tokens)


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


def image_flops(config: EncoderConfig, view: View | None = None) -> float:
    """Forward FLOPs of ``encode_image`` for one image.

    Of two stacks: the tower, and the projection of its tokens. Of a shared one: the patches. Of
    three towers: that of images.
    """
    if isinstance(config, SharedConfig | ThreeTowersConfig):
        return image_input_flops(config, view)
    image = config.image
    projection = 2.0 * (view or image.view).tokens * image.width * config.text.width
    return tower_flops(image, view) + projection


def image_input_flops(config: EncoderConfig, view: View | None = None) -> float:
    """Of ``image_flops``, what ``text_flops`` does not count: all but the projection."""
    if isinstance(config, SharedConfig):
        return stem_flops(config.image, view)
    return tower_flops(config.image, view)


def image_feature_flops(config: EncoderConfig, view: View | None = None) -> float:
    """Forward FLOPs of ``image_feature`` for one image, which ``encode_image`` has encoded."""
    if isinstance(config, SharedConfig):
        return vit_flops(config.image, view) - stem_flops(config.image, view)
    return 0.0


def text_feature_flops(config: EncoderConfig, tokens: float) -> float:
    """Forward FLOPs of ``text_feature`` for one text."""
    if isinstance(config, SharedConfig):
        return text_flops(config, tokens, streams=1, with_image=False)
    return lower_flops(config, tokens, streams=1)


def lower_flops(config: EncoderConfig, tokens: float, streams: int) -> float:
    """Of ``text_flops``, what no image enters, and what a text needs once for several images."""
    if isinstance(config, SharedConfig):
        return 0.0  # a look-up
    if isinstance(config, ThreeTowersConfig):
        return stack_flops(config.text, config.stacks["text_tower"], streams * tokens, tokens)
    two = _of_two_stacks(config)
    return stack_flops(two.text, two.stacks["text_lower"], streams * tokens, tokens)


def text_flops(
    config: EncoderConfig,
    tokens: float,
    streams: int,
    view: View | None = None,
    *,
    joint: bool = False,
    with_image: bool = True,
) -> float:
    """Forward FLOPs of the text stack for one example, both halves where there are two.

    Of a shared stack with an image: also what it makes of the image. Of three towers: those of
    texts and of pairs, with the maps from one to the other.

    Args:
        config: geometry.
        tokens: of the text.
        streams: of the text.
        view: what is encoded of the image; None: everything.
        joint: whether the streams are bidirectional; each is one sequence with the image then,
            in a shared stack and in a fusion tower.
        with_image: False: the text alone, which a shared stack reads, and a text tower.
    """
    text, rows = config.text, streams * tokens
    image_tokens, prompts = (view or config.image.view).tokens, config.text.tuning.shallow_prompts
    read = image_tokens + prompts
    if isinstance(config, SharedConfig):
        blocks = config.stacks["image_tower"]
        if not with_image:
            return stack_flops(text, blocks, rows, tokens)
        return _pair_flops(text, blocks, tokens, streams, read, joint)
    if isinstance(config, ThreeTowersConfig):
        lower = lower_flops(config, tokens, streams)
        if not with_image:
            return lower
        entering = 2.0 * (rows + image_tokens) * text.width**2
        if config.co_attention:
            fusion = streams * co_attention_flops(config, tokens, image_tokens)
        else:
            blocks = config.stacks["fusion_tower"]
            fusion = _pair_flops(text, blocks, tokens, streams, read, joint)
        return lower + entering + fusion
    two = _of_two_stacks(config)
    projections = 2.0 * text.width * (rows * text.width + image_tokens * two.image.width)
    upper = stack_flops(text, two.stacks["text_upper"], rows, tokens, read)
    return projections + lower_flops(two, tokens, streams) + upper


def _pair_flops(
    config: BlockConfig,
    blocks: Sequence[str],
    tokens: float,
    streams: int,
    image_tokens: float,
    joint: bool,
) -> float:
    """Forward FLOPs of blocks that read a text and its image; see ``models.pairs``."""
    both = image_tokens + tokens
    if joint:
        return stack_flops(config, blocks, streams * both, both)
    image = beside_flops(config, blocks, image_tokens)
    return image + stack_flops(config, blocks, streams * tokens, both)


def beside_flops(config: BlockConfig, blocks: Sequence[str], image_tokens: float) -> float:
    """Forward FLOPs of an image that passes the blocks by itself, as one-sided streams read it."""
    image = stack_flops(config, blocks[:-1], image_tokens, image_tokens)
    return image + read_flops(config, blocks[-1:], image_tokens)  # nobody reads what that makes


def read_flops(config: BlockConfig, blocks: Sequence[str], tokens: float) -> float:
    """Forward FLOPs of the keys and values of tokens in the attentions of blocks.

    Of each block by the heads that it has; attentions that are skipped read nothing.
    """
    tuning = config.tuning
    skipped = {*tuning.skipped}
    attending = [block for block in blocks if not {block, unit_name(block, "attention")} & skipped]
    heads = sum(tuning.heads_at(block, config.heads) for block in attending)
    return 2.0 * tokens * 2 * config.width * heads * config.head_width


def co_attention_flops(config: ThreeTowersConfig, tokens: float, image_tokens: float) -> float:
    """Forward FLOPs of a fusion tower of two streams for one text with its image.

    Args:
        config: geometry.
        tokens: of the text.
        image_tokens: of the image.
    """
    text, stacks = config.text, config.stacks
    tokens = tokens + text.tuning.shallow_prompts
    image_tokens = image_tokens + text.tuning.shallow_prompts
    of_image = stack_flops(text, stacks["fusion_image"], image_tokens, image_tokens, tokens)
    of_text = stack_flops(text, stacks["fusion_text"], tokens, tokens, image_tokens)
    class_token = 2.0 * text.width**2
    return of_image + of_text + class_token


def reconstructor_flops(config: EncoderConfig, queries: float, keys: float) -> float:
    """Forward FLOPs of the reconstructor for ``queries`` queries over ``keys`` states."""
    text = config.text
    halves = isinstance(config, VisionLanguageConfig)  # the second is projected into
    projection = 2.0 * queries * text.width * text.width if halves else 0.0
    return projection + config.reconstructor_depth * block_flops(text, queries, context_keys=keys)


def vocabulary_flops(config: EncoderConfig, rows: float) -> float:
    """Forward FLOPs of the vocabulary head for ``rows`` predictions."""
    width = config.text.width
    return 2.0 * rows * width * (width + config.padded_vocab_size)


def _of_two_stacks(config: EncoderConfig) -> VisionLanguageConfig:
    if not isinstance(config, VisionLanguageConfig):
        raise TypeError(f"no formula for a {type(config).__name__}")
    return config
