"""Claims on cells, by this process and by others."""

import json
import subprocess
import sys

import psutil

from tools.compare.claims import CLAIM_FILE, Claims, Outcome, read_claim, read_claims


def claim_of(folder, process, **changes):
    """Write the claim of another process."""
    folder.mkdir(parents=True, exist_ok=True)
    facts = read_example(folder) | {"pid": process.pid}
    facts["started"] = psutil.Process(process.pid).create_time()
    (folder / CLAIM_FILE).write_text(json.dumps(facts | changes))


def read_example(folder):
    """The fields of a claim of this process."""
    claims = Claims()
    claims.take(folder / "example")
    return read_claim(folder / "example")


def sleeper():
    return subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)


def end(process):
    process.communicate()


def test_a_cell_is_claimed_once_and_again_when_it_is_given_back(tmp_path):
    first, second = Claims(), Claims()
    cell = tmp_path / "cell"
    assert first.take(cell) is Outcome.TAKEN
    assert second.take(cell) is Outcome.BUSY
    first.note(cell, log="log.txt")
    assert [(name, claim["log"]) for name, claim in read_claims(tmp_path)] == [("cell", "log.txt")]
    assert second.take(cell) is Outcome.BUSY
    first.release(cell)
    assert second.take(cell) is Outcome.TAKEN


def test_the_claim_of_the_dead_is_taken_over_but_not_by_their_own_group(tmp_path):
    process = sleeper()
    claim_of(tmp_path, process, group=7)
    assert Claims(8).take(tmp_path) is Outcome.BUSY
    end(process)
    assert Claims(7).take(tmp_path) is Outcome.CRASHED
    assert Claims(8).take(tmp_path) is Outcome.TAKEN
    assert Claims(8).take(tmp_path) is Outcome.BUSY


def test_a_process_that_only_has_the_number_of_the_owner_is_not_the_owner(tmp_path):
    process = sleeper()
    claim_of(tmp_path, process, started=psutil.Process(process.pid).create_time() - 60, group=7)
    assert Claims(8).take(tmp_path) is Outcome.TAKEN
    end(process)


def test_of_processes_of_another_host_nothing_is_known(tmp_path):
    process = sleeper()
    claim_of(tmp_path, process, host="elsewhere")
    end(process)
    assert Claims().take(tmp_path) is Outcome.BUSY


def test_a_claim_whose_writer_died_in_the_middle_is_free(tmp_path):
    (tmp_path / CLAIM_FILE).write_text("")
    assert Claims().take(tmp_path) is Outcome.TAKEN


def test_many_processes_agree_on_one_owner(tmp_path):
    process = sleeper()
    claim_of(tmp_path / "cell", process, group=7)
    end(process)
    script = (
        "import pathlib, sys, time\n"
        "from tools.compare.claims import Claims\n"
        "print(Claims(8).take(pathlib.Path(sys.argv[1])).name, flush=True)\n"
        "input()\n"
    )
    takers = [
        subprocess.Popen(
            [sys.executable, "-c", script, str(tmp_path / "cell")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(4)
    ]
    said = [taker.stdout.readline().strip() for taker in takers]
    for taker in takers:
        end(taker)
    assert sorted(said) == ["BUSY", "BUSY", "BUSY", "TAKEN"]
