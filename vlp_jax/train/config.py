"""Every key a run understands, with its default.

A config file starts from ``default_config()`` and changes keys. The result is locked: a key that
is not here is an error that names it, whether it comes from the file or from a flag.

    name            of the run, in logs and reports
    seed            of everything that is drawn
    total_*         length of the run in steps, examples or epochs (see schedule.duration); an epoch
                    is as many examples as there are images, and of a run of few epochs some images
                    are seen less often than others, for data.window_batches batches are shuffled
                    together
    debug           True: one device, no jit, NaN checks
    init_from       where the first parameters come from: a run's workdir, one of its checkpoints,
                    or a parameter file (train.initial); empty: from scratch
    init_checkpoint which checkpoint of a workdir: latest, best or a step
    init_base       of init_from, or of this run's own checkpoints, where they hold tunables alone:
                    where their base lies now; empty: where it was
    adopt_model     True: take the geometry of the model (all of `model` but dtype, attention and
                    tuning; of that, what is cut out of blocks) from init_from
    skip_from       workdir of a run that has searched for units: what it chose is skipped, as
                    model.tuning.skip
    search          of units (model.tuning.gated) that a task does without, see train.search:
                    method (empty: none), skipped (how many) or flops_saved (share of the forward
                    FLOPs), cost (`none`, or `per_flop`: those of least harm for each FLOP), percent
                    (of the run's length, which the search has: total_* is that of the run that
                    follows), warmup_percent (of the search), every_steps and candidates (of a
                    comparison), reward (`held_out` or `paper`, see transfer.search), split (that
                    choices are compared on), rate (of `paper`), forget (of `held_out`), prior (of
                    `held_out`: loss that a unit's absence is expected to add for each unit of the
                    dissimilarity, 0 to 2, of what enters and what leaves it; 1 by the method das of
                    configs/transfer), final_batches
    model           geometry, see models.sizes; its keys are those of its kind: of two stacks, of
                    type="shared", of type="three_towers", and of image.type="resnet"; beside them
                    tuning, what is added to its blocks and taken out, see models.tuning_config
    objectives      name -> weight, batch (named batch it reads), and what the objective takes
    data            batch_size (global), image_size (pixels), max_text_length (tokens),
                    text_edges (fitted where empty), num_edges (of the fit; fewer where each is
                    compiled with many views of the images) and edge_multiple,
                    window_batches (sorted by length together), threads, workers, prefetch
                    (batches), max_bad_fraction (of examples; the run stops above it, though
                    not of ten damaged ones or fewer before its end), root (for
                    configs whose sources share one), sources (name -> type, weight, cache, and what
                    the source takes; label_noise, the share of its own split's labels that are
                    another class, and imbalance, the ratio of what its first and last class keep of
                    their records, see data.worse_labels), cache_dir (where sources with cache=True
                    keep pictures and encoded captions, for all runs; empty: in memory),
                    cache_workers (processes that make them). An update reads one batch of each
                    name: `batch` of a source and of an objective says which (pairs where absent),
                    and batches (name -> batch_size, text_edges, num_edges, max_text_length, weight
                    of its losses) what differs in it; alternate: instead, batches take turns,
                    `uniform` or `proportional` to their records
    mixture         metrics (name of a batch -> a figure of an evaluator by which the weights of
                    batches move, see train.mixture; empty: they are fixed), strength, limit
    stages          batches (names that each stage reads, joined by +; empty: all, throughout) and
                    metrics (the figure by whose end of falling each but the last ends), patience
                    (evaluations), min_change (see train.stages)
    tokenizer       path (a file or folder to load; empty: train on the captions), kind, vocab_size
    compression     which part of its images an update encodes, see train.bucket_schedule: buckets
                    (cheapest first), schedule (empty: whole images), costs (of an update in each,
                    as a share of one of whole images; empty: by FLOPs), shares (of the budget;
                    empty: equal), tail_percent (of the budget, at its end, for whole images), file
                    (a schedule with its costs, in place of all but the tail), decisions (of an
                    online schedule) and overhead_percent (of the budget, at most, that they may
                    cost on top), guard_file (a ranking of the evaluator `compressed`, see
                    data.guarded) and guard_percent (of what it ranks, encoded whole). total_* and
                    the durations of `schedule` then count updates of whole images, and the run has
                    as many more as these would have cost; every_* count updates
    optim           AdamW: b1, b2, eps, weight_decay, final_weight_decay (reached along a cosine;
                    None: constant), no_decay (paths without decay), clip_norm (0: none), ema_decay
                    (in an update of whole images; 0: no average), accumulation (micro-batches),
                    sequential (of several batches: gradients one after the other, in less memory,
                    with their norms and cosines logged; False: one pass over all),
                    groups (name -> pattern and rate_factor; 0: frozen, with no gradient and no
                    moments), max_skipped (non-finite updates in a row)
    schedule        peak, warmup_*, decay, cooldown_*, final_factor
    evals           name -> type, every_*, and what the evaluator takes; each also runs at the end;
                    with on="best" only then, on the best checkpoint by checkpoint.best_metric (for
                    a test split, whose score must choose nothing)
    mesh            data, fsdp, model: sizes of the axes, -1 for the rest
    checkpoint      every_*, keep_latest, keep_best, best_metric, best_mode; written together with a
                    run of the evaluator of best_metric, so that it can be the best. tunables_only:
                    leave out frozen parameters that are those of init_from, which has to stay
                    (train.tunables)
    log             every_* steps written, tensorboard, wandb (project name or empty)
    profile         start_step, num_steps (0: none)
    compile_cache   folder of compiled programs; empty: WORKDIR/compile_cache; "off": none
"""

import functools
import math
from typing import Any

from ml_collections import ConfigDict, config_dict

from vlp_jax.infra.errors import ConfigError, unknown_key
from vlp_jax.models.sizes import known_keys, model_config
from vlp_jax.train.schedule import duration

# Sections whose keys are names chosen by the user; what they hold is checked by its builder.
OPEN_SECTIONS = (
    "objectives",
    "data.sources",
    "data.batches",
    "mixture.metrics",
    "optim.groups",
    "evals",
)


def default_config(size: str = "tiny") -> ConfigDict:
    """A complete config without sources, objectives and evaluators.

    Args:
        size: of the model, see ``models.sizes``.
    """
    config = ConfigDict(
        {
            "name": "vlp",
            "seed": 0,
            "debug": False,
            "init_from": "",
            "init_checkpoint": "latest",
            "init_base": "",
            "adopt_model": False,
            "skip_from": "",
            **duration("total"),
            "model": model_config(size),
            "objectives": {},
            "data": {
                "root": "",
                "batch_size": 256,
                "image_size": 32,
                "max_text_length": 64,
                "text_edges": (),
                "num_edges": 6,
                "edge_multiple": 2,
                "window_batches": 128,
                "threads": 4,
                "workers": 0,
                "prefetch": 8,
                "max_bad_fraction": 0.01,
                "cache_dir": "",
                "cache_workers": 0,
                "sources": {},
                "batches": {},
                "alternate": "",
            },
            "stages": {"batches": (), "metrics": (), "patience": 2, "min_change": 0.01},
            "mixture": {"metrics": {}, "strength": 1.0, "limit": 4.0},
            "tokenizer": {"path": "", "kind": "wordpiece", "vocab_size": 8192},
            "compression": {
                "schedule": "",
                "buckets": (),
                "costs": (),
                "shares": (),
                "tail_percent": 0.0,
                "file": "",
                "decisions": 10,
                "overhead_percent": 5.0,
                "guard_file": "",
                "guard_percent": 1.0,
            },
            "optim": {
                "b1": 0.9,
                "b2": 0.98,
                "eps": 1e-8,
                "weight_decay": 0.01,
                "final_weight_decay": config_dict.placeholder(float),
                "no_decay": "(embedding|class_token)$",
                "clip_norm": 1.0,
                "ema_decay": 0.0,
                "accumulation": 1,
                "sequential": True,
                "max_skipped": 10,
                "groups": {},
            },
            "schedule": {
                "peak": 1e-3,
                **duration("warmup", percent=5.0),
                "decay": "linear",
                **duration("cooldown"),
                "final_factor": 0.0,
            },
            "evals": {},
            "search": {
                "method": "",
                "skipped": 0,
                "flops_saved": 0.0,
                "cost": "none",
                "percent": 8.0,
                "warmup_percent": 25.0,
                "every_steps": 4,
                "candidates": 6,
                "prior": 0.0,
                "reward": "held_out",
                "split": "val",
                "rate": 1.0,
                "forget": 0.98,
                "final_batches": 4,
            },
            "mesh": {"data": -1, "fsdp": 1, "model": 1},
            "checkpoint": {
                **duration("every", percent=10.0),
                "keep_latest": 2,
                "keep_best": 1,
                "best_metric": "",
                "best_mode": "max",
                "tunables_only": False,
            },
            "log": {**duration("every", steps=50), "tensorboard": True, "wandb": ""},
            "profile": {"start_step": 20, "num_steps": 0},
            "compile_cache": "",
        }
    )
    return config.lock()


# Key -> the least value.
_LEAST: dict[str, float] = {
    "data.batch_size": 1,
    "data.image_size": 1,
    "data.max_text_length": 3,
    "data.num_edges": 1,
    "data.edge_multiple": 1,
    "data.threads": 0,
    "data.workers": 0,
    "data.prefetch": 1,
    "data.cache_workers": 0,
    "optim.eps": 0,
    "optim.weight_decay": 0,
    "optim.clip_norm": 0,
    "optim.accumulation": 1,
    "optim.max_skipped": 0,
    "schedule.peak": 0,
    "search.skipped": 0,
    "search.flops_saved": 0,
    "search.rate": 0,
    "search.prior": 0,
    "schedule.final_factor": 0,
    "checkpoint.keep_best": 0,
    "profile.start_step": 0,
    "profile.num_steps": 0,
}
_UP_TO_ONE = ("data.max_bad_fraction", "search.forget")
_BELOW_ONE = ("optim.b1", "optim.b2", "optim.ema_decay")
_MAX_SEED = 2**32 - 1  # the model's key has 32 bits of it


def check_keys(config: ConfigDict) -> None:
    """Refuse keys that ``default_config`` does not have, and numbers out of their range.

    Raises:
        ConfigError: names the key and the nearest one that exists, or the range.
    """
    known = default_config()
    if isinstance(config.model, ConfigDict):
        with known.unlocked():
            known.model = known_keys(config.model)
    _check_section(config, known, "")
    for key, low in _LEAST.items():
        _check_range(key, _value(config, key), low)
    for key in _UP_TO_ONE:
        _check_range(key, _value(config, key), 0, 1)
    for key in _BELOW_ONE:
        _check_range(key, _value(config, key), 0, 1, closed=False)
    _check_range("seed", config.seed, 0, _MAX_SEED)
    for name, section in config.objectives.items():
        _check_range(f"objectives.{name}.weight", section.get("weight", 1.0), 0)


def _value(config: ConfigDict, key: str) -> Any:
    """The value at a dotted key."""
    return functools.reduce(lambda section, part: section[part], key.split("."), config)


def _check_range(
    key: str, value: Any, low: float, high: float = math.inf, closed: bool = True
) -> None:
    """Refuse what is no finite number from ``low`` to ``high``, that one only if ``closed``."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if number and low <= value < math.inf and (value < high or (closed and value == high)):
        return
    upwards = f"{low} or more" if high == math.inf else f"{low} to {high}"
    end = "" if closed else f", without {high}"
    problem = "is out of range" if number else "is no number"
    raise ConfigError(key, f"{value!r} {problem}", f"Use {upwards}{end}")


def _check_section(config: ConfigDict, known: ConfigDict, prefix: str) -> None:
    for key, value in config.items():
        path = f"{prefix}{key}"
        if key not in known:
            raise unknown_key(path, list(known))
        if isinstance(known[key], ConfigDict) and path not in OPEN_SECTIONS:
            if not isinstance(value, ConfigDict):
                raise ConfigError(path, f"{value!r} is no section", "Set the keys inside it")
            _check_section(value, known[key], f"{path}.")
