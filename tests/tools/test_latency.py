"""Forward passes compile side by side, and are timed one after the other."""

import logging
import threading

import jax
import jax.numpy as jnp
import pytest

from tools.latency import ForwardPass, forward_times


def test_networks_take_turns() -> None:
    calls: list[str] = []

    class Told:
        """In the place of a jitted function."""

        def __init__(self, name: str) -> None:
            self.name = name

        def lower(self) -> "Told":
            return self

        def compile(self) -> None:
            together.wait(timeout=60)  # for the other one to compile as well

        def __call__(self) -> None:
            calls.append(self.name)

    together = threading.Barrier(2)
    passes = {name: ForwardPass(Told(name), ()) for name in ("full", "pruned")}
    times = forward_times(passes, repeats=3, warm_up=1)
    assert calls == ["full", "pruned", *["full", "pruned"] * 3]
    assert set(times) == {"full", "pruned"}


def test_calls_find_what_was_compiled(caplog: pytest.LogCaptureFixture) -> None:
    one = ForwardPass(jax.jit(lambda x: (x @ x).sum()), (jnp.ones((3, 3)),))
    with jax.log_compiles(), caplog.at_level(logging.WARNING, logger="jax"):
        one.compile()
        assert "Compiling" in caplog.text
        caplog.clear()
        assert float(one()) == 27
    assert "Compiling" not in caplog.text
