"""The front of a study, and its plot."""

import json
import pathlib
from typing import Any

import pytest
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from docs.results import pcetl, pcetl_ways
from tools import pareto
from tools.compare.plot import PALETTE
from tools.jobs import Run
from tools.pareto import draw, front, lowest_shown, styles
from tools.tuning_study import Point, TuningStudy, latency_key


def test_the_front_is_what_nothing_cheaper_or_as_cheap_beats() -> None:
    #            0          1          2          3          4          5
    points = [(3.0, 5.0), (1.0, 2.0), (2.0, 1.0), (1.0, 1.0), (2.0, 4.0), (4.0, 5.0)]
    assert front(points) == [1, 4, 0]
    assert front([]) == []


def test_all_ways_of_one_task_are_in_the_legend(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    figures: list[Figure] = []

    def figure(**size: Any) -> Figure:
        figures.append(Figure(**size))
        return figures[0]

    monkeypatch.setattr(pareto, "Figure", figure)
    ways = pcetl.study().ways
    draw([point(way, "a", 0.7, 0.0) for way in ways], ["a"], tmp_path / "pareto.png")
    FigureCanvasAgg(figures[0]).draw()
    [legend] = figures[0].legends
    assert len(legend.get_texts()) == len(ways)
    assert legend.get_window_extent().y0 > 0


def test_a_run_that_failed_does_not_flatten_the_others() -> None:
    assert lowest_shown([0.80, 0.79, 0.78, 0.75, 0.2]) == pytest.approx(0.72)
    assert lowest_shown([0.80, 0.80, 0.80, 0.79, 0.2]) == pytest.approx(0.74)
    assert lowest_shown([0.8, 0.7, 0.6]) == 0.6
    assert lowest_shown([0.7]) == 0.7


def test_relatives_have_one_colour_and_no_two_ways_look_alike() -> None:
    found = styles(["full", "head", "DAS 2", "random 4", "DAS 4, int8", "full, int8"])
    colour = {way: of for way, (of, _) in found.items()}
    assert colour["full"] == colour["full, int8"] != colour["DAS 2"] == colour["DAS 4, int8"]
    assert colour["head"] == colour["random 4"]
    assert len(set(colour.values())) == 3
    assert set(colour.values()) <= set(PALETTE)
    ways = list(pcetl.study().ways)
    assert len(set(styles(ways).values())) == len(ways)


def point(way: str, task: str, score: float, share: float, **times: float) -> Point:
    return Point(way, task, {0: score, 1: score + 0.02}, 1e6, 1e9, share, None, times)


def test_every_task_has_axes_of_every_cost(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    panels: list[tuple[int, list[float]]] = []
    plain = pareto._panel

    def panel(axes, points, cost, ways):
        panels.append((len(points), [cost(one) for one in points]))
        plain(axes, points, cost, ways)

    monkeypatch.setattr(pareto, "_panel", panel)
    points = [
        point("full", "a", 0.7, 0.0, **{"1": 0.0, "64": 0.0}),
        point("DAS", "a", 0.6, -0.2, **{"1": -0.1, "64": -0.15}),
        point("LoRA", "b", 0.5, 0.0),  # of one task alone, and not measured yet
    ]
    file = tmp_path / "plots" / "pareto.png"
    draw(points, ["a", "b", "never run"], file)
    assert file.read_bytes().startswith(b"\x89PNG")
    assert panels == [
        (2, [0.0, -0.2]),
        (2, [0.0, -0.1]),
        (2, [0.0, -0.15]),
        (1, [0.0]),
        (1, [None]),
        (1, [None]),
    ]


def test_what_is_far_below_stands_at_the_edge_as_a_number(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    panels: list[Axes] = []
    plain = pareto._panel

    def panel(axes, *rest):
        panels.append(axes)
        plain(axes, *rest)

    monkeypatch.setattr(pareto, "_panel", panel)
    scores = {"full": 0.80, "DAS 2": 0.79, "DAS 4": 0.78, "DAS 6": 0.75, "head": 0.2}
    costs = {"DAS 2": -0.1, "DAS 4": -0.2, "DAS 6": -0.3}
    points = [point(way, "a", score, costs.get(way, 0.0)) for way, score in scores.items()]
    draw(points, ["a"], tmp_path / "pareto.png")
    [axes] = panels
    low, high = axes.get_ylim()
    assert 70 < low < 74
    assert 81 < high < 84
    told = {text.get_text(): text.xy for text in axes.texts if text.get_text()}
    assert told["21"] == (0.0, low)
    assert set(told) == {"21", "full", "DAS 2", "DAS 4", "DAS 6"}  # the front, by name
    drawn = {line.get_label(): line[0].get_ydata()[0] for line in axes.containers}
    assert drawn["head"] == low
    assert drawn["full"] == pytest.approx(81.0)


def test_a_study_is_drawn_from_its_archive(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run: Run = pcetl.third().tuned("adapter")("vqa", 0)
    figures = {"vqa": ("test/accuracy",)}
    study = TuningStudy(
        {"adapter": pcetl.third().tuned("adapter")}, figures, pcetl_ways.SETTINGS, ()
    )
    monkeypatch.setattr(pcetl, "study", lambda: study)
    costs = {"without_heads_parameters": 1, "forward_flops": 2.0, "extra_share": 0.1}
    costs["update_seconds"] = 0.1
    records = [
        {"job": run.key, "metrics": {"test/accuracy": 0.7}, "costs": [costs]},
        {"job": latency_key(run.key), "ms": {"1": 1.1}, "first_ms": {"1": 1.0}},
    ]
    archive, out = tmp_path / "archive.jsonl", tmp_path / "pareto.png"
    arguments = ["docs.results.pcetl", f"--archive={archive}", f"--out={out}"]
    with pytest.raises(SystemExit):
        pareto.main(arguments)
    assert "run tools.compare_stages first" in capsys.readouterr().err
    archive.write_text("".join(json.dumps(record) + "\n" for record in records))
    pareto.main(arguments)
    assert out.exists()
    with pytest.raises(SystemExit):
        pareto.main([*arguments[:2], "--out=pareto.pdf"])
    assert "name a file .png" in capsys.readouterr().err
