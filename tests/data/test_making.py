"""What is kept in files is made once, also when several want it at once or a maker dies."""

import concurrent.futures
import os
import pathlib
import signal
import subprocess
import sys
import textwrap
import time

import pytest

from vlp_jax.data.making import found_or_made, in_order


def find(file):
    return file.read_text() if file.is_file() else None


def test_of_many_that_miss_a_file_one_makes_it(tmp_path):
    file = tmp_path / "new" / "made"
    made = []

    def make():
        made.append(len(made))
        time.sleep(0.1)
        file.write_text("made")
        return "made"

    with concurrent.futures.ThreadPoolExecutor(8) as threads:
        jobs = [threads.submit(found_or_made, file, lambda: find(file), make) for _ in range(8)]
        assert [job.result() for job in jobs] == ["made"] * 8
    assert made == [0]
    assert list(file.parent.iterdir()) == [file]  # no lock is left


def test_who_fails_lets_another_try(tmp_path):
    file = tmp_path / "made"
    with pytest.raises(ZeroDivisionError):
        found_or_made(file, lambda: find(file), lambda: 1 / 0)
    assert found_or_made(file, lambda: find(file), lambda: "made") == "made"
    assert list(tmp_path.iterdir()) == []


MAKER = """
    import pathlib, sys, time
    from vlp_jax.data.making import found_or_made

    def make():
        print("making", flush=True)
        time.sleep(60)

    found_or_made(pathlib.Path(sys.argv[1]), lambda: None, make)
"""


def test_a_maker_that_is_killed_holds_nobody_up(tmp_path):
    file = tmp_path / "made"
    repo = pathlib.Path(__file__).parents[2]
    with subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(MAKER), str(file)],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(repo)},
    ) as process:
        assert process.stdout.readline() == "making\n"
        assert (tmp_path / "made.lock").read_text() == str(process.pid)
        with concurrent.futures.ThreadPoolExecutor(1) as thread:
            job = thread.submit(found_or_made, file, lambda: find(file), lambda: "made")
            time.sleep(0.2)
            assert not job.done()
            process.send_signal(signal.SIGKILL)
            assert job.result(timeout=10) == "made"
    assert list(tmp_path.iterdir()) == []


def test_a_script_without_a_main_guard_is_told_so_and_ends(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        textwrap.dedent(
            f"""
            import pathlib
            from vlp_jax.data.making import found_or_made, in_order

            file = pathlib.Path({str(tmp_path / "made")!r})

            def make():
                return list(in_order(divmod, [(7, 2)], workers=1))

            print(found_or_made(file, lambda: None, make))
            """
        )
    )
    # Two processes that wait for each other would sit here for ever.
    done = subprocess.run(
        [sys.executable, script], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout == "[(3, 1)]\n"
    assert 'put the script\'s own calls under `if __name__ == "__main__":`' in done.stderr


def test_in_order():
    assert list(in_order(divmod, [(9, 4), (7, 2)], workers=0)) == [(2, 1), (3, 1)]


def square_unless_a_helper(number, parent):
    if number == 3 and os.getpid() != parent:
        os.kill(os.getpid(), signal.SIGKILL)
    return number**2


@pytest.mark.slow
def test_a_helper_that_is_killed_loses_nothing(caplog):
    work = ((number, os.getpid()) for number in range(8))
    done = list(in_order(square_unless_a_helper, work, workers=2))
    assert done == [number**2 for number in range(8)]
    assert "helper processes (data.cache_workers) was killed" in caplog.text


@pytest.mark.slow
def test_in_order_also_with_workers():
    work = ((number, 7) for number in range(20))
    assert list(in_order(divmod, work, workers=2)) == [divmod(n, 7) for n in range(20)]
