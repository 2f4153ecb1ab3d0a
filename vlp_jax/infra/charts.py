"""Line charts for HTML: axes, ticks and paths as plain numbers, drawn by a template.

Paths fill a square of `EXTENT` units that the page stretches to any width with strokes of constant
thickness; ticks are positions in percent beside which the page writes ordinary text. So a chart
stays crisp and its labels keep their size on a phone and on a wide screen, without a script.
"""

import dataclasses
import itertools
import math
from collections.abc import Sequence

from vlp_jax.infra import units
from vlp_jax.infra.units import Unit

EXTENT = 1000  # side of the drawing square, in units
MAX_POINTS = 240  # a chart is a few hundred pixels wide; more points are averaged in groups
MARKED_POINTS = 16  # up to as many points are marked one by one
COLOURS = 8  # colours of the palette, reused beyond

# Spans of more than one and a half decades are read better on a logarithmic axis; only quantities
# of which ratios matter get one.
LOG_WORDS = frozenset({"loss", "norm", "perplexity"})
LOG_RATIO = 30.0

Points = Sequence[tuple[float, float]]


@dataclasses.dataclass(frozen=True)
class Series:
    """One line to draw.

    Attributes:
        label: its name in the legend.
        points: (x, y), x ascending; a non-finite y interrupts the line.
        colour: index into the palette.
        dashed: drawn dashed, as a variant of the solid line of that colour.
    """

    label: str
    points: Points
    colour: int = 0
    dashed: bool = False


@dataclasses.dataclass(frozen=True)
class Tick:
    """A label at ``position`` percent from the left, or from the top."""

    position: float
    label: str


@dataclasses.dataclass(frozen=True)
class Line:
    """A series as drawn.

    Attributes:
        label: its name in the legend.
        colour: index into the palette.
        dashed: whether the stroke is dashed.
        path: SVG path of the line, averaged where ``raw`` is given.
        raw: SVG path of the values themselves, drawn faintly; empty where ``path`` shows them.
        dots: SVG path of zero-length strokes that mark the points; empty for many points.
        last: the last value, with its unit.
    """

    label: str
    colour: int
    dashed: bool
    path: str
    raw: str
    dots: str
    last: str


@dataclasses.dataclass(frozen=True)
class Chart:
    """A line chart, ready to be drawn.

    Attributes:
        title: heading.
        x_label: what x counts.
        summary: the chart in words, for those who do not see it.
        lines: the series.
        x_ticks: ticks from the left.
        y_ticks: ticks from the top.
        zero: position of y = 0 from the top in percent, if it lies inside the plot.
        notes: short remarks, such as that the axis is logarithmic.
        hover: for the script: the x domain, and for each line x and the values as text.
    """

    title: str
    x_label: str
    summary: str
    lines: tuple[Line, ...]
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]
    zero: float | None
    notes: tuple[str, ...]
    hover: dict[str, object]


@dataclasses.dataclass(frozen=True)
class Bar:
    """A labelled bar: ``width`` in percent of the space, ``text`` the value with its unit."""

    label: str
    text: str
    width: float
    negative: bool


def line_chart(title: str, name: str, series: Sequence[Series], x_label: str = "step") -> Chart:
    """Lays out a chart.

    Args:
        title: heading.
        name: metric name that implies the unit of y and the kind of axis, see `units.unit_of`.
        series: at least one, each with points, and with a finite point between them.
        x_label: what x counts.
    """
    lasts = [item.points[-1][1] for item in series]
    gaps = sum(not math.isfinite(y) for item in series for _, y in item.points)
    series = [dataclasses.replace(item, points=thin(item.points)) for item in series]
    xs = [x for item in series for x, _ in item.points]
    ys = [y for item in series for _, y in item.points if math.isfinite(y)]
    x_axis = _Axis(min(xs), max(xs), logarithmic=False)
    y_axis = _y_axis(name, ys)
    lines = tuple(
        _line(item, units.format_value(name, last), x_axis, y_axis)
        for item, last in zip(series, lasts, strict=True)
    )
    notes = []
    if y_axis.logarithmic:
        notes.append("logarithmic axis")
    if any(line.raw for line in lines):
        notes.append("faint: before smoothing")
    if gaps:
        notes.append(f"{gaps} non-finite {'value' if gaps == 1 else 'values'} left out")
    unit = units.unit_of(name)
    zero = 100 - 100 * y_axis.place(0) if not y_axis.logarithmic and y_axis.low < 0 else None
    return Chart(
        title=title,
        x_label=x_label,
        summary=_summary(title, x_label, name, series),
        lines=lines,
        x_ticks=tuple(Tick(100 * x_axis.place(x), _short(x)) for x in x_axis.ticks(5)),
        y_ticks=tuple(
            Tick(100 - 100 * y_axis.place(y), label) for y, label in _y_labels(y_axis, unit)
        ),
        zero=zero,
        notes=tuple(notes),
        hover={
            "domain": [x_axis.low, x_axis.high],
            "lines": [
                {
                    "x": [x for x, _ in item.points],
                    "text": [units.format_value(name, y) for _, y in item.points],
                }
                for item in series
            ],
        },
    )


def sparkline(points: Points) -> str:
    """SVG path of ``points`` in the drawing square, without axes; empty for fewer than two."""
    finite = [(x, y) for x, y in thin(points, 60) if math.isfinite(y)]
    if len(finite) < 2:
        return ""
    xs, ys = zip(*finite, strict=True)
    x_axis = _Axis(min(xs), max(xs), logarithmic=False)
    return _path(finite, x_axis, _Axis(min(ys), max(ys), logarithmic=False))


def bars(name: str, values: Sequence[tuple[str, float]]) -> tuple[Bar, ...]:
    """Lays out labelled bars; fractions and points are drawn against 100 %.

    Args:
        name: metric name that implies the unit.
        values: (label, value); a non-finite value gets no bar.
    """
    finite = [abs(value) for _, value in values if math.isfinite(value)]
    whole = {"percent": 1.0, "points": 100.0}.get(units.unit_of(name), 0.0)
    full = max([whole, *finite]) or 1.0
    return tuple(
        Bar(
            label=label,
            text=units.format_value(name, value),
            width=100 * abs(value) / full if math.isfinite(value) else 0.0,
            negative=value < 0,
        )
        for label, value in values
    )


def thin(points: Points, most: int = MAX_POINTS) -> list[tuple[float, float]]:
    """At most ``most`` points: means of consecutive groups of one size, each at its last x."""
    if len(points) <= most:
        return list(points)
    size = -(-len(points) // most)
    groups = [points[start : start + size] for start in range(0, len(points), size)]
    # A non-finite value makes its group's mean non-finite, so that it stays visible as a gap.
    return [(group[-1][0], sum(y for _, y in group) / len(group)) for group in groups]


@dataclasses.dataclass(frozen=True)
class _Axis:
    """A linear or logarithmic scale from ``low`` to ``high``."""

    low: float
    high: float
    logarithmic: bool

    def place(self, value: float) -> float:
        """Where ``value`` lies, from 0 at ``low`` to 1 at ``high``."""
        low, high = self.low, self.high
        if self.logarithmic:
            low, high, value = math.log(low), math.log(high), math.log(value)
        return 0.5 if high == low else (value - low) / (high - low)

    def ticks(self, count: int) -> list[float]:
        """About ``count`` round values on the axis."""
        if self.logarithmic:
            return self._log_ticks()
        if self.high == self.low:
            return [self.low]
        step = _round_step((self.high - self.low) / count)
        first, last = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
        return [index * step for index in range(first, last + 1)]

    def _log_ticks(self) -> list[float]:
        decades = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
        multiples = (1, 2, 5) if len(decades) <= 3 else (1,)
        ticks = [multiple * 10.0**decade for decade in decades for multiple in multiples]
        return [tick for tick in ticks if self.low <= tick * 1.0001 and tick <= self.high * 1.0001]


def _y_axis(name: str, ys: Sequence[float]) -> _Axis:
    """The scale of y: from zero unless that would flatten the lines, with some air above."""
    low, high = min(ys), max(ys)
    if units.unit_word(name) in LOG_WORDS and low > 0 and high / low > LOG_RATIO:
        return _Axis(low / 1.15, high * 1.15, logarithmic=True)
    if units.unit_of(name) or low < 0.4 * high:
        low, high = min(low, 0.0), max(high, 0.0)
    air = 0.06 * (high - low) or 0.06 * abs(high) or 1.0
    if units.unit_of(name) == "percent" and high <= 1:
        high = min(high + air, 1.0)
    else:
        high += air
    return _Axis(low - air if low != 0 else 0.0, high, logarithmic=False)


def _round_step(step: float) -> float:
    """The next of 1, 2, 2.5, 5 times a power of ten that is at least ``step``."""
    power = 10.0 ** math.floor(math.log10(step))
    factors = (1, 2, 2.5, 5, 10)
    return next(factor * power for factor in factors if factor * power >= step * 0.999999)


def _y_labels(axis: _Axis, unit: Unit) -> list[tuple[float, str]]:
    ticks = axis.ticks(4)
    if unit == "bytes":
        return [(tick, units.format_bytes(tick)) for tick in ticks]
    scale = 100 if unit == "percent" else 1
    suffix = {"percent": " %", "seconds": " s"}.get(unit, "")
    if axis.logarithmic or len(ticks) < 2:
        return [(tick, _short(tick * scale) + suffix) for tick in ticks]
    step = scale * (ticks[1] - ticks[0])
    if step < 5e-4 or scale * ticks[-1] >= 1e4:
        return [(tick, _short(tick * scale) + suffix) for tick in ticks]
    digits = next(count for count in range(6) if math.isclose(round(step, count), step))
    return [(tick, f"{tick * scale:,.{digits}f}{suffix}".replace("-", "−")) for tick in ticks]


def _short(value: float) -> str:
    """A tick label in few characters: 500, 12k, 1.5M, 0.01, 3e−4."""
    for scale, suffix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= 10 * scale or (scale > 1e3 and abs(value) >= scale):
            return f"{value / scale:.4g}{suffix}".replace("-", "−")
    if value != 0 and abs(value) < 1e-3:
        mantissa, exponent = f"{value:.1e}".split("e")
        return f"{mantissa.removesuffix('.0')}e{int(exponent)}".replace("-", "−")
    return f"{value:,.4g}".replace("-", "−")


def _line(series: Series, last: str, x_axis: _Axis, y_axis: _Axis) -> Line:
    smooth = _moving_average(series.points) if _is_noisy(series.points) else []
    marked = len(series.points) <= MARKED_POINTS
    return Line(
        label=series.label,
        colour=series.colour % COLOURS,
        dashed=series.dashed,
        path=_path(smooth or series.points, x_axis, y_axis),
        raw=_path(series.points, x_axis, y_axis) if smooth else "",
        dots=_dots(series.points, x_axis, y_axis) if marked else "",
        last=last,
    )


def _path(points: Points, x_axis: _Axis, y_axis: _Axis) -> str:
    commands, pen_down = [], False
    for x, y in points:
        if math.isfinite(y):
            commands.append(f"{'L' if pen_down else 'M'}{_position(x, y, x_axis, y_axis)}")
        pen_down = math.isfinite(y)
    return "".join(commands)


def _dots(points: Points, x_axis: _Axis, y_axis: _Axis) -> str:
    finite = [(x, y) for x, y in points if math.isfinite(y)]
    return "".join(f"M{_position(x, y, x_axis, y_axis)}h0" for x, y in finite)


def _position(x: float, y: float, x_axis: _Axis, y_axis: _Axis) -> str:
    return f"{EXTENT * x_axis.place(x):.1f},{EXTENT * (1 - y_axis.place(y)):.1f}"


def _is_noisy(points: Points) -> bool:
    """Whether the line turns so often that its trend is hard to see."""
    if len(points) < 30:
        return False
    ys = [y for _, y in points]
    slopes = [after - before for before, after in itertools.pairwise(ys)]
    turns = sum(a * b < 0 for a, b in itertools.pairwise(slopes))
    return turns > len(points) / 4


def _moving_average(points: Points) -> list[tuple[float, float]]:
    """Centred means; the window narrows at the start, where a curve is too steep to lean on it."""
    reach = max(1, len(points) // 40)
    averaged = []
    for index, (x, _) in enumerate(points):
        near = min(reach, index)
        window = [y for _, y in points[index - near : index + near + 1]]
        averaged.append((x, sum(window) / len(window)))
    return averaged


def _summary(title: str, x_label: str, name: str, series: Sequence[Series]) -> str:
    spans = []
    for item in series:
        finite = [y for _, y in item.points if math.isfinite(y)]
        if finite:
            first, last = (units.format_value(name, y) for y in (finite[0], finite[-1]))
            spans.append(f"{item.label or title} from {first} to {last}")
    return f"{title} over {x_label}: {'; '.join(spans)}"
