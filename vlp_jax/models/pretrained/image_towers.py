"""Image towers of CLIP, ViT and MAE as parameters of ours.

Known namings: CLIP (transformers, open_clip), ViT (the authors' npz, transformers, timm) and MAE
(transformers, or the authors' in timm's naming).
"""

import dataclasses
from collections.abc import Iterable

import numpy as np

from vlp_jax.models.encoder import EncoderConfig
from vlp_jax.models.image_tower import as_vit
from vlp_jax.models.pretrained import naming, pixels
from vlp_jax.models.pretrained.converted import (
    Converted,
    count_blocks,
    make_parameters,
    missing_tensors,
    other_architecture,
    refuse_surplus,
    some_of,
)
from vlp_jax.models.pretrained.files import Weights, WeightsError
from vlp_jax.models.pretrained.geometry import check_block, expect, expect_depth
from vlp_jax.models.pretrained.merge import IMAGE_POSITIONS
from vlp_jax.models.pretrained.naming import BlockNames, Leaf
from vlp_jax.models.pretrained.pixels import PIXELS, Pixels
from vlp_jax.models.vit import ViTConfig

_PATCH = "image_tower/patch_embedding"


@dataclasses.dataclass(frozen=True)
class _ImageFamily:
    """How the torch implementations of an image tower name its parts; prefixes end in a dot."""

    title: str
    prefixes: tuple[str, ...]
    class_token: str
    positions: str
    patch: str
    pre_norm: str
    norm: str
    blocks: str
    block: BlockNames
    activation: str
    norm_eps: float


_CLIP = _ImageFamily(
    title="CLIP (transformers)",
    prefixes=("vision_model.", ""),
    class_token="embeddings.class_embedding",
    positions="embeddings.position_embedding.weight",
    patch="embeddings.patch_embedding",
    pre_norm="pre_layrnorm",  # spelt so there
    norm="post_layernorm",
    blocks="encoder.layers.",
    block=naming.CLIP_BLOCK,
    activation="quick_gelu",
    norm_eps=1e-5,
)
_OPEN_CLIP = _ImageFamily(
    title="CLIP (open_clip)",
    prefixes=("visual.",),
    class_token="class_embedding",
    positions="positional_embedding",
    patch="conv1",
    pre_norm="ln_pre",
    norm="ln_post",
    blocks="transformer.resblocks.",
    block=naming.OPEN_CLIP_BLOCK,
    activation="quick_gelu",
    norm_eps=1e-5,
)
_VIT = _ImageFamily(
    title="ViT (transformers)",
    prefixes=("vit.", ""),
    class_token="embeddings.cls_token",
    positions="embeddings.position_embeddings",
    patch="embeddings.patch_embeddings.projection",
    pre_norm="",
    norm="layernorm",
    blocks="encoder.layer.",
    block=naming.VIT_BLOCK,
    activation="gelu",
    norm_eps=1e-6,
)
_TIMM = _ImageFamily(
    title="ViT (timm)",
    prefixes=("",),
    class_token="cls_token",
    positions="pos_embed",
    patch="patch_embed.proj",
    pre_norm="norm_pre",
    norm="norm",
    blocks="blocks.",
    block=naming.TIMM_BLOCK,
    activation="gelu",
    norm_eps=1e-6,
)
_IMAGE_FAMILIES = (_CLIP, _OPEN_CLIP, _VIT, _TIMM)
_NPZ_BLOCKS = "Transformer/encoderblock_"


def convert_image(
    weights: Weights, config: EncoderConfig, fed: Pixels, trained: Pixels | None = None
) -> Converted:
    """An image tower of CLIP, ViT or MAE.

    The patch embedding absorbs the difference between the normalisation of pixels in training and
    here, exactly.

    Args:
        weights: of ``read_weights``.
        config: of the model that is to take them.
        fed: how this project's batches are normalised.
        trained: how the checkpoint's were; None: what its settings or its family say.

    Raises:
        WeightsError: no known image tower, tensors are missing, or the normalisation is not known.
        ConfigError: the config describes another geometry.
    """
    there = weights.arrays
    if any(name.startswith(_NPZ_BLOCKS) for name in there):
        return _convert_npz(weights, config, fed, trained)
    for family in _IMAGE_FAMILIES:
        for prefix in family.prefixes:
            # Either will do, so that the other one is named as missing where it is.
            if {prefix + family.class_token, f"{prefix}{family.patch}.weight"} & there.keys():
                return _convert_torch_image(weights, config, family, prefix, fed, trained)
    raise WeightsError(
        weights.file,
        f"no image tower of CLIP, ViT or MAE in a known naming; it holds {some_of(there)}",
        "Give the weights of one of these, or convert the names to those of transformers",
    )


def _convert_torch_image(
    weights: Weights,
    config: EncoderConfig,
    family: _ImageFamily,
    prefix: str,
    fed: Pixels,
    trained: Pixels | None,
) -> Converted:
    image = as_vit(config.image, str(weights.file))
    there = weights.arrays
    mae = weights.settings.get("model_type") == "vit_mae" or any(
        name.startswith(("decoder.", "decoder_")) for name in there
    )
    title = family.title.replace("ViT", "MAE") if mae else family.title
    blocks = prefix + family.blocks
    patch = f"{prefix}{family.patch}.weight"
    hidden = there.get(f"{blocks}0.{family.block.mlp_in}.weight")
    depth = count_blocks(there, blocks, f"{family.block.mlp_in}.weight")
    if not depth:
        raise other_architecture(
            weights, f"{title} has blocks named {blocks}0, and these are not there"
        )
    if patch not in there:
        raise missing_tensors(weights, [patch])
    _expect_patches(weights, patch, there[patch].shape[1:])
    clip = family in (_CLIP, _OPEN_CLIP)
    pre_norm = prefix + family.pre_norm
    has_pre_norm = clip or f"{pre_norm}.weight" in there  # timm has CLIP's towers as well
    notes = _check_image(
        weights,
        config,
        width=there[patch].shape[0],
        patch_size=there[patch].shape[-1],
        depth=depth,
        mlp_width=None if hidden is None else len(hidden),
        pre_norm=has_pre_norm,
        activation=family.activation,
        norm_eps=family.norm_eps,
    )
    if family is _OPEN_CLIP and image.block.activation == family.activation:
        notes += (
            f"config.model.image.activation is {family.activation!r}, as in OpenAI's weights; "
            "most of open_clip's own (LAION, DataComp) have 'gelu', and the names do not tell",
        )
    width = image.block.width
    leaves = [
        Leaf(
            "image_tower/class_token",
            (prefix + family.class_token,),
            lambda token: token.reshape(1, 1, width),
        ),
        Leaf(
            IMAGE_POSITIONS, (prefix + family.positions,), lambda table: table.reshape(1, -1, width)
        ),
        Leaf(f"{_PATCH}/kernel", (patch,), _patch_kernel),
        *_modality(image, prefix + family.class_token),
        *naming.norm("image_tower/norm", prefix + family.norm, there),
    ]
    bias = f"{prefix}{family.patch}.bias"
    if clip or (has_pre_norm and bias not in there):  # the convolution of CLIP has no bias
        leaves.append(Leaf(f"{_PATCH}/bias", (patch,), lambda kernel: np.zeros(len(kernel))))
    else:
        leaves.append(Leaf(f"{_PATCH}/bias", (bias,), naming.same))
    if has_pre_norm:
        leaves += naming.norm("image_tower/pre_norm", pre_norm, there)
    for layer in range(depth):
        leaves += naming.torch_block(
            f"image_tower/block_{layer:02d}",
            f"{blocks}{layer}.",
            family.block,
            image.block.heads,
            there,
        )
    refuse_surplus(weights, leaves, blocks, depth)
    if clip:
        usual: Pixels | None = PIXELS["clip"]
    else:
        usual = PIXELS["imagenet"] if mae else None  # other ViTs of these namings differ
    return _with_pixels(weights, title, leaves, notes, fed, trained, usual)


def _convert_npz(
    weights: Weights, config: EncoderConfig, fed: Pixels, trained: Pixels | None
) -> Converted:
    there = weights.arrays
    kernel, hidden = "embedding/kernel", f"{_NPZ_BLOCKS}0/MlpBlock_3/Dense_0/kernel"
    absent = [name for name in (kernel, hidden) if name not in there]
    if absent:
        raise missing_tensors(weights, absent)
    _expect_patches(weights, kernel, there[kernel].transpose(2, 0, 1, 3).shape[:3])
    depth = count_blocks(there, _NPZ_BLOCKS, "MlpBlock_3/Dense_0/kernel", separator="/")
    query = there.get(f"{_NPZ_BLOCKS}0/MultiHeadDotProductAttention_1/query/kernel")
    notes = _check_image(
        weights,
        config,
        width=there[kernel].shape[-1],
        patch_size=there[kernel].shape[0],
        depth=depth,
        mlp_width=there[hidden].shape[-1],
        pre_norm=False,
        activation="gelu",
        norm_eps=1e-6,
        heads=None if query is None else query.shape[1],
    )
    leaves = [
        Leaf("image_tower/class_token", ("cls",), naming.same),
        Leaf(IMAGE_POSITIONS, ("Transformer/posembed_input/pos_embedding",), naming.same),
        Leaf(f"{_PATCH}/kernel", (kernel,), lambda array: array.reshape(-1, array.shape[-1])),
        Leaf(f"{_PATCH}/bias", ("embedding/bias",), naming.same),
        *_modality(as_vit(config.image, str(weights.file)), "cls"),
        *naming.jax_norm("image_tower/norm", "Transformer/encoder_norm"),
    ]
    for layer in range(depth):
        leaves += naming.jax_block(f"image_tower/block_{layer:02d}", f"{_NPZ_BLOCKS}{layer}/")
    refuse_surplus(weights, leaves, _NPZ_BLOCKS, depth, separator="/")
    title = "ViT (npz of its authors)"
    return _with_pixels(weights, title, leaves, notes, fed, trained, PIXELS["half"])


def _modality(image: ViTConfig, token: str) -> list[Leaf]:
    """Zeros for the vector that marks images, which no tower of images alone has.

    Args:
        image: of the model.
        token: name of a tensor of the vector's size.
    """
    if not image.modality:
        return []
    path = "image_tower/modality_embedding"
    return [Leaf(path, (token,), lambda array: np.zeros_like(array).reshape(1, 1, -1))]


def _patch_kernel(kernel: np.ndarray) -> np.ndarray:
    """Of a convolution [D, 3, p, p] to that of a product [p * p * 3, D]."""
    return kernel.transpose(2, 3, 1, 0).reshape(-1, len(kernel))


def _with_pixels(
    weights: Weights,
    title: str,
    leaves: Iterable[Leaf],
    notes: tuple[str, ...],
    fed: Pixels,
    trained: Pixels | None,
    usual: Pixels | None,
) -> Converted:
    """Make the parameters and fold the normalisation of pixels into the patch embedding."""
    trained = trained or pixels.from_settings(weights.settings) or usual
    if trained is None:
        raise WeightsError(
            weights.file,
            f"{title}: nothing says how pixels were normalised in training",
            "Give --pixels=half (augreg and the first ViTs) or --pixels=imagenet (MAE, DeiT, DINO)",
        )
    params, sources = make_parameters(weights, leaves)
    if trained != fed:
        kernel, bias = params[f"{_PATCH}/kernel"], params[f"{_PATCH}/bias"]
        params[f"{_PATCH}/kernel"], params[f"{_PATCH}/bias"] = pixels.fold(
            kernel, bias, trained, fed
        )
        notes += (
            f"pixels were normalised by mean {trained.mean} and deviation {trained.std} in "
            "training; the patch embedding has absorbed the difference",
        )
    return Converted(weights, title, params, sources, notes)


def _expect_patches(weights: Weights, name: str, shape: tuple[int, ...]) -> None:
    """Refuse what is no embedding of square RGB patches; ``shape`` is [channels, p, p]."""
    if len(shape) != 3 or shape[0] != 3 or shape[1] != shape[2]:
        raise other_architecture(
            weights, f"{name} reads {list(shape)} (channels, height, width), no square RGB patches"
        )


def _check_image(
    weights: Weights,
    config: EncoderConfig,
    *,
    width: int,
    patch_size: int,
    depth: int,
    mlp_width: int | None,
    pre_norm: bool,
    activation: str,
    norm_eps: float,
    heads: int | None = None,
) -> tuple[str, ...]:
    """Compare the geometry of a checkpoint with the config; returns notes."""
    c, section = as_vit(config.image, str(weights.file)), "model.image"
    expect(weights, f"{section}.stem", c.stem, "patch")
    expect(weights, f"{section}.patch_size", c.patch_size, patch_size)
    expect(weights, f"{section}.width", c.block.width, width)
    if mlp_width is not None:
        expect(weights, f"{section}.mlp_width", c.block.mlp_width, mlp_width)
    expect(weights, f"{section}.pre_norm", c.pre_norm, pre_norm)
    expect(weights, f"{section}.norm", c.block.norm, "pre")
    expect_depth(weights, f"{section}.depth", c.depth, depth)
    if heads is not None:
        expect(weights, f"{section}.heads", c.block.heads, heads)
    settings = weights.settings.get("vision_config") or weights.settings
    known = heads is not None
    return check_block(weights, section, c.block, settings, activation, norm_eps, known)
