"""From a config to sources, tokenizer and plans."""

import collections
import hashlib
import inspect
import itertools
import pathlib
from collections.abc import Mapping, Sequence

import jax
import numpy as np
from ml_collections import ConfigDict

from vlp_jax.compress.buckets import MAX_SCHEDULED_BUCKETS
from vlp_jax.data.cache import ImageCache, uncached
from vlp_jax.data.captions import (
    EncodedCaptions,
    batch_maxima,
    captions_file,
    every_caption,
    fit_edges,
)
from vlp_jax.data.eval_plan import EvalPlan
from vlp_jax.data.folder import Folder
from vlp_jax.data.guarded import Guarded
from vlp_jax.data.loader import Loader
from vlp_jax.data.making import found_or_made
from vlp_jax.data.plan import Plan
from vlp_jax.data.planned import BatchPlan, PlannedSource
from vlp_jax.data.scenes import (
    Scenes,
    ScenesEntailment,
    ScenesLabels,
    ScenesNLVR2,
    ScenesVQA,
)
from vlp_jax.data.source import Source, Worded
from vlp_jax.data.tasks import GLUE, NLVR2, VQA, ImageLabels, VisualEntailment
from vlp_jax.data.tasks.annotated import AnnotatedImages
from vlp_jax.data.tokenizer import Tokenizer
from vlp_jax.infra.errors import ConfigError, section_arguments
from vlp_jax.infra.files import write_text

SOURCES: Mapping[str, type] = {
    "scenes": Scenes,
    "scenes_vqa": ScenesVQA,
    "scenes_nlvr2": ScenesNLVR2,
    "scenes_entailment": ScenesEntailment,
    "scenes_labels": ScenesLabels,
    "folder": Folder,
    "vqa": VQA,
    "nlvr2": NLVR2,
    "visual_entailment": VisualEntailment,
    "image_labels": ImageLabels,
    "glue": GLUE,
}
# Keys of a source's section that are read here and not by the source.
_RESERVED = ("type", "weight", "split", "cache")
# Captions of one source that train a tokenizer, at most.
TOKENIZER_SAMPLE = 200_000
UNBOUNDED_SAMPLE = 20_000  # of a source that makes each of them up on the spot


def build_source(
    config: ConfigDict, name: str, split: str | None = None, num_records: int | None = None
) -> Source:
    """A source of ``config.data.sources``.

    A section with ``cache`` keeps its pictures and extra fields in memory, or in files of
    ``data.cache_dir`` that runs share; ``data.cache_workers`` processes make them.

    Args:
        config: of the run.
        name: of the source.
        split: in place of the section's own; a section without one means ``train``.
        num_records: for another split, how many records are wanted of a source that can make any
            number; the section's ``num_records`` belongs to its own split.

    Raises:
        ConfigError: no such source, or a key it does not take.
        ValueError: from the source, naming the key or the file.
    """
    path = f"data.sources.{name}"
    if name not in config.data.sources:
        raise ConfigError(path, "no such source", f"There are {sorted(config.data.sources)}")
    section = config.data.sources[name]
    kind = section.get("type", name)
    if kind not in SOURCES:
        raise ConfigError(f"{path}.type", f"{kind!r} is no source", f"Use one of {sorted(SOURCES)}")
    parameters = inspect.signature(SOURCES[kind]).parameters
    known = [name for name in parameters if name not in ("name", "key")]
    arguments = section_arguments(section, path, known, _RESERVED)
    for key in known:
        missing = parameters[key].default is inspect.Parameter.empty and key != "split"
        if missing and not arguments.get(key):
            raise ConfigError(f"{path}.{key}", "missing", "Add it")
    own_split = section.get("split", "train")
    if split not in (None, own_split) and "num_records" in known:
        arguments["num_records"] = num_records
    if "key" in parameters:
        arguments["key"] = f"{path}.root"
    source = SOURCES[kind](split=split or own_split, name=name, **arguments)
    if section.get("cache", False) and source.num_records is not None:
        source = ImageCache(
            source,
            config.data.image_size,
            path=_cache_path(config, source),
            workers=config.data.cache_workers,
        )
    return source


def build_tokenizer(config: ConfigDict, sources: Sequence[Source]) -> Tokenizer:
    """Load the tokenizer of ``config.tokenizer.path``, or train one on the captions.

    What was trained on sources whose pictures are kept in files is kept beside them.

    Args:
        config: of the run.
        sources: whose captions to train on: of an unbounded source, ``UNBOUNDED_SAMPLE`` of the
            first records; else all, or ``TOKENIZER_SAMPLE`` of records at even distances.
    """
    section = config.tokenizer
    if section.path:
        return Tokenizer.load(section.path)

    def train() -> Tokenizer:
        texts = itertools.chain.from_iterable(_tokenizer_texts(source) for source in sources)
        return Tokenizer.train(texts, section.vocab_size, section.kind)

    file = _tokenizer_file(section, sources)
    if file is None:
        return train()

    def make() -> Tokenizer:
        tokenizer = train()
        write_text(file, tokenizer.to_json())
        return tokenizer

    return found_or_made(file, lambda: Tokenizer.load(file) if file.exists() else None, make)


def build_plan(
    config: ConfigDict,
    sources: Mapping[str, Source],
    tokenizer: Tokenizer,
    most_edges: int = MAX_SCHEDULED_BUCKETS,
    guarded: Guarded | None = None,
) -> Plan:
    """The training plan: every source of the config, edges fitted to their lengths.

    Args:
        config: of the run.
        sources: name -> training source.
        tokenizer: of the run.
        most_edges: how many edges are fitted at most, whatever ``data.num_edges`` says: a run
            compiles each with every view of its images.
        guarded: records of each source that are encoded whole.

    Raises:
        ConfigError: captions could be longer than the model has positions.
    """
    data = config.data
    if not sources:
        raise ConfigError("data.sources", "there is none", f"Add one of {sorted(SOURCES)}")
    if data.max_text_length > config.model.text.max_positions:
        raise ConfigError(
            "data.max_text_length",
            f"{data.max_text_length} tokens exceed "
            f"model.text.max_positions={config.model.text.max_positions}",
            "Lower the one or raise the other",
        )
    planned = [
        PlannedSource(
            source,
            _encoded(config, source, tokenizer),
            data.sources[name].get("weight", 1.0),
            (guarded or {}).get(name, np.empty(0, np.int64)),
        )
        for name, source in sources.items()
    ]
    edges = tuple(data.text_edges) or _fitted_edges(config, planned, most_edges)
    if edges[-1] > config.model.text.max_positions:
        raise ConfigError(
            "data.text_edges",
            f"the last of {edges} exceeds the positions of the text stack "
            f"(model.text.max_positions={config.model.text.max_positions})",
            "Lower the one or raise the other",
        )
    return Plan(planned, data.batch_size, config.seed, edges, data.image_size, data.window_batches)


def build_eval_plan(
    config: ConfigDict,
    source: Source,
    tokenizer: Tokenizer,
    edges: Sequence[int],
    num_examples: int,
    batch_size: int,
) -> EvalPlan:
    """The first records of a source, each with its first caption, in a fixed order."""
    captions = EncodedCaptions(source, tokenizer, config.data.max_text_length, store=False)
    return EvalPlan(
        PlannedSource(source, captions), num_examples, batch_size, edges, config.data.image_size
    )


def open_loader(
    config: ConfigDict, plan: BatchPlan, steps: range, extra_fields: Sequence[str] = ()
) -> Loader:
    """The loader of a run on this process.

    Args:
        config: of the run; ``data.workers``, ``data.threads`` and ``data.prefetch`` apply.
        plan: what is in each batch.
        steps: whose batches are read.
        extra_fields: keys of ``batch.EXTRA_FIELDS`` to read beside the standard ones.

    Raises:
        ConfigError: see ``Loader``.
    """
    return Loader(
        plan,
        steps.start,
        steps.stop,
        host=jax.process_index(),
        hosts=jax.process_count(),
        workers=config.data.workers,
        threads=config.data.threads,
        prefetch=config.data.prefetch,
        extra_fields=extra_fields,
    )


def bad_captions(sources: Mapping[str, Source]) -> dict[str, int]:
    """Captions that sources left out when they read their annotations, by kind."""
    counts: collections.Counter[str] = collections.Counter()
    for source in sources.values():
        read = uncached(source)
        if isinstance(read, Folder | AnnotatedImages | GLUE):
            counts += read.bad_captions
    return dict(counts)


def missing_images(sources: Mapping[str, Source]) -> int:
    """Images that annotations name and that are not there, where ``missing_images`` is ``skip``."""
    count = 0
    for source in sources.values():
        read = uncached(source)
        if isinstance(read, Folder | AnnotatedImages):
            count += read.num_missing
    return count


def _cache_path(config: ConfigDict, source: Source) -> pathlib.Path | None:
    """Where the pictures are kept, those of every set in a file of their own; None: in memory."""
    if not config.data.cache_dir:
        return None
    identity = getattr(source, "identity", None)
    text = f"{identity} {source.num_records} {config.data.image_size}"
    digest = hashlib.sha256(text.encode()).hexdigest()
    return pathlib.Path(config.data.cache_dir) / f"{source.name}-{digest[:12]}.npy"


def _encoded(config: ConfigDict, source: Source, tokenizer: Tokenizer) -> EncodedCaptions:
    """The captions of a training source, kept beside its pictures if these are kept."""
    max_length = config.data.max_text_length
    if not isinstance(source, ImageCache):
        return EncodedCaptions(source, tokenizer, max_length)
    return EncodedCaptions(
        source,
        tokenizer,
        max_length,
        cache_file=source.path and captions_file(source.path, tokenizer, max_length),
        workers=config.data.cache_workers,
    )


def _tokenizer_texts(source: Source) -> list[str]:
    """Every caption of the records that a tokenizer is trained on, and words of later tasks."""
    # Twice: a word that occurs once is left in pieces.
    return [*_task_words(source), *_task_words(source), *_sampled_captions(source)]


def _task_words(source: Source) -> tuple[str, ...]:
    read = uncached(source)
    return read.task_words if isinstance(read, Worded) else ()


def _sampled_captions(source: Source) -> list[str]:
    if source.num_records is None:
        return every_caption(source, np.arange(UNBOUNDED_SAMPLE // 5))[:UNBOUNDED_SAMPLE]
    records = np.arange(source.num_records)
    total = int(source.num_captions(records).sum())
    if total > TOKENIZER_SAMPLE:
        kept = max(1, TOKENIZER_SAMPLE * len(records) // total)
        records = np.arange(kept) * len(records) // kept
    return every_caption(source, records)[:TOKENIZER_SAMPLE]


def _tokenizer_file(section: ConfigDict, sources: Sequence[Source]) -> pathlib.Path | None:
    """Where a tokenizer is kept: beside the pictures of the first source, if all are kept."""
    kept = [s for s in sources if isinstance(s, ImageCache) and s.path is not None]
    if not kept or len(kept) < len(sources):
        return None
    made_of = [(source.identity, source.num_records, _task_words(source)) for source in kept]
    text = f"{section.vocab_size} {section.kind} {TOKENIZER_SAMPLE} {made_of}"
    digest = hashlib.sha256(text.encode()).hexdigest()
    pictures = kept[0].path
    assert pictures is not None
    return pictures.with_name(f"{pictures.stem}.tokenizer-{digest[:12]}.json")


def _fitted_edges(
    config: ConfigDict, planned: Sequence[PlannedSource], most: int
) -> tuple[int, ...]:
    data = config.data
    total = np.zeros(data.max_text_length + 1)
    weights = sum(p.weight for p in planned)
    for p in planned:
        histogram = p.captions.histogram()
        total += p.weight / weights * histogram / histogram.sum()
    maxima = batch_maxima(total, data.batch_size, data.window_batches)
    longest = max(p.captions.longest for p in planned)
    return fit_edges(maxima, min(data.num_edges, most), data.edge_multiple, longest=longest)
