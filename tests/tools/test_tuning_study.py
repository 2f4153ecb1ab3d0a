"""A study of ways to tune: the order of its jobs, tables from records, and the rates it chose."""

import dataclasses
import json
import pathlib

import pytest
from ml_collections import ConfigDict

from docs.results import pcetl
from tools.jobs import Run
from tools.tuning_study import TuningStudy, latency_key
from vlp_jax.train.config import check_keys

STUDY = pcetl.study()


def record(run: Run, score: float, saved: float = 0.0) -> dict:
    costs = {
        "without_heads_parameters": 2_000_000,
        "forward_flops": 3e9 * (1 - saved),
        "extra_share": -saved,
        "update_seconds": 0.02,
    }
    return {"job": run.key, "metrics": {"test/accuracy": score}, "costs": [costs]}


@pytest.fixture(scope="module")
def small() -> tuple[TuningStudy, dict[str, Run]]:
    """Two ways of one task; what is chosen comes from a search."""
    ways = {"adapter": pcetl.tuned("adapter"), "DAS 4": pcetl.searched({"skipped": 4})}
    study = TuningStudy(ways, {"vqa": ("test/accuracy",)}, STUDY.settings, ("adapter",))
    return study, {way: of("vqa", 0) for way, of in ways.items()}


@pytest.mark.parametrize("task", pcetl.UPDATES)
def test_every_way_is_a_config_whose_search_fits_it(task: str) -> None:
    for way, of in STUDY.ways.items():
        run = of(task, 0)
        assert run is not None
        parent = run.parent.parent if run.eight else run.parent
        assert parent.key == pcetl.base().key
        check_keys(run.config)
        assert not run.config.search.method
        if run.search is None:
            continue
        check_keys(run.search.config)
        assert run.search.parent.key == run.parent.key
        assert run.search.config.search.method, way
        assert run.search.config.model.tuning.gated == ("all",)
        # What is searched is what is tuned afterwards.
        kinds = [one.config.model.tuning.adapter for one in (run, run.search)]
        assert kinds[0] == kinds[1]


def test_jobs_come_after_what_they_need(small) -> None:
    study, runs = small
    jobs = study.jobs(list(study.cells), range(2), study.settings)
    keys = [job.key for job in jobs]
    assert len(keys) == len(set(keys)) == 1 + 2 * 3  # base; of a seed adapter, search, what follows
    for job in jobs:
        assert not job.needs or keys.index(job.needs) < keys.index(job.key)
    das = runs["DAS 4"]
    [last] = [job for job in jobs if job.key == das.key]
    assert last.needs == das.search.key
    # Another search is another run, though the config is the same.
    other = pcetl.searched({"skipped": 2})("vqa", 0)
    assert other.config.to_json_best_effort() == das.config.to_json_best_effort()
    assert other.key != das.key


def test_tables_tell_scores_costs_differences_and_choices(small) -> None:
    study, _ = small
    known = {}
    sets = [("text_lower_0", "text_upper_3"), ("text_lower_0", "text_upper_3"), ("text_lower_0",)]
    for seed, (plain, cut) in enumerate([(0.70, 0.69), (0.72, 0.72), (0.74, 0.72)]):
        adapter, das = (of("vqa", seed) for of in study.ways.values())
        search = {"search": {"flops_saved": 0.12, "skipped": sets[seed]}}
        times = {"training_seconds": 8.0, "decisions_seconds": 2.0}
        after = {"run": {"training_seconds": 50.0, "decisions_seconds": None}}
        ms = {"ms": {"1": 0.9, "64": 8.0}, "first_ms": {"1": 1.0, "64": 10.0}}
        records = [
            record(adapter, plain),
            {**record(das, cut, 0.12), **after},
            {**record(das.search, 0), **search, "run": times},
            {"job": latency_key(das.key), **ms},
        ]
        known |= {one["job"]: one for one in records}
    text = study.tables(known, range(3))
    assert "| vqa | trained | GFLOPs | FLOPs | time, 1 | time, 64 | ms/update | score |" in text
    assert "| adapter | 2.00M | 3.000 | +0.0 % | – | – | 20.0 | 72.0 ± 2.0 (3) |" in text
    assert "| DAS 4 | 2.00M | 2.640 | -12.0 % | -10.0 % | -20.0 % | 20.0 | 71.0 ± 1.7 (3)" in text
    assert "| DAS 4 | -1.0 ± 0.6 (3) |" in text
    # Of the pairs of sets one is the same, two share half.
    assert "| DAS 4 | vqa | 3 | 67 % | – | 20 % |" in text
    assert "| DAS 4 | vqa | 2 | 12.0 % | text_lower_0 |" in text


def test_choices_are_compared_with_those_of_the_first_search(small) -> None:
    study, _ = small
    other = pcetl.searched({"skipped": 4}, **{"schedule.peak": 1e-4})
    study = dataclasses.replace(study, ways={**study.ways, "other": other})
    known = {}
    for way, skipped in (("DAS 4", ["a", "b"]), ("other", ["b", "c"])):
        key = study.ways[way]("vqa", 0).search.key
        known[key] = {"search": {"skipped": skipped, "flops_saved": 0.1}}
    text = study.tables(known, [0])
    assert "| search | task | seeds | overlap | with DAS 4 | of the tuning's time |" in text
    assert "| DAS 4 | vqa | 1 | – | – | – |" in text
    assert "| other | vqa | 1 | – | 33 % | – |" in text


def test_references_leave_out_every_unit_alone_and_labels_are_worse_in_the_search_alone() -> None:
    alone = pcetl.alone()
    skipped = [of("vqa", 0).config.model.tuning.skip for of in alone.ways.values()]
    assert [unit for units in skipped for unit in units] == list(pcetl.units())
    assert len(pcetl.units()) == 16
    for of in pcetl.robustness().ways.values():
        run = of("vqa", 0)
        check_keys(run.search.config)
        assert "label_noise" not in run.config.data.sources.questions
    worse = [of("vqa", 0).search.config for of in pcetl.robustness().ways.values()]
    assert {config.data.sources.questions.get("label_noise") for config in worse} == {
        None,
        0.1,
        0.3,
    }
    # Without worse labels it is the search of the study, done once.
    same = (study.ways["DAS 4"]("vqa", 0).key for study in (STUDY, pcetl.robustness()))
    assert len(set(same)) == 1


def test_the_rate_that_scores_best_is_taken_once_all_were_tried(tmp_path: pathlib.Path) -> None:
    rates = pcetl.rates()
    scores = {"lora": (0.71, 0.74), "head": (0.5,)}
    lines = []
    for method, found in scores.items():
        for rate, score in zip(pcetl.TRIED[method], found, strict=False):
            run = rates.ways[f"{method}, {rate:g}"]("vqa", 0)
            lines.append(json.dumps({**record(run, 0), "metrics": {"val/accuracy": score}}))
    archive = tmp_path / "archive.jsonl"
    archive.write_text("\n".join(lines) + "\n")
    assert pcetl.choose(archive) == {"lora": pcetl.TRIED["lora"][1]}


def test_random_draws_differ_by_draw_and_seed() -> None:
    seeds = {
        STUDY.ways[f"random 4, draw {draw}"]("vqa", seed).search.config.seed
        for draw in range(5)
        for seed in range(3)
    }
    assert len(seeds) == 15
    config: ConfigDict = STUDY.ways["random 4, draw 0"]("vqa", 0).config
    assert config.seed == 0
