"""A Pareto curve as a table for the terminal, and as a page of its own with a drawing."""

from __future__ import annotations

from html import escape

from rich import box
from rich.table import Table

from qcqp_prune.solve.pareto import ParetoFront

WIDTH, HEIGHT, LEFT, BOTTOM = 720, 420, 80, 50
SAMPLES = 200

_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<style>
body {{ font-family: system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #222; }}
table {{ border-collapse: collapse; }} td, th {{ padding: .2em .8em; text-align: right; border-bottom: 1px solid #ddd }}
.bound {{ stroke: #c33; fill: none; stroke-width: 2; }} .found {{ fill: #236; }} .axis {{ stroke: #888; }}
.between {{ fill: #c33; opacity: .08; }} text {{ font-size: 12px; fill: #444; }}
</style></head><body>
<h1>{title}</h1>
<p>Dots are selections that were found, and whose budgets were checked in integers. No selection lies above the red
line, whatever its budget: multipliers found at a few limits prove it for all of them.</p>
{drawing}
<table><tr>{head}</tr>{rows}</table>
{notes}
</body></html>
"""


def pareto_table(front: ParetoFront) -> Table:
    """One line for each limit."""
    table = Table(title=f"{front.resource} against worth", title_justify="left", box=box.SIMPLE_HEAD)
    for column in ("limit", "share", "used", "worth", "no selection above", "gap"):
        table.add_column(column, justify="right", no_wrap=True)
    for row in _cells(front):
        table.add_row(*row)
    return table


def pareto_html(front: ParetoFront) -> str:
    """A page that needs nothing else: no script, no file beside it."""
    head = "".join(
        f"<th>{name}</th>" for name in ("limit", "share", "used", "worth", "no selection above", "gap")
    )
    rows = "".join(
        "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in _cells(front)
    )
    notes = "".join(f"<p>{escape(note)}</p>" for note in front.notes)
    title = f"{escape(front.resource)} against worth"
    return _PAGE.format(title=title, drawing=_drawing(front), head=head, rows=rows, notes=notes)


def _cells(front: ParetoFront) -> list[tuple[str, ...]]:
    return [
        (
            f"{p.limit:,}",
            f"{p.limit / front.dense:.2%}",
            f"{p.used:,}",
            f"{p.objective:.6g}",
            "" if p.bound is None else f"{p.bound:.6g}",
            "" if p.gap is None else f"{p.gap:.3%}",
        )
        for p in front.points
    ]


def _drawing(front: ParetoFront) -> str:
    if not front.points:
        return ""
    first, last = front.points[0].limit, max(front.points[-1].limit, front.points[0].limit + 1)
    limits = [first + (last - first) * k / SAMPLES for k in range(SAMPLES + 1)]
    line = [(x, y) for x in limits if (y := front.bound(x)) is not None]
    worth = [p.objective for p in front.points] + [y for _, y in line]
    low, high = min(worth), max(worth)
    high = high if high > low else low + 1.0

    def place(x: float, y: float) -> str:
        across = LEFT + (WIDTH - LEFT - 20) * (x - first) / (last - first)
        return f"{across:.1f},{HEIGHT - BOTTOM - (HEIGHT - BOTTOM - 20) * (y - low) / (high - low):.1f}"

    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="worth against the limit">']
    parts.append(f'<line class="axis" x1="{LEFT}" y1="20" x2="{LEFT}" y2="{HEIGHT - BOTTOM}"/>')
    base = HEIGHT - BOTTOM
    parts.append(f'<line class="axis" x1="{LEFT}" y1="{base}" x2="{WIDTH - 20}" y2="{base}"/>')
    for k in range(5):
        x, y = first + (last - first) * k / 4, low + (high - low) * k / 4
        across, up = place(x, y).split(",")
        parts.append(f'<text x="{across}" y="{base + 18}" text-anchor="middle">{x / front.dense:.0%}</text>')
        parts.append(f'<text x="{LEFT - 8}" y="{up}" text-anchor="end">{y:.4g}</text>')
    what = f"limit as a share of the dense network's {front.dense:,} {escape(front.unit)}"
    parts.append(f'<text x="{WIDTH / 2}" y="{HEIGHT - 8}" text-anchor="middle">{what}</text>')
    if line:
        edge = " ".join(place(x, y) for x, y in line)
        # A selection serves every larger limit as well: below the line, what is open is above a staircase.
        steps = [(last, front.points[-1].objective)]
        for p, before in zip(front.points[::-1], [*front.points[-2::-1], None], strict=True):
            steps += [(p.limit, p.objective)] + ([] if before is None else [(p.limit, before.objective)])
        parts.append(f'<polygon class="between" points="{edge} {" ".join(place(*s) for s in steps)}"/>')
        parts.append(f'<polyline class="bound" points="{edge}"/>')
    for p in front.points:
        across, up = place(p.limit, p.objective).split(",")
        said = f"{p.limit:,} {escape(front.unit)}: {p.objective:.6g}"
        parts.append(f'<circle class="found" cx="{across}" cy="{up}" r="4"><title>{said}</title></circle>')
    return "\n".join([*parts, "</svg>"])
