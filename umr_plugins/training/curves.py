"""Curves of a run as inline SVG: the logged numbers, a running mean, axes with ticks; nothing is loaded.

Colours come from the page's style sheet, so that a curve follows light and dark mode. Imports no torch.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any

from umr_plugins.html import escape

MOST_POINTS = 600
"""Most points drawn of one line, however many were logged."""

WIDTH, HEIGHT = 520, 220
_LEFT, _RIGHT, _TOP, _BOTTOM = 58, 20, 10, 26
_TICKS = 5
_LOG_SCALE_FROM = 20
"""How far the greatest value may lie above the median before a linear axis would flatten the rest."""

Point = tuple[float, float]


@dataclass(frozen=True)
class Series:
    """A logged number over the steps: (step, value) each; `lost` counts values that can't be drawn."""

    points: list[Point]
    lost: int = 0


@dataclass(frozen=True)
class Axis:
    """From values to places in [0, 1], and the values that get a number."""

    low: float
    high: float
    ticks: tuple[float, ...]
    log: bool = False

    def at(self, value: float) -> float:
        """Where a value lies: 0 at the low end, 1 at the high one, 0.5 where the axis has no length."""
        scale: Callable[[float], float] = math.log10 if self.log else float
        low, high = scale(self.low), scale(self.high)
        return (scale(value) - low) / (high - low) if high > low else 0.5


def kept(history: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The lines that led to the final weights.

    A run that resumes at an earlier step does some steps again; what was logged of them before is left out.
    """
    lines: list[Mapping[str, Any]] = []
    least = math.inf
    for line in reversed(history):
        if line["step"] < least:
            lines.append(line)
            least = line["step"]
    return lines[::-1]


def series(history: Sequence[Mapping[str, Any]], name: str) -> Series:
    """The values logged under a name. Lines without one count nothing; NaN and infinity count as lost."""
    given = [(line["step"], line[name]) for line in history if line.get(name) is not None]
    points = [(float(step), float(value)) for step, value in given if _is_finite(value)]
    return Series(points, len(given) - len(points))


def _is_finite(value: Any) -> bool:
    return not isinstance(value, bool) and isinstance(value, Real) and math.isfinite(value)


def absent(data: Series) -> str:
    """Why a series has no points."""
    return f"none of {data.lost:,} logged values is a finite number" if data.lost else "not logged"


def window(count: int) -> int:
    """How many of `count` logged values one value of the running mean stands for: a twentieth, and odd."""
    return 2 * (count // 40) + 1


def smooth(points: Sequence[Point]) -> list[Point]:
    """The running mean, centred; at both ends over what there is."""
    half = window(len(points)) // 2
    sums = list(itertools.accumulate((value for _, value in points), initial=0.0))
    ends = ((max(at - half, 0), min(at + half + 1, len(points))) for at in range(len(points)))
    return [
        (step, (sums[end] - sums[start]) / (end - start))
        for (step, _), (start, end) in zip(points, ends, strict=True)
    ]


def decimate(points: Sequence[Point], most: int = MOST_POINTS) -> list[Point]:
    """At most `most` points, in order: the ends, and least and greatest value of each bin between them."""
    if len(points) <= most:
        return list(points)
    inner, bins = points[1:-1], (most - 2) // 2
    chosen = [points[0]]
    for at in range(bins):
        part = inner[at * len(inner) // bins : (at + 1) * len(inner) // bins]
        chosen += sorted({min(part, key=lambda point: point[1]), max(part, key=lambda point: point[1])})
    return [*chosen, points[-1]]


def linear_axis(low: float, high: float) -> Axis:
    """Round ticks that enclose the values; from 0 where the least value is small against the greatest."""
    if high - low <= 1e-9 * max(abs(low), abs(high)):  # one value: as a line at some distance from 0
        low, high = min(low, 0.0), max(high, 0.0)
    if 0 <= low <= high / 2:
        low = 0.0
    if high - low < 1e-300:  # nothing but zeros, or so small that a tick could not be told from 0
        high = low + 1.0
    step = _round_step((high - low) / _TICKS)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    ticks = tuple(place * step for place in range(first, last + 1))
    return Axis(ticks[0], ticks[-1], ticks)


def log_axis(low: float, high: float) -> Axis:
    """Powers of ten that enclose the values, which must be above 0; every second or third one if many."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    stride = max(1, math.ceil((last - first) / _TICKS))
    ticks = tuple(10.0**power for power in range(first, last + stride, stride))
    return Axis(ticks[0], ticks[-1], ticks, log=True)


def step_axis(low: float, high: float) -> Axis:
    """Exactly the steps that were logged, with round ticks among them."""
    if low == high:
        return Axis(low, high, (low,))
    step = max(_round_step((high - low) / _TICKS), 1.0)
    ticks = tuple(place * step for place in range(math.ceil(low / step), math.floor(high / step) + 1))
    return Axis(low, high, ticks)


def value_axis(values: Sequence[float]) -> Axis:
    """Linear, or logarithmic where a few values would flatten all others."""
    low, high, middle = min(values), max(values), sorted(values)[len(values) // 2]
    return log_axis(low, high) if low > 0 and high > _LOG_SCALE_FROM * middle else linear_axis(low, high)


def _round_step(rough: float) -> float:
    """The least of 1, 2, 5 times a power of ten that is not below `rough`."""
    power = 10.0 ** math.floor(math.log10(rough))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * (1 - 1e-9))


def number(value: float, digits: int = 3) -> str:
    """A number for people: 12,500, 0.42, 2e-5."""
    if value and not 1e-3 <= abs(value) < 1e9:
        mantissa, _, exponent = f"{value:.{digits - 1}e}".partition("e")
        return f"{float(mantissa):g}e{int(exponent)}"
    whole = math.floor(math.log10(abs(value))) + 1 if value else 1
    text = f"{value:,.{max(digits - whole, 0)}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def curve(title: str, data: Series, *, marks: Sequence[tuple[float, str]] = (), running: bool = False) -> str:
    """One curve as a `figure`; a sentence where there is nothing to draw.

    Args:
        title: what the values are, with their unit.
        data: the values.
        marks: steps to mark with a dashed line, with what happened there.
        running: the values faintly under the line of their running mean, instead of as a line.
    """
    head = f"<b>{escape(title)}</b>"
    if not data.points:
        why = f'<p class="missing">{absent(data)}</p>'
        return f'<figure class="curve"><figcaption>{head}</figcaption>{why}</figure>'
    line = smooth(data.points) if running else data.points
    values = [value for _, value in data.points]
    across, up = step_axis(data.points[0][0], data.points[-1][0]), value_axis(values)

    def places(points: Sequence[Point]) -> list[str]:
        return [f"{_x(across, step):.1f} {_y(up, value):.1f}" for step, value in decimate(points)]

    drawn = [_grid(across, up)]
    for step, said in marks:
        if across.low <= step <= across.high:
            place = f"M{_x(across, step):.1f} {_TOP}V{HEIGHT - _BOTTOM}"
            drawn.append(f'<path class="mark" d="{place}"><title>{escape(said)}</title></path>')
    raw = places(data.points)
    if len(raw) == 1 or (running and len(data.points) == len(raw)):
        # A stroke without length and with round ends is a point.
        kind = "dots one" if len(raw) == 1 else "dots"
        drawn.append(f'<path class="{kind}" d="{"".join(f"M{place}h0" for place in raw)}"/>')
    elif running:  # extremes as points would look like two bands; as a line they fill what they span
        drawn.append(f'<path class="span" d="M{"L".join(raw)}"/>')
    if len(line) > 1:
        drawn.append(f'<path class="line" d="M{"L".join(places(line))}"/>')
    told = (
        f"{title}, steps {number(across.low, 9)} to {number(across.high, 9)}: first {number(line[0][1])}, "
        f"last {number(line[-1][1])}, least {number(min(values))}, greatest {number(max(values))}"
    )
    svg = f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(told)}">{"".join(drawn)}</svg>'
    note = f"<span>{escape(_note(data, up, running))}</span>"
    return f'<figure class="curve"><figcaption>{head}{note}</figcaption>{svg}</figure>'


def _note(data: Series, up: Axis, running: bool) -> str:
    count = len(data.points)
    mean = f"line: mean of {window(count):,} logged steps" if running and window(count) > 1 else ""
    parts = [
        mean,
        "log scale" if up.log else "",
        f"{MOST_POINTS} of {count:,} points, extremes kept" if count > MOST_POINTS else "",
        f"not finite, not drawn: {data.lost:,}" if data.lost else "",
    ]
    return " · ".join(part for part in parts if part)


def _grid(across: Axis, up: Axis) -> str:
    parts = []
    # As many digits as it takes to tell one tick from the next.
    apart = up.ticks[1] - up.ticks[0]
    digits = 3 if up.log else max(3, 1 + math.ceil(math.log10(max(map(abs, up.ticks)) / apart)))
    for tick in up.ticks:
        y = f"{_y(up, tick):.1f}"
        parts.append(f'<path d="M{_LEFT} {y}H{WIDTH - _RIGHT}"/>')
        parts.append(f'<text class="y" x="{_LEFT - 8}" y="{y}">{number(tick, digits)}</text>')
    for tick in across.ticks:
        x = f"{_x(across, tick):.1f}"
        parts.append(f'<text class="x" x="{x}" y="{HEIGHT - 8}">{number(tick, 9)}</text>')
    return "".join(parts)


def _x(across: Axis, step: float) -> float:
    return _LEFT + across.at(step) * (WIDTH - _LEFT - _RIGHT)


def _y(up: Axis, value: float) -> float:
    return HEIGHT - _BOTTOM - up.at(value) * (HEIGHT - _TOP - _BOTTOM)
