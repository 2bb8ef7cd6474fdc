"""The section of docs/results.md on ``benchmarks.rival_tracing``."""

from __future__ import annotations

from statistics import median
from typing import Any

PARTS = {"ours": ("export", "group", "score and solve", "cut"), "torch_pruning": ("dependency graph", "step")}
NAMES = {"ours": "ours", "torch_pruning": "Torch-Pruning"}


def table(rows: list[dict[str, Any]]) -> str:
    """What each tool gets through, medians over what both do, and every network."""
    both = [row for row in rows if all(row[side]["through"] for side in PARTS)]
    lines = [
        "torchvision's models for classification with random weights, all in one process, seconds of one thread. "
        "Ours is `torch.export` and the grouping behind it, a score and a solve by `block_coordinate` for exactly half "
        "of the multiply-adds, and a cut copy, not verified. Torch-Pruning's is its dependency graph and one step of "
        "`MagnitudePruner` in place, at a uniform ratio of 0.3 for every network: it has no budget. Verification, "
        "which ours does before it hands anything back, is in [the compatibility matrix](compatibility.md).",
        "",
        "| | gets through | median of those that both get through | of that | multiply-adds left: least, most |",
        "|---|---|---|---|---|",
    ]
    for side, parts in PARTS.items():
        through = [row for row in rows if row[side]["through"]]
        left = [row[side]["macs_left"] for row in both] or [0.0]
        each = ", ".join(f"{part} {_median([r[side]['parts'][part] for r in both])}" for part in parts)
        lines.append(
            f"| {NAMES[side]} | {len(through)} of {len(rows)} | {_median([r[side]['seconds'] for r in both])} s "
            f"({len(both)} networks) | {each} | {100 * min(left):.1f} %, {100 * max(left):.1f} % |"
        )
    lines += ["", f"| network | {_heads()} |", "|---|---|---|---|---|---|---|"]
    for row in rows:
        lines.append(f"| {row['model']} | {' | '.join(_cells(row[side], PARTS[side]) for side in PARTS)} |")
    return "\n".join(lines)


def medians(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Median seconds of each side over the networks that both get through."""
    both = [row for row in rows if all(row[side]["through"] for side in PARTS)]
    return {side: median(row[side]["seconds"] for row in both) for side in PARTS}


def _median(values: list[float]) -> str:
    return f"{median(values):.2f}" if values else "-"


def _heads() -> str:
    return " | ".join(f"{NAMES[side]}, s | {', '.join(PARTS[side])} | MACs left" for side in PARTS)


def _cells(side: dict[str, Any], parts: tuple[str, ...]) -> str:
    if not side["through"]:
        error = side["error"].replace("|", "/").replace("<", "").replace(">", "")
        return f"fails | {error} | -"
    each = ", ".join(f"{side['parts'][part]:.2f}" for part in parts)
    return f"{side['seconds']:.2f} | {each} | {100 * side['macs_left']:.1f} %"
