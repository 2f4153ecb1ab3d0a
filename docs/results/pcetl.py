"""The study of ways to tune: a base, three tasks, and what each way costs and scores.

    docs/results/pcetl.sh base OUT, and what else it does
    python -m tools.compare_stages docs.results.pcetl --archive=... --seeds=6 --max_seconds=0
    python -m tools.pareto docs.results.pcetl --archive=... --out=docs/results/pcetl_pareto.png

All ways (``docs.results.pcetl_ways``) tune the same base at rates that were chosen on the
validation split of each task (``rates``). Beside it stands what heads do at a higher rate
(``faster_heads``). Around an earlier base (``first_base``, by ``first_rates``) are VQA and
retrieval once more, every unit left out alone (``alone``), searches by worse labels
(``robustness``), and, with its rates, a second one (``second_base``).
"""

import json
import math
import pathlib
import statistics
import sys
import tempfile
from collections.abc import Callable, Mapping

from absl import logging

from docs.results.pcetl_ways import (
    CLOSE,
    FIGURES,
    PAPER,
    SETTINGS,
    TRIED,
    Around,
    Way,
    base,
    below,
    task_config,
    tried_seeds,
    units,
)
from tools.jobs import read_archive
from tools.tuning_study import TuningStudy
from vlp_jax.infra.command import argument_parser, bad_input

# Seeds of the bases. The first two are no more: they were lost with the machines that held them
# before all tasks were done, and a GPU that adds up in any order does not make them again.
FIRST, SECOND, THIRD = range(3)
MORE = {"vqa": 5}  # seeds, around the first base, of the ways that are compared most closely
TIMED = ("DAS 4",)  # of the ways
AGAIN = ("adapter", "scaled_parallel", "DAS 4", "DAS 12%", "DAS 25%")  # around a second base
# The training labels of a search, see ``vlp_jax.data.worse_labels``.
WORSE: dict[str, dict[str, float]] = {
    "": {},
    ", 10 % noise": {"label_noise": 0.1},
    ", 30 % noise": {"label_noise": 0.3},
    ", imbalance 100": {"imbalance": 100.0},
}
WIDE = 144  # of an adapter in the place of a unit, for each branch of that: three times theirs
LONGER = 1.2  # times the updates: with the search, the training FLOPs of all blocks with adapters
HIGHER = 1e-3  # the next of the rates that were tried
# Method -> task -> rate, as chosen around the third base, and around the first.
RATES_FILE, FIRST_RATES_FILE = (
    pathlib.Path(__file__).with_name(f"pcetl_{name}.json") for name in ("rates", "first_rates")
)
EARLIER = ("vqa", "retrieval")  # tasks that were done around the first base


def rates_of(file: pathlib.Path) -> dict[str, dict[str, float]]:
    """What was chosen, method -> task -> rate; nothing where there is no file."""
    found: dict[str, dict[str, float]] = json.loads(file.read_text()) if file.exists() else {}
    return found


def third() -> Around:
    """The base of all three tasks."""
    return Around(base(seed=THIRD), rates_of(RATES_FILE))


def first() -> Around:
    """The one that VQA and retrieval tuned before."""
    return Around(base(seed=FIRST), rates_of(FIRST_RATES_FILE))


def study() -> TuningStudy:
    """What ``tools.compare_stages --seeds=6`` does: more draws of random units than seeds."""
    return third().study(tuple(FIGURES), {})


def first_base() -> TuningStudy:
    """VQA and retrieval around the first base, some ways of VQA with more seeds."""
    return first().study(EARLIER, MORE)


def rates() -> TuningStudy:
    """The rates that were tried around the base."""
    return third().tried(tuple(FIGURES))


def first_rates() -> TuningStudy:
    """The rates that were tried around the first base."""
    return first().tried(EARLIER)


def timed() -> TuningStudy:
    """What a search costs beside what follows it, where each has the device for itself.

    On a base of one update: how long updates take does not depend on what they make of it, so that
    scores say nothing here.
    """
    ways = Around(base(1), rates_of(FIRST_RATES_FILE)).ways()
    return TuningStudy(
        {name: below(MORE if name in CLOSE else {}, ways[name]) for name in TIMED},
        {task: FIGURES[task] for task in EARLIER},
        SETTINGS,
        less=(),
        one_base=False,
    )


def second_base() -> TuningStudy:
    """VQA around another training of the base: what is told of ways, and not of one base.

    With what may lift searches, by themselves or beside adapters, where they lose: adapters that
    are wider in the place of what is skipped, more updates, and the next rate.
    """
    around = Around(base(seed=SECOND), rates_of(FIRST_RATES_FILE))
    whole = around.ways()
    ways: dict[str, Way] = {name: whole[name] for name in AGAIN}
    ways["DAS 4, wide"] = around.searched({"skipped": 4}, then={"model.tuning.replacement": WIDE})
    ways["DAS 4, longer"] = around.searched({"skipped": 4}, updates=LONGER)
    plain = ("adapter", "scaled_parallel")
    ways |= {f"{name}, at {HIGHER:g}": around.tuned(name, HIGHER) for name in plain}
    for name, of in {
        "DAS 4": {"skipped": 4},
        "DAS 12%": {"flops_saved": 0.12},
        "DAS 25%": {"flops_saved": 0.25},
    }.items():
        ways[f"{name}, at {HIGHER:g}"] = around.searched(of, then={"schedule.peak": HIGHER})
    ways = {name: below({}, way) for name, way in ways.items()}
    less = (*plain, *(f"{name}, at {HIGHER:g}" for name in plain))
    return TuningStudy(ways, {"vqa": FIGURES["vqa"]}, SETTINGS, less)


def faster_heads() -> TuningStudy:
    """NLVR2 by heads at five times the rate of what is tuned, as other tasks have them."""
    faster, around = {"optim.groups.heads.rate_factor": 5.0}, third()
    ways: dict[str, Way] = {
        "adapter": around.tuned("adapter", **faster),
        "DAS 4": around.searched({"skipped": 4}, then=faster),
    }
    return TuningStudy(ways, {"nlvr2": FIGURES["nlvr2"]}, SETTINGS, ("adapter",))


def alone() -> TuningStudy:
    """The reference of a search for one unit: each that there is, left out in the same way."""
    around = first()
    ways: dict[str, Way] = {"adapter": around.tuned("adapter")}
    for unit in units():
        ways[f"without {unit}"] = around.tuned("adapter", **{"model.tuning.skip": (unit,)})
    ways["DAS 1"] = around.searched({"skipped": 1})
    for kind in ("similarity", "greedy"):
        ways[f"{kind} 1"] = around.searched({"skipped": 1, "method": kind})
    return TuningStudy(ways, {"vqa": FIGURES["vqa"]}, SETTINGS, ("adapter",))


def robustness() -> TuningStudy:
    """What is chosen where the labels that a search trains on are worse (five seeds of each).

    What follows is tuned on the labels as they are, so that what is lost is lost by the choice.
    """
    around = first()
    ways: dict[str, Way] = {}
    for name, changes in WORSE.items():
        for reward, of in (("", {}), (", paper", PAPER)):
            key = {f"data.sources.questions.{k}": value for k, value in changes.items()}
            ways[f"DAS 4{reward}{name}"] = around.searched({"skipped": 4, **of}, **key)
    return TuningStudy(ways, {"vqa": FIGURES["vqa"]}, SETTINGS, tuple(ways)[:2])


def choose(archive: pathlib.Path, tried: TuningStudy) -> dict[str, dict[str, float]]:
    """Of every method and task, where all rates that were tried are done, the lowest that is good.

    Good is what scores within a standard error of the best: rates at the upper end train most runs
    as well, and make of some nothing at all. Scores are means over the seeds of ``TRIED_SEEDS``.

    Args:
        archive: what was done.
        tried: as ``rates`` gives it.
    """
    known = read_archive(archive)
    found: dict[str, dict[str, float]] = {}
    for method, task in ((method, task) for method in TRIED for task in tried.figures):
        of, seeds = TRIED[method][task], range(tried_seeds(task, method))
        scores = tried.scores(known, seeds)
        names = [f"{task}, {method}, {rate:g}" for rate in of]
        runs = [scores.get(name, {}).get(task, {}) for name in names]
        if all(len(run) == len(seeds) for run in runs):
            mine = [statistics.mean(run.values()) for run in runs]
            best = max(mine)
            config = task_config(task, method, 0, of[0])
            examples = int(config.evals.val.num_examples)  # of all seeds
            least = best - math.sqrt(best * (1 - best) / examples)
            good = [rate for rate, score in zip(of, mine, strict=True) if score >= least]
            found.setdefault(method, {})[task] = min(good)
    return found


def chosen_anew(
    archive: pathlib.Path, tried: TuningStudy, before: Mapping[str, Mapping[str, float]]
) -> dict[str, dict[str, float]]:
    """What ``choose`` finds; where not all rates were tried, the one that was there before."""
    found = choose(archive, tried)
    return {method: {**before.get(method, {}), **found.get(method, {})} for method in TRIED}


def tell_of_base(program: str, description: str, table: Callable[[str, str], str]) -> None:
    """The command of a figure beside the study: prints a table of the base that it is given.

    Args:
        program: as ``python -m`` has it.
        description: its help.
        table: from the base, a workdir or a parameter file, and a folder for what is made.
    """
    logging.set_verbosity(logging.ERROR)
    parser = argument_parser(program, description)
    parser.add_argument("base", help="workdir or parameter file")
    with tempfile.TemporaryDirectory() as folder, bad_input():
        print(table(parser.parse_args().base, folder))


if __name__ == "__main__":
    for file, tried in ((RATES_FILE, rates()), (FIRST_RATES_FILE, first_rates())):
        chosen = chosen_anew(pathlib.Path(sys.argv[1]), tried, rates_of(file))
        file.write_text(json.dumps(chosen, indent=1) + "\n")
        print(file.name, chosen)
