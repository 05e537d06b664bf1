"""Line charts as SVG."""

import math
from collections.abc import Sequence
from html import escape
from typing import NamedTuple

from drpo_lightning.report.runs import Curve

WIDTH, HEIGHT = 360, 210
LEFT, RIGHT, TOP, BOTTOM = 46, 8, 8, 22
MAX_POINTS = 100
"""Points of a line; longer curves are drawn as means and ranges of groups of points."""
NUM_TICKS = 5
DASHES = ("", "6 3", "2 3", "9 3 2 3", "1 2", "12 4")
"""Patterns of the lines of one run."""


class Point(NamedTuple):
    """Neighbouring points of a curve as one: means of steps and values, and the values' range; NaN without a value."""

    step: float
    mean: float
    low: float
    high: float


class Line(NamedTuple):
    """A line of a chart.

    Attributes:
        curve: what is drawn.
        label: what the line says under the mouse.
        colour: CSS colour.
        dash: pattern, one of `DASHES`.
    """

    curve: Curve
    label: str
    colour: str
    dash: str = ""


class Scale(NamedTuple):
    """Maps a range of values to pixels."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        """Where a value is, in pixels."""
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)


def thinned(curve: Curve, max_points: int = MAX_POINTS) -> list[Point]:
    """At most `max_points` points; values that are not finite count only where a point has no others."""
    size = math.ceil(len(curve.steps) / max_points)
    points = []
    for start in range(0, len(curve.steps), size or 1):
        steps = curve.steps[start : start + size]
        values = [value for value in curve.values[start : start + size] if math.isfinite(value)] or [math.nan]
        points.append(Point(sum(steps) / len(steps), sum(values) / len(values), min(values), max(values)))
    return points


def ticks(low: float, high: float, count: int = NUM_TICKS) -> list[float]:
    """About `count` round numbers in a range: multiples of 1, 2 or 5 times a power of ten."""
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * (1 - 1e-9))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [i * step for i in range(first, last + 1)]


def value_range(values: Sequence[float]) -> tuple[float, float]:
    """Lowest and highest value, apart from each other."""
    low, high = min(values), max(values)
    margin = (high - low) * 0.04 or abs(low) * 0.1 or 1.0
    return low - margin, high + margin


def line_chart(lines: Sequence[Line], identity: str) -> str:
    """A chart with axes, one line per curve, and a title on each line that shows under the mouse.

    Args:
        lines: what to draw; values that are not finite leave a gap.
        identity: a name for the parts of the chart, unique on the page.
    """
    drawn = [(line, thinned(line.curve)) for line in lines]
    means = [point.mean for _, points in drawn for point in points if not math.isnan(point.mean)]
    if not means:
        return '<p class="empty">no finite value</p>'
    steps = [point.step for _, points in drawn for point in points]
    x = Scale(min(steps), max(max(steps), min(steps) + 1), LEFT, WIDTH - RIGHT)
    y = Scale(*value_range(means), HEIGHT - BOTTOM, TOP)
    body = "".join(line_group(line, points, x, y, f"{identity}-{i}") for i, (line, points) in enumerate(drawn))
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img">'
        f'<clipPath id="{identity}"><rect x="{LEFT}" y="{TOP - 2}" width="{WIDTH - LEFT - RIGHT + 4}" '
        f'height="{HEIGHT - TOP - BOTTOM + 4}"/></clipPath>{axes(x, y)}<g clip-path="url(#{identity})">{body}</g></svg>'
    )


def axes(x: Scale, y: Scale) -> str:
    """Grid lines with their numbers."""
    parts = []
    for value in ticks(y.low, y.high):
        at = f"{y(value):.1f}"
        parts.append(f'<path class="grid" d="M{LEFT} {at}H{WIDTH - RIGHT}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{at}" dy=".32em" text-anchor="end">{number(value)}</text>')
    for value in ticks(x.low, x.high):
        at = f"{x(value):.1f}"
        parts.append(f'<path class="grid" d="M{at} {TOP}V{HEIGHT - BOTTOM}"/>')
        parts.append(f'<text x="{at}" y="{HEIGHT - 7}" text-anchor="middle">{number(value)}</text>')
    return "".join(parts)


def line_group(line: Line, points: Sequence[Point], x: Scale, y: Scale, identity: str) -> str:
    """A line over the ranges of its points, with a wide invisible one to meet the mouse."""
    stretches = finite_stretches(points)
    path = "".join("M" + "L".join(f"{x(p.step):.1f} {y(p.mean):.1f}" for p in stretch) for stretch in stretches)
    dots = "".join(
        f'<circle cx="{x(stretch[0].step):.1f}" cy="{y(stretch[0].mean):.1f}" r="2.5"/>'
        for stretch in stretches
        if len(stretch) == 1
    )
    bands = "".join(band(stretch, x, y) for stretch in stretches if any(p.low < p.high for p in stretch))
    dash = f' stroke-dasharray="{line.dash}"' if line.dash else ""
    return (
        f'<g style="--colour:{line.colour}"><title>{escape(line.label)}</title>{bands}'
        f'<path class="line" id="{identity}" d="{path}"{dash}/><use href="#{identity}" class="hit"/>{dots}</g>'
    )


def band(points: Sequence[Point], x: Scale, y: Scale) -> str:
    """The area between the lowest and the highest values."""
    upper = [f"{x(p.step):.1f} {y(p.high):.1f}" for p in points]
    lower = [f"{x(p.step):.1f} {y(p.low):.1f}" for p in reversed(points)]
    return f'<path class="band" d="M{"L".join(upper + lower)}Z"/>'


def finite_stretches(points: Sequence[Point]) -> list[list[Point]]:
    """The points in runs without a gap."""
    stretches: list[list[Point]] = [[]]
    for point in points:
        if math.isnan(point.mean):
            stretches.append([])
        else:
            stretches[-1].append(point)
    return [stretch for stretch in stretches if stretch]


def number(value: float) -> str:
    """A number in four digits."""
    return f"{value:.4g}"
