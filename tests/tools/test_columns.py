"""The table of three columns: what is asked, and how scores become averages."""

import json

import pytest

from tools.columns import (
    COLUMNS,
    Score,
    Settings,
    Task,
    _config,
    _place,
    averages,
    chosen,
    header_of,
    rows_of,
    tasks_of,
    told,
)
from tools.compare.table import markdown_table
from vlp_jax.infra.errors import ConfigError
from vlp_jax.infra.report import RUN_FILE
from vlp_jax.train.config import check_keys

TASKS = [
    Task("image", "frozen", "", (), frozen=True),
    Task("image", "tuned", "", ()),
    Task("text", "words", "", ()),
    Task("multimodal", "questions", "", ()),
]
SCORES = {
    "first": {"frozen": Score((0.5,)), "tuned": Score((0.6, 0.8)), "words": Score((0.7, 0.9))},
    "second": {"frozen": Score((0.25,)), "questions": Score((0.5, 0.5))},
}


def settings(out, **changes):
    values = {
        **{"seeds": (0, 1), "steps": 7, "batch_size": 8, "records": 100, "examples": 50},
        **{"level": "easy", "rate": 0.5, "num_edges": 1, "selections": 1, "out": out},
    }
    return Settings(**{**values, **changes})


def test_averages_are_over_the_tasks_of_a_column_seed_by_seed():
    found = averages(SCORES["first"], TASKS)
    assert found == {"image": Score((0.55, 0.65)), "text": Score((0.7, 0.9))}
    assert averages(SCORES["second"], TASKS)["multimodal"] == Score((0.5, 0.5))


def test_a_score_is_told_with_its_spread_and_what_is_absent_as_such():
    assert told(None) == "–"
    assert told(Score((0.123,))) == "12.3"
    assert told(Score((0.6, 0.8))) == "70.0 ± 14.1"
    rows = rows_of(SCORES, TASKS)
    assert rows[0] == [
        "first",
        "50.0 ± 0.0",  # of what is frozen, which both have: tuned is the first alone
        "80.0 ± 14.1",
        "–",
        "50.0",
        "70.0 ± 14.1",
        "80.0 ± 14.1",
        "–",
    ]
    table = markdown_table(header_of(TASKS), rows).splitlines()
    assert table[0].startswith("| run | IMAGE | TEXT | MULTIMODAL | frozen |")
    assert len({line.count("|") for line in table}) == 1


@pytest.mark.parametrize("data", ["scenes", "pack"])
def test_every_task_has_a_config_that_knows_its_keys(tmp_path, data):
    """And each is told from the others by its name."""
    (tmp_path / "config.json").write_text(json.dumps({"data": {"image_size": 32}}))
    tasks = tasks_of(data, "GLUE", ["sst2", "mnli"])
    assert len({task.name for task in tasks}) == len(tasks)
    assert {task.column for task in tasks} == set(COLUMNS)
    for task in tasks:
        config = _config(task, tmp_path, settings(tmp_path), seed=3)
        check_keys(config)
        assert (config.seed, config.total_steps, config.init_from) == (3, 7, str(tmp_path))
        assert config.schedule.peak == 0.5
        expected = {"frozen"} if task.evaluator else {"val", "test"}
        expected |= {"mismatched"} if task.name == "mnli" else set()
        assert set(config.evals) <= expected
        if not task.frozen:
            assert {figure.split("/")[0] for figure in task.figures} == expected - {"val"}
        assert set(config.evals) & {"frozen", "test"}
        if data == "scenes" and task.column != "text":
            assert config.data.image_size == 32
            assert {section.level for section in config.data.sources.values()} == {"easy"}
    assert not [task for task in tasks_of(data, "", ["sst2"]) if task.column == "text"]


def test_what_is_fine_tuned_is_known_by_its_config_and_by_what_it_starts_from(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.json").write_text(json.dumps({"data": {"image_size": 32}}))
    (run / RUN_FILE).write_text("trained")
    [task] = chosen(tasks_of("scenes", "", []), ["classification"])

    def place(out="out", seed=0, **changes):
        how = settings(tmp_path / out, **changes)
        return _place(_config(task, run, how, seed), run, task, how).name

    first = place()
    assert place("elsewhere", helpers=3) == first
    others = {place(steps=8), place(rate=0.25), place(records=90), place(seed=1)}
    (run / RUN_FILE).write_text("trained further")
    assert len({first, *others, place()}) == 6


def test_a_test_split_that_has_an_end_is_scored_to_its_end(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.json").write_text(json.dumps({"data": {"image_size": 32}}))
    tasks = chosen(tasks_of("scenes", str(tmp_path), ["sst2"]), ["sst2", "vqa"])
    ends = {task.name: _config(task, run, settings(tmp_path), 0).evals.test for task in tasks}
    assert ends["sst2"].num_examples == 0
    assert ends["vqa"].num_examples == 50


def test_what_is_asked_must_be_there(tmp_path):
    tasks = tasks_of("scenes", "", [])
    assert [task.name for task in chosen(tasks, ["vqa", "neighbours"])] == ["neighbours", "vqa"]
    with pytest.raises(ValueError, match="--tasks: 'vqq' is none of neighbours, "):
        list(chosen(tasks, ["vqq"]))
    with pytest.raises(ConfigError, match="is no workdir of a run"):
        _config(tasks[0], tmp_path / "nothing", settings(tmp_path), seed=0)
