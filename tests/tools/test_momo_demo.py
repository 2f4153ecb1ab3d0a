"""The demo of three stages says what it lacks; whole, it takes minutes: `make momo-demo`."""

import pathlib
import subprocess
import sys


def test_without_its_texts_the_demo_says_what_to_put_where(tmp_path: pathlib.Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tools.momo_demo", f"--workdir={tmp_path / 'runs'}"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={"PYTHONPATH": str(pathlib.Path(__file__).parents[2]), "JAX_PLATFORMS": "cpu"},
    )
    assert done.returncode == 64, done.stderr
    assert "../shared/data/text does not exist; the demo reads its texts: put Wiki" in done.stderr
    assert not (tmp_path / "runs").exists()
