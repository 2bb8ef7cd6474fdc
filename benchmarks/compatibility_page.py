"""docs/compatibility.md as Markdown, from the committed results file; ``python -m benchmarks.tables`` writes it."""

from __future__ import annotations

from statistics import median
from typing import Any

from benchmarks.compatibility import NAME
from benchmarks.recording import recorded
from benchmarks.zoo import SOURCES

TITLES = {
    "torchvision": "torchvision: classification",
    "segmentation": "torchvision: segmentation",
    "detection": "torchvision: backbones of detectors",
    "timm": "timm",
    "transformers": "transformers",
}

INTRODUCTION = """\
This page is made by `python -m benchmarks.tables` from `benchmarks/results/compatibility.json`, which
`python -m benchmarks.compatibility` measures: one process for each network, random weights, one thread.

Each network is traced, cut to half its multiply-adds by `block_coordinate`, and *verified* when three things hold:

* the multiply-adds, parameters and bytes that the model of costs predicts equal, as integers, what independent counters
  find on the smaller network;
* the smaller network computes what the masked one does, interpreted operator by operator at full size, in double
  precision unless the row says otherwise; the largest relative error is in the table;
* the outputs depend on the input, so that their equality proves something.

*Prunable* is the share of multiply-adds that the smallest selection saves; where less than half of them can go, the
least that can be reached is asked for. *Floor* is the share of each layer that had to stay. *Built as* says whether the
model's own classes came back (`modules`) or a rewritten graph (`graph`), because its forward has shapes written into
it. Seconds are processor seconds of one thread: of tracing and grouping, of solving, and of cutting and verifying.
Images are small where the network takes them; a count of MACs is for that size."""


def page() -> str:
    """The page as Markdown."""
    rows = recorded(NAME)
    of = {source: [r for r in rows if r["source"] == source] for source in SOURCES}
    parts = ["# Compatibility", INTRODUCTION, _summary(of)]
    parts += [_section(source, mine) for source, mine in of.items() if mine]
    return "\n\n".join(parts) + "\n"


def _summary(of: dict[str, list[dict[str, Any]]]) -> str:
    lines = [
        "| source | networks | verified | versions | trace and group: median, longest |",
        "|---|---|---|---|---|",
    ]
    for source, rows in of.items():
        if not rows:
            continue
        good = sum(r["status"] == "verified" for r in rows)
        versions = ", ".join(sorted({r["version"] for r in rows if "version" in r}))
        seconds = [r["seconds"]["trace"] for r in rows if "trace" in r.get("seconds", {})] or [0.0]
        lines.append(
            f"| {TITLES[source]} | {len(rows)} | {good} | {versions} | {median(seconds):.1f} s, {max(seconds):.1f} s |"
        )
    return "\n".join(lines)


def _section(source: str, rows: list[dict[str, Any]]) -> str:
    good = [r for r in rows if r["status"] == "verified"]
    bad = [r for r in rows if r["status"] != "verified"]
    parts = [f"## {TITLES[source]}", f"{len(good)} of {len(rows)} verified."]
    if bad:
        parts.append(
            "\n".join(["### Not verified", "", "| network | input | stopped at | by |", "|---|---|---|---|"])
        )
        parts[-1] += "".join(
            f"\n| {r['model']} | {r['input']} | {r['stage']} | {_cell(r['error'])} |" for r in bad
        )
    if good:
        parts += ["### Verified", _table(good), "### What was left alone", _left_alone(good)]
    return "\n\n".join(parts)


def _table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| network | input | nodes | units | groups | prunable | floor | MACs: asked, predicted = counted, dense | "
        "max relative error | built as | trace, solve, verify: s | peak memory | commit |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    return "\n".join([*lines, *map(_line, rows)])


def _line(row: dict[str, Any]) -> str:
    macs, seconds = row["macs"], row["seconds"]
    floor = "1 unit" if row["min_keep"] == 1 else f"{100 * row['min_keep']:g} %"
    error = f"{row['max_relative_error']:.0e}" + ("" if row["dtype"] == "float64" else f" ({row['dtype']})")
    took = ", ".join(f"{seconds[k]:.1f}" for k in ("trace", "solve", "shrink and verify"))
    asked = f"{row['asked']}: {macs['counted']:,} of {macs['dense']:,}"
    shown = row["input"] + (f" ({row['note']})" if row["note"] else "")
    return (
        f"| {row['model']} | {shown} | {row['nodes']:,} | {row['units']:,} | {row['groups']:,} | "
        f"{_floored_percent(row['prunable_share'])} | {floor} | {asked} | "
        f"{error} | {row['realisation']} | {took} | {row['peak_mb']:,} MB | {row['commit']} |"
    )


def _floored_percent(share: float) -> str:
    return f"{int(1000 * share) / 10:.1f} %"


def _left_alone(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| network | reason (how many layers keep all of their outputs for it), and notes |",
        "|---|---|",
    ]
    for row in rows:
        why = [f"graph rewritten: {row['why_rewritten']}"] if row["why_rewritten"] else []
        lines.append(f"| {row['model']} | {_cell('; '.join([*row['left_alone'], *why]))} |")
    return "\n".join(lines)


def _cell(text: str) -> str:
    """Text that a cell of a table can hold."""
    escaped = "".join(f"\\{c}" if c in "|*_`<>[]" else c for c in text)
    return escaped or "-"
