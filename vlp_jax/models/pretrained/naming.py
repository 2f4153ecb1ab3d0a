"""From public tensor names and layouts to ours.

Every parameter of ours is described by a ``Leaf``: the public tensors it is made of and how. A
checkpoint's own tensors that no leaf names are unused, and a leaf whose tensors are absent is what
the checkpoint lacks, so that both fall out of the same table.
"""

import dataclasses
from collections.abc import Callable, Collection, Iterator

import numpy as np

Change = Callable[[np.ndarray], np.ndarray]


@dataclasses.dataclass(frozen=True)
class Leaf:
    """One parameter of ours, made of public tensors.

    Attributes:
        path: in our tree.
        sources: names of the public tensors.
        make: from these, as float32, to the parameter.
    """

    path: str
    sources: tuple[str, ...]
    make: Callable[..., np.ndarray]


@dataclasses.dataclass(frozen=True)
class BlockNames:
    """How a torch implementation names the parts of a transformer block.

    Attributes:
        query, key, value: the projections; empty where they are fused.
        fused: kernel and bias [3 D, ...] of the fused projections, or None.
        out: the projection after attention.
        attention_norm: the norm of the attention branch.
        mlp_in, mlp_out: the feed-forward layers.
        mlp_norm: the norm of the feed-forward branch.
    """

    query: str
    key: str
    value: str
    out: str
    attention_norm: str
    mlp_in: str
    mlp_out: str
    mlp_norm: str
    fused: tuple[str, str] | None = None


CLIP_BLOCK = BlockNames(
    query="self_attn.q_proj",
    key="self_attn.k_proj",
    value="self_attn.v_proj",
    out="self_attn.out_proj",
    attention_norm="layer_norm1",
    mlp_in="mlp.fc1",
    mlp_out="mlp.fc2",
    mlp_norm="layer_norm2",
)
OPEN_CLIP_BLOCK = BlockNames(
    query="",
    key="",
    value="",
    fused=("attn.in_proj_weight", "attn.in_proj_bias"),
    out="attn.out_proj",
    attention_norm="ln_1",
    mlp_in="mlp.c_fc",
    mlp_out="mlp.c_proj",
    mlp_norm="ln_2",
)
VIT_BLOCK = BlockNames(
    query="attention.attention.query",
    key="attention.attention.key",
    value="attention.attention.value",
    out="attention.output.dense",
    attention_norm="layernorm_before",
    mlp_in="intermediate.dense",
    mlp_out="output.dense",
    mlp_norm="layernorm_after",
)
TIMM_BLOCK = BlockNames(
    query="",
    key="",
    value="",
    fused=("attn.qkv.weight", "attn.qkv.bias"),
    out="attn.proj",
    attention_norm="norm1",
    mlp_in="mlp.fc1",
    mlp_out="mlp.fc2",
    mlp_norm="norm2",
)
BERT_BLOCK = BlockNames(
    query="attention.self.query",
    key="attention.self.key",
    value="attention.self.value",
    out="attention.output.dense",
    attention_norm="attention.output.LayerNorm",
    mlp_in="intermediate.dense",
    mlp_out="output.dense",
    mlp_norm="output.LayerNorm",
)


def same(array: np.ndarray) -> np.ndarray:
    """The array itself."""
    return array


def transposed(array: np.ndarray) -> np.ndarray:
    """A torch kernel [out, in] as ours [in, out]."""
    return array.T


def dense(path: str, name: str) -> Iterator[Leaf]:
    """A torch linear layer."""
    yield Leaf(f"{path}/kernel", (f"{name}.weight",), transposed)
    yield Leaf(f"{path}/bias", (f"{name}.bias",), same)


def norm(path: str, name: str, there: Collection[str]) -> Iterator[Leaf]:
    """A layer norm; the oldest BERT files call its parameters gamma and beta.

    Args:
        path: ours.
        name: theirs.
        there: names in the checkpoint.
    """
    old = f"{name}.gamma" in there
    yield Leaf(f"{path}/scale", (f"{name}.{'gamma' if old else 'weight'}",), same)
    yield Leaf(f"{path}/bias", (f"{name}.{'beta' if old else 'bias'}",), same)


def torch_block(
    path: str, prefix: str, names: BlockNames, heads: int, there: Collection[str]
) -> Iterator[Leaf]:
    """A block of self-attention and feed-forward layers.

    Args:
        path: ours.
        prefix: theirs, with the dot at its end.
        names: of the parts.
        heads: H; kernels [D, D] become [D, H, d] (queries, keys, values) or [H, d, D] (out).
        there: names in the checkpoint.
    """
    attention = f"{path}/self_attention"
    for index, role in enumerate(("query", "key", "value")):
        third: Change = same
        if names.fused is None:
            name = f"{prefix}{getattr(names, role)}"
            sources = f"{name}.weight", f"{name}.bias"
        else:
            sources = f"{prefix}{names.fused[0]}", f"{prefix}{names.fused[1]}"
            third = _third(index)
        yield Leaf(f"{attention}/{role}/kernel", sources[:1], _split_columns(third, heads))
        yield Leaf(f"{attention}/{role}/bias", sources[1:], _split_bias(third, heads))
    out = f"{prefix}{names.out}"
    yield Leaf(f"{attention}/out/kernel", (f"{out}.weight",), _split_rows(heads))
    yield Leaf(f"{attention}/out/bias", (f"{out}.bias",), same)
    yield from norm(f"{path}/self_attention_norm", f"{prefix}{names.attention_norm}", there)
    yield from dense(f"{path}/mlp/in", f"{prefix}{names.mlp_in}")
    yield from dense(f"{path}/mlp/out", f"{prefix}{names.mlp_out}")
    yield from norm(f"{path}/mlp_norm", f"{prefix}{names.mlp_norm}", there)


def jax_block(path: str, prefix: str) -> Iterator[Leaf]:
    """A block of the npz files of the ViT authors, whose layouts are ours.

    Args:
        path: ours.
        prefix: theirs, with the slash at its end.
    """
    parts = {
        **{
            f"self_attention/{role}": f"MultiHeadDotProductAttention_1/{role}"
            for role in ("query", "key", "value", "out")
        },
        "mlp/in": "MlpBlock_3/Dense_0",
        "mlp/out": "MlpBlock_3/Dense_1",
    }
    for ours, theirs in parts.items():
        for name in ("kernel", "bias"):
            yield Leaf(f"{path}/{ours}/{name}", (f"{prefix}{theirs}/{name}",), same)
    yield from jax_norm(f"{path}/self_attention_norm", f"{prefix}LayerNorm_0")
    yield from jax_norm(f"{path}/mlp_norm", f"{prefix}LayerNorm_2")


def jax_norm(path: str, name: str) -> Iterator[Leaf]:
    """A layer norm of the npz files."""
    yield Leaf(f"{path}/scale", (f"{name}/scale",), same)
    yield Leaf(f"{path}/bias", (f"{name}/bias",), same)


def _third(index: int) -> Change:
    return lambda fused: np.split(fused, 3)[index]


def _split_columns(third: Change, heads: int) -> Change:
    return lambda kernel: third(kernel).T.reshape(kernel.shape[1], heads, -1)


def _split_bias(third: Change, heads: int) -> Change:
    return lambda bias: third(bias).reshape(heads, -1)


def _split_rows(heads: int) -> Change:
    return lambda kernel: kernel.T.reshape(heads, -1, kernel.shape[0])
