"""The first signal asks, the second ends; the old handlers come back."""

import os
import signal
import subprocess
import sys

import pytest

from vlp_jax.infra.preemption import ExitCode, Interrupted, PreemptionGuard


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_first_signal_sets_the_flag(number):
    before = signal.getsignal(number)
    with PreemptionGuard() as guard:
        assert not guard.requested
        os.kill(os.getpid(), number)
        assert guard.requested
        assert signal.getsignal(number) == before  # the next one is not caught
    assert signal.getsignal(number) == before


def test_work_that_is_done_again_is_cut_short():
    done = []

    def work(name, *, signalled=False):
        with guard.interrupting():
            if signalled:
                os.kill(os.getpid(), signal.SIGTERM)
            done.append(name)

    with PreemptionGuard() as guard:
        work("before")
        with pytest.raises(Interrupted):
            work("cut short", signalled=True)
        assert guard.requested
        with pytest.raises(Interrupted):
            work("not begun")
    assert done == ["before"]


def test_handlers_come_back_without_a_signal():
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    with pytest.raises(ZeroDivisionError), PreemptionGuard():
        _ = 1 / 0
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before


def test_a_signal_may_come_while_handlers_are_put_back(monkeypatch):
    numbers = (signal.SIGTERM, signal.SIGINT)
    before = [signal.getsignal(number) for number in numbers]
    put_back = signal.signal

    def interrupted(number, handler):
        monkeypatch.setattr(signal, "signal", put_back)
        os.kill(os.getpid(), signal.SIGINT)
        return put_back(number, handler)

    with PreemptionGuard() as guard:
        monkeypatch.setattr(signal, "signal", interrupted)
        os.kill(os.getpid(), signal.SIGTERM)
        assert guard.requested
    assert [signal.getsignal(number) for number in numbers] == before


LOOP = """
import sys, time
from vlp_jax.infra.preemption import ExitCode, PreemptionGuard
with PreemptionGuard() as guard:
    print("ready", flush=True)
    for _ in range(2000):
        time.sleep(0.01)
        if guard.requested and "patient" not in sys.argv:
            sys.exit(ExitCode.PREEMPTED)
        if guard.requested:
            print("asked", flush=True)
"""


def _start(*arguments):
    process = subprocess.Popen(
        [sys.executable, "-c", LOOP, *arguments], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "ready\n"
    return process


def test_exit_code_of_a_preempted_run():
    with _start() as process:
        process.terminate()
        assert process.wait(timeout=20) == ExitCode.PREEMPTED == 75


def test_a_second_signal_ends_the_process():
    with _start("patient") as process:
        process.terminate()
        assert process.stdout.readline() == "asked\n"
        process.terminate()
        assert process.wait(timeout=20) == -signal.SIGTERM


def test_exit_codes_differ_from_shell_and_signal_codes():
    codes = [int(code) for code in ExitCode]
    assert len(set(codes)) == len(codes)
    assert max(codes) < 126
