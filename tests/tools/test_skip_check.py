"""Whether what a search has chosen stands on other data, by a search of a small trained model."""

import json
import pathlib
from collections.abc import Iterator

import numpy as np
import pytest
from tiny_search import UNITS, search_config

from tools.new_data import Batches, batches_of, overrides_of
from tools.searched import read_search, restored
from tools.skip_check import Checker, main, verdict
from vlp_jax.data.scenes import Scenes
from vlp_jax.infra.errors import ConfigError
from vlp_jax.infra.preemption import ExitCode
from vlp_jax.train.loop import train
from vlp_jax.train.searching import SEARCH_FILE
from vlp_jax.train.setup import plain, prepare

SEEDS = [range(1, 3), range(1, 11)]
FEW = "num_records=512"  # of the new data: more are read in more time


@pytest.fixture(scope="module")
def search(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A finished search on easy scenes, trained until it reads some words off them."""
    workdir = tmp_path_factory.mktemp("search") / "easy"
    config = search_config(**{"total_steps": 100, "checkpoint.every_steps": 100})
    config.schedule.peak = 3e-3
    config.search.every_steps, config.search.candidates = 15, 5
    config.log.every_steps = 50
    assert train(prepare(config, workdir)) == ExitCode.OK
    return workdir


@pytest.fixture(scope="module")
def checker(search: pathlib.Path) -> Iterator[Checker]:
    run = read_search(search)
    with restored(run) as (setup, state):
        yield Checker(run, setup, state)


def stands(checker: Checker, search: pathlib.Path, data: str) -> bool:
    found = checker.losses(overrides_of(data, search_config()))
    return bool(verdict(read_search(search), checker.compared, found)["stands"])


@pytest.mark.parametrize("seeds", SEEDS)
def test_other_scenes_of_the_same_kind_pass(checker, search, seeds):
    """In nine of ten worlds, or more; that this is no luck is tested in test_standing."""
    passed = [stands(checker, search, f"seed={seed},{FEW}") for seed in seeds]
    assert sum(passed) >= 0.9 * len(seeds)


@pytest.mark.parametrize("seeds", SEEDS)
def test_scenes_of_another_kind_do_not(checker, search, seeds):
    passed = [stands(checker, search, f"level=hard,seed={seed},{FEW}") for seed in seeds]
    assert sum(passed) <= 0.1 * len(seeds)


def test_batches_share_no_record_and_are_none_that_the_search_has_read(checker):
    """And losses are those of the search's comparisons: the first column is the full network."""
    losses = checker.losses(overrides_of(f"seed=1,{FEW}", search_config()))
    reference, new, batches = losses
    assert batches.rows == {"pairs": 16}
    assert batches.unread
    assert batches.first * 16 >= 16 * 8  # comparisons and final batches
    assert reference.shape == new.shape == (32, len(checker.compared.choices))
    assert np.isfinite(reference).all()
    with pytest.raises(ValueError, match=r"need 128 records or more; .* the new data 100\. Give"):
        checker.losses(overrides_of("seed=1,num_records=100", search_config()))


@pytest.mark.parametrize(
    ("records", "new", "used", "expected"),
    [
        (2000, 2000, 8, Batches({"pairs": 16}, 32, 32, True)),
        (2000, 300, 8, Batches({"pairs": 9}, 32, 32, True)),  # of fewer records, smaller batches
        (900, 900, 8, Batches({"pairs": 14}, 32, 32, True)),  # smaller, so that none was read
        (600, 600, 32, Batches({"pairs": 16}, 32, 0, False)),  # hardly any is left: read again
    ],
)
def test_batches_are_as_large_as_records_allow(records, new, used, expected):
    def world(count: int, seed: int = 0) -> dict[str, Scenes]:
        return {"scenes": Scenes(split="val", level="easy", num_records=count, seed=seed)}

    config = search_config()
    found = batches_of(config, world(records), world(new, 1), 32, used, {"pairs": 16})
    assert found == expected


def test_the_exit_code_says_it(search, tmp_path, capsys):
    file = tmp_path / "check.json"
    flags = [str(search), f"--data=level=hard,seed=3,{FEW}", f"--json={file}"]
    assert main(flags) == ExitCode.CHOICE_FALLS == 3
    shown = capsys.readouterr().out
    assert "the choice does not stand" in shown
    assert "the new data are not such as the choice was made on" in shown
    result = json.loads(file.read_text())
    assert not result["stands"]
    assert [row["unit"] for row in result["units"]] == list(UNITS)
    chosen = json.loads((search / SEARCH_FILE).read_text())["skipped"]
    assert [row["unit"] for row in result["units"] if not row["kept"]] == sorted(chosen)
    assert all(row["new"]["error"] > 0 for row in result["units"])
    assert (result["data"], result["batches"]) == (f"level=hard,seed=3,{FEW}", 32)
    with pytest.raises(SystemExit) as ended:
        main([str(search), "--data=split=train"])
    assert ended.value.code == ExitCode.BAD_INPUT
    assert "pictures are in the training split as well" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("nowhere", "no such folder, and not KEY=VALUE either"),
        ("level=easy,7", "'7' is not KEY=VALUE"),
        ("levels=easy", r"data\.sources\.scenes\.levels: unknown key. Perhaps you mean 'level'"),
        ("weight=2.0", r"data\.sources\.scenes\.weight: unknown key"),
        ("seed=many", "seed=many is not of the type int"),
        ("others.level=easy", "no source 'others'; use scenes"),
    ],
)
def test_overrides_that_cannot_be(data, message):
    with pytest.raises((ConfigError, ValueError), match=message):
        overrides_of(data, search_config())


def test_overrides_name_one_of_several_sources(tmp_path):
    config = search_config()
    assert overrides_of("seed=7,split=test", config) == {"scenes": {"seed": 7, "split": "test"}}
    with pytest.raises(ConfigError, match=r"data\.sources\.scenes\.root: unknown key"):
        overrides_of(str(tmp_path), config)
    with config.unlocked():
        config.data.sources.photographs = {"type": "folder", "root": "here"}
    assert overrides_of(f"photographs.root={tmp_path}", config) == {
        "photographs": {"root": str(tmp_path)}
    }
    with pytest.raises(ValueError, match=r"sources photographs, scenes; write NAME\.seed=7"):
        overrides_of("seed=7", config)


@pytest.mark.parametrize(
    ("facts", "method", "message"),
    [
        (None, "learned", "holds no run: run.json is absent"),
        ({"status": "finished"}, "", "has not searched (config.search.method is empty)"),
        ({"status": "preempted"}, "learned", "has not finished (run.json says 'preempted')"),
        ({"status": "finished"}, "learned", "search.json is absent, though the run has finished"),
    ],
)
def test_a_workdir_without_a_choice_says_why(tmp_path, capsys, facts, method, message):
    config = search_config(**{"search.method": method})
    (tmp_path / "config.json").write_text(json.dumps(plain(config)))
    if facts is not None:
        (tmp_path / "run.json").write_text(json.dumps(facts))
    with pytest.raises(SystemExit) as ended:
        main([str(tmp_path), "--data=seed=1"])
    assert ended.value.code == ExitCode.BAD_INPUT
    assert message in capsys.readouterr().err
