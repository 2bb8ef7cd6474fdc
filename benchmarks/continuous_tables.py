"""Tables of the continuous path for docs/results.md."""

from __future__ import annotations

from itertools import groupby
from statistics import mean, stdev
from typing import Any

PUBLISHED = {
    "resnet20": "published (500 epochs): 52.05 % of the parameters gone at 91.23 %, 74.00 % at 89.47 %"
}


def costs(rows: list[dict[str, Any]]) -> str:
    """What a regulariser adds to an epoch."""
    lines = [
        "One epoch with and without, taking turns in one process; the median and quartiles of the ratio over rounds. "
        "Images lie ready in memory. The published implementation of SPR takes 2.0 (ResNet-20) and 2.15 (ResNet-56).",
        "",
        "| device | network | regulariser | seconds for a batch of 128 | ratio | quartiles |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        lines.append(
            f"| {row['device']}, {row['threads']} threads | {row['network']} | {row['regularizer']} | "
            f"{row['seconds_per_batch']} | {row['ratio']:.3f} | "
            f"{row['quartiles'][0]:.3f} to {row['quartiles'][1]:.3f} |"
        )
    return "\n".join(lines)


def accuracies(rows: list[dict[str, Any]]) -> str:
    """Accuracy at equal parameters, training and finetuning; one line for each arm, means over seeds."""
    lines = [
        "Accuracy on the whole test set: after training under the penalty (or without one), straight after the cut, "
        "and after equal finetuning. Every arm starts from the same weights and sees the same batches. An epoch has "
        "that many batches of 128 images, so schedules are much shorter than the published ones and the figures no "
        "reproduction of theirs. Of `exact` and `top-k` dense is after as much training without a penalty. `spr 0.5` "
        "and the like are SPR as published with that strength, rounded to the budget by the solver; what its own rule "
        "would have left is the last column.",
        "",
        "| network | budget (params) | epochs x batches | arm | seeds | dense | trained | cut | finetuned | "
        "relaxed use at the end | by its own rule |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    key = ("instance", "share", "schedule", "arm")
    arms = list(dict.fromkeys(row["arm"] for row in rows))
    ordered = sorted(
        rows,
        key=lambda r: (r["instance"], -float(r["share"].rstrip("%")), r["schedule"], arms.index(r["arm"])),
    )
    for names, members in groupby(ordered, key=lambda r: tuple(str(r[k]) for k in key)):
        group = list(members)
        first = group[0]
        train, tune, batches = first["schedule"]
        end = "-"
        if first.get("control"):
            use = mean(row["control"][-1]["used"]["params"] for row in group)
            end = f"{100 * use:.1f} % of the limit"
        rule = "-"
        if own := first.get("by its own rule"):
            left = own["params"]["used"] / own["params"]["dense"]
            rule = f"{100 * left:.1f} % of the parameters"
        cells = [
            _share([r["accuracy"].get(k) for r in group])
            for k in ("dense", "regularised", "pruned", "finetuned")
        ]
        lines.append(
            f"| {names[0]} | {names[1]} | {train} + {tune} x {batches} | {names[3]} | {len(group)} | "
            f"{' | '.join(cells)} | {end} | {rule} |"
        )
    notes = [PUBLISHED[name] for name in dict.fromkeys(r["instance"] for r in ordered) if name in PUBLISHED]
    return "\n".join([*lines, "", *(f"{note}." for note in notes)])


def comparison(rows: list[dict[str, Any]]) -> str:
    """Relaxed and exact masks side by side."""
    lines = []
    for row in rows:
        found = row["comparison"]
        proved = "proved best" if found["proved"] else "the best known"
        lines += [
            f"{row['network']} at {row['budget']} of its multiply-adds, objective `Magnitude()`; the reference is "
            f"{found['reference']} ({proved}), the best bound {found['bound']:,.4f}.",
            "",
            "| origin | objective | below the bound | by a threshold instead | multiply-adds | own bound | "
            "integrality gap | Jaccard with the reference | rank correlation | seconds |",
            "|---|---|---|---|---|---|---|---|---|---|",
        ]
        for origin in found["origins"]:
            threshold, bound, rank = (origin[k] for k in ("threshold_objective", "bound", "rank_correlation"))
            lines.append(
                f"| {origin['name']} | {origin['objective']:,.4f} | {_percent(origin['gap'])} | "
                f"{'-' if threshold is None else f'{threshold:,.4f}'} | {origin['used']['macs']:,} | "
                f"{'-' if bound is None else f'{bound:,.4f}'} | {_percent(origin['bound_gap'])} | "
                f"{origin['jaccard']:.3f} | {'-' if rank is None else f'{rank:.2f}'} | "
                f"{row['seconds'].get(origin['name'], '-')} |"
            )
        lines.append("")
    return "\n".join(lines).rstrip()


def _share(values: list[float | None]) -> str:
    given = [100 * v for v in values if v is not None]
    if not given:
        return "-"
    spread = f" ± {stdev(given):.2f}" if len(given) > 1 else ""
    return f"{mean(given):.2f}{spread} %"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.3f} %"
