"""Everything a run needs, built and checked before any device time is spent."""

import collections
import dataclasses
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from absl import logging
from jax.sharding import Mesh
from ml_collections import ConfigDict

from vlp_jax.compress.buckets import MAX_SCHEDULED_BUCKETS, StepBucket
from vlp_jax.data.build import build_plan, build_tokenizer
from vlp_jax.data.guarded import Guarded, keep_guarded, kept_guarded, read_guarded
from vlp_jax.data.joint_plan import JointPlan
from vlp_jax.data.source import Source
from vlp_jax.data.sources import bad_captions, build_source, missing_images
from vlp_jax.data.tokenizer import Tokenizer
from vlp_jax.evals import EvalContext, Evaluator, build_evaluators
from vlp_jax.infra.checkpoint import Checkpoints
from vlp_jax.infra.checkpoint_reader import has_checkpoint
from vlp_jax.infra.errors import ConfigError
from vlp_jax.infra.files import write_text
from vlp_jax.infra.mesh import make_mesh
from vlp_jax.infra.metrics import check_wandb
from vlp_jax.infra.report import CONFIG_FILE
from vlp_jax.infra.sharding import by_path
from vlp_jax.models.pretrained import Metadata, Report, check_vocabulary, merge
from vlp_jax.objectives import learns_from
from vlp_jax.train.adopted import adopt, adopt_skipped
from vlp_jax.train.bucket_schedule import Resolved, count_buckets
from vlp_jax.train.checks import (
    changed_keys,
    check_batches,
    check_classes,
    check_dropped,
    check_figure,
    check_teachers,
    check_texts,
    completed,
    judged_on_best,
    source_facts,
    without_foreign_heads,
)
from vlp_jax.train.config import check_keys
from vlp_jax.train.initial import (
    CHECKPOINT_FOLDER,
    Origin,
    read_origin,
    skipped_units,
)
from vlp_jax.train.online import Decider
from vlp_jax.train.program import Program
from vlp_jax.train.schedule import Budget, to_steps
from vlp_jax.train.searching import Searcher, build_searcher
from vlp_jax.train.state import TrainState
from vlp_jax.train.tunables import Tunables

TOKENIZER_FILE = "tokenizer.json"
SCHEDULE_FILE, GUARDED_FILE = "schedule.json", "guarded.json"


@dataclasses.dataclass(frozen=True)
class Setup:
    """What ``prepare`` builds.

    Attributes:
        config: of the run.
        workdir: where the run keeps its files.
        mesh: all devices, or one in debug mode.
        tokenizer: loaded or trained; kept in the workdir and in every checkpoint.
        sources: training sources by name.
        plan: of the training batches.
        plans: of the batches that each stage reads; of a run without stages, that plan alone.
        budget: examples of an update, epoch and total steps.
        program: the update.
        evaluators: by name.
        eval_steps: name -> steps between two runs of an evaluator; None: only at the end.
        on_best: names of the evaluators that run once, on the best checkpoint.
        origin: where the first parameters come from; None: from scratch, or the run was begun.
        dropped_captions: captions left out when the annotations were read, by kind.
        missing_images: images that the annotations name and that are not there.
        source_facts: what a resumed run must find again, by source; see ``checks.source_facts``.
        unknown_tokens: by source, the share of the tokens of words that are <unk>.
        decider: of an online schedule of buckets, or of a search; None: there is none.
        tunables: what checkpoints leave to the base they are made on.
    """

    config: ConfigDict
    workdir: pathlib.Path
    mesh: Mesh
    tokenizer: Tokenizer
    sources: dict[str, Source]
    plan: JointPlan
    plans: tuple[JointPlan, ...]
    budget: Budget
    program: Program
    evaluators: dict[str, Evaluator]
    eval_steps: dict[str, int | None]
    on_best: frozenset[str]
    origin: Origin | None
    dropped_captions: dict[str, int]
    missing_images: int
    source_facts: dict[str, dict[str, Any]]
    unknown_tokens: dict[str, float]
    decider: Decider | Searcher | None
    tunables: Tunables

    @property
    def total_steps(self) -> int:
        """Updates of the whole run; of an online schedule, as far as it is decided."""
        return self.program.schedule.total_steps

    def open_checkpoints(self) -> Checkpoints:
        """The checkpoints of the workdir."""
        section = self.config.checkpoint
        return Checkpoints(
            self.workdir / CHECKPOINT_FOLDER,
            keep_latest=section.keep_latest,
            keep_best=section.keep_best,
            best_metric=section.best_metric or None,
            best_mode=section.best_mode,
        )

    def checkpoint_extra(self) -> dict[str, Any]:
        """What is saved beside the state: enough to use it without the workdir."""
        classes = [source.classes for source in self.sources.values() if source.classes]
        return {
            "config": plain(self.config),
            "tokenizer": self.tokenizer.to_json(),
            "classes": list(classes[0]) if classes else [],
            "sources": self.source_facts,
            **self.tunables.extra,
        }

    def check_same_data(self, extra: Mapping[str, Any]) -> None:
        """Say where the sources are not those of a checkpoint that the run goes on from.

        Args:
            extra: saved beside the checkpoint's state.

        Raises:
            ConfigError: labels would mean something else.
        """
        for name, before in extra.get("sources", {}).items():
            now = self.source_facts.get(name)
            if now is None or now == before:  # what the config has changed is told by itself
                continue
            if now["classes"] != before["classes"]:
                raise ConfigError(
                    f"data.sources.{name}",
                    f"its {len(now['classes'])} classes are not the {len(before['classes'])} of "
                    "the last checkpoint, so that one label would mean two things",
                    "Give it the old list again, or use another workdir",
                )
            logging.warning(
                "data.sources.%s had %s images with %s captions at the last checkpoint, and has "
                "%s with %s now: from here on its batches are others",
                name,
                before["images"],
                before["captions"],
                now["images"],
                now["captions"],
            )

    def first_state(self) -> tuple[TrainState, Report | None]:
        """A fresh state, with the parameters of ``origin`` where they fit, and their report."""
        if self.origin is None:
            return self.program.init(), None
        arrays, shapes = self.origin.arrays, _shapes(self.program.state_spec.params)
        given = {
            path for path, shape in shapes.items() if path in arrays and arrays[path].shape == shape
        }
        state = self.program.init(given)
        skipped = skipped_units(self.config.model)
        merged, report = merge(state.params, arrays, self.origin.where, skipped)
        params = jax.tree.map(
            lambda new, old: jax.device_put(new, old.sharding), merged, state.params
        )
        return self.program.started_from(params, state), report


def prepare(config: ConfigDict, workdir: pathlib.Path) -> Setup:
    """Build a run from its config; every fault of the input shows here.

    Args:
        config: complete, see ``train.config``.
        workdir: made if absent. A run that has a checkpoint there goes on from it, with its
            tokenizer and geometry; one that was ended before its first begins anew.

    Raises:
        ConfigError, ValueError, OSError: the message names the key or the file, and the remedy.
    """
    check_keys(config)
    check_wandb(config.log.wandb)
    mesh = make_mesh(devices=jax.devices()[:1]) if config.debug else make_mesh(**config.mesh)
    if mesh.shape["model"] > 1:
        raise ConfigError(
            "mesh.model",
            f"no parameter is cut along this axis yet: {mesh.shape['model']} devices would each "
            "compute the same",
            "Use 1, and mesh.fsdp to share parameters",
        )
    sources = {name: build_source(config, name) for name in sorted(config.data.sources)}
    dropped = bad_captions(sources)
    facts = source_facts(sources)
    check_dropped(config, facts, dropped)
    workdir.mkdir(parents=True, exist_ok=True)
    # Its folder alone says nothing: it is there long before the first checkpoint is.
    begun = has_checkpoint(workdir / CHECKPOINT_FOLDER)
    origin = None
    if config.init_from and not begun:
        origin = read_origin(config.init_from, str(config.init_checkpoint), config.init_base)
    adopt(config, workdir if begun else None, origin)
    adopt_skipped(config, workdir if begun else None)
    tokenizer = _tokenizer(config, workdir, begun, list(sources.values()), origin)
    most_edges = max(1, MAX_SCHEDULED_BUCKETS // count_buckets(config.compression))
    as_begun = begun and _same_compression(config, workdir)
    guarded = _guarded(config, workdir, as_begun, sources)
    plan = build_plan(config, sources, tokenizer, most_edges, guarded)
    budget = Budget(plan.batch_size, plan.examples_per_epoch, text_lengths=plan.mean_text_lengths)
    total = to_steps(config, "", "total", budget)
    if not total:
        raise ConfigError(
            "total_steps", "the run has no length", "Give total_steps, _examples or _epochs"
        )
    if config.search.method:
        total = max(1, round(total * config.search.percent / 100))
    budget = dataclasses.replace(budget, total_steps=total)
    program = Program(
        config,
        tokenizer.vocabulary,
        mesh,
        budget,
        _kept_schedule(workdir) if as_begun else None,
        plan.guarded_share,
    )
    check_batches(program.objectives, plan.plans)
    # From here on, its length is the updates that the budget buys.
    budget = dataclasses.replace(budget, total_steps=program.schedule.total_steps)
    stages = program.stages.batches if program.stages else (tuple(plan.plans),)
    plans = tuple(plan.part(names) for names in stages)
    buckets = program.buckets(sizes_of(plans))
    if len(buckets) > MAX_SCHEDULED_BUCKETS:
        raise ConfigError(
            "compression.buckets" if program.schedule.compresses else "data.text_edges",
            f"a run compiles at most {MAX_SCHEDULED_BUCKETS} buckets, not {len(buckets)}: "
            f"{len(sizes_of(plans))} text lengths with each of "
            f"{len(buckets) // len(sizes_of(plans))} views",
            "Give fewer",
        )
    check_classes(sources, program.objectives)
    unknown = check_texts(plan)
    if origin is not None:  # a misfit shows here, before any device time is spent
        origin = without_foreign_heads(origin, sources, program.objectives)
        origin.check_fit(_shapes(program.state_spec.params), plain(config)["model"])
    tunables = Tunables(config, program, origin)
    evaluators = build_evaluators(
        EvalContext(config, program.objectives, tokenizer, mesh, sources, plan.edges, workdir)
    )
    eval_steps = {
        name: to_steps(with_durations(config.evals[name]), f"evals.{name}", "every", budget)
        for name in evaluators
    }
    on_best = judged_on_best(config)
    check_teachers(config, evaluators)
    best = config.checkpoint.best_metric
    if best and best.partition("/")[0] not in set(evaluators) - on_best:
        raise ConfigError(
            "checkpoint.best_metric",
            f"{best!r} is a figure of no evaluator of this run",
            f"Begin it with one of {sorted(evaluators)}, or leave it empty",
        )
    if best:
        check_figure("checkpoint.best_metric", best, evaluators)
    _write_config(config, workdir, begun)
    if jax.process_index() == 0 and program.schedule.compresses:
        program.compression.write(workdir / SCHEDULE_FILE, program.made_for, {})
        if guarded:
            keep_guarded(workdir / GUARDED_FILE, guarded)
    return Setup(
        config,
        workdir,
        mesh,
        tokenizer,
        sources,
        plan,
        plans,
        budget,
        program,
        evaluators,
        eval_steps,
        on_best,
        origin,
        dict(sum(dropped.values(), collections.Counter())),
        missing_images(sources),
        facts,
        unknown,
        _decider(config, program, plan, sources, tokenizer, workdir),
        tunables,
    )


def sizes_of(plans: Sequence[JointPlan]) -> tuple[StepBucket, ...]:
    """The sizes of batches that can occur in any stage, each once."""
    return tuple(dict.fromkeys(sizes for plan in plans for sizes in plan.buckets()))


def with_durations(section: ConfigDict) -> ConfigDict:
    """A section whose missing ``every_*`` keys are None."""
    keys = ("every_steps", "every_examples", "every_epochs", "every_percent")
    return ConfigDict({key: section.get(key) for key in keys})


def plain(config: ConfigDict) -> dict[str, Any]:
    """A config as JSON holds it."""
    result: dict[str, Any] = json.loads(config.to_json_best_effort())
    return result


def _tokenizer(
    config: ConfigDict,
    workdir: pathlib.Path,
    begun: bool,
    sources: list[Source],
    origin: Origin | None,
) -> Tokenizer:
    """That of a run that has begun, of ``tokenizer.path``, of the origin, or one trained here."""
    file, old = workdir / TOKENIZER_FILE, workdir / CONFIG_FILE
    if begun and file.exists() and old.exists():
        if json.loads(old.read_text())["tokenizer"] == plain(config)["tokenizer"]:
            return Tokenizer.load(file)
        raise ConfigError(
            "tokenizer",
            f"the run in {workdir} was begun with another tokenizer section",
            "Use the old one (it is in config.json there) or another workdir",
        )
    if origin is not None and not origin.reads_text:
        origin = None  # whatever words there are, none of its parameters means one
    if origin is not None and origin.tokenizer and not config.tokenizer.path:
        tokenizer = Tokenizer.from_json(origin.tokenizer, origin.where)
    else:
        tokenizer = build_tokenizer(config, sources)
        if origin is not None:
            made_with = Metadata(origin.config, origin.tokenizer)
            check_vocabulary(made_with, tokenizer.to_json(), origin.where)
    if jax.process_index() == 0:
        tokenizer.save(file)
    return tokenizer


def _decider(
    config: ConfigDict,
    program: Program,
    plan: JointPlan,
    sources: Mapping[str, Source],
    tokenizer: Tokenizer,
    workdir: pathlib.Path,
) -> Decider | Searcher | None:
    if program.search is None:
        return Decider(program, plan) if program.compression.decisions else None
    if program.compression.decisions:
        raise ConfigError(
            "search.method",
            "in a run whose schedule of buckets is decided online, by gradients of other networks",
            "Give compression.schedule another kind",
        )
    return build_searcher(config, program, sources, tokenizer, workdir)


def _same_compression(config: ConfigDict, workdir: pathlib.Path) -> bool:
    """Whether the run in a workdir was begun with the section ``compression`` of this config."""
    old = workdir / CONFIG_FILE
    if not old.exists():
        return False
    before = completed(json.loads(old.read_text()))["compression"]
    return bool(before == plain(config)["compression"])


def _kept_schedule(workdir: pathlib.Path) -> Resolved | None:
    """The schedule of buckets that a run was begun with; None: there is none."""
    file = workdir / SCHEDULE_FILE
    return Resolved.read(file) if file.exists() else None


def _guarded(
    config: ConfigDict, workdir: pathlib.Path, as_begun: bool, sources: Mapping[str, Source]
) -> Guarded:
    """The records that are encoded whole; as a run was begun, so it goes on."""
    if not config.compression.guard_file:
        return {}
    file = workdir / GUARDED_FILE
    return kept_guarded(file) if as_begun and file.exists() else read_guarded(config, sources)


def _shapes(params: Any) -> dict[str, tuple[int, ...]]:
    return {path: tuple(leaf.shape) for path, leaf in by_path(params).items()}


def _learns(config: ConfigDict) -> bool:
    """Whether what a run computes depends on its evaluators."""
    learns = any(learns_from(config.objectives).values())
    return learns or bool(config.mixture.metrics) or bool(config.stages.metrics)


def _write_config(config: ConfigDict, workdir: pathlib.Path, begun: bool) -> None:
    """Keep the config in the workdir; say so where it changes what a resumed run computes."""
    if jax.process_index() != 0:
        return
    file = workdir / CONFIG_FILE
    new = plain(config)
    if begun and file.exists():
        old = json.loads(file.read_text())
        changed = changed_keys(old, new, watched=_learns(config))
        if changed:
            logging.warning(
                "the config differs from that of the last start in %s: from here on the run is "
                "not the one that was begun",
                ", ".join(changed),
            )
    write_text(file, json.dumps(new, indent=2, sort_keys=True) + "\n")
