"""Bad input of a command line is one line that names the flag, the key or the path, and code 64."""

import json
import pathlib
import subprocess
import sys

import pytest
from absl import flags
from ml_collections import config_flags

from tests.conftest import REPO
from vlp_jax.infra import command
from vlp_jax.infra.errors import ConfigError
from vlp_jax.infra.preemption import ExitCode

STAGED = (
    "--config.compression.schedule=staged",
    "--config.compression.buckets=('p16@16','whole')",
)
TINY = f"--config={REPO / 'tests' / 'tiny_config.py'}"
VQA = f"--config={REPO / 'configs' / 'transfer' / 'vqa.py'}"

# ml_collections' way to load a config.
pytestmark = pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")


@pytest.fixture
def parse(monkeypatch, capsys):
    """Parses flags; gives what is left of them, or the exit code, and what it complained of."""

    def run(*arguments):
        values = flags.FlagValues()
        config_flags.DEFINE_config_file("config", None, "a config", flag_values=values)
        flags.DEFINE_integer("steps", 1, "steps", lower_bound=1, flag_values=values)
        monkeypatch.setattr(flags, "FLAGS", values)
        monkeypatch.setattr(sys, "argv", ["tool", *arguments])  # ml_collections looks there
        try:
            result = command.parse_flags(["tool", *arguments])
        except SystemExit as error:
            result = error.code
        return result, capsys.readouterr().err

    return run


def test_good_flags_leave_the_rest(parse):
    assert parse(TINY, "step", "--config.data.batch_size=8") == (["tool", "step"], "")
    assert flags.FLAGS.config.data.batch_size == 8
    assert parse("step") == (["tool", "step"], "")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((TINY, "--config.nokey=1"), "bad flag: --config.nokey: no key 'nokey' (vlp_jax/train/"),
        ((TINY, "--config.data.nokey=1"), "--config.data.nokey: no key 'nokey'"),
        (  # ml_collections names the last word of a key alone
            (TINY, "--config.evals.reconstruction.num_examples=8", "--config.num_examples=8"),
            "--config.evals.reconstruction.num_examples or --config.num_examples: no key",
        ),
        ((TINY, "--config.dta.threads=1"), "no key 'dta'. Did you mean \"data\""),
        ((TINY, "--config.total_steps=few"), "--config.total_steps=few"),
        (("--config=absent.py",), "No such file or directory: 'absent.py'"),
        ((f"{VQA}:nosuch",), r"vqa.py:nosuch: write DATA[,SIZE[,METHOD]]"),
        (("--steps=0",), "--steps=0: 0 is not a positive integer"),
        (("--stepz=1",), "Unknown command line flag 'stepz'. Did you mean: steps"),
    ],
)
def test_bad_flags_are_one_line(parse, arguments, message):
    code, complaint = parse(*arguments)
    assert code == ExitCode.BAD_INPUT
    assert complaint.startswith("error: ")
    assert message in complaint
    assert complaint.count("\n") == 1


def test_bad_input_names_what_the_user_gave(capsys):
    def complaint(error, *arguments):
        with pytest.raises(SystemExit) as ended, command.bad_input(*arguments):
            raise error
        assert ended.value.code == ExitCode.BAD_INPUT
        return capsys.readouterr().err

    fault = ConfigError("init_from", "x is no run", "Give one")
    assert complaint(fault) == "error: config.init_from: x is no run. Give one.\n"
    assert complaint(fault, {"init_from": "--run"}) == "error: --run: x is no run. Give one.\n"
    assert complaint(FileNotFoundError("no x"), {"init_from": "--run"}) == "error: no x\n"
    assert complaint(RuntimeError("torn"), None, (RuntimeError,)) == "error: torn\n"
    with pytest.raises(RuntimeError), command.bad_input():
        raise RuntimeError("a fault of the program keeps its traceback")


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-m", *arguments]
    return subprocess.run(line, cwd=REPO, capture_output=True, text=True)


@pytest.fixture(scope="module")
def drawings(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A folder whose training split has no JPEG file, and whose test split a damaged one."""
    folder = tmp_path_factory.mktemp("drawings")
    entries = []
    for name, split in (("a.png", "train"), ("b.jpg", "test")):
        (folder / name).write_bytes(b"no picture")
        entries.append({"image": name, "split": split, "captions": ["a drawing"]})
    (folder / "captions.json").write_text(json.dumps(entries))
    return folder


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (("tools.bench", "step", TINY, "--config.nokey=1"), "--config.nokey: no key"),
        (("tools.bench", "step", TINY, "--max_length=65"), "--max_length=65: more tokens than"),
        (("tools.bench", "step", TINY, "--min_length=9", "--max_length=8"), "--min_length=9 is"),
        (("tools.bench", "step", TINY, "--batch=0"), "--batch=0"),
        (("tools.bench", "step", TINY, "--config.data.text_edges=(66,)"), "data.text_edges"),
        (("tools.bench", "step", TINY, "--config.objectives.flm.nokey=1"), "nokey"),
        (("tools.bench", "step", TINY, "--out=x"), "--out is for the costs of buckets"),
        (("tools.bench", "buckets", TINY), "config.compression.schedule: says what is to be"),
        (("tools.bench", "step", TINY, *STAGED), "config.compression.schedule: 'staged' uses sev"),
        (("tools.bench", "buckets", TINY, *STAGED, "--out=nowhere/x"), "--out=nowhere/x: its fol"),
        (("tools.bench_decode", "--root=DRAWINGS"), "--root=DRAWINGS: none of the first 1 images"),
        (("tools.bench_decode", "--root=DRAWINGS", "--split=val"), "--split=val: "),
        (("tools.bench_decode", "--root=DRAWINGS", "--split=test"), "DRAWINGS/b.jpg"),
        (("tools.bench_decode", "--root=nowhere"), "--root=nowhere: no such folder"),
        (("tools.bench_generate", TINY, "--config.nokey=1"), "--config.nokey: no key"),
        (("tools.bench_generate", TINY, "--max_length=65"), "--max_length=65: more tokens than"),
        (("tools.bench_rank", TINY, "--config.nokey=1"), "--config.nokey: no key"),
        (("tools.bench_rank", TINY, "--text_length=65"), "--text_length=65: more tokens than"),
        (("tools.bench_rank", "--workdir=nowhere"), "--workdir: nowhere is neither a run's"),
        (("tools.import_weights", TINY, "--out=x", "--config.nokey=1"), "--config.nokey: no key"),
        (("tools.import_weights", TINY, "--out=x"), "give --vision, --text or both"),
        (("tools.export_weights", "nowhere", "--out=x"), "workdir: nowhere is neither a run's"),
        (("tools.profile_table", "nowhere"), "nowhere: no such file or folder"),
        (("tools.profile_table", "nowhere", "--steps=0"), "--steps=0: give 1 or more"),
        (("tools.predict", "caption", "--nokey=1"), "Unknown command line flag 'nokey'"),
        (("vlp_jax.main", TINY, "--workdir=x", "--config.nokey=1"), "--config.nokey: no key"),
    ],
    ids=lambda value: (
        " ".join(value).replace(f"{REPO}/", "")[:60].strip() if type(value) is tuple else ""
    ),
)
def test_tools_refuse_bad_input(drawings, line, message):
    result = run(*(word.replace("DRAWINGS", str(drawings)) for word in line))
    assert result.returncode == ExitCode.BAD_INPUT, result.stderr
    assert result.stdout == ""
    [complaint] = [text for text in result.stderr.splitlines() if text.startswith("error: ")]
    assert message.replace("DRAWINGS", str(drawings)) in complaint
    assert "Traceback" not in result.stderr
    assert not (REPO / "x").exists()
