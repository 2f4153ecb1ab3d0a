"""What a run refuses or tells before it begins, where several sections of its config meet."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from absl import logging
from ml_collections import ConfigDict

from vlp_jax.data.joint_plan import JointPlan
from vlp_jax.data.plan import Plan
from vlp_jax.data.source import Source
from vlp_jax.evals import Evaluator
from vlp_jax.evals.base import has_figure
from vlp_jax.infra.errors import ConfigError
from vlp_jax.models.tuning_config import tuning_config
from vlp_jax.objectives import learns_from
from vlp_jax.objectives.base import Objective
from vlp_jax.objectives.classification import Classifier
from vlp_jax.train.config import default_config
from vlp_jax.train.initial import Origin
from vlp_jax.train.schedule import UNITS

# Keys that may change between two starts of a run without changing what it computes; `evals` unless
# an objective learns from them. That moved data are the same is looked at by ``source_facts``.
FREE_KEYS = (
    *("name", "debug", "log", "profile", "checkpoint", "evals", "compile_cache", "mesh"),
    "init_base",
)
FREE_DATA_KEYS = ("root", "threads", "workers", "prefetch", "cache_dir", "cache_workers")
# Shares of unknown tokens: from the first on it is told, from the second on refused.
TELL_UNKNOWN, MAX_UNKNOWN = 0.01, 0.3


def source_facts(sources: Mapping[str, Source]) -> dict[str, dict[str, Any]]:
    """Images and captions of each source, None where it is unbounded, and its classes."""
    facts = {}
    for name, source in sources.items():
        images = source.num_records
        captions = None if images is None else int(source.num_captions(np.arange(images)).sum())
        facts[name] = {"images": images, "captions": captions, "classes": list(source.classes)}
    return facts


def check_figure(key: str, metric: str, evaluators: Mapping[str, Evaluator]) -> None:
    """Refuse a figure that its evaluator does not give."""
    name, _, figure = metric.partition("/")
    if not has_figure(evaluators[name], figure):
        raise ConfigError(
            key,
            f"{metric!r} is none of the figures of evals.{name}",
            f"Use one of {', '.join(f'{name}/{known}' for known in evaluators[name].figures)}",
        )


def check_teachers(config: ConfigDict, evaluators: Mapping[str, Evaluator]) -> None:
    """Refuse what would wait in vain for a figure that it learns from."""
    waiting = {f"objectives.{name}": m for name, m in learns_from(config.objectives).items()}
    waiting["mixture.metrics"] = tuple(config.mixture.metrics.values())
    waiting["stages.metrics"] = tuple(config.stages.metrics)
    for key, metrics in waiting.items():
        for metric in metrics:
            evaluator = metric.partition("/")[0]
            section = config.evals.get(evaluator, {})
            if not _period(section) or section.get("on", "last") == "best":
                raise ConfigError(
                    key,
                    f"learns from {metric!r}, which no evaluator reports while the run trains",
                    f"Add evals.{evaluator} with every_steps or the like, or name another metric",
                )
            check_figure(key, metric, evaluators)
    periods = {m: _period(config.evals[m.partition("/")[0]]) for m in waiting["mixture.metrics"]}
    if len(set(map(str, periods.values()))) > 1:
        raise ConfigError(
            "mixture.metrics",
            f"weights move when all figures are known, and these come apart: {periods}",
            "Give their evaluators the same every_steps or the like",
        )


def _period(section: Mapping[str, Any]) -> dict[str, float]:
    """Unit -> how often an evaluator comes; empty: not while the run trains."""
    return {unit: every for unit in UNITS if (every := section.get(f"every_{unit}"))}


def check_batches(objectives: Sequence[Objective], batches: Mapping[str, Plan]) -> None:
    """Refuse an objective whose batch no source feeds, and a batch that no objective reads."""
    for objective in objectives:
        if objective.batch_name not in batches:
            raise ConfigError(
                f"objectives.{objective.name}.batch",
                f"no source feeds a batch {objective.batch_name!r}",
                f"Use one of {sorted(batches)}, or give data.sources.NAME.batch="
                f"{objective.batch_name!r}",
            )
    for name in batches.keys() - {objective.batch_name for objective in objectives}:
        source = batches[name].sources[0].source.name
        raise ConfigError(
            f"data.sources.{source}.batch",
            f"no objective reads the batch {name!r}",
            f"Give objectives.NAME.batch={name!r}, or remove the source",
        )


def check_classes(sources: Mapping[str, Source], objectives: Sequence[Objective]) -> None:
    """Refuse labels that mean different things in two sources, or more than an objective knows."""
    having = {name: source.classes for name, source in sources.items() if source.classes}
    first, *others = having or [""]
    for name in others:
        if having[name] != having[first]:
            raise ConfigError(
                f"data.sources.{name}",
                f"its {len(having[name])} classes are not the {len(having[first])} of "
                f"data.sources.{first}, so that one label would mean two things",
                "Give both the same list, for VQA by `answers`, or train on one of them",
            )
    for objective in objectives:
        needed = len(having.get(first, ()))
        if isinstance(objective, Classifier) and needed > objective.num_classes:
            raise ConfigError(
                f"objectives.{objective.name}.num_classes",
                f"{objective.num_classes} classes, but data.sources.{first} has {needed}",
                "Use at least as many",
            )


def judged_on_best(config: ConfigDict) -> frozenset[str]:
    """The evaluators whose section says ``on="best"``."""
    names = set()
    for name, section in config.evals.items():
        if section.get("on", "last") not in ("last", "best"):
            raise ConfigError(f"evals.{name}.on", f"{section.on!r}", "Use 'last' or 'best'")
        if section.get("on", "last") == "best":
            names.add(name)
    if names and not config.checkpoint.best_metric:
        raise ConfigError(
            f"evals.{min(names)}.on",
            "'best' by no metric",
            "Give checkpoint.best_metric, a figure of an evaluator on the validation split",
        )
    return frozenset(names)


def check_texts(plan: JointPlan) -> dict[str, float]:
    """Refuse sources whose texts the tokenizer cannot spell, and warn of what a model cannot read.

    A text of <unk> alone is predicted with ease, so that scores would not tell.

    Args:
        plan: of the run.

    Returns:
        Source -> share of the tokens of its words that are unknown.

    Raises:
        ConfigError: it is ``MAX_UNKNOWN`` or more.
    """
    shares = {}
    for planned in plan.sources:
        name, captions = planned.source.name, planned.captions
        share = shares[name] = captions.unknown_share()
        if share >= MAX_UNKNOWN:
            raise ConfigError(
                "tokenizer",
                f"{share:.0%} of the tokens of data.sources.{name} are words or signs that the "
                "tokenizer has never seen",
                "Give tokenizer.path of one that knows them, or start without init_from",
            )
        if share >= TELL_UNKNOWN:
            logging.warning(
                "data.sources.%s: %.1f %% of the tokens are words or signs that the tokenizer has "
                "never seen; the model reads <unk> in their place",
                name,
                100 * share,
            )
        if captions.num_truncated:
            logging.warning(
                "data.sources.%s: %d captions are cut to data.max_text_length=%d tokens",
                name,
                captions.num_truncated,
                captions.max_length,
            )
    return shares


def without_foreign_heads(
    origin: Origin, sources: Mapping[str, Source], objectives: Sequence[Objective]
) -> Origin:
    """An origin without the heads of classification whose classes meant something else there.

    Their shapes agree all the same where a config gives the number of classes.
    """
    having = [source.classes for source in sources.values() if source.classes]
    if not having or not origin.classes or tuple(origin.classes) == tuple(having[0]):
        return origin
    heads = {o.head_name for o in objectives if isinstance(o, Classifier)}
    arrays = {
        path: array for path, array in origin.arrays.items() if path.split("/")[0] not in heads
    }
    if len(arrays) < len(origin.arrays):
        logging.warning(
            "init_from: the %d classes of %s are not the %d of this run, whose head is fresh",
            len(origin.classes),
            origin.where,
            len(having[0]),
        )
    return dataclasses.replace(origin, arrays=arrays)


def check_dropped(
    config: ConfigDict,
    facts: Mapping[str, Mapping[str, Any]],
    dropped: Mapping[str, Mapping[str, int]],
) -> None:
    """Stop where annotations are worse than the config allows.

    Args:
        config: of the run.
        facts: of its sources, see ``source_facts``.
        dropped: captions that each source left out when it read its annotations, by kind.

    Raises:
        ConfigError: more of them than ``data.max_bad_fraction``.
    """
    kept = sum(source["captions"] or 0 for source in facts.values())
    total = sum(sum(kinds.values()) for kinds in dropped.values())
    if total > config.data.max_bad_fraction * (kept + total):
        raise ConfigError(
            "data.max_bad_fraction",
            f"{total} of {kept + total} captions are bad ({_told(dropped)}), more than "
            f"{config.data.max_bad_fraction:.2%}",
            "Mend the annotations or raise the limit",
        )
    if dropped:
        logging.warning("captions left out: %s", _told(dropped))


def _told(dropped: Mapping[str, Mapping[str, int]]) -> str:
    return "; ".join(f"data.sources.{name}: {dict(kinds)}" for name, kinds in dropped.items())


def changed_keys(old: Mapping[str, Any], new: Mapping[str, Any], watched: bool) -> list[str]:
    """Keys by which a resumed run differs in what it computes; those of ``data`` one by one.

    Args:
        old: config of the last start.
        new: config of this one.
        watched: whether an objective learns from evaluators.
    """
    old = completed(old)
    free = {*FREE_KEYS} - ({"evals"} if watched else set())
    keys = [key for key in new if key not in free and old.get(key) != new[key]]
    before, now = _placeless(old.get("data", {})), _placeless(new["data"])
    inside = [key for key in now if key not in FREE_DATA_KEYS and before.get(key) != now[key]]
    return sorted({*keys} - {"data"} | {f"data.{key}" for key in inside})


def completed(old: Mapping[str, Any]) -> dict[str, Any]:
    """The config of an earlier version, with the keys that came since, at their defaults."""
    default: dict[str, Any] = json.loads(default_config().to_json_best_effort())
    model = {**old.get("model", {})}
    if "image" in model:
        image = {key: default["model"]["image"][key] for key in ("positions", "drop_path")}
        model["image"] = {**image, **model["image"]}
    if "tuning" in model:
        model["tuning"] = {**json.loads(tuning_config().to_json_best_effort()), **model["tuning"]}
    compression = {**default["compression"], **old.get("compression", {})}
    came = {key: default[key] for key in ("mixture", "stages", "search", "skip_from")}
    found = {**came, **old, "compression": compression}
    if "data" in old:
        found["data"] = {"batches": {}, "alternate": "", **old["data"]}
    if "optim" in old:
        found["optim"] = {"final_weight_decay": None, "sequential": True, **old["optim"]}
    return {**found, "model": model} if model else found


def _placeless(data: Mapping[str, Any]) -> dict[str, Any]:
    """``config.data`` without the folders that its sources lie in."""
    sources = {
        name: {key: value for key, value in section.items() if key != "root"}
        for name, section in data.get("sources", {}).items()
    }
    return {**data, "sources": sources}
