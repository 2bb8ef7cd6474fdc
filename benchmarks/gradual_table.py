"""The table of ``benchmarks.gradual`` for docs/results.md."""

from __future__ import annotations

import math
from itertools import groupby
from statistics import mean, stdev
from typing import Any

from benchmarks.recording import seed_count

Row = dict[str, Any]


def table(rows: list[Row]) -> str:
    """One line for each number of rounds, means over seeds."""
    lines = [
        "Every arm of a network starts from the same weights and is finetuned on the same batches of 128 images in the "
        "same order, at once or in equal parts after each of several cuts; it then has at most the same multiply-adds, "
        "counted from the dense network. Accuracy in percent on the whole test set, means over seeds, with the "
        "standard error of the last: after the last cut, repaired without training, and at the end. Where trainings "
        "ended in a loss that is no number their seeds are counted as diverged, and the figures are of the others.",
        "",
        "| network | MACs | objective | spacing | rounds x epochs x batches | seeds | MACs used | dense | last cut | "
        "repaired | finetuned |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    ordered = sorted(rows, key=lambda r: (*_place(r), r["count"]))
    for (_, count), members in groupby(ordered, key=lambda r: (_place(r), r["count"])):
        everyone = list(members)
        first, group = everyone[0], [r for r in everyone if "error" not in r]
        used = f"{100 * mean(r['macs']['used'] / r['macs']['dense'] for r in group):.2f} %" if group else "-"
        cells = [_shares([r["accuracy"].get(k) for r in group]) for k in ("dense", "pruned", "repaired")]
        lines.append(
            f"| {first['instance']} | {first['budget']} | {first['objective']} | {first['spacing']} | "
            f"{count} x {first['epochs']} x {first['batches']} | {seed_count(everyone)} | {used} | "
            f"{' | '.join(cells)} | {_shares([r['accuracy'].get('finetuned') for r in group], error=True)} |"
        )
    return "\n".join(lines)


def _place(row: Row) -> tuple[Any, ...]:
    """What arms that are compared have in common."""
    total = row["count"] * row["epochs"]
    share = -float(row["budget"].rstrip("%"))
    return row["instance"], share, row["objective"], row["spacing"], row["batches"], total


def _shares(values: list[float | None], *, error: bool = False) -> str:
    known = [100 * v for v in values if v is not None]
    if not known:
        return "-"
    spread = f" ± {stdev(known) / math.sqrt(len(known)):.2f}" if error and len(known) > 1 else ""
    return f"{mean(known):.2f}{spread}"
