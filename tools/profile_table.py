"""A profile as a table: which kernels take the time, and how long the device waits between them.

    python -m vlp_jax.main --config=FILE --config.profile.num_steps=5 --workdir=RUN
    python -m tools.profile_table RUN/profile

Kernels that differ in a number at their end count as one. ``busy`` is the time in which at least
one of them runs; what is missing to the whole are gaps, in which the device waits for the host or
for a launch. The host's table has the calls of the thread that trains, each without those in it.
"""

import collections
import dataclasses
import math
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import jax

from vlp_jax.infra.command import argument_parser, fail
from vlp_jax.infra.preemption import ExitCode

_STEP = "train"  # annotation of infra.profiling
_DEVICE = "/device:"
_KERNELS = ("Stream", "XLA Ops")  # lines of a GPU's and of a TPU's plane


class _Event(Protocol):
    name: str
    start_ns: float
    duration_ns: float


@dataclasses.dataclass(frozen=True)
class Table:
    """Where the time of a traced window goes.

    Attributes:
        title: of what.
        steps: in the window.
        whole_ms: from the first event's start to the last one's end.
        busy_ms: of these, how long at least one event ran.
        rows: (name, calls, milliseconds), the longest first.
    """

    title: str
    steps: int
    whole_ms: float
    busy_ms: float
    rows: Sequence[tuple[str, int, float]]

    def text(self, top: int) -> str:
        """The table in Markdown, all figures for one step, with its ``top`` longest rows."""
        steps, total = self.steps, sum(ms for *_, ms in self.rows)
        calls = sum(count for _, count, _ in self.rows)
        lines = [
            f"{self.title}: {self.whole_ms / steps:.2f} ms a step, busy for "
            f"{self.busy_ms / steps:.2f} ms ({self.busy_ms / self.whole_ms:.0%}), "
            f"{calls / steps:,.0f} calls a step ({steps} steps)",
            "",
            "| name | calls | ms | share |",
            "| --- | ---: | ---: | ---: |",
        ]
        lines += [
            f"| {name} | {count / steps:,.1f} | {ms / steps:.3f} | {ms / total:.1%} |"
            for name, count, ms in self.rows[:top]
        ]
        return "\n".join(lines)


def kernel_table(title: str, events: Iterable[_Event], steps: int) -> Table:
    """The table of what ran on a device.

    Args:
        title: of the table.
        events: at least one.
        steps: that they belong to.
    """
    calls, spent = collections.Counter[str](), collections.defaultdict[str, float](float)
    events = list(events)
    for event in events:
        name = re.sub(r"([._]\d+)+$", "", event.name)
        calls[name] += 1
        spent[name] += event.duration_ns / 1e6
    return _table(title, steps, _spans(events), calls, spent)


def call_table(title: str, events: Iterable[_Event], steps: int) -> Table:
    """The table of what a thread of the host did, each call without the calls in it.

    Args:
        title: of the table.
        events: of one thread, nested or apart; at least one.
        steps: that they belong to.
    """
    spans, calls, own = [], collections.Counter[str](), collections.defaultdict[str, float](float)
    open_calls: list[tuple[float, str]] = []  # (end, name), the innermost last
    for event in sorted(events, key=lambda e: (e.start_ns, -e.duration_ns)):
        end, ms = event.start_ns + event.duration_ns, event.duration_ns / 1e6
        while open_calls and open_calls[-1][0] <= event.start_ns:
            open_calls.pop()
        if open_calls:
            own[open_calls[-1][1]] -= ms
        else:
            spans.append((event.start_ns, end))
        calls[event.name] += 1
        own[event.name] += ms
        open_calls.append((end, event.name))
    return _table(title, steps, spans, calls, own)


def _table(
    title: str,
    steps: int,
    spans: list[tuple[float, float]],
    calls: Mapping[str, int],
    spent: Mapping[str, float],
) -> Table:
    whole = max(end for _, end in spans) - min(start for start, _ in spans)
    rows = [(name, calls[name], ms) for name, ms in sorted(spent.items(), key=lambda r: -r[1])]
    return Table(title, steps, whole / 1e6, _busy_ms(spans), rows)


def _spans(events: Iterable[_Event]) -> list[tuple[float, float]]:
    """Start and end of each, in nanoseconds."""
    return [(event.start_ns, event.start_ns + event.duration_ns) for event in events]


def _busy_ms(spans: Iterable[tuple[float, float]]) -> float:
    """How long at least one of some spans lasts: nanoseconds -> milliseconds."""
    busy, reached = 0.0, -math.inf
    for start, end in sorted(spans):
        busy += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return busy / 1e6


def _planes(file: Path) -> list[Any]:
    return list(jax.profiler.ProfileData.from_file(str(file)).planes)


def _host(planes: Iterable[Any]) -> list[Any]:
    """The threads of the host."""
    return [line for plane in planes if plane.name == "/host:CPU" for line in plane.lines]


def _count_steps(file: Path, planes: Iterable[Any]) -> int:
    """Annotated steps.

    Raises:
        ValueError: there is none.
    """
    steps = sum(event.name == _STEP for line in _host(planes) for event in line.events)
    if not steps:
        raise ValueError(f"{file} has no step annotated {_STEP!r}; give --steps")
    return steps


def _devices(planes: Iterable[Any]) -> dict[str, list[_Event]]:
    """What ran, by device."""
    devices = {
        plane.name: [
            e for line in plane.lines if line.name.startswith(_KERNELS) for e in line.events
        ]
        for plane in planes
        if plane.name.startswith(_DEVICE)
    }
    # A CPU has no plane of its own; what XLA runs there names its operation.
    devices["CPU"] = [
        event
        for line in _host(planes)
        if line.name.startswith("tf_")
        for event in line.events
        if "hlo_op" in dict(event.stats)
    ]
    return devices


def read_tables(file: Path, steps: int | None = None) -> Iterator[Table]:
    """The tables of a trace: of every device, and of the thread that trains.

    Args:
        file: an ``.xplane.pb``.
        steps: in the window; counted by their annotations where None.

    Raises:
        ValueError: no step is annotated, or nothing of a device was traced.
    """
    planes = _planes(file)
    if steps is None:
        steps = _count_steps(file, planes)
    devices = _devices(planes)
    found = {name: events for name, events in devices.items() if events}
    if not found:
        raise ValueError(f"{file} has nothing that ran on a device")
    for name, events in found.items():
        yield kernel_table(name, events, steps)
    for line in _host(planes):
        events = list(line.events)
        if any(event.name == _STEP for event in events):
            yield call_table("host, the thread that trains", events, steps)


def device_busy_ms(trace: Path) -> float:
    """Milliseconds of a traced step in which the device is busy; of several, the busiest.

    Args:
        trace: a file, or a folder of which the newest counts.

    Raises:
        ValueError: no trace, no step in it, or nothing of an accelerator.
    """
    file = _newest(trace)
    planes = _planes(file)
    found = [e for name, e in _devices(planes).items() if e and name.startswith(_DEVICE)]
    if not found:
        raise ValueError(f"{file} has nothing that ran on an accelerator")
    steps = _count_steps(file, planes)
    return max(_busy_ms(_spans(events)) for events in found) / steps


def _newest(trace: Path) -> Path:
    """A trace itself, or the newest below a folder.

    Raises:
        ValueError: there is none.
    """
    if not trace.exists():
        raise ValueError(f"{trace}: no such file or folder; give a run's `profile`")
    files = [trace] if trace.is_file() else [*trace.rglob("*.xplane.pb")]
    if not files:
        raise ValueError(f"no .xplane.pb in {trace}")
    return max(files, key=lambda f: f.stat().st_mtime)


def main(arguments: Sequence[str] | None = None) -> ExitCode:
    """Print the tables of the newest trace in a folder."""
    parser = argument_parser("tools.profile_table", __doc__)
    parser.add_argument("trace", type=Path, help="an .xplane.pb, or a folder with one below it")
    parser.add_argument("--top", type=int, default=25, help="rows of a table")
    parser.add_argument("--steps", type=int, help="steps in the window; counted where not given")
    options = parser.parse_args(arguments)
    try:
        for name in ("steps", "top"):
            if (count := getattr(options, name)) is not None and count < 1:
                raise ValueError(f"--{name}={count}: give 1 or more")
        tables = list(read_tables(_newest(options.trace), options.steps))
    except (ValueError, OSError, RuntimeError) as error:
        return fail(ExitCode.BAD_INPUT, error)
    print("\n\n".join(table.text(options.top) for table in tables))
    return ExitCode.OK


if __name__ == "__main__":
    sys.exit(main())
