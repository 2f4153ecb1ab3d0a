"""Accelerated against uncompressed pretraining by invariance: see compression.md.

    python -m docs.results.compression run OUT --gpus=4 --workers=3
    python -m docs.results.compression table OUT   # or docs/results/compression, the archive

``run`` trains, for each objective, a pilot of whole images, measures the gradient error of every
bucket along it and derives a schedule (``tools.gradient_error``, alone on its GPU); then it trains
with that schedule and with others at shares of the pilot's budget, several runs on a GPU at a time.
A share of the budget is a share of the time that the pilot's updates take alone, for the budget
counts by the costs measured. It goes on where it was stopped.

As a config (``--config=docs/results/compression.py:OBJECTIVE``) it is what all runs share.
"""

import argparse
import dataclasses
import itertools
import json
import os
import pathlib
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from ml_collections import ConfigDict

STEPS = 2_500  # of the pilot
OBJECTIVES = ("moco_v3", "simclr", "dino")
SEEDS = (0, 1)
SHARES = (1 / 4, 1 / 2.5, 1.0)  # of the budget, for the derived schedule
OTHERS = 1 / 2.5  # of the budget, for what it is compared with
BUCKETS = ("p16@64", "p8@64k32", "p8@64", "p4@64k64", "p4@64k128", "whole")
CONSTANT = ("p4@64k64", "p4@64k128", "p8@64", "p16@64")
PEAKS = {"moco_v3": 6e-4, "simclr": 1e-3, "dino": 1e-3}
_SELF = "docs/results/compression.py"
_START_SECONDS = 60.0  # left of the time, no run is begun


def get_config(objective: str) -> ConfigDict:
    """What all runs of an objective share."""
    from configs import invariance  # here: the driver itself needs no model

    config = invariance.get_config(f"{objective},mini")
    config.total_steps = STEPS
    config.schedule.peak = PEAKS[objective]
    config.model.image.patch_size = 4
    config.data.threads = 8
    config.data.prefetch = 16
    config.data.cache_workers = 16
    config.log.every_steps = 100
    config.log.tensorboard = False
    config.checkpoint.every_percent = 25.0
    config.checkpoint.keep_latest = 9
    config.checkpoint.best_metric = ""
    with config.unlocked():
        config.data.sources.scenes.update(num_records=100_000, cache=True)
        config.evals = {
            "neighbours": {"source": "scenes", "every_percent": 50.0},
            "linear_probe": {
                "source": "scenes",
                "labels": ("shape", "texture"),
                "max_iterations": 100,
            },
        }
    return config


@dataclasses.dataclass(frozen=True)
class Job:
    """One run.

    Attributes:
        objective: of ``OBJECTIVES``.
        arm: how it is compressed.
        share: of the pilot's budget.
        seed: of the run.
    """

    objective: str
    arm: str
    share: float
    seed: int

    @property
    def name(self) -> str:
        """Its folder."""
        arm = self.arm.replace("@", "_")
        return f"{self.objective}/{arm}_{round(1000 * self.share)}_{self.seed}"

    def flags(self, out: pathlib.Path) -> list[str] | None:
        """Of the command line; None: it waits for the derived schedule, or would repeat it."""
        flags = [f"--config.seed={self.seed}", f"--config.total_steps={round(STEPS * self.share)}"]
        if self.arm == "whole":
            return flags
        file = out / self.objective / "pilot" / "gradient_error" / "schedule.json"
        if not file.is_file():
            return None
        if self.arm == "derived":
            return [*flags, f"--config.compression.file={file}"]
        if self.arm in ("reversed", "random"):
            return flags + _reordered(json.loads(file.read_text()), self.arm)
        results = json.loads((file.parent / "results.json").read_text())
        return [
            *flags,
            "--config.compression.schedule=constant",
            f"--config.compression.buckets=({self.arm!r},)",
            f"--config.compression.costs=({results['costs'][self.arm]},)",
        ]


def _reordered(schedule: Mapping[str, Any], kind: str) -> list[str]:
    ends = [0.0, *(end for end, _ in schedule["stages"])]
    shares = [0.0] * len(schedule["buckets"])
    for (end, number), start in zip(schedule["stages"], ends, strict=False):
        shares[number] += end - start
    return [
        f"--config.compression.schedule={kind}",
        f"--config.compression.buckets={tuple(schedule['buckets'])}",
        f"--config.compression.costs={tuple(schedule['costs'])}",
        f"--config.compression.shares={tuple(shares)}",
    ]


def jobs() -> Iterator[Job]:
    """All runs but the pilots, the most telling first."""
    for objective in OBJECTIVES:
        yield Job(objective, "whole", 1.0, SEEDS[1])
    for share in SHARES[:2]:
        for seed in SEEDS:
            for objective in OBJECTIVES:
                yield Job(objective, "derived", share, seed)
    for arm in ("whole", *CONSTANT, "reversed", "random"):
        for objective in OBJECTIVES:
            yield Job(objective, arm, OTHERS, SEEDS[0])
    for arm in ("whole", "reversed", "random", *CONSTANT):
        for objective in OBJECTIVES:
            yield Job(objective, arm, OTHERS, SEEDS[1])
    for seed in SEEDS:
        for objective in OBJECTIVES:
            yield Job(objective, "derived", SHARES[2], seed)


class Runner:
    """Runs jobs on several GPUs until a time is over."""

    def __init__(self, out: pathlib.Path, gpus: int, workers: int, seconds: float):
        self.out, self.gpus, self.workers = out.resolve(), gpus, workers
        self.end = time.monotonic() + seconds
        self.lock = threading.Lock()
        self.left = [*jobs()]
        self.running: set[subprocess.Popen[bytes]] = set()
        self.alone = {gpu: threading.Event() for gpu in range(gpus)}  # its pilots are done

    def run(self) -> None:
        """Everything; returns when nothing is left or the time is over."""
        threads = [
            threading.Thread(target=self._work, args=(gpu, number))
            for gpu in range(self.gpus)
            for number in range(self.workers)
        ]
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads) and time.monotonic() < self.end:
            time.sleep(0.5)
        with self.lock:
            self.left = []
            for process in self.running:
                process.send_signal(signal.SIGTERM)
        for thread in threads:
            thread.join()

    def _work(self, gpu: int, number: int) -> None:
        if number == 0:
            for objective in OBJECTIVES[gpu :: self.gpus]:
                self._pilot(objective, gpu)
            self.alone[gpu].set()
        self.alone[gpu].wait()
        while (job := self._next()) is not None:
            self._main(job, gpu)

    def _next(self) -> Job | None:
        while True:
            with self.lock:
                if not self.left or time.monotonic() > self.end - _START_SECONDS:
                    return None
                for job in self.left:
                    if job.flags(self.out) is not None:
                        self.left.remove(job)
                        return job
            time.sleep(1.0)

    def _pilot(self, objective: str, gpu: int) -> None:
        workdir = self.out / objective / "pilot"
        self._call(["-m", "vlp_jax.main", *self._common(objective, workdir)], gpu, workdir)
        if (workdir / "gradient_error" / "schedule.json").is_file():
            return
        flags = [
            "--config.compression.schedule=staged",
            f"--config.compression.buckets={BUCKETS}",
            "--batches=48",
        ]
        self._call(
            ["-m", "tools.gradient_error", *self._common(objective, workdir), *flags],
            gpu,
            workdir.with_name("gradient_error"),
        )

    def _main(self, job: Job, gpu: int) -> None:
        workdir = self.out / job.name
        flags = job.flags(self.out)
        assert flags is not None
        common = self._common(job.objective, workdir)
        self._call(["-m", "vlp_jax.main", *common, *flags], gpu, workdir)

    def _common(self, objective: str, workdir: pathlib.Path) -> list[str]:
        return [
            f"--config={_SELF}:{objective}",
            f"--workdir={workdir}",
            f"--config.data.cache_dir={self.out / 'data'}",
            f"--config.compile_cache={self.out / 'programs'}",
        ]

    def _call(self, arguments: list[str], gpu: int, log: pathlib.Path) -> None:
        if _final(log) is not None:
            return
        log.parent.mkdir(parents=True, exist_ok=True)
        environment = os.environ | {"CUDA_VISIBLE_DEVICES": str(gpu)}
        with open(f"{log}.txt", "ab") as file:
            process = subprocess.Popen(
                [sys.executable, *arguments], env=environment, stdout=file, stderr=file
            )
            with self.lock:
                self.running.add(process)
            code = process.wait()
            with self.lock:
                self.running.discard(process)
        print(f"{log.relative_to(self.out)}: exit code {code}", flush=True)


def _final(workdir: pathlib.Path) -> dict[str, float] | None:
    """The last figures of a run that has finished."""
    facts = workdir / "run.json"
    if not facts.is_file() or json.loads(facts.read_text())["status"] != "finished":
        return None
    values: dict[str, float] = {}
    for line in (workdir / "metrics.jsonl").read_text().splitlines():
        values |= json.loads(line)
    return values


def results(out: pathlib.Path) -> list[dict[str, Any]]:
    """The runs that have finished: objective, arm, share, seed and their figures."""
    found = []
    pilots = [Job(objective, "whole", 1.0, SEEDS[0]) for objective in OBJECTIVES]
    for job in (*pilots, *jobs()):
        pilot = job.arm == "whole" and job.share == 1.0 and job.seed == SEEDS[0]
        values = _final(out / job.objective / "pilot" if pilot else out / job.name)
        if values is None:
            continue
        kept = {k: v for k, v in values.items() if k.startswith(("neighbours/", "linear_probe/"))}
        found.append(dataclasses.asdict(job) | kept | {"steps": values["step"]})
    return found


def scores(row: Mapping[str, Any]) -> dict[str, float]:
    """Mean accuracies over labels: of k nearest neighbours and of linear probes."""
    knn = [v for k, v in row.items() if k.endswith("/knn_accuracy")]
    probe = [v for k, v in row.items() if k.startswith("linear_probe/") and k.endswith("/accuracy")]
    return {"knn": float(np.mean(knn)), "probe": float(np.mean(probe))}


def table(rows: list[dict[str, Any]]) -> str:
    """In Markdown: every arm at its share, mean and range over seeds; and shares of the time."""
    lines = []
    for objective in OBJECTIVES:
        mine = [row for row in rows if row["objective"] == objective]
        lines += [
            f"\n### {objective}\n",
            "| arm | share of the time | kNN, mean of 5 labels | linear probe, shape and texture | "
            "seeds | updates |",
            "| --- | ---: | ---: | ---: | ---: | ---: |",
        ]
        cells: dict[tuple[str, float], list[dict[str, Any]]] = {}
        for row in mine:
            cells.setdefault((row["arm"], row["share"]), []).append(row)
        means: dict[tuple[str, float], dict[str, float]] = {}
        for key, group in sorted(cells.items(), key=lambda item: (-item[0][1], item[0][0])):
            values = [scores(row) for row in group]
            means[key] = {k: float(np.mean([v[k] for v in values])) for k in values[0]}
            shown = [
                f"{100 * means[key][k]:.1f} "
                f"({100 * min(v[k] for v in values):.1f} to {100 * max(v[k] for v in values):.1f})"
                for k in ("knn", "probe")
            ]
            lines.append(
                f"| `{key[0]}` | {key[1]:.3g} | {shown[0]} | {shown[1]} | {len(group)} | "
                f"{round(np.mean([row['steps'] for row in group])):,} |"
            )
        for kind in ("knn", "probe"):
            share = _share_to_match(means, kind)
            if share:
                lines.append(
                    f"\nDerived schedule, time to the final {kind} of whole images: {share}"
                )
    return "\n".join(lines) + "\n"


def _share_to_match(means: Mapping[tuple[str, float], Mapping[str, float]], kind: str) -> str:
    """Where the derived schedule reaches the score of whole images, between completed runs."""
    if ("whole", 1.0) not in means:
        return ""
    target = means["whole", 1.0][kind]
    points = sorted((share, m[kind]) for (arm, share), m in means.items() if arm == "derived")
    if not points:
        return ""
    if points[0][1] >= target:
        return f"at most {points[0][0]:.3g}"
    for (a, low), (b, high) in itertools.pairwise(points):
        if low < target <= high:
            return f"{a + (b - a) * (target - low) / (high - low):.3g} (interpolated)"
    return f"not reached up to {points[-1][0]:.3g}"


def main() -> None:
    """Run or tell, as the command line says."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("run", "table"))
    parser.add_argument("out", type=pathlib.Path)
    parser.add_argument("--gpus", type=int, default=1)
    parser.add_argument("--workers", type=int, default=3, help="runs at a time on a GPU")
    parser.add_argument("--seconds", type=float, default=86_400.0, help="after which all stop")
    options = parser.parse_args()
    if options.what == "run":
        options.out.mkdir(parents=True, exist_ok=True)
        Runner(options.out, options.gpus, options.workers, options.seconds).run()
    archive = options.out / "runs.jsonl"
    rows = results(options.out)
    if rows:
        with open(archive, "w") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
    else:  # an archive alone
        rows = [json.loads(line) for line in archive.read_text().splitlines()]
    print(table(rows))


if __name__ == "__main__":
    main()
