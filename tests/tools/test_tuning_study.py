"""A study of ways to tune: the order of its jobs, tables from records, and the rates it chose."""

import json
import pathlib

import pytest
from ml_collections import ConfigDict

from docs.results import pcetl
from tools.jobs import Run
from tools.tuning_study import TuningStudy
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


def test_tables_tell_scores_differences_and_choices(small) -> None:
    study, _ = small
    known = {}
    for seed, (plain, cut) in enumerate([(0.70, 0.69), (0.72, 0.72), (0.74, 0.72)]):
        adapter, das = (of("vqa", seed) for of in study.ways.values())
        search = {"search": {"flops_saved": 0.12, "skipped": ["text_lower_0", "text_upper_3"]}}
        records = [
            record(adapter, plain),
            record(das, cut, 0.12),
            {**record(das.search, 0), **search},
        ]
        known |= {one["job"]: one for one in records}
    text = study.tables(known, range(3))
    assert "| adapter | 2.00M | 3.000 | +0.0 % | 20.0 | 72.0 ± 2.0 (3) | 72.0 ± 2.0 (3) |" in text
    assert "| DAS 4 | 2.00M | 2.640 | -12.0 % | 20.0 | 71.0 ± 1.7 (3) |" in text
    assert "| DAS 4 | -1.0 ± 0.6 (3) | -1.0 ± 0.6 (3) |" in text
    assert "| DAS 4 | vqa | 2 | 12.0 % | text_lower_0, text_upper_3 |" in text


def test_the_rate_that_scores_best_is_taken_once_all_were_tried(tmp_path: pathlib.Path) -> None:
    rates = pcetl.rates()
    scores = {"lora": (0.71, 0.74), "head": (0.5,)}
    lines = []
    for method, found in scores.items():
        for rate, score in zip(pcetl.TRIED[method], found, strict=False):
            run = rates.ways[f"{method}, {rate:g}"]("vqa", 0)
            lines.append(json.dumps({"job": run.key, "metrics": {"val/accuracy": score}}))
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
