"""Text encoders, RoBERTa and BERT in the naming of transformers, as parameters of ours.

They become the lower half of the text stack (FLM fact sheet, section 1); their MLM head becomes the
vocabulary head, if asked for.
"""

from collections.abc import Iterator, Mapping

import numpy as np

from vlp_jax.infra.errors import ConfigError
from vlp_jax.models.pretrained import naming
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
from vlp_jax.models.pretrained.merge import TEXT_POSITIONS
from vlp_jax.models.pretrained.naming import Leaf
from vlp_jax.models.vision_language import VisionLanguageConfig

_WORDS = "embeddings.word_embeddings.weight"


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
        raise missing_tensors(weights, [words])
    vocab_size, width = there[words].shape
    depth = count_blocks(there, f"{prefix}encoder.layer.", "attention.output.dense.weight")
    if not depth:
        raise other_architecture(
            weights, f"{title} has blocks named {prefix}encoder.layer.0, not there"
        )
    roberta = title == "RoBERTa"
    _check_vocabulary(weights, vocab_size, config, special_ids, roberta)
    section = "model.text"
    expect(weights, f"{section}.width", config.text.width, width)
    expect(weights, f"{section}.norm", config.text.norm, "post")
    expect_depth(weights, f"{section}.lower_depth", config.lower_depth, depth)
    intermediate = there.get(f"{prefix}encoder.layer.0.intermediate.dense.weight")
    if intermediate is not None:
        expect(weights, f"{section}.mlp_width", config.text.mlp_width, len(intermediate))
    default_eps = 1e-5 if roberta else 1e-12
    notes = check_block(weights, section, config.text, weights.settings, "gelu", default_eps)
    leaves = list(_text_leaves(there, prefix, config, depth, first_row=2 if roberta else 0))
    refuse_surplus(weights, leaves, f"{prefix}encoder.layer.", depth)
    if mlm_head:
        head = list(_mlm_head(there, words, config, roberta))
        if there.keys().isdisjoint(name for leaf in head for name in leaf.sources if name != words):
            raise WeightsError(
                weights.file,
                f"{title} without the head of its pretraining",
                "Leave --mlm_head out, or give weights that were saved with it (...ForMaskedLM)",
            )
        leaves += head
    params, sources = make_parameters(weights, leaves)
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
        f"neither RoBERTa nor BERT in the naming of transformers; it holds {some_of(there)}",
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


def _pad_rows(table: np.ndarray, rows: int) -> np.ndarray:
    """Zeros below a table [V, ...], up to ``rows``."""
    return np.pad(table, [(0, rows - len(table)), *[(0, 0)] * (table.ndim - 1)])
