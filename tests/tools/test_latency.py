"""Forward passes compile side by side, and are timed one after the other."""

import fcntl
import functools
import pathlib
import threading

import jax
import jax.numpy as jnp
import numpy as np

from tools.latency import ForwardPass, Turns, forward_times

DEVICE = jax.devices()[0]


class Told:
    """In the place of a jitted function: tells what is done with it, and where."""

    def __init__(self, name: str, together: threading.Barrier, told: list[str]) -> None:
        self.name, self.together, self.told = name, together, told

    def lower(self) -> "Told":
        return self

    def compile(self) -> functools.partial[None]:
        self.together.wait(timeout=60)  # for the other one to compile as well
        self.told.append("compiled")
        return functools.partial(self.run)

    def run(self) -> None:
        assert threading.current_thread() is threading.main_thread()
        self.told.append(self.name)


def test_networks_compile_together_and_take_turns() -> None:
    told: list[str] = []
    together = threading.Barrier(2)
    passes = {
        name: ForwardPass(Told(name, together, told), (), DEVICE) for name in ("full", "pruned")
    }
    times = forward_times(passes, repeats=3, warm_up=1)
    assert told == ["compiled", "compiled", "full", "pruned", *["full", "pruned"] * 3]
    assert set(times) == {"full", "pruned"}


def test_the_first_ones_compile_before_the_others() -> None:
    told: list[str] = []

    class Compiled(Told):
        def compile(self) -> functools.partial[None]:
            self.together.wait(timeout=60)
            self.told.append(self.name)
            return functools.partial(self.run)

    first, others = threading.Barrier(2), threading.Barrier(3)
    passes = {
        name: ForwardPass(Compiled(name, together, told), (), DEVICE)
        for name, together in (("a", first), ("b", first), *((name, others) for name in "cde"))
    }
    times = forward_times(passes, repeats=1, warm_up=0, ahead=2)
    assert ({*told[:2]}, {*told[2:5]}, told[5:]) == ({"a", "b"}, {"c", "d", "e"}, [*"abcde"])
    assert list(times) == [*"abcde"]


def test_of_several_processes_only_one_times_while_none_compiles(tmp_path: pathlib.Path) -> None:
    file = tmp_path / "lock"

    def may(how: int) -> bool:
        """Whether another process would go on at once: a lock is of who has opened the file."""
        with file.open("a") as other:
            try:
                fcntl.flock(other, how | fcntl.LOCK_NB)
            except BlockingIOError:
                return False
        return True

    held: list[tuple[bool, bool]] = []

    class Watched(Told):
        def lower(self) -> "Watched":
            held.append((may(fcntl.LOCK_SH), may(fcntl.LOCK_EX)))
            return self

        def run(self) -> None:
            held.append((may(fcntl.LOCK_SH), may(fcntl.LOCK_EX)))

        def compile(self) -> functools.partial[None]:
            self.run()
            return functools.partial(self.run)

    passes = {"full": ForwardPass(Watched("full", threading.Barrier(1), []), (), DEVICE)}
    forward_times(passes, repeats=1, warm_up=1, turns=Turns(file))
    # Traced whatever others do, compiled beside them, and timed alone.
    assert held == [(True, True), (True, False), (False, False), (False, False)]
    assert may(fcntl.LOCK_EX)
    held.clear()
    forward_times(passes, repeats=1, warm_up=0)
    assert held == [(True, True)] * 3  # a process that is alone


def test_a_pass_has_its_arguments_on_its_device_once() -> None:
    product = jax.jit(lambda x, y: (x @ y).sum())
    shared, device = np.ones((2, 3), np.float32), jax.devices()[1]
    wide, narrow = (
        ForwardPass(product, (shared, jnp.ones((3, columns))), device) for columns in (4, 1)
    )
    placed: dict[tuple[int, jax.Device], jax.Array] = {}
    for one, expected in ((wide, 24), (narrow, 6)):
        result = one.lowered().compile()(*one.placed(placed))
        assert float(result) == expected
        assert result.devices() == {device}
    assert wide.placed(placed)[0] is narrow.placed(placed)[0]
    assert len(placed) == 3
