"""Measure what cached towers and a shortlist pay in retrieval, on the machine at hand.

    python -m tools.bench_rank --config=configs/flm_base.py
    python -m tools.bench_rank --config=configs/demo.py --all_pairs_images=8 --images=50
    python -m tools.bench_rank --workdir=RUN --images=1000       # and the recall that is lost

prints one JSON line. Speed needs no data: parameters, pixels and tokens are random, every image has
``--captions`` texts and every text ``--text_length`` tokens. Compile time is left out.

``cached_towers``: every text of ``--all_pairs_images`` images is matched with every image, in two
ways: as ``vlp_jax.transfer.ranking`` does, which encodes each image and each text once and runs the
upper half of the text stack alone for a pair; and by encoding both again for every pair.
``speedup`` is the ratio of seconds, the encoding included, ``flop_ratio`` that of the FLOPs that
both execute, by formula, and ``share`` the part of it that is reached. Encoding again is timed on
``pairs_measured`` pairs and scaled to all of them. ``largest_difference`` is that of the scores of
these pairs.

``shortlist``: retrieval both ways over ``--images`` images (by default those of COCO's test split).
Matching re-ranks the ``--shortlist`` best by embeddings of each image and of each text, ``pairs``
of ``pairs_in_all``; against it stands matching all pairs, towers cached, timed on
``pairs_measured`` of them and scaled. Embeddings, encoding and the choice of candidates count.
``speedup`` is bounded by ``pair_ratio``, and that by the size of the set: with n images of c texts
each, n c / (1 + c) / shortlist, which is 33 for COCO's 5,000 images and 6.5 for 1,000.

``recall`` (with ``--workdir``, whose config then gives the geometry): recall of the run's latest
checkpoint by matching all pairs and by matching the shortlist, on the first ``--images`` images of
``--split``, and the first minus the second, ``lost``.
"""

import functools
import json
import pathlib
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast, get_args

import flax.linen as nn
import jax
import numpy as np
from absl import app, flags
from ml_collections import ConfigDict, config_flags

from vlp_jax.compress.buckets import Bucket
from vlp_jax.data.batch import batch_spec
from vlp_jax.data.sources import build_source
from vlp_jax.evals.base import EvalContext
from vlp_jax.evals.retrieval import Retrieval
from vlp_jax.infra.command import bad_input, check_length, parse_flags
from vlp_jax.infra.compilation import set_gpu_flags
from vlp_jax.infra.hardware import device_facts
from vlp_jax.infra.mesh import make_mesh
from vlp_jax.models.decoding import project_image_flops
from vlp_jax.models.flops import (
    image_feature_flops,
    image_flops,
    image_input_flops,
    lower_flops,
    text_feature_flops,
)
from vlp_jax.models.sizes import build_model
from vlp_jax.models.vision_language import VisionLanguageModel, two_stacks
from vlp_jax.objectives.base import Params, encode_image
from vlp_jax.objectives.contrastive import ITC, ITM
from vlp_jax.objectives.readout import EncodedText, Kind
from vlp_jax.predict import Predictor
from vlp_jax.transfer.ranking import TEXTS_AT_ONCE, Images, Ranker, Texts, shortlisted

_CONFIG = config_flags.DEFINE_config_file("config", None, "configuration to measure")
_WORKDIR = flags.DEFINE_string("workdir", None, "a run with `itc` and `itm`, for its recall")
_SPLIT = flags.DEFINE_string("split", "val", "of the run's source, for its recall")
_SOURCE = flags.DEFINE_string("source", "", "key in data.sources of the run; empty: the only one")
_ALL_PAIRS_IMAGES = flags.DEFINE_integer(
    "all_pairs_images", 256, "images whose pairs are all matched", lower_bound=1
)
_IMAGES = flags.DEFINE_integer("images", 5000, "images of the retrieval", lower_bound=1)
_CAPTIONS = flags.DEFINE_integer("captions", 5, "texts of an image", lower_bound=1)
_TEXT_LENGTH = flags.DEFINE_integer("text_length", 16, "tokens of a text", lower_bound=3)
_SHORTLIST = flags.DEFINE_integer("shortlist", 128, "candidates that are matched", lower_bound=1)
_READOUT = flags.DEFINE_enum(
    "readout", "query", get_args(Kind), "how matching reads a pair; a run's own with --workdir"
)
_BATCH = flags.DEFINE_integer("batch", 256, "rows encoded at a time", lower_bound=1)
_PAIRS = flags.DEFINE_integer("pairs", 1024, "pairs at a time", lower_bound=1)
_MEASURED = flags.DEFINE_integer(
    "pairs_measured", 16384, "pairs on which what is scaled is timed, at most", lower_bound=1
)
_REPEATS = flags.DEFINE_integer("repeats", 3, "timed repeats", lower_bound=1)

MASK = 4  # any id will do: the model is random


class Set(NamedTuple):
    """Random images and texts.

    Attributes:
        pixels: uint8 [n, S, S, 3].
        ids: int32 [m, N].
        lengths: int32 [m].
    """

    pixels: np.ndarray
    ids: np.ndarray
    lengths: np.ndarray


class Sizes(NamedTuple):
    """What is measured; see the flags."""

    all_pairs_images: int
    images: int
    captions: int
    text_length: int
    shortlist: int
    batch: int
    pairs: int
    pairs_measured: int
    repeats: int


def bench_rank(config: Any, readout: Kind, sizes: Sizes) -> dict[str, Any]:
    """Time both ways of both comparisons on one device.

    Args:
        config: a run's config; its model, image size and vocabulary count.
        readout: how matching reads a pair, see ``vlp_jax.objectives.readout``.
        sizes: of what is measured.

    Returns:
        The figures, ready for JSON.

    Raises:
        ValueError: a text is beyond the positions of the model, or a key does not fit.
    """
    check_length("text_length", sizes.text_length, config.model.text.max_positions)
    size = config.data.image_size
    model = build_model(config.model, config.tokenizer.vocab_size, MASK, size)
    itm = ITM(ITC(model), readout=readout)
    spec = batch_spec(Bucket(sizes.text_length, size), 1)
    params = jax.jit(lambda key: itm.init(key, spec)[0])(jax.random.key(config.seed))
    mesh = make_mesh(devices=jax.devices()[:1])
    ranker = Ranker(itm.itc, itm, mesh, sizes.batch, sizes.pairs)
    small = _random_set(config, sizes.all_pairs_images, sizes)
    large = _random_set(config, sizes.images, sizes)
    return {
        "cached_towers": _cached_towers(ranker, params, small, sizes),
        "shortlist": _shortlist(ranker, params, large, sizes),
        "readout": readout,
        "text_length": sizes.text_length,
        "batch": ranker.batch_size,
        "pairs_at_once": ranker.pairs_at_once,
        "config": config.name,
        **device_facts(),
    }


def encode_flops(itm: ITM, text_length: int) -> tuple[float, float]:
    """FLOPs of encoding one image and one text once, for embedding and for matching."""
    c = itm.model.config
    head = 2.0 * c.text.width * itm.itc.embedding_dim
    lower = lower_flops(c, text_length, itm.reader.streams)
    image = image_flops(c) + image_feature_flops(c)
    return image + head, text_feature_flops(c, text_length) + lower + head


def pair_flops(itm: ITM, text_length: int) -> tuple[float, float]:
    """FLOPs of matching one pair: with both sides encoded before, and from pixels and tokens."""
    c = two_stacks(itm.model, "this benchmark").config
    tower = image_flops(c)
    projection = tower - image_input_flops(c)
    lower = lower_flops(c, text_length, itm.reader.streams)
    pair = itm.reader.flops(c, text_length) - projection - lower
    # The texts of a group share keys and values of the image in every block of the upper half.
    shared = project_image_flops(c) * (1 - 1 / TEXTS_AT_ONCE)
    return pair - shared, tower + lower + pair


def _random_set(config: Any, images: int, sizes: Sizes) -> Set:
    draw = np.random.default_rng(config.seed)
    size, texts = config.data.image_size, images * sizes.captions
    shape = (texts, sizes.text_length)
    return Set(
        draw.integers(0, 256, (images, size, size, 3), dtype=np.uint8),
        draw.integers(MASK + 1, config.tokenizer.vocab_size, shape, dtype=np.int32),
        np.full(texts, sizes.text_length, np.int32),
    )


def _encode(ranker: Ranker, params: Params, of: Set) -> tuple[Images, Texts]:
    images = ranker.encode_images(params, [of.pixels])
    texts = ranker.encode_texts(params, of.ids, of.lengths)
    return jax.block_until_ready((images, texts))


def _first_pairs(of: Set, count: int) -> np.ndarray:
    """The first pairs, image by image: int64 [p, 2], no more than there are."""
    texts = len(of.ids)
    first = np.arange(min(count, len(of.pixels) * texts))
    return np.stack(np.divmod(first, texts), axis=1)


def _cached_towers(ranker: Ranker, params: Params, of: Set, sizes: Sizes) -> dict[str, Any]:
    """All pairs of a small set, with and without caches."""
    assert ranker.itm is not None
    pairs = _first_pairs(of, len(of.pixels) * len(of.ids))
    some = pairs[: sizes.pairs_measured]
    score = jax.jit(functools.partial(_score_anew, ranker.itm))
    on_device = jax.device_put(of)

    def cached() -> np.ndarray:
        return ranker.match(params, *_encode(ranker, params, of), pairs)

    def anew() -> np.ndarray:
        step = min(sizes.pairs, len(some))
        starts = range(0, len(some), step)
        parts = (np.resize(some[start : start + step], (step, 2)) for start in starts)
        found = [score(params, on_device, part) for part in parts]
        return np.concatenate(jax.device_get(found))[: len(some)]

    difference = np.abs(cached()[: len(some)] - anew()).max()  # and both are compiled
    seconds = _seconds(cached, sizes.repeats)
    seconds_anew = _seconds(anew, sizes.repeats) * len(pairs) / len(some)
    image, text = encode_flops(ranker.itm, sizes.text_length)
    pair, pair_anew = pair_flops(ranker.itm, sizes.text_length)
    flops = len(of.pixels) * image + len(of.ids) * text + len(pairs) * pair
    speedup, ratio = seconds_anew / seconds, len(pairs) * pair_anew / flops
    return {
        "speedup": round(speedup, 3),
        "flop_ratio": round(ratio, 3),
        "share": round(speedup / ratio, 3),
        "cached_seconds": round(seconds, 6),
        "anew_seconds": round(seconds_anew, 6),
        "images": len(of.pixels),
        "texts": len(of.ids),
        "pairs": len(pairs),
        "pairs_measured": len(some),
        "largest_difference": float(difference),
        "flops": {
            "image": round(image),
            "text": round(text),
            "pair": round(pair),
            "pair_anew": round(pair_anew),
        },
    }


def _score_anew(itm: ITM, params: Params, of: Set, pairs: jax.Array) -> jax.Array:
    """Log-odds of pairs int [p, 2] from pixels and tokens: float32 [p]."""
    image, text = pairs[:, 0], pairs[:, 1]

    def forward(model: VisionLanguageModel) -> EncodedText:
        return itm.reader.encode(model, of.ids[text], of.lengths[text], None)

    encoded = nn.apply(forward, itm.model)({"params": params})
    tokens = encode_image(itm.model, params, {"image": of.pixels[image]}, None)
    return itm.match(params, encoded, tokens)


def _shortlist(ranker: Ranker, params: Params, of: Set, sizes: Sizes) -> dict[str, Any]:
    """Retrieval both ways over a large set, by a shortlist and by matching all pairs."""
    some = _first_pairs(of, sizes.pairs_measured)
    all_pairs = len(of.pixels) * len(of.ids)
    images, texts = _encode(ranker, params, of)
    ranker.match(params, images, texts, some)  # both are compiled now
    chosen = len(shortlisted(images.embeddings, texts.embeddings, sizes.shortlist))

    def rank() -> np.ndarray:
        encoded = _encode(ranker, params, of)
        return ranker.rerank(params, *encoded, sizes.shortlist)

    seconds = _seconds(rank, sizes.repeats)
    encoding = _seconds(lambda: _encode(ranker, params, of), sizes.repeats)
    matching = _seconds(lambda: ranker.match(params, images, texts, some), sizes.repeats)
    all_seconds = encoding + matching * all_pairs / len(some)
    return {
        "speedup": round(all_seconds / seconds, 3),
        "pair_ratio": round(all_pairs / chosen, 3),
        "seconds": round(seconds, 6),
        "all_pairs_seconds": round(all_seconds, 6),
        "encode_seconds": round(encoding, 6),
        "images": len(of.pixels),
        "texts": len(of.ids),
        "shortlist": sizes.shortlist,
        "pairs": chosen,
        "pairs_in_all": all_pairs,
        "pairs_measured": len(some),
        "pairs_per_second": round(len(some) / matching, 1),
    }


def recall(
    predictor: Predictor, source: str, split: str, images: int, captions: int, shortlist: int
) -> dict[str, dict[str, float]]:
    """Recall at 1, 5 and 10 both ways, by matching all pairs and by matching a shortlist.

    Args:
        predictor: of a run with one ``itc`` and one ``itm``.
        source: key in ``data.sources`` of the run.
        split: of that source.
        images: the first ones of the split.
        captions: of each image, at most.
        shortlist: candidates of each image and of each text.

    Returns:
        ``all_pairs``, ``shortlist`` and ``lost``, the first minus the second: fractions of one.

    Raises:
        ValueError: the run has no such objective, source or split; the message names it.
    """
    config = ConfigDict(predictor.config)
    with config.unlocked():
        for section in config.data.sources.values():
            section.cache = False  # nothing is trained on here
    names = {type(objective): objective.name for objective in predictor.objectives}
    context = EvalContext(
        config,
        predictor.objectives,
        predictor.tokenizer,
        make_mesh(devices=jax.devices()[:1]),
        {source: build_source(config, source)},
        (config.data.max_text_length,),
        None,
    )

    def ranked(candidates: int) -> dict[str, float]:
        evaluator = Retrieval(
            context,
            "bench_rank",
            source,
            split=split,
            num_examples=images,
            max_captions=captions,
            objective=names.get(ITC, "itc"),
            matching=names.get(ITM, "itm"),
            shortlist=candidates,
        )
        figures = dict(evaluator.run(predictor.params))
        ways = [f"{way}_r{k}" for way in ("i2t", "t2i") for k in (1, 5, 10)]
        return {way: figures[f"reranked/{way}"] for way in ways}

    found = {"all_pairs": ranked(images * captions), "shortlist": ranked(shortlist)}
    lost = {way: found["all_pairs"][way] - found["shortlist"][way] for way in found["shortlist"]}
    return {**found, "lost": lost}


def _seconds(run: Callable[[], Any], repeats: int) -> float:
    """Median time of a call that is compiled."""
    seconds = []
    for _ in range(repeats):
        started = time.perf_counter()
        jax.block_until_ready(run())
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds)


def main(argv: Sequence[str]) -> None:
    """Run the measurement."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {argv[1:]}")
    if (_CONFIG.value is None) == (_WORKDIR.value is None):
        raise app.UsageError("either --config=configs/NAME.py or --workdir=RUN is needed")
    sizes = Sizes(
        _ALL_PAIRS_IMAGES.value,
        _IMAGES.value,
        _CAPTIONS.value,
        _TEXT_LENGTH.value,
        _SHORTLIST.value,
        _BATCH.value,
        _PAIRS.value,
        _MEASURED.value,
        _REPEATS.value,
    )
    with bad_input({"init_from": "--workdir"}):
        if _WORKDIR.value is None:
            figures = bench_rank(_CONFIG.value, cast(Kind, _READOUT.value), sizes)
        else:
            figures = _bench_run(pathlib.Path(_WORKDIR.value), sizes)
    print(json.dumps(figures))


def _bench_run(workdir: pathlib.Path, sizes: Sizes) -> dict[str, Any]:
    """The figures at the geometry of a run, and its recall."""
    predictor = Predictor.load(workdir)
    sources = sorted(predictor.config.data.sources)
    source = _SOURCE.value or (sources[0] if len(sources) == 1 else "")
    if source not in sources:
        raise ValueError(f"--source={source}: use a source of the run: {', '.join(sources)}")
    readouts = [o.readout for o in predictor.objectives if isinstance(o, ITM)]
    if len(readouts) != 1:
        raise ValueError(
            f"--workdir={workdir}: needs a run with one objective `itm`, this has {len(readouts)}"
        )
    positions = predictor.config.model.text.max_positions
    check_length("text_length", sizes.text_length, positions)  # recall takes long
    lost = recall(predictor, source, _SPLIT.value, sizes.images, sizes.captions, sizes.shortlist)
    return {**bench_rank(predictor.config, readouts[0], sizes), "recall": lost}


if __name__ == "__main__":
    set_gpu_flags()
    app.run(main, flags_parser=parse_flags)
