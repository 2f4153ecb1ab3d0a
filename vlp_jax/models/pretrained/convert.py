"""Public checkpoints as parameters of our model.

Image towers: CLIP (transformers, open_clip), ViT (the authors' npz, transformers, timm) and MAE
(transformers, or the authors' in timm's naming). Text: RoBERTa and BERT (transformers), into the
lower half of the text stack (FLM fact sheet, section 1), and their MLM head if asked for.

    weights = read_weights("clip-vit-base-patch32/")
    converted = convert_image(weights, model.config, fed=Pixels(PIXEL_MEAN, PIXEL_STD))
    arrays, report = converted.fit(shapes)
"""

import dataclasses
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from vlp_jax.infra.errors import ConfigError
from vlp_jax.models.layers import BlockConfig
from vlp_jax.models.pretrained import naming, pixels
from vlp_jax.models.pretrained.files import Weights, WeightsError
from vlp_jax.models.pretrained.merge import IMAGE_POSITIONS, TEXT_POSITIONS, Report, Row, fit
from vlp_jax.models.pretrained.naming import BlockNames, Leaf
from vlp_jax.models.pretrained.pixels import PIXELS, Pixels
from vlp_jax.models.vision_language import VisionLanguageConfig

_PATCH = "image_tower/patch_embedding"
_USUAL_HEAD = 64  # features of a head, where neither shapes nor settings tell
_WORDS = "embeddings.word_embeddings.weight"
# Names of activations in the settings of transformers -> ours.
_ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "quick_gelu": "quick_gelu",
}


@dataclasses.dataclass(frozen=True)
class Converted:
    """A public checkpoint in our naming, at its own depth and with its own position tables.

    Attributes:
        weights: it was made of.
        family: what the checkpoint is, for the user.
        params: path in our tree -> float32 array.
        sources: the same paths -> names of the public tensors.
        notes: what the user should know.
    """

    weights: Weights
    family: str
    params: dict[str, np.ndarray]
    sources: dict[str, tuple[str, ...]]
    notes: tuple[str, ...]

    def fit(self, shapes: Mapping[str, tuple[int, ...]]) -> tuple[dict[str, np.ndarray], Report]:
        """Cut and resize to a model: last blocks that it lacks are left out.

        Args:
            shapes: of the model's parameters, by path.

        Returns:
            The parameters it takes from the checkpoint, and what became of every tensor: each
            parameter of the model, and each public tensor that was not used.

        Raises:
            WeightsError: what is there does not fit; see ``merge``.
        """
        origin = str(self.weights.file)
        fitted, report = fit(shapes, self.params, origin, drop_blocks=True)
        rows = [
            dataclasses.replace(row, sources=self.sources.get(row.parameter, ()))
            for row in report.rows
            if row.status != "unused"
        ]
        taken = {name for row in rows for name in row.sources}
        rows += [
            Row("unused", "", array.shape, (name,))
            for name, array in self.weights.arrays.items()
            if name not in taken
        ]
        return fitted, Report(tuple(rows), self.notes)


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
    weights: Weights, config: VisionLanguageConfig, fed: Pixels, trained: Pixels | None = None
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
        f"no image tower of CLIP, ViT or MAE in a known naming; it holds {_some(there)}",
        "Give the weights of one of these, or convert the names to those of transformers",
    )


def convert_text(
    weights: Weights,
    config: VisionLanguageConfig,
    special_ids: Mapping[str, int],
    mlm_head: bool = False,
) -> Converted:
    """The embeddings and first blocks of RoBERTa or BERT, for the lower half of the text stack.

    The first row of the token types is added to every position (captions have one type), and
    RoBERTa's first two positions, which no token has, are left out.

    Args:
        weights: of ``read_weights``.
        config: of the model that is to take them; its vocabulary is that of the tokenizer.
        special_ids: ``bos``, ``pad`` and ``eos`` -> their number in the tokenizer.
        mlm_head: whether the MLM head goes to the vocabulary head.

    Raises:
        WeightsError: neither RoBERTa nor BERT, or tensors are missing.
        ConfigError: the config describes another geometry, or the tokenizer another vocabulary.
    """
    there = weights.arrays
    title, prefix = _text_family(weights)
    words = f"{prefix}{_WORDS}"
    if words not in there:
        raise _missing(weights, [words])
    vocab_size, width = there[words].shape
    depth = _depth(there, f"{prefix}encoder.layer.", "attention.output.dense.weight")
    if not depth:
        raise _foreign(weights, f"{title} has blocks named {prefix}encoder.layer.0, not there")
    roberta = title == "RoBERTa"
    _check_vocabulary(weights, vocab_size, config, special_ids, roberta)
    section = "model.text"
    _expect(weights, f"{section}.width", config.text.width, width)
    _expect(weights, f"{section}.norm", config.text.norm, "post")
    _expect_depth(weights, f"{section}.lower_depth", config.lower_depth, depth)
    intermediate = there.get(f"{prefix}encoder.layer.0.intermediate.dense.weight")
    if intermediate is not None:
        _expect(weights, f"{section}.mlp_width", config.text.mlp_width, len(intermediate))
    default_eps = 1e-5 if roberta else 1e-12
    notes = _check_block(weights, section, config.text, weights.settings, "gelu", default_eps)
    leaves = list(_text_leaves(there, prefix, config, depth, first_row=2 if roberta else 0))
    _refuse_surplus(weights, leaves, f"{prefix}encoder.layer.", depth)
    if mlm_head:
        head = list(_mlm_head(there, words, config, roberta))
        if there.keys().isdisjoint(name for leaf in head for name in leaf.sources if name != words):
            raise WeightsError(
                weights.file,
                f"{title} without the head of its pretraining",
                "Leave --mlm_head out, or give weights that were saved with it (...ForMaskedLM)",
            )
        leaves += head
    params, sources = _make(weights, leaves)
    return Converted(weights, title, params, sources, notes)


def _text_family(weights: Weights) -> tuple[str, str]:
    """RoBERTa or BERT, and the prefix of its names."""
    there = weights.arrays
    for title, prefix in (("RoBERTa", "roberta."), ("BERT", "bert.")):
        if any(name.startswith(prefix) for name in there):
            return title, prefix
    types = there.get("embeddings.token_type_embeddings.weight")
    if _WORDS in there and types is not None:
        # Saved without a head, and so without a prefix. RoBERTa has one token type, BERT two.
        return ("RoBERTa" if len(types) == 1 else "BERT"), ""
    raise WeightsError(
        weights.file,
        f"neither RoBERTa nor BERT in the naming of transformers; it holds {_some(there)}",
        "Give the weights of one of these",
    )


def _check_vocabulary(
    weights: Weights,
    vocab_size: int,
    config: VisionLanguageConfig,
    special_ids: Mapping[str, int],
    roberta: bool,
) -> None:
    remedy = "Give the tokenizer that came with the weights (--tokenizer)"
    if vocab_size != config.vocab_size:
        raise ConfigError(
            "tokenizer.path",
            f"{weights.file} has a vocabulary of {vocab_size} tokens, the tokenizer "
            f"{config.vocab_size}",
            remedy,
        )
    usual = {"bos": 0, "pad": 1, "eos": 2} if roberta else {"pad": 0}
    for role, number in usual.items():
        expected = weights.settings.get(f"{role}_token_id", number)
        if expected is not None and special_ids[role] != expected:
            raise ConfigError(
                "tokenizer.path",
                f"its {role} token has number {special_ids[role]}, that of {weights.file} has "
                f"{expected}",
                remedy,
            )


def _text_leaves(
    there: Mapping[str, np.ndarray],
    prefix: str,
    config: VisionLanguageConfig,
    depth: int,
    first_row: int,
) -> Iterator[Leaf]:
    embeddings = f"{prefix}embeddings."
    yield Leaf(
        "text_embedding/token/embedding",
        (f"{prefix}{_WORDS}",),
        lambda table: _pad_rows(table, config.padded_vocab_size),
    )
    yield Leaf(
        TEXT_POSITIONS,
        (f"{embeddings}position_embeddings.weight", f"{embeddings}token_type_embeddings.weight"),
        lambda positions, types: positions[first_row:] + types[0],
    )
    yield from naming.norm("text_embedding/norm", f"{embeddings}LayerNorm", there)
    for layer in range(depth):
        yield from naming.torch_block(
            f"text_lower_{layer}",
            f"{prefix}encoder.layer.{layer}.",
            naming.BERT_BLOCK,
            config.text.heads,
            there,
        )


def _mlm_head(
    there: Mapping[str, np.ndarray], words: str, config: VisionLanguageConfig, roberta: bool
) -> Iterator[Leaf]:
    if roberta:
        dense, norm, head, bias = "lm_head.dense", "lm_head.layer_norm", "lm_head", "lm_head.bias"
    else:
        head, bias = "cls.predictions", "cls.predictions.bias"
        dense, norm = f"{head}.transform.dense", f"{head}.transform.LayerNorm"
    decoder = f"{head}.decoder.weight"
    yield from naming.dense("vocabulary_head/dense", dense)
    yield from naming.norm("vocabulary_head/norm", norm, there)
    yield Leaf(
        "vocabulary_head/decoder_kernel",
        (decoder if decoder in there else words,),  # files leave out tensors that are tied
        lambda table: _pad_rows(table, config.padded_vocab_size).T,
    )
    yield Leaf(
        "vocabulary_head/decoder_bias",
        (bias,),
        lambda values: _pad_rows(values, config.padded_vocab_size),
    )


def _convert_torch_image(
    weights: Weights,
    config: VisionLanguageConfig,
    family: _ImageFamily,
    prefix: str,
    fed: Pixels,
    trained: Pixels | None,
) -> Converted:
    there = weights.arrays
    mae = weights.settings.get("model_type") == "vit_mae" or any(
        name.startswith(("decoder.", "decoder_")) for name in there
    )
    title = family.title.replace("ViT", "MAE") if mae else family.title
    blocks = prefix + family.blocks
    patch = f"{prefix}{family.patch}.weight"
    hidden = there.get(f"{blocks}0.{family.block.mlp_in}.weight")
    depth = _depth(there, blocks, f"{family.block.mlp_in}.weight")
    if not depth:
        raise _foreign(weights, f"{title} has blocks named {blocks}0, and these are not there")
    if patch not in there:
        raise _missing(weights, [patch])
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
    if family is _OPEN_CLIP and config.image.block.activation == family.activation:
        notes += (
            f"config.model.image.activation is {family.activation!r}, as in OpenAI's weights; "
            "most of open_clip's own (LAION, DataComp) have 'gelu', and the names do not tell",
        )
    width = config.image.block.width
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
            config.image.block.heads,
            there,
        )
    _refuse_surplus(weights, leaves, blocks, depth)
    if clip:
        usual: Pixels | None = PIXELS["clip"]
    else:
        usual = PIXELS["imagenet"] if mae else None  # other ViTs of these namings differ
    return _with_pixels(weights, title, leaves, notes, fed, trained, usual)


def _convert_npz(
    weights: Weights, config: VisionLanguageConfig, fed: Pixels, trained: Pixels | None
) -> Converted:
    there = weights.arrays
    kernel, hidden = "embedding/kernel", f"{_NPZ_BLOCKS}0/MlpBlock_3/Dense_0/kernel"
    absent = [name for name in (kernel, hidden) if name not in there]
    if absent:
        raise _missing(weights, absent)
    _expect_patches(weights, kernel, there[kernel].transpose(2, 0, 1, 3).shape[:3])
    depth = _depth(there, _NPZ_BLOCKS, "MlpBlock_3/Dense_0/kernel", separator="/")
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
        *naming.jax_norm("image_tower/norm", "Transformer/encoder_norm"),
    ]
    for layer in range(depth):
        leaves += naming.jax_block(f"image_tower/block_{layer:02d}", f"{_NPZ_BLOCKS}{layer}/")
    _refuse_surplus(weights, leaves, _NPZ_BLOCKS, depth, separator="/")
    title = "ViT (npz of its authors)"
    return _with_pixels(weights, title, leaves, notes, fed, trained, PIXELS["half"])


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
    params, sources = _make(weights, leaves)
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


def _make(
    weights: Weights, leaves: Iterable[Leaf]
) -> tuple[dict[str, np.ndarray], dict[str, tuple[str, ...]]]:
    """Parameters and their sources, by path; all missing tensors are named at once."""
    leaves = list(leaves)
    absent = {name: None for leaf in leaves for name in leaf.sources if name not in weights.arrays}
    if absent:
        raise _missing(weights, list(absent))
    params = {leaf.path: _make_one(weights, leaf) for leaf in leaves}
    return params, {leaf.path: leaf.sources for leaf in leaves}


def _make_one(weights: Weights, leaf: Leaf) -> np.ndarray:
    there = [weights.arrays[name] for name in leaf.sources]
    try:
        made = leaf.make(*(array.astype(np.float32) for array in there))
    except ValueError as error:
        shapes = ", ".join(f"{n} {list(a.shape)}" for n, a in zip(leaf.sources, there, strict=True))
        raise _foreign(weights, f"{shapes} cannot become {leaf.path} ({error})") from error
    return np.ascontiguousarray(made, np.float32)


def _refuse_surplus(
    weights: Weights, leaves: Iterable[Leaf], prefix: str, depth: int, separator: str = "."
) -> None:
    """Refuse blocks that compute what ours do not, such as layer scales or cross-attention.

    Left out, such a tensor would leave a model with other outputs than the checkpoint's.

    Args:
        weights: of the checkpoint.
        leaves: all that is made of it.
        prefix: of the names of blocks, up to their number.
        depth: how many blocks there are.
        separator: between the number of a block and the names of its parts.
    """
    known = {name for leaf in leaves for name in leaf.sources}
    blocks = tuple(f"{prefix}{layer}{separator}" for layer in range(depth))
    surplus = [name for name in weights.arrays if name.startswith(blocks) and name not in known]
    if surplus:
        raise _foreign(
            weights, f"its blocks hold {len(surplus)} tensors that ours lack: {_some(surplus)}"
        )


def _expect_patches(weights: Weights, name: str, shape: tuple[int, ...]) -> None:
    """Refuse what is no embedding of square RGB patches; ``shape`` is [channels, p, p]."""
    if len(shape) != 3 or shape[0] != 3 or shape[1] != shape[2]:
        raise _foreign(
            weights, f"{name} reads {list(shape)} (channels, height, width), no square RGB patches"
        )


def _check_image(
    weights: Weights,
    config: VisionLanguageConfig,
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
    c, section = config.image, "model.image"
    _expect(weights, f"{section}.stem", c.stem, "patch")
    _expect(weights, f"{section}.patch_size", c.patch_size, patch_size)
    _expect(weights, f"{section}.width", c.block.width, width)
    if mlp_width is not None:
        _expect(weights, f"{section}.mlp_width", c.block.mlp_width, mlp_width)
    _expect(weights, f"{section}.pre_norm", c.pre_norm, pre_norm)
    _expect(weights, f"{section}.norm", c.block.norm, "pre")
    _expect_depth(weights, f"{section}.depth", c.depth, depth)
    if heads is not None:
        _expect(weights, f"{section}.heads", c.block.heads, heads)
    settings = weights.settings.get("vision_config") or weights.settings
    known = heads is not None
    return _check_block(weights, section, c.block, settings, activation, norm_eps, known)


def _check_block(
    weights: Weights,
    section: str,
    block: BlockConfig,
    settings: Mapping[str, Any],
    usual_activation: str,
    usual_eps: float,
    heads_known: bool = False,
) -> tuple[str, ...]:
    """What shapes do not show: heads, activation and the norms' epsilon."""
    notes = []
    if "num_attention_heads" in settings:
        _expect(weights, f"{section}.heads", block.heads, settings["num_attention_heads"])
    elif not heads_known and block.width != block.heads * _USUAL_HEAD:
        notes.append(
            f"config.{section}.heads is {block.heads}, so that a head has "
            f"{block.width // block.heads} features; the weights do not say how many they were "
            f"trained with, most public ones with {_USUAL_HEAD}: give their folder with config.json"
        )
    if "hidden_act" in settings:
        stated = _ACTIVATIONS.get(settings["hidden_act"], settings["hidden_act"])
        _expect(weights, f"{section}.activation", block.activation, stated)
    elif block.activation != usual_activation:
        notes.append(
            f"config.{section}.activation is {block.activation!r}; weights of this kind are "
            f"usually trained with {usual_activation!r}"
        )
    eps = settings.get("layer_norm_eps", usual_eps)
    if block.norm_eps != eps:
        notes.append(f"config.{section}.norm_eps is {block.norm_eps:g}; in training it was {eps:g}")
    return tuple(notes)


def _expect(weights: Weights, key: str, ours: Any, theirs: Any) -> None:
    if ours != theirs:
        raise ConfigError(
            key,
            f"is {ours!r}, and the weights of {weights.file} have {theirs!r}",
            f"Set {theirs!r}",
        )


def _expect_depth(weights: Weights, key: str, ours: int, theirs: int) -> None:
    if ours > theirs:
        raise ConfigError(
            key,
            f"is {ours}, and {weights.file} has {theirs} blocks",
            f"Set {theirs} or less, or fetch the file again if blocks are missing",
        )


def _depth(there: Iterable[str], prefix: str, suffix: str, separator: str = ".") -> int:
    """Number of blocks: one more than the highest that is there."""
    number = re.compile(re.escape(prefix) + r"(\d+)" + re.escape(separator + suffix))
    found = [match for match in map(number.fullmatch, there) if match]
    return max((int(match[1]) for match in found), default=-1) + 1


def _pad_rows(table: np.ndarray, rows: int) -> np.ndarray:
    """Zeros below a table [V, ...], up to ``rows``."""
    return np.pad(table, [(0, rows - len(table)), *[(0, 0)] * (table.ndim - 1)])


def _foreign(weights: Weights, problem: str) -> WeightsError:
    return WeightsError(
        weights.file,
        f"of another architecture: {problem}",
        "Give weights of CLIP's ViT, ViT (augreg), MAE, RoBERTa or BERT",
    )


def _missing(weights: Weights, names: list[str]) -> WeightsError:
    return WeightsError(
        weights.file,
        f"{len(names)} tensors are missing: {_some(names)}",
        "Fetch the file again, or give the whole checkpoint",
    )


def _some(names: Iterable[str], count: int = 5) -> str:
    names = list(names)
    more = len(names) - count
    return ", ".join(names[:count]) + (f" and {more} more" if more > 0 else "")
