"""Compare sizes of encoders on the machine at hand: parameters, FLOPs and forward speed.

    python -m tools.bench_encoders --sizes=shared_base,towers_base --batch=256 --text_length=32

prints one JSON line. The first size is the one that ratios are of: ``vs_first`` above 1 is more of
whatever is counted. Nothing is trained and no data is read: parameters, pixels and tokens are
random, and every text has ``--text_length`` tokens. Of each size:

``parameters``: ``all``, what pretraining by masked images and texts, contrast and matching has;
``without_heads``, the same but the vocabulary head, the decoder of pixels and the heads of contrast
and matching. The table of tokens counts as part of the encoder, padded rows included.

``--skip=UNIT,UNIT`` adds the first size without these units (``models.tuning``; several times:
several networks), and ``--set=KEY=VALUE`` changes a key of ``config.model`` of all of them:

    python -m tools.bench_encoders --sizes=co_attention_base --image_size=384 --text_length=40 \
        --batch=64 --modes=pair --set=image.depth=11 --set=tuning.adapter.kind=serial \
        --skip=fusion_tower/image_block_00,fusion_tower/text_block_00

``image``, ``text`` and ``pair``: one vector of an image alone, of a text alone, and of a text with
its image as VQA reads it (row <s> of a bidirectional text); ``samples_per_second`` (median, and
range over repeats, in which the sizes take turns), ``device_ms`` of a batch (for which an
accelerator is busy), ``gflops`` of an example by formula, and ratios to the first size of both; of
what is skipped also how far time and FLOPs have fallen, and by what share of the latter the former.
Ratios of speed are by the time for which the device is busy where that is known. Parameters are
float32 and products of ``--dtype``, as in training. Compile time is left out.
"""

import functools
import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import numpy as np
from absl import app, flags
from ml_collections import ConfigDict

from tools.compare.configs import parse_value
from tools.timing import UpdateTime, busy_ms, cost_shares, repeat
from vlp_jax.compress.buckets import Bucket
from vlp_jax.data.augment import normalize
from vlp_jax.data.batch import Batch, batch_spec
from vlp_jax.data.vocabulary import Vocabulary
from vlp_jax.infra.command import bad_input, check_length, parse_flags
from vlp_jax.infra.compilation import set_gpu_flags
from vlp_jax.infra.hardware import device_facts, timings
from vlp_jax.infra.sharding import by_path, nested
from vlp_jax.models.encoder import Encoder, EncoderConfig
from vlp_jax.models.flops import (
    image_feature_flops,
    image_flops,
    image_input_flops,
    text_feature_flops,
)
from vlp_jax.models.sizes import build_model, model_config
from vlp_jax.models.tuning_config import tuning_config
from vlp_jax.objectives import build_objectives
from vlp_jax.objectives.readout import Readout

_SIZES = flags.DEFINE_list(
    "sizes", ["shared_base", "towers_base"], "of vlp_jax.models.sizes; the first is compared with"
)
_BATCH = flags.DEFINE_integer("batch", 256, "examples at a time", lower_bound=1)
_TEXT_LENGTH = flags.DEFINE_integer("text_length", 32, "tokens of a text", lower_bound=3)
_IMAGE_SIZE = flags.DEFINE_integer("image_size", 224, "side of an image in pixels", lower_bound=1)
_VOCAB = flags.DEFINE_integer("vocab_size", 30_522, "entries of the vocabulary", lower_bound=8)
_DTYPE = flags.DEFINE_enum("dtype", "bfloat16", ["bfloat16", "float32"], "of products")
_SKIP = flags.DEFINE_multi_string("skip", [], "units of the first size, left out of a further one")
_SET = flags.DEFINE_multi_string("set", [], "KEY=VALUE of config.model, of all sizes")
_MODES = flags.DEFINE_list("modes", ["image", "text", "pair"], "what is measured")
_STEPS = flags.DEFINE_integer("steps", 16, "batches timed in one repeat", lower_bound=1)
_REPEATS = flags.DEFINE_integer("repeats", 5, "timed repeats", lower_bound=1)

MASK = 4  # any id will do: the model is random
OBJECTIVES: Mapping[str, Any] = {
    "mim": {},
    "mlm": {},
    "itc": {},
    "itm": {"readout": "bidirectional"},
}
READOUT = Readout("bidirectional", "readout")


class Setting(NamedTuple):
    """What every size is measured with; see the flags."""

    batch: int
    text_length: int
    image_size: int
    vocab_size: int
    dtype: str
    steps: int
    repeats: int
    modes: Sequence[str] = ("image", "text", "pair")
    changes: Sequence[str] = ()


def of_image(model: Encoder, batch: Batch) -> jax.Array:
    """[B, D] of images alone."""
    return model.image_feature(model.encode_image(normalize(batch["image"])))


def of_text(model: Encoder, batch: Batch) -> jax.Array:
    """[B, D] of texts alone."""
    return model.text_feature(batch["text_ids"], batch["text_length"])


def of_pair(model: Encoder, batch: Batch) -> jax.Array:
    """[B, D] of texts with their images."""
    image = model.encode_image(normalize(batch["image"]))
    text = READOUT.encode(model, batch["text_ids"], batch["text_length"], None)
    return READOUT.read(model, text, image, None)


MODES: Mapping[str, Callable[[Encoder, Batch], jax.Array]] = {
    "image": of_image,
    "text": of_text,
    "pair": of_pair,
}


def mode_flops(config: EncoderConfig, mode: str, tokens: int) -> float:
    """Forward FLOPs of one example in a mode, by formula."""
    if mode == "image":
        return image_flops(config) + image_feature_flops(config)
    if mode == "text":
        return text_feature_flops(config, tokens)
    return image_input_flops(config) + READOUT.flops(config, tokens)


def parameter_shapes(model: Encoder, spec: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, Any]:
    """Shapes of the parameters of pretraining, by path.

    Raises:
        ConfigError: an objective does not work on the model.
    """
    vocabulary = Vocabulary.of_words(model.config.vocab_size, MASK)
    shapes: dict[str, Any] = {}
    for one in build_objectives(ConfigDict(OBJECTIVES), model, vocabulary):
        init = jax.eval_shape(functools.partial(_params, one, spec), jax.random.key(0))
        shapes |= by_path(init)
    return shapes


def _params(objective: Any, spec: Any, key: jax.Array) -> Any:
    return objective.init(key, spec)[0]


def bench_encoders(
    sizes: Sequence[str], setting: Setting, skips: Sequence[str] = ()
) -> dict[str, Any]:
    """Measure each size on one device; see the module's docstring.

    Args:
        sizes: names of ``models.sizes``; all ratios are to the first.
        setting: what each is measured with.
        skips: units, with commas between them, each of a further network of the first size.

    Returns:
        The figures, ready for JSON.

    Raises:
        ValueError, ConfigError: a size is unknown, given twice, or does not fit.
    """
    if not sizes or len({*sizes}) < len(sizes):
        raise ValueError(f"--sizes={','.join(sizes)}: give different ones")
    if unknown := [mode for mode in setting.modes if mode not in MODES]:
        raise ValueError(f"--modes: {unknown[0]!r} is none of {', '.join(MODES)}")
    networks = {size: (size, ()) for size in sizes} | {
        f"{sizes[0]} without {units}": (sizes[0], tuple(units.split(","))) for units in skips
    }
    models = {}
    for name, (size, skipped) in networks.items():
        config = _changed(model_config(size), setting.changes)
        config.dtype = setting.dtype
        if skipped:
            config.tuning.skip = skipped
        check_length("text_length", setting.text_length, config.text.max_positions)
        models[name] = build_model(config, setting.vocab_size, MASK, setting.image_size)
    sizes = list(networks)
    spec = batch_spec(Bucket(setting.text_length, setting.image_size), 1)
    shapes = {size: parameter_shapes(model, spec) for size, model in models.items()}
    params = {size: _random_params(shapes[size]) for size in sizes}
    batch = _random_batch(setting)
    found: dict[str, Any] = {size: {"parameters": _counts(shapes[size])} for size in sizes}
    first = models[sizes[0]].config
    for mode in setting.modes:
        runs = {size: _compiled(models[size], params[size], MODES[mode], batch) for size in sizes}
        rates, times = _timed(runs, setting)
        costs = cost_shares(times, unit=sizes[0])
        unit = mode_flops(first, mode, setting.text_length)
        for size, model in models.items():
            flops = mode_flops(model.config, mode, setting.text_length)
            passed, busy = times[size].passed, times[size].busy
            found[size][mode] = {
                "samples_per_second": round(1e3 * setting.batch / passed, 2),
                "samples_per_second_range": [round(f(rates[size]), 2) for f in (min, max)],
                "device_ms": None if busy is None else round(busy, 3),
                "gflops": round(flops / 1e9, 4),
                "speed_vs_first": round(1 / costs[size], 4),
                "gflops_vs_first": round(flops / unit, 4),
            }
            if networks[size][1] and flops != unit:
                fell = 1 - costs[size]
                found[size][mode] |= {
                    "time_fell": round(fell, 4),
                    "gflops_fell": round(1 - flops / unit, 4),
                    "fell_by_share": round(fell / (1 - flops / unit), 4),
                }
    for key in ("all", "without_heads"):
        unit = found[sizes[0]]["parameters"][key]
        for size in sizes:
            counts = found[size]["parameters"]
            counts[f"{key}_vs_first"] = round(counts[key] / unit, 4)
    return {"sizes": found, **setting._asdict(), **device_facts()}


def _changed(config: ConfigDict, changes: Sequence[str]) -> ConfigDict:
    """``config.model`` with keys set, each ``KEY=VALUE``.

    Raises:
        ValueError: there is no such key, or the value is none for it.
    """
    config.tuning = tuning_config()
    for change in changes:
        key, _, text = change.partition("=")
        try:
            before = functools.reduce(lambda section, part: section[part], key.split("."), config)
            value = text if isinstance(before, str) else parse_value(text)
            config.update_from_flattened_dict({key: value})
        except KeyError as error:
            raise ValueError(f"--set={change}: config.model has no such key") from error
        except (TypeError, ValueError) as error:
            raise ValueError(f"--set={change}: {error}; give KEY=VALUE of config.model") from error
    return config


def _counts(shapes: Mapping[str, Any]) -> dict[str, Any]:
    """Parameters in all, and without those that only objectives read."""

    def of_encoder(path: str) -> bool:
        return not path.split("/")[0].endswith(("_head", "_decoder"))

    return {
        "all": sum(leaf.size for leaf in shapes.values()),
        "without_heads": sum(leaf.size for path, leaf in shapes.items() if of_encoder(path)),
    }


def _random_params(shapes: Mapping[str, Any]) -> Any:
    """On the device, without compiling what would initialise them; speed depends on none."""
    draw = np.random.default_rng(0)
    leaves = {
        path: 0.02 * draw.standard_normal(leaf.shape, np.float32) for path, leaf in shapes.items()
    }
    return jax.device_put(nested(leaves))


def _random_batch(setting: Setting) -> Batch:
    """On the device."""
    draw = np.random.default_rng(0)
    rows, side, tokens = setting.batch, setting.image_size, setting.text_length
    batch = {
        "image": draw.integers(0, 256, (rows, side, side, 3), dtype=np.uint8),
        "text_ids": draw.integers(MASK + 1, setting.vocab_size, (rows, tokens), dtype=np.int32),
        "text_length": np.full(rows, tokens, np.int32),
    }
    return jax.device_put(batch)


def _timed(
    runs: Mapping[str, Callable[[int], Any]], setting: Setting
) -> tuple[dict[str, list[float]], dict[str, UpdateTime]]:
    """Examples a second of every repeat, and milliseconds of a batch, by size."""
    seconds: dict[str, list[float]] = {size: [] for size in runs}
    for _ in range(setting.repeats):  # in turns: what else the machine does meets all of them
        for size, run in runs.items():
            [passed] = timings(functools.partial(repeat, run, setting.steps), 1)
            seconds[size].append(passed / setting.steps)
    rates = {size: [setting.batch / each for each in passed] for size, passed in seconds.items()}
    times = {
        size: UpdateTime(1e3 * statistics.median(seconds[size]), busy_ms(run, setting.steps))
        for size, run in runs.items()
    }
    return rates, times


def _compiled(
    model: Encoder, params: Any, forward: Callable[[Encoder, Batch], jax.Array], batch: Batch
) -> Callable[[int], jax.Array]:
    """A pass over the batch, which has run once."""
    run = jax.jit(nn.apply(forward, model))
    variables = {"params": params}
    jax.block_until_ready(run(variables, batch))
    return lambda number: run(variables, batch)


def main(argv: Sequence[str]) -> None:
    """Run the measurement."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {argv[1:]}")
    with bad_input():
        setting = Setting(
            _BATCH.value,
            _TEXT_LENGTH.value,
            _IMAGE_SIZE.value,
            _VOCAB.value,
            _DTYPE.value,
            _STEPS.value,
            _REPEATS.value,
            tuple(_MODES.value),
            tuple(_SET.value),
        )
        figures = bench_encoders(_SIZES.value, setting, _SKIP.value)
    print(json.dumps(figures))


if __name__ == "__main__":
    set_gpu_flags()
    app.run(main, flags_parser=parse_flags)
