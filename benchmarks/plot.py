"""Plots as SVG text: the same points always give the same file."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT, LEFT, BOTTOM, TOP, LEGEND = 640, 400, 70, 50, 30, 190
COLOURS = ("#1f5fa8", "#c0561b", "#2b8a3e", "#7b3fa0", "#b8860b", "#0f8b8d", "#a61e4d", "#555555")


@dataclass(frozen=True)
class Series:
    """Points with a name, and the exponent of the power law fitted to them."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    exponent: float


@dataclass(frozen=True)
class Line:
    """Accuracies in percent with a name, joined in the order of ``x``, and how far off each may be."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    error: Sequence[float]
    dashed: bool = False


def log_log(title: str, axes: tuple[str, str], series: Sequence[Series]) -> str:
    """Draw the points and, dashed, the fitted power law through their geometric mean."""
    across = _Scale([v for s in series for v in s.x], LEFT, WIDTH - 20)
    up = _Scale([v for s in series for v in s.y], HEIGHT - BOTTOM, TOP)
    ticks = [(across(t), _short(t)) for t in across.ticks()], [(up(t), _short(t)) for t in up.ticks()]
    parts = _frame(title, axes, *ticks)
    for k, (one, colour) in enumerate(zip(series, COLOURS, strict=False)):
        parts += _drawn(one, across, up, colour)
        label = f"{one.name}: exponent {one.exponent:.2f}"
        parts.append(f'<text x="{LEFT + 12}" y="{TOP + 18 + 16 * k}" fill="{colour}">{escape(label)}</text>')
    return "\n".join([*parts, "</svg>"]) + "\n"


def accuracies(title: str, axes: tuple[str, str], lines: Sequence[Line]) -> str:
    """Draw a line for each method with its error bars; upwards the logarithm of what is wrong, which shows small steps.

    Dashed lines begin with the first colour again, so that of each kind as many can be told apart as there are colours.
    """
    xs = [v for line in lines for v in line.x]
    worst = [100 - v + e for line in lines for v, e in zip(line.y, line.error, strict=True)]
    best = [max(100 - v - e, 0.05) for line in lines for v, e in zip(line.y, line.error, strict=True)]
    across = _Scale(xs, LEFT, WIDTH - 20)
    wrong = _Scale([*worst, *best], HEIGHT - BOTTOM, TOP, downwards=True)
    ticks = (
        [(across(t), _short(t)) for t in across.ticks()],
        [(wrong(t), f"{100 - t:g}") for t in wrong.ticks() if t < 100],
    )
    parts = _frame(title, axes, *ticks, legend=LEGEND)
    for dashed in (False, True):
        kind = [line for line in lines if line.dashed == dashed]
        for k, line in enumerate(kind):
            row = k + (len(lines) - len(kind)) * dashed
            parts += _joined(line, across, wrong, COLOURS[k % len(COLOURS)], TOP + 10 + 18 * row)
    return "\n".join([*parts, "</svg>"]) + "\n"


Ticks = Sequence[tuple[float, str]]


def _frame(title: str, axes: tuple[str, str], across: Ticks, up: Ticks, *, legend: int = 0) -> list[str]:
    """The opening tag, the grid and what the axes are."""
    whole, middle = WIDTH + legend, HEIGHT / 2
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {whole} {HEIGHT}" font-family="sans-serif" '
        'font-size="12">',
        f'<rect width="{whole}" height="{HEIGHT}" fill="white"/>',
        f'<text x="{WIDTH / 2}" y="18" text-anchor="middle" font-size="14">{escape(title)}</text>',
    ]
    for x, label in across:
        parts.append(f'<path d="M{x:.1f} {TOP}V{HEIGHT - BOTTOM}" stroke="#ddd"/>')
        parts.append(f'<text x="{x:.1f}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">{label}</text>')
    for y, label in up:
        parts.append(f'<path d="M{LEFT} {y:.1f}H{WIDTH - 20}" stroke="#ddd"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{label}</text>')
    parts.append(f'<text x="{WIDTH / 2}" y="{HEIGHT - 12}" text-anchor="middle">{escape(axes[0])}</text>')
    parts.append(
        f'<text x="16" y="{middle}" text-anchor="middle" transform="rotate(-90 16 {middle})">{escape(axes[1])}</text>'
    )
    return parts


def _drawn(series: Series, across: _Scale, up: _Scale, colour: str) -> list[str]:
    dots = [
        f'<circle cx="{across(x):.1f}" cy="{up(y):.1f}" r="4" fill="{colour}"/>'
        for x, y in zip(series.x, series.y, strict=True)
    ]
    centre = [sum(map(math.log, values)) / len(values) for values in (series.x, series.y)]
    ends = [
        (x, math.exp(centre[1] + series.exponent * (math.log(x) - centre[0])))
        for x in (min(series.x), max(series.x))
    ]
    line = "L".join(f"{across(x):.1f} {up(y):.1f}" for x, y in ends)
    return [*dots, f'<path d="M{line}" stroke="{colour}" stroke-dasharray="5 4" fill="none"/>']


def _joined(line: Line, across: _Scale, wrong: _Scale, colour: str, row: int) -> list[str]:
    """One line, its bars and dots, and its name beside the plot."""
    dash = ' stroke-dasharray="5 4"' if line.dashed else ""
    points = sorted(zip(line.x, line.y, line.error, strict=True))
    path = "L".join(f"{across(x):.1f} {wrong(100 - y):.1f}" for x, y, _ in points)
    parts = [f'<path class="line" d="M{path}" stroke="{colour}"{dash} fill="none"/>']
    for x, y, error in points:
        ends = wrong(100 - y + error), wrong(max(100 - y - error, 0.05))
        parts.append(
            f'<path class="bar" d="M{across(x):.1f} {ends[0]:.1f}V{ends[1]:.1f}" stroke="{colour}"/>'
        )
        parts.append(f'<circle cx="{across(x):.1f}" cy="{wrong(100 - y):.1f}" r="3" fill="{colour}"/>')
    parts.append(f'<path d="M{WIDTH} {row}H{WIDTH + 24}" stroke="{colour}"{dash}/>')
    parts.append(f'<text x="{WIDTH + 30}" y="{row + 4}" fill="{colour}">{escape(line.name)}</text>')
    return parts


class _Scale:
    """From values to places on one logarithmic axis."""

    def __init__(self, values: Sequence[float], start: float, end: float, *, downwards: bool = False) -> None:
        self._low, self._high = math.log10(min(values)) - 0.1, math.log10(max(values)) + 0.1
        self._start, self._end = (end, start) if downwards else (start, end)

    def __call__(self, value: float) -> float:
        share = (math.log10(value) - self._low) / (self._high - self._low)
        return self._start + share * (self._end - self._start)

    def ticks(self) -> list[float]:
        """1, 2 and 5 times the powers of ten in range; all digits where those are fewer than four."""
        powers = range(math.floor(self._low), math.ceil(self._high) + 1)
        found: list[float] = []
        for digits in ((1, 2, 5), range(1, 10)):
            every = [m * 10.0**k for k in powers for m in digits]
            found = [t for t in every if self._low <= math.log10(t) <= self._high]
            if len(found) > 3:
                break
        return found


def _short(value: float) -> str:
    for size, name in ((1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:g}{name}"
    return f"{value:g}"
