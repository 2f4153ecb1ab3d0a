"""What the stages of the shared encoder have in common.

One transformer reads images, texts and both (fact sheet of MoMo). What the paper leaves open is
chosen after the sheet's defaults: MAE's recipe for images, 15 % of the words masked, all losses at
weight 1, a fresh optimiser and warm-up in every stage.
"""

from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from configs import language_objective
from vlp_jax.train.config import default_config

DATA = ("scenes", "folder", "pictures")
# What stage 3 may do without: objectives of pairs.
PAIR_OBJECTIVES = ("language", "mim", "itc", "itm")
# And what it may have besides: images alone, as in the stages before (no part of the paper's).
IMAGES_ALONE = "images"


def base(stage: int, arg: str | None) -> tuple[ConfigDict, dict[str, Any]]:
    """A config without sources, objectives and evaluators.

    Args:
        stage: 1, 2 or 3.
        arg: ``DATA[,SIZE[,LANGUAGE[,PAIRS[,IMAGES]]]]``: one of ``DATA``, of which ``pictures``, a
            folder without texts, has no pairs; a shared size of models/sizes.py (`shared_small` by
            default), or one of three towers to compare with; the language objective, a name of
            configs/__init__.py (`mlm15` by default); objectives of pairs, joined by +, of
            ``PAIR_OBJECTIVES`` (all by default) and ``images``; how many scenes each source has,
            rendered once (unbounded by default).

    Returns:
        The config, and ``data``, ``size``, ``language``, ``pairs`` and ``images`` of the argument.

    Raises:
        ValueError: the argument names something else.
    """
    where = f"--config=configs/momo/stage{stage}.py:{arg}"
    parts = [*(arg or "").split(","), *[""] * 5]
    if any(parts[5:]) or (parts[0] or DATA[0]) not in DATA:
        raise ValueError(
            f"{where}: write DATA[,SIZE[,LANGUAGE[,PAIRS[,IMAGES]]]], DATA one of {DATA}"
        )
    if parts[0] == "pictures" and stage == 3:
        raise ValueError(f"{where}: pictures alone are no pairs; use folder, with captions")
    size = parts[1] or "shared_small"
    pairs = (parts[3] or "+".join(PAIR_OBJECTIVES)).split("+")
    known = (*PAIR_OBJECTIVES, IMAGES_ALONE)
    if strange := [name for name in pairs if name not in known]:
        raise ValueError(f"{where}: {strange[0]!r} is none of {', '.join(known)}")
    given = {
        "data": parts[0] or DATA[0],
        "size": size,
        "language": language_objective(parts[2] or "mlm15", where),
        "pairs": pairs,
        "images": int(parts[4] or 0),
    }
    config = default_config(size)
    config.name = f"momo_stage{stage}"
    config.total_steps = 20_000
    config.data.image_size = 64 if given["data"] == "scenes" else 224
    config.data.batch_size = 256
    config.data.max_text_length = 48
    config.data.threads = 16
    config.data.prefetch = 32
    if given["images"]:  # pictures that are there are copied, by few threads
        config.data.threads, config.data.prefetch = 2, 4
    config.tokenizer.vocab_size = 8192
    config.schedule.peak = 5e-4
    config.schedule.decay = "cosine"
    config.optim.update(weight_decay=0.05, b2=0.95)
    config.log.every_steps = 20
    return config, given


def images(config: ConfigDict, given: Mapping[str, Any]) -> None:
    """Add a batch of pictures, whose captions are not read, and MAE on it.

    Beside MAE on pairs, by the decoder of that, which is the one of the stages before.

    Args:
        config: changed.
        given: of ``base``.
    """
    section, objective = _mim(config, "images"), "mim"
    if "mim" in config.objectives:
        section["decoder_of"], objective = "mim", "images"
    with config.unlocked():
        config.data.sources.pictures = {**_pictures(config, given), "batch": "images"}
        config.data.batches.images = {**_by_flags(config), "num_edges": 1}
        config.objectives[objective] = section
        config.evals.heldout_images = _heldout("pictures", objective)


def text(config: ConfigDict, given: Mapping[str, Any]) -> None:
    """Add a batch of packed texts, and the language objective on it.

    Args:
        config: changed.
        given: of ``base``.
    """
    with config.unlocked():
        if given["data"] == "scenes":
            # The free text beside the checkout stands for a corpus; any folder of files does.
            root = "../shared/data/text"
            config.data.sources.prose = {
                "type": "texts",
                "root": root,
                "files": "wikitext*.txt",
                "weight": 1.0,
                "batch": "text",
            }
            config.data.sources.phrases = {
                "type": "texts",
                "root": root,
                "files": "sst2_train.tsv",
                "column": "sentence",
                "weight": 1.0,
                "batch": "text",
            }
        else:
            config.data.sources.prose = {
                "type": "texts",
                "root": "",
                "files": "*.txt",
                "val_files": "",
                "unit": "lines",
                "batch": "text",
            }
        packed = {"max_text_length": 128, "text_edges": (128,)}
        config.data.batches.text = {**_by_flags(config), **packed}
        config.objectives.text = {**given["language"], "batch": "text", "with_image": False}
        config.evals.heldout_text = _heldout("prose", "text")


def pairs(config: ConfigDict, given: Mapping[str, Any]) -> None:
    """Add a batch of pictures with their captions, and objectives on it.

    Args:
        config: changed.
        given: of ``base``.
    """
    language, chosen = given["language"], given["pairs"]
    readout = "query" if language["type"] == "flm" else "bidirectional"
    with config.unlocked():
        config.data.sources.captions = {**_pictures(config, given), "batch": "pairs"}
        config.data.batches.pairs = {**_by_flags(config), "num_edges": 2}
        if "language" in chosen:
            config.objectives.language = {**language, "batch": "pairs"}
            config.evals.heldout_pairs = _heldout("captions", "language")
        if "mim" in chosen:
            # Mirrored, a picture would belie what its caption says of left and right.
            augment = {"scale": (0.2, 1.0), "flip": 0.0}
            config.objectives.mim = {**_mim(config, "pairs"), "with_text": True, "augment": augment}
        if "itc" in chosen or "itm" in chosen:  # which draws its negatives by the contrast
            config.objectives.itc = {"batch": "pairs"}
        if "itm" in chosen:
            config.objectives.itm = {"batch": "pairs", "readout": readout}


def _by_flags(config: ConfigDict) -> dict[str, Any]:
    """Keys of a batch at their defaults, for a flag can set only what is there."""
    return {"batch_size": config.data.get_oneway_ref("batch_size"), "weight": 1.0}


def _pictures(config: ConfigDict, given: Mapping[str, Any]) -> dict[str, Any]:
    if given["data"] == "scenes":
        rendered = {"num_records": given["images"], "cache": True} if given["images"] else {}
        return {"type": "scenes", "level": "hard", **rendered}
    root = config.data.get_oneway_ref("root")
    if given["data"] == "pictures":
        return {"type": "unpaired_images", "root": root, "val_percent": 1.0, "test_percent": 1.0}
    return {"type": "folder", "root": root}


def _mim(config: ConfigDict, batch: str) -> dict[str, Any]:
    """MAE; its decoder as wide in proportion as that of a ViT-B, and half as deep where small."""
    width = config.model.image.width
    heads = config.model.image.heads
    decoder = {"decoder_width": 512, "decoder_depth": 8, "decoder_heads": 16}
    if width < 768:
        decoder = {"decoder_width": width // 2, "decoder_depth": 2, "decoder_heads": heads}
    return {"type": "mim", "batch": batch, **decoder}


def _heldout(source: str, objective: str) -> dict[str, Any]:
    return {
        "type": "heldout",
        "source": source,
        "objective": objective,
        "num_examples": 512,
        "num_draws": 2,
        "every_percent": 20.0,
    }
