"""Finished cells, kept in a folder, and the one way to get another.

A cell is one training run. What it is, is the digest of its complete config and the machine; so
cells of several invocations come together in one table, and a cell of an edited config or of
another machine can never be mixed in: it has another name, and the table says how many such cells
were left out. Layout::

    OUT/calibration/NAME.json        cost of an update, measured once for each cost
    OUT/cells/NAME/                  workdir of the run: config, metrics, report, log.txt
    OUT/cells/NAME/claim.json        who is training it now, see ``claims``
    OUT/cells/NAME/result.json       what it cost and scored; there only when it has finished
    OUT/compile_cache/               compiled programs, shared by all
    OUT/prepared/NAME/               workdir of a short run that has filled the caches

A cell's seconds are its updates times the calibrated seconds of one: see ``records.Calibration``.
"""

import dataclasses
import hashlib
import json
import shutil
import socket
import sys
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from ml_collections import ConfigDict

from tools.compare.claims import CLAIM_FILE, Claims, Outcome, read_claim
from tools.compare.configs import CommandError, NamedConfig, Overrides, cost_digest, digest
from tools.compare.records import SCRATCH, Calibration, Measurement, Result, Runner, describe
from vlp_jax.infra.checkpoint_reader import has_checkpoint
from vlp_jax.infra.errors import ConfigError
from vlp_jax.infra.files import write_text
from vlp_jax.train.initial import CHECKPOINT_FOLDER

CALIBRATION_FOLDER = "calibration"
CELLS_FOLDER = "cells"
PREPARED_FOLDER = "prepared"
RESULT_FILE = "result.json"
LOG_FILE = "log.txt"
_DONE_FILE = "done"
# Beside a result whose run is made again, for the sake of its checkpoint.
_AGAIN_FILE = "again"
SAVE_SECONDS = 120.0
# With fewer updates a schedule has no shape, and rounding to whole ones shows in the seconds.
MIN_STEPS = 10
# Of the files; what was written in another is left out like a cell of another machine.
_FORMAT = 3


class Cells:
    """The cells of a folder.

    Attributes:
        folder: OUT.
        runner: trains what is not there yet.
        interrupted: the process was asked to stop; no cell is started any more.
        trained: names of the cells that this process has trained.
        busy: names of the cells that other processes were training when last asked for.
        crashed: names of the cells that have brought this process an error.
        used: names of the finished runs that were asked for.
    """

    def __init__(
        self,
        folder: Path,
        runner: Runner,
        may_start: Callable[[], bool],
        *,
        calibration_steps: int,
        may_calibrate: bool = True,
        group: int | None = None,
        keep_checkpoints: bool = False,
        say: Callable[[str], None] = print,
    ):
        """Open the folder; it is made when needed.

        Args:
            folder: OUT.
            runner: trains.
            may_start: whether there is time to start another cell.
            calibration_steps: least length of the runs that measure the cost of an update.
            may_calibrate: False where other processes use the device at the same time.
            group: of the claims, see ``Claims``. Without one, an error of a run is told and the
                cell left out; a worker ends with it, since others go on.
            keep_checkpoints: keep the final states of finished cells.
            say: takes a line about what is being done.
        """
        self.folder = folder
        self.runner = runner
        self.interrupted = False
        self.trained: set[str] = set()
        self.busy: set[str] = set()
        self.crashed: set[str] = set()
        self.used: set[str] = set()
        self._may_start = may_start
        self._may_calibrate = may_calibrate
        self._claims = Claims(group)
        self._is_worker = group is not None
        self._told: set[str] = set()
        self._calibration_steps = calibration_steps
        self._keep_checkpoints = keep_checkpoints
        self._say = say

    def can_start(self) -> bool:
        """Whether another cell may be started: there is time, and no signal has come."""
        return not self.interrupted and self._may_start()

    def prepare(
        self, label: str, config: ConfigDict, parent: ConfigDict | None = None
    ) -> Path | None:
        """Run a config for the sake of the caches that it fills, once.

        Args:
            label: of the config.
            config: of a short run.
            parent: config of the run that it starts from.

        Returns:
            The workdir, with a checkpoint; None where the run is not finished: there is no time
            for it, or another process is at it.
        """
        identity = digest(config, "" if parent is None else digest(parent))
        workdir = self.folder / PREPARED_FOLDER / self._name(identity)
        if (workdir / _DONE_FILE).exists():
            return workdir
        if not self.can_start():
            return None
        with self._claimed(workdir) as claimed:
            if not claimed:
                return None
            if not (workdir / _DONE_FILE).exists():
                self._share_compile_cache(config)
                log = workdir / LOG_FILE
                self._claims.note(workdir, run=f"{label}, to fill the caches", log=str(log))
                self._say(f"{label}: compiling, log in {log}")
                if self.runner.run(config, workdir) is None:
                    self.interrupted = True
                    return None
                (workdir / _DONE_FILE).touch()
        return workdir

    def calibration(self, named: NamedConfig, overrides: Overrides) -> Calibration | None:
        """The cost of an update, measured once and then kept; None: not measured, and no time to.

        The length of a run follows from it, so it is kept for good: delete the file to measure
        again, and with it go all cells of that config.
        """
        config = named.calibration(steps=self._calibration_steps, overrides=overrides)
        file = self.folder / CALIBRATION_FOLDER / f"{self._name(cost_digest(config))}.json"
        if not file.exists():
            if not self._may_calibrate or not self.can_start():
                return None
            file.parent.mkdir(parents=True, exist_ok=True)
            workdir = file.with_suffix("")
            self._share_compile_cache(config)
            measured = self.runner.calibrate(config, workdir)
            shutil.rmtree(workdir, ignore_errors=True)
            if measured is None:
                self.interrupted = True
                return None
            self._say(
                f"{named.label}: an update takes {measured.median_ms:.2f} ms "
                f"({measured.min_ms:.2f} to {measured.max_ms:.2f}), "
                f"{measured.input_wait_fraction:.1%} of it waiting for input"
                + (f"; {measured.device_ms:.2f} ms of the device" if measured.device_ms else "")
            )
            facts = {
                "label": named.label,
                "machine": dict(self.runner.machine),
                "versions": dict(self.runner.versions),
                "commit": self.runner.commit,
                "calibration": dataclasses.asdict(measured),
            }
            write_text(file, json.dumps(facts, indent=2) + "\n")
        return Calibration(**json.loads(file.read_text())["calibration"])

    def obtain(
        self,
        named: NamedConfig,
        *,
        budget_seconds: float,
        seed: int,
        overrides: Overrides,
        finetunes: Sequence[NamedConfig] = (),
        keep_checkpoint: bool = False,
    ) -> Result | None:
        """A cell: as it was kept, or trained now.

        Args:
            named: its config.
            budget_seconds: training seconds to fill.
            seed: of the run.
            overrides: values by dotted key.
            finetunes: each is run from the cell's checkpoint.
            keep_checkpoint: it may be fine-tuned later.

        Returns:
            The result, or None where it is not complete and either no other run may be started, or
            another process has claimed the cell.

        Raises:
            CommandError: the budget buys hardly any update.
        """
        calibration = self.calibration(named, overrides)
        if calibration is None:
            return None
        config = named.run(
            steps=steps_for(named.label, budget_seconds, calibration),
            seed=seed,
            step_seconds=calibration.seconds,
            save_seconds=SAVE_SECONDS,
            overrides=overrides,
        )
        identity = digest(config)
        workdir = self._workdir(identity)
        tuning = [
            _Tuning(tune.label, tuned, digest(tuned, identity))
            for tune in finetunes
            for tuned in [tune.finetuning(seed=seed, init_from=workdir.resolve())]
        ]
        self.busy.discard(workdir.name)
        kept = self._kept(identity, tuning)
        if kept is not None or workdir.name in self.crashed or not self.can_start():
            return kept
        with self._claimed(workdir) as claimed:
            if not claimed:
                return None
            # Another process may have finished it between the look and the claim.
            kept = self._kept(identity, tuning)
            if kept is None:
                kept = self._complete(named.label, config, identity, calibration, tuning)
            if kept is not None and not keep_checkpoint:
                self.remove_checkpoints(workdir.name)
            return kept
        return None  # an error has ended it

    def obtain_scratch(
        self, finetunes: Sequence[NamedConfig], *, seed: int, pretraining: ConfigDict
    ) -> Result | None:
        """Fine-tuning runs from fresh parameters, as kept or made now: a cell without pretraining.

        Args:
            finetunes: the runs.
            seed: of them.
            pretraining: the config that they do without, see ``NamedConfig.from_scratch``.

        Returns:
            The result, whose own measurement is that of no update; None as for ``obtain``.
        """
        tuning = [
            _Tuning(tune.label, tuned, digest(tuned))
            for tune in finetunes
            for tuned in [tune.from_scratch(seed=seed, pretraining=pretraining)]
        ]
        # A folder of its own, for the claim.
        identity = hashlib.sha256(" ".join(tune.identity for tune in tuning).encode()).hexdigest()
        workdir = self._workdir(identity)
        self.busy.discard(workdir.name)
        result = self._scratch(identity)
        kept = self._with_tuning(result, tuning)
        if kept is not None or workdir.name in self.crashed or not self.can_start():
            return kept
        with self._claimed(workdir) as claimed:
            if not claimed or not self._tune(tuning, workdir):
                return None
        return self._with_tuning(result, tuning)

    def remove_checkpoints(self, name: str) -> None:
        """Remove the states of a finished run, unless they are to be kept."""
        if not self._keep_checkpoints:
            workdir = self.folder / CELLS_FOLDER / name
            shutil.rmtree(workdir / CHECKPOINT_FOLDER, ignore_errors=True)

    def tell_foreign_claims(self) -> None:
        """Say which cells wait for processes of other hosts, of which nothing can be known."""
        for name in sorted(self.busy - self._told):
            claim = read_claim(self.folder / CELLS_FOLDER / name)
            if claim is not None and claim["host"] != socket.gethostname():
                self._told.add(name)
                self._say(
                    f"cell {name} is left to process {claim['pid']} of {claim['host']}; if that "
                    f"has died, delete {self.folder / CELLS_FOLDER / name / CLAIM_FILE}"
                )

    def left_out(self) -> list[str]:
        """Finished cells of the folder that nobody asked for, counted by why they do not count."""
        reasons: Counter[str] = Counter()
        for file in sorted((self.folder / CELLS_FOLDER).glob(f"*/{RESULT_FILE}")):
            if file.parent.name in self.used:
                continue
            machine = json.loads(file.read_text())["machine"]
            if machine != dict(self.runner.machine):
                reasons[f"of another machine ({describe(machine)})"] += 1
            else:
                reasons["of other settings: another command, or a config changed since"] += 1
        return [f"{count} {reason}" for reason, count in reasons.items()]

    def _kept(self, identity: str, tuning: Sequence["_Tuning"]) -> Result | None:
        """A cell of which nothing is missing."""
        result = self._load(identity)
        if result is None or result.measurement.status != "finished":
            return result
        return self._with_tuning(result, tuning)

    def _with_tuning(self, result: Result, tuning: Sequence["_Tuning"]) -> Result | None:
        """A result with its fine-tuning runs; None where one is missing."""
        done = {tune.label: self._load(tune.identity) for tune in tuning}
        if None in done.values():
            return None
        finetuning = {label: tuned.measurement for label, tuned in done.items() if tuned}
        return dataclasses.replace(result, finetuning=finetuning)

    def _scratch(self, identity: str) -> Result:
        """The result of no pretraining at all."""
        nothing = Measurement("finished", "", 0, 0, 0.0, 0.0, 0.0, 0.0, {})
        runner = self.runner
        return Result(
            self._name(identity),
            SCRATCH,
            identity,
            runner.machine,
            runner.versions,
            runner.commit,
            nothing,
            0.0,
        )

    def _complete(
        self,
        label: str,
        config: ConfigDict,
        identity: str,
        calibration: Calibration,
        tuning: Sequence["_Tuning"],
    ) -> Result | None:
        """Do what a claimed cell is missing; None where that was cut short."""
        workdir = self._workdir(identity)
        result = self._load(identity)
        if result is not None and not has_checkpoint(workdir / CHECKPOINT_FOLDER):
            self._say(f"{label}: to be fine-tuned and its checkpoint is gone, trained again")
            (workdir / _AGAIN_FILE).touch()  # until the end, the result that is there counts
        if result is None or (workdir / _AGAIN_FILE).exists():
            result = self._train(label, config, identity, calibration, workdir)
        if result is None or result.measurement.status != "finished":
            return result
        if not self._tune(tuning, workdir):
            return None
        return self._kept(identity, tuning)

    def _tune(self, tuning: Sequence["_Tuning"], claimed: Path) -> bool:
        """Make the fine-tuning runs that are missing; False where that was cut short."""
        for tune in tuning:
            if self._load(tune.identity) is None:
                if self._train(tune.label, tune.config, tune.identity, None, claimed) is None:
                    return False
                self.remove_checkpoints(self._workdir(tune.identity).name)
        return True

    def _train(
        self,
        label: str,
        config: ConfigDict,
        identity: str,
        calibration: Calibration | None,
        claimed: Path,
    ) -> Result | None:
        if not self.can_start():
            return None
        workdir = self._workdir(identity)
        workdir.mkdir(parents=True, exist_ok=True)
        self._share_compile_cache(config)
        log = workdir / LOG_FILE
        self._claims.note(claimed, run=f"{label}, seed {config.seed}", log=str(log))
        self._say(f"{label}: seed {config.seed}, log in {log}")
        measured = self.runner.run(config, workdir)
        if measured is None:
            self.interrupted = True
            return None
        runner = self.runner
        result = Result(
            workdir.name,
            label,
            identity,
            runner.machine,
            runner.versions,
            runner.commit,
            measured,
            None if calibration is None else measured.seconds(calibration),
        )
        text = json.dumps(result.to_json(), indent=2, allow_nan=False)
        write_text(workdir / RESULT_FILE, text + "\n")
        (workdir / _AGAIN_FILE).unlink(missing_ok=True)
        self.trained.add(claimed.name)
        return result

    @contextmanager
    def _claimed(self, workdir: Path) -> Iterator[bool]:
        """Hold the claim of a cell; a worker's stays after an error, and tells what has brought it.

        Without workers there is nobody else to go on, and the error of a cell is no reason to lose
        the others: it is told, and the cell left out.
        """
        outcome = self._claims.take(workdir)
        if outcome is Outcome.BUSY:
            self.busy.add(workdir.name)
        try:
            yield outcome is Outcome.TAKEN
        except (CommandError, ConfigError):  # a fault of what was asked for
            raise
        except Exception:
            if self._is_worker:
                raise
            self.crashed.add(workdir.name)
            run = (read_claim(workdir) or {}).get("run", "")
            print(f"error: cell {workdir.name} ({run}) is left out:", file=sys.stderr)
            traceback.print_exc()
        if outcome is Outcome.TAKEN:
            self._claims.release(workdir)

    def _load(self, identity: str) -> Result | None:
        file = self._workdir(identity) / RESULT_FILE
        if not file.exists():
            return None
        self.used.add(file.parent.name)
        return Result.from_json(json.loads(file.read_text()))

    def _share_compile_cache(self, config: ConfigDict) -> None:
        if not config.compile_cache:
            config.compile_cache = str((self.folder / "compile_cache").resolve())

    def _workdir(self, identity: str) -> Path:
        return self.folder / CELLS_FOLDER / self._name(identity)

    def _name(self, identity: str) -> str:
        machine = json.dumps(dict(self.runner.machine), sort_keys=True)
        return hashlib.sha256(f"{_FORMAT} {identity} {machine}".encode()).hexdigest()[:16]


@dataclasses.dataclass(frozen=True)
class _Tuning:
    """A fine-tuning run of a cell.

    Attributes:
        label: of its config.
        config: from the cell's checkpoint.
        identity: digest of the config and the cell's.
    """

    label: str
    config: ConfigDict
    identity: str


def steps_for(label: str, budget_seconds: float, calibration: Calibration) -> int:
    """Updates that fill a budget.

    Raises:
        CommandError: fewer than ``MIN_STEPS``.
    """
    steps = round(budget_seconds / calibration.seconds)
    if steps < MIN_STEPS:
        raise CommandError(
            f"{budget_seconds:.3g} s are {steps} updates of {label}, at "
            f"{1e3 * calibration.seconds:.3g} ms each; give a longer --budget_seconds, or a larger "
            "smallest share by --fractions"
        )
    return steps
