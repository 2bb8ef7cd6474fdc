"""A plot with two logarithmic axes as SVG text: the same points always give the same file."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT, LEFT, BOTTOM, TOP = 640, 400, 70, 50, 30
COLOURS = ("#1f5fa8", "#c0561b")


@dataclass(frozen=True)
class Series:
    """Points with a name, and the exponent of the power law fitted to them."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    exponent: float


def log_log(title: str, axes: tuple[str, str], series: Sequence[Series]) -> str:
    """Draw the points and, dashed, the fitted power law through their geometric mean."""
    xs = [v for s in series for v in s.x]
    ys = [v for s in series for v in s.y]
    across, up = _Scale(xs, LEFT, WIDTH - 20), _Scale(ys, HEIGHT - BOTTOM, TOP)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" '
        'font-size="12">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
        f'<text x="{WIDTH / 2}" y="18" text-anchor="middle" font-size="14">{escape(title)}</text>',
    ]
    for tick in across.ticks():
        x = across(tick)
        parts.append(f'<path d="M{x:.1f} {TOP}V{HEIGHT - BOTTOM}" stroke="#ddd"/>')
        parts.append(
            f'<text x="{x:.1f}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">{_short(tick)}</text>'
        )
    for tick in up.ticks():
        y = up(tick)
        parts.append(f'<path d="M{LEFT} {y:.1f}H{WIDTH - 20}" stroke="#ddd"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{_short(tick)}</text>')
    parts.append(f'<text x="{WIDTH / 2}" y="{HEIGHT - 12}" text-anchor="middle">{escape(axes[0])}</text>')
    middle = HEIGHT / 2
    parts.append(
        f'<text x="16" y="{middle}" text-anchor="middle" transform="rotate(-90 16 {middle})">{escape(axes[1])}</text>'
    )
    for k, (one, colour) in enumerate(zip(series, COLOURS, strict=False)):
        parts += _drawn(one, across, up, colour)
        label = f"{one.name}: exponent {one.exponent:.2f}"
        parts.append(f'<text x="{LEFT + 12}" y="{TOP + 18 + 16 * k}" fill="{colour}">{escape(label)}</text>')
    return "\n".join([*parts, "</svg>"]) + "\n"


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


class _Scale:
    """From values to places on one axis."""

    def __init__(self, values: Sequence[float], start: float, end: float) -> None:
        self._low, self._high = math.log10(min(values)) - 0.1, math.log10(max(values)) + 0.1
        self._start, self._end = start, end

    def __call__(self, value: float) -> float:
        share = (math.log10(value) - self._low) / (self._high - self._low)
        return self._start + share * (self._end - self._start)

    def ticks(self) -> list[float]:
        """1, 2 and 5 times the powers of ten in range."""
        powers = range(math.floor(self._low), math.ceil(self._high) + 1)
        every = [m * 10.0**k for k in powers for m in (1, 2, 5)]
        return [t for t in every if self._low <= math.log10(t) <= self._high]


def _short(value: float) -> str:
    for size, name in ((1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:g}{name}"
    return f"{value:g}"
