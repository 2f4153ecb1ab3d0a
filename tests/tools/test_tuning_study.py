"""A study of ways to tune: the order of its jobs, tables from records, and the rates it chose."""

import dataclasses
import json
import pathlib
from collections.abc import Collection

import pytest

from configs.transfer import nlvr2
from docs.results import pcetl, pcetl_ways
from tests.tools.bases import parameters
from tools.execution import _origin
from tools.jobs import Job, Places, Run, expected_seconds
from tools.tuning_study import TuningStudy, latency_key
from vlp_jax.train.config import check_keys

STUDY, FIRST = pcetl.study(), pcetl.first_base()
AROUND = pcetl.third()


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
    ways = {"adapter": AROUND.tuned("adapter"), "DAS 4": AROUND.searched({"skipped": 4})}
    study = TuningStudy(ways, {"vqa": ("test/accuracy",)}, STUDY.settings, ("adapter",))
    return study, {way: of("vqa", 0) for way, of in ways.items()}


@pytest.mark.parametrize("task", pcetl_ways.UPDATES)
def test_every_way_is_a_config_whose_search_fits_it(task: str) -> None:
    for way, of in STUDY.ways.items():
        run = of(task, 0)
        assert run is not None, way
        parent = run.parent.parent if run.eight else run.parent
        assert parent.key == pcetl_ways.base(seed=2).key
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
    other = AROUND.searched({"skipped": 2})("vqa", 0)
    assert other.config.to_json_best_effort() == das.config.to_json_best_effort()
    assert other.key != das.key


def test_what_has_no_score_of_its_own_waits_for_the_quickest_of_what_needs_it(small) -> None:
    study, runs = small
    das = runs["DAS 4"]
    wide = AROUND.searched({"skipped": 4}, updates=2.0)("vqa", 0)
    wide.config.name = "wide"
    assert das.search.key == wide.search.key
    eight = Run(das.config, das, eight=True)
    more = {"wide": lambda task, seed: wide, "eight": lambda task, seed: eight}
    study = dataclasses.replace(study, ways={**study.ways, **more})
    jobs = study.jobs(list(study.cells), [0], study.settings)
    found = {job.key: job for job in jobs}
    last, search, base = (found[run.key] for run in (das, das.search, das.parent))
    seconds = {search.name: 10.0, last.name: 70.0, "wide": 50.0, base.name: 5.0}
    seconds[found[eight.key].name] = 3.0
    assert len(seconds) == 5

    def expected(job: Job, known: Collection[str] = (), longest=seconds) -> float:
        return expected_seconds(job, jobs, dict.fromkeys(known), longest)

    assert expected(search) == 60.0
    assert expected(search, [wide.key]) == 80.0  # is not done again
    assert expected(search, longest={search.name: 10.0}) == 10.0  # of the others nothing is known
    assert expected(base) == 5.0  # nor of what is the first to need it
    assert expected(last) == 70.0  # a score by itself
    assert expected(last, [last.key]) == 73.0  # done again for the eight bits
    assert expected(found[eight.key]) == 3.0


def test_what_is_cut_is_made_once(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = []

    def fake(checkpoint, out, heads, mlp, **_):
        made.append((checkpoint, heads, mlp))
        out.write_text("weights")

    monkeypatch.setattr("tools.execution.prune_weights", fake)
    run = STUDY.run("pruned 17%", "vqa", 0)
    places, other = (Places(tmp_path, "", base=parameters(tmp_path, value)) for value in (0, 1))
    first, again = (_origin(run, places) for _ in range(2))
    assert first == again
    assert first.read_text() == "weights"
    assert made == [(places.workdir(run.parent), 1 / 6, 1 / 6)]
    assert _origin(STUDY.run("DAS 4", "vqa", 0), places) == places.workdir(run.parent)
    assert _origin(run.parent, places) is None
    assert _origin(run, other) != first  # cut out of another base


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
    other = AROUND.searched({"skipped": 4}, **{"schedule.peak": 1e-4})
    study = dataclasses.replace(study, ways={**study.ways, "other": other})
    known = {}
    for way, skipped in (("DAS 4", ["a", "b"]), ("other", ["b", "c"])):
        key = study.ways[way]("vqa", 0).search.key
        known[key] = {"search": {"skipped": skipped, "flops_saved": 0.1}}
    text = study.tables(known, [0])
    assert "| search | task | seeds | overlap | with DAS 4 | of the tuning's time |" in text
    assert "| DAS 4 | vqa | 1 | – | – | – |" in text
    assert "| other | vqa | 1 | – | 33 % | – |" in text


def test_what_follows_a_search_may_differ_and_the_search_is_the_same() -> None:
    second = pcetl.second_base()
    plain, wide, longer, higher = (
        second.run(f"DAS 4{how}", "vqa", 1) for how in ("", ", wide", ", longer", ", at 0.001")
    )
    assert {run.search.key for run in (plain, wide, longer, higher)} == {plain.search.key}
    assert higher.config.schedule.peak == 1e-3 != plain.config.schedule.peak
    assert second.run("adapter, at 0.001", "vqa", 0).config.schedule.peak == 1e-3
    assert second.run("DAS 4, wide", "vqa", 3) is None
    widths = [run.config.model.tuning.replacement for run in (plain, wide, longer)]
    assert widths == [-1, 3 * 384 // 8, -1]
    assert longer.config.total_steps == 1_800
    assert plain.config.total_steps == wide.config.total_steps == 1_500
    for run in (plain, wide, longer, higher):
        check_keys(run.config)


def test_references_leave_out_every_unit_alone_and_labels_are_worse_in_the_search_alone() -> None:
    alone = pcetl.alone()
    skipped = [of("vqa", 0).config.model.tuning.skip for of in alone.ways.values()]
    assert [unit for units in skipped for unit in units] == list(pcetl_ways.units())
    assert len(pcetl_ways.units()) == 16
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
    same = (study.ways["DAS 4"]("vqa", 0).key for study in (FIRST, pcetl.robustness()))
    assert len(set(same)) == 1


def test_the_lowest_rate_within_noise_of_the_best_is_taken_once_all_were_tried(
    tmp_path: pathlib.Path,
) -> None:
    rates = pcetl.rates()
    scores = {
        ("vqa", "lora"): (0.71, 0.74),  # of 2,000 questions: a standard error is 0.01
        ("vqa", "adapter"): (0.60, 0.735, 0.74),
        ("retrieval", "full"): (0.69, 0.70),  # of 500 pictures: 0.02
        ("retrieval", "head"): (0.6, 0.7),
        ("nlvr2", "head"): (0.5,),
        ("nlvr2", "adapter"): ((0.70, 0.69), (0.74, 0.70)),  # of two seeds as of one
        ("nlvr2", "scaled_parallel"): ((0.71, 0.71), (0.74,)),
    }
    lines = []
    for (task, method), found in scores.items():
        for rate, seeds in zip(pcetl_ways.TRIED[method][task], found, strict=False):
            for seed, score in enumerate(seeds if isinstance(seeds, tuple) else (seeds,)):
                run = rates.run(f"{task}, {method}, {rate:g}", task, seed)
                metrics = dict.fromkeys(pcetl_ways.VALIDATED[task], score)
                lines.append(json.dumps({**record(run, 0), "metrics": metrics}))
    archive = tmp_path / "archive.jsonl"
    archive.write_text("\n".join(lines) + "\n")
    taken = [("vqa", "lora", 1), ("vqa", "adapter", 1), ("retrieval", "full", 0)]
    taken += [("retrieval", "head", 1), ("nlvr2", "adapter", 1)]
    expected: dict[str, dict[str, float]] = {}
    for task, method, index in taken:
        expected.setdefault(method, {})[task] = pcetl_ways.TRIED[method][task][index]
    assert pcetl.choose(archive, rates) == expected
    # What was not tried whole stays as it was.
    before = {"adapter": {"vqa": 0.5, "retrieval": 0.25}, "head": {"nlvr2": 0.125}}
    after = pcetl.chosen_anew(archive, rates, before)
    assert after["adapter"] == expected["adapter"] | {"retrieval": 0.25}
    assert after["head"] == expected["head"] | {"nlvr2": 0.125}
    assert after["lora"] == expected["lora"]
    assert after["bitfit"] == {}


def test_rates_are_tried_on_their_task_alone_and_taken_by_it() -> None:
    rates = pcetl.rates()
    tried = [(way, task) for way in rates.ways for task in rates.figures if rates.run(way, task, 0)]
    assert len(tried) == len(rates.ways) == 51
    assert all(way.startswith(f"{task}, ") for way, task in tried)
    twice = [way for way in rates.ways if rates.run(way, "nlvr2", 1)]
    assert twice == [
        f"nlvr2, {method}, {rate:g}"
        for method in pcetl_ways.TRIED_SEEDS
        for rate in pcetl_ways.TRIED[method]["nlvr2"]
    ]
    chosen = {"adapter": {"vqa": 0.5, "nlvr2": 0.25}, "scaled_parallel": {"vqa": 0.125}}
    around = pcetl_ways.Around(pcetl_ways.base(), chosen)
    untold = pcetl_ways.TRIED["adapter"]["retrieval"][1]
    runs = {task: around.searched({"skipped": 4})(task, 0) for task in pcetl_ways.UPDATES}
    peaks = {task: run.config.schedule.peak for task, run in runs.items()}
    assert peaks == {"vqa": 0.5, "nlvr2": 0.25, "retrieval": untold}
    assert peaks == {task: run.search.config.schedule.peak for task, run in runs.items()}
    parallel = around.searched({"skipped": 4}, "scaled_parallel")("vqa", 0)
    assert parallel.config.schedule.peak == 0.125
    assert parallel.search.config.schedule.peak == 0.5  # a search has that of adapters


def test_more_units_are_drawn_at_random_than_other_ways_have_seeds() -> None:
    draws = range(pcetl_ways.DRAWS)
    made = {way: [FIRST.run(way, "vqa", seed) for seed in draws] for way in FIRST.ways}
    draws = made.pop("random 4")
    assert len({run.search.config.seed for run in draws}) == 6
    assert [run.config.seed for run in draws] == list(range(6))
    assert set(pcetl_ways.CLOSE) < set(made)
    for way, runs in made.items():
        seeds = 5 if way in pcetl_ways.CLOSE else 3
        assert [run is None for run in runs] == [False] * seeds + [True] * (6 - seeds)
    assert FIRST.run("adapter", "retrieval", 3) is None  # more of VQA alone
    assert STUDY.run("adapter", "vqa", 3) is None
    assert STUDY.run("random 4", "vqa", 5) is not None


def test_what_is_timed_and_done_around_a_second_base_differs_by_its_base_alone() -> None:
    timed, second = pcetl.timed(), pcetl.second_base()
    assert {run.parent.config.total_steps for run in runs_of(timed)} == {1}
    assert {run.root.key for run in runs_of(second)} == {pcetl_ways.base(seed=1).key}
    assert {run.root.key for run in runs_of(FIRST)} == {pcetl_ways.base(seed=0).key}
    for tried, seed in ((pcetl.rates(), 2), (pcetl.first_rates(), 0)):
        found = [tried.run(way, task, 0) for way in tried.ways for task in tried.figures]
        assert {run.parent.key for run in found if run} == {pcetl_ways.base(seed=seed).key}
    for study in (timed, second):
        for way, run in zip(study.ways, runs_of(study), strict=True):
            if way not in FIRST.ways:
                continue
            whole = FIRST.run(way, "vqa", 0)
            assert run.parent.key != whole.parent.key
            pairs = [(run, whole)]
            if run.search is not None:
                assert run.search.parent.key == run.parent.key
                pairs.append((run.search, whole.search))
            for one, other in pairs:
                assert one.config.to_json_best_effort() == other.config.to_json_best_effort()


def test_heads_of_nlvr2_are_as_fast_as_what_is_tuned_but_where_that_is_measured() -> None:
    for way in ("adapter", "DAS 4"):
        plain, faster = (of.run(way, "nlvr2", 0) for of in (STUDY, pcetl.faster_heads()))
        factors = [run.config.optim.groups.heads.rate_factor for run in (plain, faster)]
        assert factors == [1.0, 5.0]
        faster.config.optim.groups.heads.rate_factor = 1.0
        assert faster.config.to_json_best_effort() == plain.config.to_json_best_effort()
        assert plain.search is None or plain.search.key == faster.search.key
    assert STUDY.run("full", "nlvr2", 0).config.optim.groups.heads.rate_factor == 5.0


@pytest.mark.parametrize(("method", "rate"), [("full", 1e-4), ("head", 1e-4), ("lora", 3e-4)])
def test_rates_of_nlvr2_are_those_of_what_is_tuned(method: str, rate: float) -> None:
    config = nlvr2.get_config(f"scenes,small,{method}")
    assert config.schedule.peak == rate
    assert config.optim.groups.heads.rate_factor == (1.0 if method == "lora" else 5.0)


def runs_of(study: TuningStudy) -> list[Run]:
    """Of VQA with seed 0."""
    return [study.run(way, "vqa", 0) for way in study.ways]
