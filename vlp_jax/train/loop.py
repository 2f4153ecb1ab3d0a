"""The train loop, from top to bottom.

Nothing of a run lives outside its state and the step's number: the batch of step t is a function of
t, so a run that was killed goes on as if nothing had happened.
"""

import collections
import contextlib
import functools
import json
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import rich
from absl import logging

from vlp_jax.compress.buckets import MAX_SCHEDULED_BUCKETS, StepBucket
from vlp_jax.data.batch import HostBatch
from vlp_jax.data.source import NothingReadable
from vlp_jax.infra.checkpoint import Checkpoints
from vlp_jax.infra.compilation import CompiledSteps, enable_compile_cache
from vlp_jax.infra.hardware import measure_matmul_peak, memory
from vlp_jax.infra.metrics import open_writer, read_metrics, results_table, strict
from vlp_jax.infra.preemption import ExitCode, PreemptionGuard
from vlp_jax.infra.profiling import PROFILE_FOLDER, ProfilerWindow
from vlp_jax.infra.report import write_report
from vlp_jax.train.clock import Clock
from vlp_jax.train.costs import end_facts
from vlp_jax.train.evaluation import evaluate, evaluate_best, is_save_due, ranked
from vlp_jax.train.facts import (
    BAD_EXAMPLES_FILE,
    facts_table,
    loaded_table,
    now,
    run_facts,
    time_facts,
    write_bad_examples,
    write_facts,
    write_loaded,
)
from vlp_jax.train.feed import Feed
from vlp_jax.train.program import Program
from vlp_jax.train.schedule import to_steps
from vlp_jax.train.setup import Setup, plain, sizes_of
from vlp_jax.train.stages import stage_of
from vlp_jax.train.step import StepFunction
from vlp_jax.train.watch import alarmed

# Steps that may wait on the device: enough to hide the host, few enough to hold few batches.
QUEUED_STEPS = 2
HEALTH_STEPS = 10  # between two looks at the counters of updates that have ended
_COUNTERS = ("skipped_in_a_row", "replaced")
ALWAYS_ALLOWED = 10  # damaged examples, before their share is judged

# Of a checkpoint: whether what was due at its step was evaluated.
_EVALUATED = "evaluated"

_matmul_peak = functools.cache(measure_matmul_peak)  # once for all runs of a process


class RunStopped(RuntimeError):
    """The run cannot go on.

    Attributes:
        code: exit code of the process.
    """

    def __init__(self, code: ExitCode, message: str):
        super().__init__(message)
        self.code = code


def train(setup: Setup) -> ExitCode:
    """Train to the end of the budget, or until a signal asks to stop.

    Prints one JSON line at the end: ``workdir``, ``report``, ``step``, ``metrics``.

    Args:
        setup: of ``train.setup.prepare``.

    Returns:
        ``OK`` or ``PREEMPTED``.

    Raises:
        RunStopped: too many bad updates or examples; the message names the last checkpoint.
    """
    config, program = setup.config, setup.program
    primary = jax.process_index() == 0
    if config.compile_cache != "off":
        enable_compile_cache(config.compile_cache or setup.workdir / "compile_cache")

    with contextlib.ExitStack() as stack:
        # Look for a checkpoint, and open what reads and writes. ----------------------------------
        checkpoints = stack.enter_context(setup.open_checkpoints())
        tunables = setup.tunables
        restored = checkpoints.restore_latest(program.state_spec, tunables.elsewhere)
        start = 0 if restored is None else restored.step
        if restored is not None:
            setup.check_same_data(restored.extra)
            tunables.follow(restored.extra)
        stage = 0 if restored is None else stage_of(restored.state.extras)
        feed = stack.enter_context(Feed(setup, stage, start))
        profiler = stack.enter_context(
            ProfilerWindow(setup.workdir / PROFILE_FOLDER, **config.profile.to_dict())
        )
        longest = program.longest
        log_every = to_steps(config.log, "log", "every", setup.budget) or longest
        save_every = to_steps(config.checkpoint, "checkpoint", "every", setup.budget) or longest
        facts = run_facts(setup, None if restored is None else setup.workdir)

        # Restore or begin, and compile every bucket ahead of its first use. ----------------------
        if primary:
            rich.print(facts_table(facts["parameters"]))
            if restored is not None:
                print(f"resumed from step {start} of {checkpoints.directory}", flush=True)
        if restored is None:
            state, loaded = setup.first_state()
            if loaded is not None:
                facts["init_from"] = f"{config.init_from}: {loaded.summary()}"
                if primary:
                    write_loaded(setup.workdir, loaded)
                    rich.print(loaded_table(loaded, config.init_from))
        else:
            state = restored.state
            program.follow(state)
        peak = _matmul_peak()
        steps = _compile(setup, primary)
        compiled = {program.label(key): seconds for key, seconds in steps.seconds.items()}
        if setup.decider is not None:
            stack.callback(setup.decider.close)
            setup.decider.compile()
            compiled["decisions"] = setup.decider.compile_seconds
        facts |= {
            "matmul_peak_tflops": round(peak / 1e12, 2),
            "compile_seconds": {label: round(seconds, 1) for label, seconds in compiled.items()},
        }
        write_facts(setup, facts | {"status": "running", "step": start}, primary)
        facts["status"] = "failed"  # unless the end of this function is reached
        stack.callback(lambda: write_facts(setup, facts, primary))
        stack.callback(lambda: write_bad_examples(setup, feed.bad.places(), primary))
        writer = open_writer(
            setup.workdir,
            setup.total_steps,
            primary=primary,
            resume_step=None if restored is None else start,
            tensorboard=config.log.tensorboard,
            wandb_project=config.log.wandb,
            config=plain(config),
        )
        stack.callback(writer.close)
        writer.write(start, {f"compile/seconds/{name}": value for name, value in compiled.items()})

        # Train. ----------------------------------------------------------------------------------
        guard = stack.enter_context(PreemptionGuard())
        queue: collections.deque[Any] = collections.deque()
        clock, step, saved, trained = Clock(), start, start, 0.0
        alarms: frozenset[str] = frozenset()  # batches of which was warned
        ranking = config.checkpoint.best_metric.partition("/")[0]
        ranks_every = setup.eval_steps.get(ranking) if config.checkpoint.keep_best else None
        evaluated: dict[str, float] | None = {}  # None: a signal came before the end
        if restored is not None and not restored.extra.get(_EVALUATED, True):
            evaluated = evaluate(setup, state, step, writer, guard)
            if evaluated:
                state = program.observe(state, evaluated)
                feed.move(stage_of(state.extras), step)
                checkpoints.rank(step, ranked(setup, evaluated))
        # Without jit, the constants of a step are transfers.
        guarded = "allow" if config.debug else "disallow"
        while step < setup.total_steps and not guard.requested:
            if setup.decider is not None and setup.decider.is_due(step):
                with clock.pausing():
                    state, values = setup.decider.decide(state, step)
                    writer.write(step, values)
            waiting = time.perf_counter()
            host, planned = _next(feed), feed.plan.batches(step)
            if step == start:
                clock = Clock()  # until here reading began: nothing was trained
            else:
                clock.waited += time.perf_counter() - waiting
            batches = program.batches(host)
            bucket = program.bucket(feed.plan.bucket(step), step)
            moment = program.moment(step)
            with profiler.step(step), jax.transfer_guard(guarded):
                state, metrics = steps[bucket](state, batches, moment)
            clock.count(bucket, planned)
            step += 1
            queue.append(metrics)
            if len(queue) > QUEUED_STEPS:
                finished = jax.block_until_ready(queue.popleft())
                if step % HEALTH_STEPS == 0:
                    counters = jax.device_get({name: finished[name] for name in _COUNTERS})
                    _check_health(setup, counters, step - QUEUED_STEPS, checkpoints)

            if step % log_every == 0 or step == setup.total_steps:
                values = {k: float(v) for k, v in jax.device_get(metrics).items()}
                _check_health(setup, values, step, checkpoints)
                alarms = alarms | _warned(values, alarms)
                used = memory()
                writer.write(
                    step,
                    {f"train/{name}": value for name, value in values.items()}
                    | clock.speed(program, peak)
                    | {"memory/peak_bytes": used.peak, "memory/in_use_bytes": used.in_use}
                    | {"data/fingerprint": float(feed.plan.fingerprint(step - 1))}
                    | _compression(program, step - 1)
                    | ({"data/stage": float(feed.stage)} if program.stages else {}),
                )
                trained += clock.seconds
                clock = Clock()

            with clock.pausing():
                if setup.decider is not None and step == setup.total_steps:
                    state, values = setup.decider.conclude(state, step)
                    writer.write(step, values)
                evaluated = evaluate(setup, state, step, writer, guard)
                if evaluated:
                    state = program.observe(state, evaluated)
                    feed.move(stage_of(state.extras), step)
                if evaluated is not None and step < setup.total_steps:
                    scores = ranked(setup, evaluated)
                    if is_save_due(step, saved, save_every, bool(scores), ranks_every):
                        extra = setup.checkpoint_extra()
                        checkpoints.save(step, state, scores, extra, tunables.left_out)
                        saved = step

        # Save and report. ------------------------------------------------------------------------
        extra = setup.checkpoint_extra() | {_EVALUATED: evaluated is not None}
        checkpoints.save(step, state, ranked(setup, evaluated or {}), extra, tunables.left_out)
        checkpoints.wait()
        preempted = step < setup.total_steps or evaluated is None
        decided = None if setup.decider is None else setup.decider.seconds
        facts |= time_facts(facts, trained, decided)
        if not preempted:
            preempted = not evaluate_best(setup, checkpoints, step, writer, guard)
        if primary:  # who writes them
            facts |= end_facts(setup, checkpoints, steps)
        facts |= {
            "status": "preempted" if preempted else "finished",
            "step": step,
            "end": now(),
            "total_steps": setup.total_steps,
            "bad_examples": dict(feed.bad.counts + collections.Counter(facts["bad_examples"])),
        }
    if primary:
        report = write_report(setup.workdir)
        latest: dict[str, float] = {}
        for record in read_metrics(setup.workdir):
            latest |= record
        del latest["step"]
        rich.print(results_table(latest))
        print(f"checkpoint: {facts['checkpoint']}\nreport: {report}")
        summary = {"workdir": str(setup.workdir), "report": str(report), "step": step}
        print(json.dumps(summary | {"metrics": strict(latest)}, allow_nan=False), flush=True)
    return ExitCode.PREEMPTED if preempted else ExitCode.OK


def _next(feed: Feed) -> dict[str, HostBatch]:
    """The next batches, by name.

    Raises:
        RunStopped: nothing of a source can be read.
    """
    try:
        return next(feed)
    except NothingReadable as error:
        raise RunStopped(ExitCode.TOO_MANY_BAD_EXAMPLES, str(error)) from error


def _compile(setup: Setup, primary: bool) -> CompiledSteps[StepBucket, StepFunction]:
    """The compiled update of every bucket the plan can ask for."""
    steps: CompiledSteps[StepBucket, StepFunction] = CompiledSteps(limit=MAX_SCHEDULED_BUCKETS)
    program, debug = setup.program, setup.config.debug

    def lower(key: StepBucket) -> Callable[[], StepFunction]:
        return (lambda: program.step(key)) if debug else program.lower(key).compile

    def done(key: StepBucket) -> None:
        if primary and not debug:
            print(f"compiled bucket {program.label(key)} in {steps.seconds[key]:.1f} s", flush=True)

    steps.compile(program.buckets(sizes_of(setup.plans)), lower, done)
    return steps


def _warned(values: Mapping[str, float], before: frozenset[str]) -> frozenset[str]:
    """The batches that the metrics of an update raise an alarm for; warns of those that are new."""
    found = frozenset(alarmed(values))
    for name in sorted(found - before):
        logging.warning(
            "the loss of the batch %r has risen to %.1f standard errors above its lowest, while "
            "the run went on: raise data.batches.%s.weight or its share of the examples, or lower "
            "config.schedule.peak",
            name,
            values[f"batch/{name}/alarm"],
            name,
        )
    return found


def _check_health(
    setup: Setup, values: Mapping[str, Any], step: int, checkpoints: Checkpoints
) -> None:
    """Stop a run that has lost its way, and say from where to go on.

    Args:
        setup: of the run.
        values: ``_COUNTERS`` after ``step`` updates.
        step: updates made.
        checkpoints: of the run, for the message.
    """

    def stop(code: ExitCode, problem: str, remedy: str) -> RunStopped:
        last = f"last good checkpoint: {checkpoints.latest_path or 'none'}"
        return RunStopped(code, f"step {step}: {problem}; {last}. {remedy}")

    limit = setup.config.optim.max_skipped
    if limit and values["skipped_in_a_row"] >= limit:
        raise stop(
            ExitCode.TOO_MANY_BAD_UPDATES,
            f"loss or gradient not finite {int(values['skipped_in_a_row'])} times in a row "
            f"(config.optim.max_skipped={limit})",
            "Lower config.schedule.peak or set config.debug=True to find the first NaN.",
        )
    seen = step * setup.budget.batch_size
    bad_limit = setup.config.data.max_bad_fraction
    allowed = bad_limit * seen
    if bad_limit and step < setup.total_steps:  # of few examples, one alone is a large share
        allowed = max(allowed, ALWAYS_ALLOWED)
    if values["replaced"] > allowed:
        raise stop(
            ExitCode.TOO_MANY_BAD_EXAMPLES,
            f"{int(values['replaced'])} of {seen} examples were damaged, more than "
            f"config.data.max_bad_fraction={bad_limit:.2%}",
            f"Mend the data ({setup.workdir / BAD_EXAMPLES_FILE} lists them) or raise the limit.",
        )


def _compression(program: Program, step: int) -> dict[str, float]:
    """What an update encoded and cost, in a run that compresses."""
    schedule = program.schedule
    if not schedule.compresses:
        return {}
    return {
        "compression/image_tokens": float(program.image_tokens(step)),
        "compression/cost_share": schedule.cost(step),
        "compression/budget_share": schedule.progress(step + 1),
    }
