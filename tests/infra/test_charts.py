import math
import re

import pytest

from vlp_jax.infra import charts
from vlp_jax.infra.charts import Series


def _points(path: str) -> list[tuple[float, float]]:
    return [(float(x), float(y)) for x, y in re.findall(r"[ML]([\d.]+),(-?[\d.]+)", path)]


def test_line_runs_from_corner_to_corner() -> None:
    points = [(float(x), x / 10) for x in range(11)]
    chart = charts.line_chart("Accuracy", "accuracy", [Series("", points)])
    assert _points(chart.lines[0].path)[0] == (0, 1000)
    assert _points(chart.lines[0].path)[-1] == (1000, 0)
    assert [tick.label for tick in chart.y_ticks] == ["0 %", "25 %", "50 %", "75 %", "100 %"]
    assert [tick.position for tick in chart.y_ticks] == [100, 75, 50, 25, 0]
    assert chart.summary == "Accuracy over step: Accuracy from 0.0 % to 100.0 %"


def test_ticks_match_the_lines_on_a_logarithmic_axis() -> None:
    points = [(float(x), 10.0 ** (2 - x)) for x in range(5)]
    chart = charts.line_chart("Loss", "train/loss", [Series("", points)])
    assert "logarithmic axis" in chart.notes
    heights = [y / 10 for _, y in _points(chart.lines[0].path)]
    assert [tick.label for tick in chart.y_ticks] == ["0.01", "0.1", "1", "10", "100"]
    assert [tick.position for tick in reversed(chart.y_ticks)] == pytest.approx(heights, abs=0.1)


def test_non_finite_values_interrupt_the_line() -> None:
    points = [(0.0, 1.0), (1.0, 2.0), (2.0, math.nan), (3.0, math.inf), (4.0, 1.0)]
    chart = charts.line_chart("t", "train/loss", [Series("", points)])
    assert chart.lines[0].path.count("M") == 2
    assert "nan" not in chart.lines[0].path
    assert "2 non-finite values left out" in chart.notes


@pytest.mark.parametrize("values", [[3.0], [0.0, 0.0], [-5.0, -5.0], [1e-12, 2e-12], [1e12, 3e12]])
@pytest.mark.parametrize("name", ["loss", "accuracy", "gap", "bytes", "seconds", "a_per_second"])
def test_every_range_has_ticks_inside(name: str, values: list[float]) -> None:
    chart = charts.line_chart("t", name, [Series("", list(enumerate(values)))])
    assert chart.x_ticks
    assert chart.y_ticks
    for tick in (*chart.x_ticks, *chart.y_ticks):
        assert -0.01 <= tick.position <= 100.01
    for _, y in _points(chart.lines[0].path):
        assert 0 <= y <= charts.EXTENT


def test_thinning_keeps_the_mean_and_the_end() -> None:
    points = [(float(x), float(x % 7)) for x in range(1000)]
    thinned = charts.thin(points, 200)
    assert len(thinned) == 200
    assert thinned[-1][0] == 999
    mean = sum(y for _, y in points) / 1000
    assert sum(y for _, y in thinned) / 200 == pytest.approx(mean)


def test_only_a_noisy_line_is_smoothed() -> None:
    smooth = [(float(x), x * x / 100) for x in range(100)]
    noisy = [(x, y + 5 * (-1) ** int(x)) for x, y in smooth]
    chart = charts.line_chart("t", "t", [Series("a", smooth), Series("b", noisy)])
    assert [bool(line.raw) for line in chart.lines] == [False, True]
    # The legend tells the value itself, not its average.
    assert chart.lines[1].last == "93.01"


def test_bars_are_drawn_against_the_whole() -> None:
    bars = charts.bars("gap", [("a", 50.0), ("b", -25.0), ("c", math.nan)])
    assert [bar.width for bar in bars] == [50, 25, 0]
    assert [bar.negative for bar in bars] == [False, True, False]
    bars = charts.bars("seconds", [("a", 2.0), ("b", 4.0)])
    assert [bar.width for bar in bars] == [50, 100]
