"""The window is traced, and nothing else is."""

import jax
import jax.numpy as jnp
import pytest

from vlp_jax.infra.errors import ConfigError
from vlp_jax.infra.profiling import ProfilerWindow


def test_only_the_window_is_traced(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(jax.profiler, "start_trace", lambda path, **_: calls.append("start"))
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: calls.append("stop"))
    with ProfilerWindow(tmp_path, start_step=2, num_steps=2) as profiler:
        for step in range(6):
            with profiler.step(step):
                calls.append(step)
    assert calls == [0, 1, "start", 2, 3, "stop", 4, 5]


def test_a_run_that_ends_inside_the_window_still_closes_it(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(jax.profiler, "start_trace", lambda path, **_: calls.append("start"))
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: calls.append("stop"))
    with ProfilerWindow(tmp_path, 0, 5) as profiler, profiler.step(3):
        pass
    assert calls == ["start", "stop"]


def test_no_steps_no_effect(tmp_path):
    with ProfilerWindow(tmp_path / "profile", 0, 0) as profiler, profiler.step(0):
        pass
    assert not (tmp_path / "profile").exists()


def test_a_trace_is_written(tmp_path):
    with ProfilerWindow(tmp_path, 1, 1) as profiler:
        for step in range(3):
            with profiler.step(step):
                jnp.ones(3) + step
    [file] = tmp_path.rglob("*.xplane.pb")
    planes = jax.profiler.ProfileData.from_file(str(file)).planes
    names = {event.name for plane in planes for line in plane.lines for event in line.events}
    assert "train" in names, "the annotation of the step"
    # The tracer of Python marks its calls so.
    assert not [name for name in names if name.startswith("$")]


def test_negative_numbers_are_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"profile\.num_steps"):
        ProfilerWindow(tmp_path, 0, -1)
