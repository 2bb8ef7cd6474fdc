"""Write docs/results.md, docs/compatibility.md and measured parts of docs/concepts.md from the committed results files.

python -m benchmarks.tables
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from benchmarks import (
    accuracy_tables,
    compatibility_page,
    continuous_tables,
    gradual_table,
    objectives_tables,
    rival_tracing_table,
)
from benchmarks.growth import exponent
from benchmarks.plot import Series, log_log
from benchmarks.recording import RESULTS, recorded

PAGE = RESULTS.parent.parent / "docs" / "results.md"
COMPATIBILITY = PAGE.parent / "compatibility.md"
CONCEPTS = PAGE.parent / "concepts.md"
PLOT = PAGE.parent / "growth.svg"
MEASURED = re.compile(r"(?<=<!-- measured: objectives -->\n).*?(?=<!-- end -->)", re.DOTALL)
"""The part of docs/concepts.md that is made from a results file; nothing where it was not measured."""


def main() -> None:
    pages = ((PAGE, page()), (COMPATIBILITY, compatibility_page.page()), (CONCEPTS, concepts()))
    for path, text in pages:
        path.write_text(text)
        print("written:", path)
    for path, plot in plots().items():
        path.write_text(plot)
        print("written:", path)


def page() -> str:
    """The page as Markdown."""
    parts = [
        "# Results",
        "This page is made by `python -m benchmarks.tables` from the files in `benchmarks/results/`. Each section "
        "names the commands that measured it.",
        _section("Pretrained CIFAR-10 ResNets", "pretrained_resnets", _pretrained),
        _section("What each objective does to a network", "objectives", objectives_tables.table),
        _section("Accuracy at equal multiply-adds", "accuracy", accuracy_tables.table),
        _section(
            "Table 2 of the discrete-QCQP paper",
            "published_table2",
            accuracy_tables.published,
            "its 200 epochs want a GPU, and there was none",
        ),
        _section("At once and in rounds", "gradual", gradual_table.table),
        _section("Certified gaps", "certified_gaps", _gaps),
        _section("Against rivals", "rivals", _rivals),
        _section("Residual branches that go as a whole", "blocks", _blocks),
        _section("Growth", "growth", _growth),
        _section("Tracing and building", "footprint", _footprint),
        _section("Tracing and pruning against Torch-Pruning", "rival_tracing", rival_tracing_table.table),
        _section("SPR and PSP: what an epoch costs", "regularizer_cost", continuous_tables.costs),
        _section("SPR and PSP with a budget", "continuous", continuous_tables.accuracies),
        _section("Relaxed and exact masks", "relaxed_and_exact", continuous_tables.comparison),
        _section("Random networks", "random_graphs", _random_graphs),
    ]
    return "\n\n".join(parts) + "\n"


def concepts() -> str:
    """docs/concepts.md as it is, with its measured part as the results file has it."""
    block = objectives_tables.block(recorded("objectives"))
    return MEASURED.sub(lambda _: block, CONCEPTS.read_text())


def _section(title: str, name: str, table: Any, why: str = "") -> str:
    """A part of the page; where there are no results, which command makes them, and why it was not run."""
    path: Path = RESULTS / f"{name}.json"
    if not path.is_file():
        reason = f", as {why}" if why else ""
        return f"## {title}\n\nNot measured yet{reason}: run `python -m benchmarks.{name}`."
    data = json.loads(path.read_text())
    machine = data["machine"]
    commands = ", ".join(f"`{command}`" for command in data["commands"])
    measured = (
        f"{commands}; {machine['cores']} cores ({machine['processor']}), Python {machine['python']}, "
        f"torch {data['packages']['torch']}."
    )
    return f"## {title}\n\n{measured}\n\n{table(data['rows'])}"


def _random_graphs(rows: list[dict[str, Any]]) -> str:
    total, masks, found = (sum(row[key] for row in rows) for key in ("examples", "masks", "seconds"))
    violations = [v for row in rows for v in row["violations"]]
    times: dict[str, int] = {}
    for row in rows:
        for name, count in row["occurrences"].items():
            times[name] = times.get(name, 0) + count
    families = {name: count for name, count in times.items() if ":" not in name and " " not in name}
    options = {name: count for name, count in times.items() if name not in families}
    commits = ", ".join(dict.fromkeys(row["commit"] for row in rows))
    lines = [
        "Networks of one to twelve blocks drawn from all families, each cut by random masks in float64: predicted "
        "counts equal measured ones, and the smaller network computes what the masked one does (and, where no operator "
        "mixes channels without weights, what the network with zeroed weights does). A batch with a violation is drawn "
        "anew once the library is mended; what was found so is in the changelog.",
        "",
        f"{total:,} networks, {masks:,} selections, **{len(violations)} violations**; seed {rows[0]['seed']}, commit "
        f"{commits}, {found / 3600:.1f} hours of one process.",
        "",
        "| family | networks | family | networks | family | networks |",
        "|---|---|---|---|---|---|",
    ]
    cells = [f"{name} | {count:,}" for name, count in sorted(families.items())]
    cells += [" | "] * (-len(cells) % 3)
    lines += [f"| {' | '.join(cells[k : k + 3])} |" for k in range(0, len(cells), 3)]
    lines += ["", "; ".join(f"{name}: {count:,}" for name, count in sorted(options.items())) + "."]
    return "\n".join(lines)


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
        '`solver="decomposition"`, the search included in the seconds, each row in a process of its own. `tv_` '
        "networks are torchvision's, with random weights; `_free` has free residual sharing, `_columns` kernel columns "
        "as units. The independent checker (`qcqp-prune certify`) read every certificate.",
        "",
        "| network | units | pairs | budget | gap at the end | seconds | wanted | reached after | peak memory | "
        "certificate, seconds to check |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        reached = "-" if row["seconds_to_target"] is None else f"{row['seconds_to_target']} s"
        wanted = f"{100 * row['target']:g} % in {row['time_limit']} s"
        lines.append(
            f"| {row['network']} | {row['units']:,} | {row['pairs']:,} | {_budgets(row)} | {_percent(row['gap'])} | "
            f"{row['seconds']} | {wanted} | {reached} | {row['peak_mb']:,} MB | {row['certificate']}, "
            f"{row['check_seconds']} |"
        )
    return "\n".join(lines)


def _rivals(rows: list[dict[str, Any]]) -> str:
    lines = [
        "Every method in a process of its own, without a warm start, one thread; objective and bound when its time was "
        "over. Masks are checked in exact integers by the problem itself. `chain:` instances are synthetic. Best "
        "objective and best bound of an instance in bold, to a millionth.",
    ]
    instances = list(dict.fromkeys((row["network"], _budgets(row)) for row in rows))
    for network, budgets in instances:
        mine = [row for row in rows if (row["network"], _budgets(row)) == (network, budgets)]
        size = next((row for row in mine if "units" in row), None)
        about = "" if size is None else f", {size['units']:,} units, {size['pairs']:,} pairs"
        lines += ["", f"### {network}, {budgets}{about}", "", *_rival_table(mine)]
    return "\n".join(lines)


def _rival_table(rows: list[dict[str, Any]]) -> list[str]:
    found = {key: [row[key] for row in rows if row.get(key) is not None] for key in ("objective", "bound")}
    best = {"objective": max(found["objective"], default=None), "bound": min(found["bound"], default=None)}
    lines = ["| method | objective | bound | gap | seconds | |", "|---|---|---|---|---|---|"]
    for row in rows:
        cells = [_marked(row.get(key), best[key]) for key in ("objective", "bound")]
        gap = "-" if row.get("gap") is None else _percent(row["gap"])
        proved = "proved" if row.get("proved") else ""
        note = ", ".join(part for part in (proved, row.get("note", "").replace("|", "/")) if part)
        lines.append(
            f"| {row['method']} | {' | '.join(cells)} | {gap} | {row.get('seconds', '-')} | {note} |"
        )
    return lines


def _marked(value: float | None, best: float | None) -> str:
    if value is None or best is None:
        return "-"
    return f"**{value:,.4f}**" if abs(value - best) <= 1e-6 * abs(best) else f"{value:,.4f}"


def _growth(rows: list[dict[str, Any]]) -> str:
    pairs = [row["pairs"] for row in rows]
    powers = [exponent(pairs, [row[key] for row in rows]) for key in ("seconds", "solve_mb")]
    lines = [
        f"torchvision's ResNet-50 at several widths, 50 % MACs, {rows[0]['work']} oracle calls of the decomposition "
        "after its search. Memory of the solve is what the peak of the process rises by. Fitted to the number of pairs "
        f"of units, seconds grow with the power {powers[0]:.2f}, memory with {powers[1]:.2f}.",
        "",
        "![seconds and memory against pairs, both axes logarithmic](growth.svg)",
        "",
        "| width | units | pairs | seconds | memory of the solve | peak memory | gap |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        lines.append(
            f"| {row['width']} | {row['units']:,} | {row['pairs']:,} | {row['seconds']} | {row['solve_mb']:,} MB | "
            f"{row['peak_mb']:,} MB | {_percent(row['gap'])} |"
        )
    return "\n".join(lines)


def _blocks(rows: list[dict[str, Any]]) -> str:
    lines = [
        "CIFAR ResNet-56, random weights of a fixed seed, `Magnitude()`, block coordinate search. The same network, "
        "floors and budgets, with and without `blocks=True`; smallest is the least share of multiply-adds that any "
        "selection reaches. A dash: nothing meets the budget.",
        "",
        "| `min_keep` | MACs at most | smallest without, with | objective without | objective with | removed |",
        "|---|---|---|---|---|---|",
    ]
    found = {(row["min_keep"], row["budget"], row["blocks"]): row for row in rows}
    for floor, budget in sorted({(row["min_keep"], row["budget"]) for row in rows}):
        one, other = (found[floor, budget, blocks] for blocks in (False, True))
        worth = ["-" if r["objective"] is None else f"{r['objective']:,.1f}" for r in (one, other)]
        smallest = ", ".join(_percent(r["smallest"]) for r in (one, other))
        lines.append(f"| {floor} | {budget} % | {smallest} | {worth[0]} | {worth[1]} | {other['removed']} |")
    return "\n".join(lines)


def plots() -> dict[Path, str]:
    """The plots of what was measured, by the file that the page shows."""
    found = {PAGE.parent / name: svg for name, svg in accuracy_tables.plots(recorded("accuracy")).items()}
    rows = recorded("growth")
    if rows:
        found[PLOT] = _growth_plot(rows)
    return found


def _growth_plot(rows: list[dict[str, Any]]) -> str:
    pairs = [row["pairs"] for row in rows]
    series = [
        Series(name, pairs, values, exponent(pairs, values))
        for name, values in (
            ("seconds", [row["seconds"] for row in rows]),
            ("memory of the solve, MB", [row["solve_mb"] for row in rows]),
        )
    ]
    return log_log("Decomposition on ResNet-50 at 0.25 to 2 times its width", ("pairs", "s, MB"), series)


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
