"""From a config to tokenizer, plans and loader."""

import hashlib
import itertools
import pathlib
from collections.abc import Mapping, Sequence

import jax
import numpy as np
from ml_collections import ConfigDict

from vlp_jax.compress.buckets import MAX_SCHEDULED_BUCKETS
from vlp_jax.data.batch import FIELDS, PAIRS, standard_fields
from vlp_jax.data.cache import kept_file, uncached
from vlp_jax.data.captions import (
    EncodedCaptions,
    captions_file,
    every_caption,
    known_identity,
)
from vlp_jax.data.eval_plan import EvalPlan
from vlp_jax.data.guarded import Guarded
from vlp_jax.data.joint_plan import JointPlan
from vlp_jax.data.loader import JointLoader, Loader
from vlp_jax.data.making import found_or_made
from vlp_jax.data.named import BatchSection, batch_section, batch_sources
from vlp_jax.data.packing import PackedTexts
from vlp_jax.data.plan import Plan
from vlp_jax.data.planned import PlannedSource
from vlp_jax.data.source import Source, Worded, has_pictures
from vlp_jax.data.sources import SOURCES
from vlp_jax.data.text_edges import batch_maxima, fit_edges
from vlp_jax.data.texts import Texts
from vlp_jax.data.tokenizer import Tokenizer
from vlp_jax.data.worse_labels import with_its_captions
from vlp_jax.infra.errors import ConfigError
from vlp_jax.infra.files import write_text

# Captions of one source that train a tokenizer, at most.
TOKENIZER_SAMPLE = 200_000
UNBOUNDED_SAMPLE = 20_000  # of a source that makes each of them up on the spot


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
) -> JointPlan:
    """The training plan: every named batch of the config, edges fitted to its sources' lengths.

    Args:
        config: of the run.
        sources: name -> training source.
        tokenizer: of the run.
        most_edges: how many text lengths (of several batches: combinations of them) there are at
            most, whatever ``num_edges`` says: a run compiles each with every view of its images.
        guarded: records of each source that are encoded whole.

    Raises:
        ConfigError: captions could be longer than the model has positions.
    """
    if not sources:
        raise ConfigError("data.sources", "there is none", f"Add one of {sorted(SOURCES)}")
    plans = {
        batch: _batch_plan(
            config,
            batch,
            [
                _planned(
                    config,
                    sources[name],
                    tokenizer,
                    config.data.sources[name].get("weight", 1.0),
                    (guarded or {}).get(name, np.empty(0, np.int64)),
                )
                for name in names
            ],
            most_edges,
        )
        for batch, names in batch_sources(config).items()
    }
    return JointPlan(plans, most_edges, _turns(config, plans))


def batch_fields(config: ConfigDict, name: str) -> tuple[str, ...]:
    """The standard arrays of a named batch: those of pairs, but for what its sources have not.

    Raises:
        ConfigError: some of its sources have pictures, and some have none.
    """
    names = batch_sources(config).get(name, ())
    pictures = {source: _has_pictures(config, source) for source in names}
    if len({*pictures.values()}) > 1:
        with_them, without = (
            next(source for source, has in pictures.items() if has is wanted)
            for wanted in (True, False)
        )
        raise ConfigError(
            f"data.sources.{without}.batch",
            f"it has no pictures, and data.sources.{with_them} of the same batch {name!r} has",
            "Give it a batch of its own",
        )
    return standard_fields(all(pictures.values()), any(_is_packed(config, s) for s in names))


def build_eval_plan(
    config: ConfigDict,
    source: Source,
    tokenizer: Tokenizer,
    edges: Sequence[int],
    num_examples: int,
    batch_size: int,
) -> EvalPlan:
    """The first records of a source, each with its first caption; of packed texts, rows."""
    length = _text_length(config, source)
    if isinstance(uncached(source), Texts):
        packed = PackedTexts(source, tokenizer, length)
        planned = PlannedSource(packed, packed)
    else:
        planned = PlannedSource(source, EncodedCaptions(source, tokenizer, length, store=False))
    return EvalPlan(planned, num_examples, batch_size, edges, config.data.image_size)


def open_loader(
    config: ConfigDict,
    joint: JointPlan,
    steps: range,
    fields: Mapping[str, Sequence[str]] | None = None,
) -> JointLoader:
    """The loader of a run on this process.

    Args:
        config: of the run; ``data.workers``, ``data.threads`` and ``data.prefetch`` apply, to each
            batch.
        joint: what is in each batch.
        steps: whose batches are read.
        fields: name of a batch -> its arrays, see ``data.batch``; the standard ones of pairs where
            it is not named.

    Raises:
        ConfigError: see ``Loader``.
    """
    fields = fields or {}
    return JointLoader(
        {
            name: Loader(
                member,
                joint.updates_before(name, steps.start),
                joint.updates_before(name, steps.stop),
                host=jax.process_index(),
                hosts=jax.process_count(),
                workers=config.data.workers,
                threads=config.data.threads,
                prefetch=config.data.prefetch,
                fields=fields.get(name, tuple(FIELDS)),
            )
            for name, member in joint.members.items()
        },
        lambda step: [name for name, _ in joint.bucket(step)],
        steps,
    )


def _text_length(config: ConfigDict, source: Source) -> int:
    """Most tokens of a text of a source; of packed ones, of a row.

    Raises:
        ConfigError: the model has fewer positions.
    """
    section = batch_section(config, config.data.sources[source.name].get("batch", PAIRS))
    if section.max_text_length > config.model.text.max_positions:
        raise ConfigError(
            section.length_key,
            f"{section.max_text_length} tokens exceed "
            f"model.text.max_positions={config.model.text.max_positions}",
            "Lower the one or raise the other",
        )
    return section.max_text_length


def _planned(
    config: ConfigDict, source: Source, tokenizer: Tokenizer, weight: float, guarded: np.ndarray
) -> PlannedSource:
    """A training source; texts without pictures are packed into rows."""
    if not isinstance(source, Texts):
        return PlannedSource(source, _encoded(config, source, tokenizer), weight, guarded)
    length, data = _text_length(config, source), config.data
    file = None
    if data.cache_dir:
        digest = hashlib.sha256(f"{source.identity} {length} {tokenizer.to_json()}".encode())
        name = f"{source.name}.packed-{digest.hexdigest()[:12]}.npz"
        file = pathlib.Path(data.cache_dir) / name
    packed = PackedTexts(
        source, tokenizer, length, cache_file=file, workers=data.cache_workers if file else 0
    )
    return PlannedSource(packed, packed, weight, guarded)


def _encoded(config: ConfigDict, source: Source, tokenizer: Tokenizer) -> EncodedCaptions:
    """The captions of a training source, kept beside its pictures if these are kept."""
    max_length = _text_length(config, source)
    source = with_its_captions(source)
    if uncached(source) is source:
        return EncodedCaptions(source, tokenizer, max_length)
    pictures = kept_file(source)
    return EncodedCaptions(
        source,
        tokenizer,
        max_length,
        cache_file=pictures and captions_file(pictures, tokenizer, max_length),
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
    read = [with_its_captions(source) for source in sources]
    kept = [file for source in read if (file := kept_file(source)) is not None]
    if not kept or len(kept) < len(sources):
        return None
    made_of = [
        (known_identity(source, file), source.num_records, _task_words(source))
        for source, file in zip(read, kept, strict=True)
    ]
    text = f"{section.vocab_size} {section.kind} {TOKENIZER_SAMPLE} {made_of}"
    digest = hashlib.sha256(text.encode()).hexdigest()
    return kept[0].with_name(f"{kept[0].stem}.tokenizer-{digest[:12]}.json")


def _has_pictures(config: ConfigDict, source: str) -> bool:
    """Whether the records of a source of the config are pictures; of an unknown kind, they are."""
    kind = SOURCES.get(config.data.sources[source].get("type", source))
    return kind is None or has_pictures(kind)


def _turns(config: ConfigDict, plans: Mapping[str, Plan]) -> dict[str, float] | None:
    """How many of the updates each batch gets where they take turns; None: they do not."""
    kind = config.data.alternate
    if not kind:
        return None
    if config.stages.batches:
        raise ConfigError(
            "data.alternate",
            "batches take turns in the stages of one run, where the turns before a stage would not "
            "be known, and its first batches be read again",
            "Remove stages.batches, or train each stage as a run of its own (init_from)",
        )
    if kind == "uniform":
        return dict.fromkeys(plans, 1.0)
    if kind != "proportional":
        raise ConfigError(
            "data.alternate",
            f"{kind!r} is no way to take turns",
            "Use 'uniform', 'proportional', or '' for updates that read every batch",
        )
    shares = {}
    for name, plan in plans.items():
        records = plan.examples_per_epoch
        if records is None:
            raise ConfigError(
                "data.alternate",
                f"'proportional' to the records of the batch {name!r}, of which there is no end",
                "Give its source num_records, or use 'uniform'",
            )
        shares[name] = records / plan.batch_size
    return shares


def _is_packed(config: ConfigDict, source: str) -> bool:
    """Whether several texts of a source of the config share a row."""
    return SOURCES.get(config.data.sources[source].get("type", source)) is Texts


def _batch_plan(
    config: ConfigDict, name: str, planned: Sequence[PlannedSource], most_edges: int
) -> Plan:
    section, data = batch_section(config, name), config.data
    edges = section.text_edges or _fitted_edges(config, section, planned, most_edges)
    if edges[-1] > config.model.text.max_positions:
        raise ConfigError(
            "data.text_edges",
            f"the last of {edges} exceeds the positions of the text stack "
            f"(model.text.max_positions={config.model.text.max_positions})",
            "Lower the one or raise the other",
        )
    return Plan(
        planned,
        section.batch_size,
        config.seed,
        edges,
        data.image_size,
        data.window_batches,
        stream="" if name == PAIRS else name,
    )


def _fitted_edges(
    config: ConfigDict, section: BatchSection, planned: Sequence[PlannedSource], most: int
) -> tuple[int, ...]:
    data = config.data
    total = np.zeros(section.max_text_length + 1)
    weights = sum(p.weight for p in planned)
    for p in planned:
        histogram = p.captions.histogram()
        total += p.weight / weights * histogram / histogram.sum()
    maxima = batch_maxima(total, section.batch_size, data.window_batches)
    longest = max(p.captions.longest for p in planned)
    return fit_edges(maxima, min(section.num_edges, most), data.edge_multiple, longest=longest)
