"""The command that scores runs in three columns, on towers that have read images alone."""

import json
import pathlib
import subprocess
import sys
from collections.abc import Callable

import pytest

from tests.tools.small_stages import small_stage
from tools.columns import train_to_end

Command = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def command(tmp_path_factory: pytest.TempPathFactory) -> Command:
    """The command on a run of stage 1 of three towers."""
    folder = tmp_path_factory.mktemp("towers")
    config = small_stage(1, "towers_tiny")
    config.data.cache_dir = str(folder / "data")
    train_to_end(config, folder / "stage1")
    sentences = ["sentence\tlabel", *(f"a film of {n} parts\t{n % 2}" for n in range(40))]
    for split in ("train", "validation"):
        (folder / f"sst2_{split}.tsv").write_text("\n".join(sentences) + "\n")

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        size = ["--steps=2", "--batch_size=8", "--records=40", "--examples=8", "--num_edges=1"]
        places = [str(folder / "stage1"), f"--glue={folder}", f"--out={folder / 'out'}"]
        return subprocess.run(
            [sys.executable, "-m", "tools.evaluate_shared", *places, *size, *arguments],
            capture_output=True,
            text=True,
            cwd=pathlib.Path(__file__).parents[2],
        )

    return run


@pytest.mark.slow
def test_what_a_run_has_not_learned_has_no_score(command: Command) -> None:
    done = command("--tasks=neighbours,sst2,zero-shot retrieval", "--level=easy")
    assert done.returncode == 0, done.stderr
    table = pathlib.Path(done.stdout.splitlines()[-1])
    header, _, row = (
        [cell.strip() for cell in line.split("|")[1:-1]] for line in table.read_text().splitlines()
    )
    found = dict(zip(header, row, strict=True))
    scores = json.loads((table.parent / "scores.json").read_text())["stage1"]
    [value] = scores.pop("neighbours")
    assert not scores
    assert found == {
        "run": "stage1",
        "IMAGE": f"{100 * value:.1f}",
        "TEXT": "–",
        "MULTIMODAL": "–",
        "neighbours": f"{100 * value:.1f}",
        "sst2": "–",
        "zero-shot retrieval": "–",
    }


def test_a_run_of_which_no_task_reads_a_part_is_an_error(command: Command) -> None:
    done = command("--tasks=sst2")
    assert done.returncode == 64
    assert "none of its parts is read by a task; give a run of a shared stack" in done.stderr


def test_all_tasks_are_checked_before_the_first_begins(
    command: Command, tmp_path: pathlib.Path
) -> None:
    wrong = tmp_path / "none"
    done = command("--tasks=neighbours,sst2", f"--glue={wrong}", f"--out={tmp_path / 'out'}")
    assert done.returncode == 64
    assert f"stage1, sst2: data.sources.sentences.root={wrong}: no such folder" in done.stderr
    assert not (tmp_path / "out" / "scores.json").exists()
