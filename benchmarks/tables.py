"""Write docs/results.md from the committed results files.

python -m benchmarks.tables
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks.recording import RESULTS

PAGE = RESULTS.parent.parent / "docs" / "results.md"


def main() -> None:
    PAGE.write_text(page())
    print("written:", PAGE)


def page() -> str:
    """The page as Markdown."""
    parts = [
        "# Results",
        "This page is made by `python -m benchmarks.tables` from the files in `benchmarks/results/`. Each section "
        "names the command that measured it.",
        _section("Pretrained CIFAR-10 ResNets", "pretrained_resnets", _pretrained),
        _section("Certified gaps", "certified_gaps", _gaps),
        _section("Tracing and building", "footprint", _footprint),
    ]
    return "\n\n".join(parts) + "\n"


def _section(title: str, name: str, table: Any) -> str:
    path: Path = RESULTS / f"{name}.json"
    if not path.is_file():
        return f"## {title}\n\nNot measured yet: run `python -m benchmarks.{name}`."
    data = json.loads(path.read_text())
    machine = data["machine"]
    measured = (
        f"`{data['command']}`; {machine['cores']} cores ({machine['processor']}), Python {machine['python']}, "
        f"torch {data['packages']['torch']}."
    )
    return f"## {title}\n\n{measured}\n\n{table(data['rows'])}"


def _pretrained(rows: list[dict[str, Any]]) -> str:
    lines = [
        'The paper\'s objective (`Magnitude()`), `solver="auto"`. Accuracy is of the 10,000 test images, without '
        "finetuning: dense, cut, and with batch norm statistics estimated anew. Every budget is met, every count was "
        "predicted exactly, and the cut network computes what the masked one does.",
        "",
        "| network | budgets | used | certified gap | seconds | counts equal | max relative error | "
        "accuracy: dense, cut, recalibrated |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        used = ", ".join(
            f"{u['used']:,} of {u['limit']:,} {name}"
            for name, u in row["used"].items()
            if u["limit"] is not None
        )
        accuracy = ", ".join(
            f"{100 * row[key]:.2f} %"
            for key in ("dense_accuracy", "accuracy_after_pruning", "accuracy_recalibrated")
            if row.get(key) is not None
        )
        lines.append(
            f"| {row['network']} | {_budgets(row)} | {used} | {_percent(row['gap'])} | {row['seconds']} | "
            f"{'yes' if row['counts_equal'] else 'NO'} | {row['max_relative_error']:.0e} | {accuracy or '-'} |"
        )
    return "\n".join(lines)


def _gaps(rows: list[dict[str, Any]]) -> str:
    lines = [
        '`solver="decomposition"`, the search included in the seconds. `tv_` networks are torchvision\'s, with random '
        "weights.",
        "",
        "| network | units | pairs | budget | gap | seconds | seconds to 1 % | peak memory |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        reached = "-" if row["seconds_to_1_percent"] is None else row["seconds_to_1_percent"]
        lines.append(
            f"| {row['network']} | {row['units']:,} | {row['pairs']:,} | {_budgets(row)} | {_percent(row['gap'])} | "
            f"{row['seconds']} | {reached} | {row['peak_mb']:,} MB |"
        )
    return "\n".join(lines)


def _footprint(rows: list[dict[str, Any]]) -> str:
    lines = [
        "One process for each network. Memory is of the whole process, PyTorch and the model included.",
        "",
        "| network | units | groups | pairs | trace, s | build, s | peak before | peak after |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        lines.append(
            f"| {row['network']} | {row['units']:,} | {row['groups']} | {row['pairs']:,} | {row['trace_seconds']} | "
            f"{row['build_seconds']} | {row['peak_mb_before']:,} MB | {row['peak_mb_after']:,} MB |"
        )
    return "\n".join(lines)


def _budgets(row: dict[str, Any]) -> str:
    return ", ".join(f"{share} {name}" for name, share in row["budgets"].items())


def _percent(gap: float | None) -> str:
    return "none" if gap is None else f"{100 * gap:.3f} %"


if __name__ == "__main__":
    main()
