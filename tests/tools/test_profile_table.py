"""A profile as a table: what ran, how often, how long, and what lies between."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import pytest

from tools import profile_table
from vlp_jax.infra.preemption import ExitCode
from vlp_jax.infra.profiling import ProfilerWindow


class Event(NamedTuple):
    name: str
    start_ns: float
    duration_ns: float


def test_kernels_of_a_kind_are_one_row_and_overlaps_are_busy_once():
    events = [
        Event("fusion_add_3", 0, 2e6),
        Event("fusion_add_12.1", 1e6, 3e6),  # beside the first
        Event("gemm", 6e6, 2e6),  # after a gap of 2 ms
    ]
    table = profile_table.kernel_table("chip", events, steps=2)
    assert table.rows == [("fusion_add", 2, 5.0), ("gemm", 1, 2.0)]
    assert (table.whole_ms, table.busy_ms) == (8.0, 6.0)
    text = table.text(top=1)
    assert "4.00 ms a step, busy for 3.00 ms (75%), 2 calls a step (2 steps)" in text
    assert "| fusion_add | 1.0 | 2.500 | 71.4% |" in text
    assert "gemm" not in text


def test_a_call_is_counted_without_the_calls_in_it():
    events = [
        Event("step", 0, 10e6),
        Event("put", 1e6, 4e6),
        Event("copy", 2e6, 1e6),
        Event("put", 6e6, 2e6),
        Event("log", 12e6, 1e6),
    ]
    table = profile_table.call_table("host", events, steps=1)
    assert table.rows == [("put", 2, 5.0), ("step", 1, 4.0), ("copy", 1, 1.0), ("log", 1, 1.0)]
    assert (table.whole_ms, table.busy_ms) == (13.0, 11.0)


def test_a_trace_of_this_machine(tmp_path, capsys):
    step = jax.jit(lambda x: jnp.tanh(x @ x))
    x = step(jnp.eye(64))
    with ProfilerWindow(tmp_path, start_step=0, num_steps=3) as profiler:
        for t in range(5):
            with profiler.step(t):
                x = step(x).block_until_ready()
    assert profile_table.main([str(tmp_path), "--top=100"]) == ExitCode.OK
    text = capsys.readouterr().out
    assert "(3 steps)" in text
    assert "host, the thread that trains" in text


class Line(NamedTuple):
    name: str
    events: list[Event]


class Plane(NamedTuple):
    name: str
    lines: list[Line]


def test_the_busy_time_of_a_step_is_that_of_the_busiest_device(tmp_path, monkeypatch):
    steps = Line("python", [Event("train", n * 1e6, 1e6) for n in range(4)])
    planes = [
        Plane("/device:GPU:0", [Line("Stream #1", [Event("gemm", 0, 8e6)])]),
        Plane(  # two streams at once
            "/device:GPU:1",
            [
                Line("Stream #1", [Event("gemm", 0, 9e6)]),
                Line("Stream #2", [Event("add", 6e6, 6e6)]),
            ],
        ),
        Plane("/host:CPU", [steps]),
    ]
    (tmp_path / "a.xplane.pb").touch()
    monkeypatch.setattr(profile_table, "_planes", lambda file: planes)
    assert profile_table.device_busy_ms(tmp_path) == 3.0
    monkeypatch.setattr(profile_table, "_planes", lambda file: planes[2:])
    with pytest.raises(ValueError, match="nothing that ran on an accelerator"):
        profile_table.device_busy_ms(tmp_path)


def test_bad_traces(tmp_path, capsys):
    assert profile_table.main([str(tmp_path)]) == ExitCode.BAD_INPUT
    assert "no .xplane.pb" in capsys.readouterr().err
    with jax.profiler.trace(str(tmp_path)):
        jnp.ones(3).block_until_ready()
    assert profile_table.main([str(tmp_path)]) == ExitCode.BAD_INPUT
    assert "give --steps" in capsys.readouterr().err
    for flag in ("--steps=0", "--steps=-2", "--top=0"):
        assert profile_table.main([str(tmp_path), flag]) == ExitCode.BAD_INPUT
        assert capsys.readouterr().err == f"error: {flag}: give 1 or more\n"


@pytest.mark.parametrize("content", [b"", b"no trace"])
def test_a_damaged_trace(tmp_path, capsys, content):
    (tmp_path / "a.xplane.pb").write_bytes(content)
    assert profile_table.main([str(tmp_path / "a.xplane.pb")]) == ExitCode.BAD_INPUT
    assert capsys.readouterr().err.startswith("error: ")
