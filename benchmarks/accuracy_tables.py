"""Tables and plots of ``benchmarks.accuracy`` for docs/results.md."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from statistics import mean, stdev
from typing import Any

from benchmarks.plot import Line, accuracies
from benchmarks.recording import seed_count

Row = dict[str, Any]
Place = tuple[str, str]
"""Instance and budget."""
INNER = ", inner"
"""What the names of methods end with that leave residual streams whole."""
UNUSED = 0.5
"""Points of the dense network's multiply-adds that a method may leave of a budget before the page says so."""


@dataclass(frozen=True)
class Cell:
    """The seeds of one method at one budget of one instance, in percent.

    Attributes:
        finetuned: accuracies, one for each seed.
        before: accuracy after repair or recalibration, before finetuning.
        share: of the dense network's multiply-adds that is used.
    """

    finetuned: tuple[float, ...]
    before: float
    share: float

    @property
    def mean(self) -> float:
        return mean(self.finetuned)

    @property
    def error(self) -> float | None:
        """Standard error of the mean; None for one seed."""
        if len(self.finetuned) < 2:
            return None
        return stdev(self.finetuned) / math.sqrt(len(self.finetuned))


@dataclass(frozen=True)
class Measured:
    """All that was measured.

    Attributes:
        schedules: epochs and batches of each, by instance.
        cells: by instance and budget, then by method.
        ours: names of our methods.
        dense: accuracy of the dense network of each instance, in percent.
        notes: what rows say of how a method could be applied, without what differs between budgets.
        failed: for each method that failed somewhere, where and why.
    """

    schedules: dict[str, tuple[int, int]]
    cells: dict[Place, dict[str, Cell]]
    ours: set[str]
    dense: dict[str, float]
    notes: list[str]
    failed: list[str]

    @property
    def methods(self) -> list[str]:
        """Ours, then the others, each in the order of their rows."""
        found = dict.fromkeys(name for methods in self.cells.values() for name in methods)
        return sorted(found, key=lambda name: name not in self.ours)

    def budgets(self, instance: str) -> list[str]:
        """Of an instance, the largest first."""
        found = [budget for name, budget in self.cells if name == instance]
        return sorted(found, key=lambda budget: -float(budget.rstrip("%")))


def measured(rows: list[Row]) -> Measured:
    """Rows as cells; those without finetuning are of trials and left out.

    Raises:
        ValueError: an instance was finetuned by two schedules, which nothing may be compared across.
    """
    rows = [row for row in rows if row["schedule"][0]]
    schedules: dict[str, tuple[int, int]] = {}
    for row in rows:
        epochs, batches = row["schedule"]
        if schedules.setdefault(row["instance"], (epochs, batches)) != (epochs, batches):
            raise ValueError(f"{row['instance']} has rows of two schedules")
    good = [row for row in rows if "error" not in row]
    runs: dict[tuple[Place, str], list[Row]] = {}
    for row in good:
        runs.setdefault(((row["instance"], row["budget"]), row["method"]), []).append(row)
    cells: dict[Place, dict[str, Cell]] = {}
    for (place, method), seeds in runs.items():
        figures = [row["accuracy"] for row in seeds]
        cells.setdefault(place, {})[method] = Cell(
            tuple(100 * f["finetuned"] for f in figures),
            100 * mean(f["before"] for f in figures),
            100 * mean(row["macs"]["share"] for row in seeds),
        )
    notes = (
        f"{r['method']} on {r['instance']}: {r['note'].partition(' (')[0]}" for r in good if r.get("note")
    )
    failed = (
        f"{r['method']} on {r['instance']} at {r['budget']}: {r['error']}" for r in rows if "error" in r
    )
    return Measured(
        schedules,
        cells,
        {row["method"] for row in rows if row["ours"]},
        {row["instance"]: 100 * row["accuracy"]["dense"] for row in good},
        list(dict.fromkeys(notes)),
        list(dict.fromkeys(failed)),
    )


def table(rows: list[Row]) -> str:
    """Everything as Markdown."""
    lines = [
        "Every method starts from the same weights, looks at the same 2,500 training images, and gets the same "
        "finetuning, batch by batch. Accuracy on the whole test set after finetuning, in percent, with the standard "
        "error over seeds; in brackets before finetuning: after a method's own repair, or else with recalibrated batch "
        "norms. The best of a column in bold. `uniform l1`, `global l1` and `FPGM` are cut by our masks, where it says "
        "inner without touching residual streams, as the papers do; TP is Torch-Pruning, whose group norm is one step "
        "without its sparse training. Each uses at most the budget, counted independently. A figure below the one in "
        "brackets is of a network that a training as short as this one made worse; the recipe is the same for all. "
        "`resnet56` is tested under bfloat16, as it is trained, so its dense accuracy differs from the one above. What "
        "is of the repair and what of the selection can be read where both were measured apart: `default, without "
        "repair`, and rivals or other objectives with repair.",
    ]
    one = measured(rows)
    for instance in one.dense:
        lines += ["", *_instance(one, instance), "", f"![{instance}]({plot_name(one, instance)})"]
    lines += ["", *_summary(one)]
    if one.notes:
        lines += ["", *(f"- {note}." for note in one.notes)]
    if one.failed:
        lines += ["", "Failed:", "", *(f"- {what}" for what in one.failed)]
    return "\n".join(lines)


def plots(rows: list[Row]) -> dict[str, str]:
    """The plots by file name: accuracy after finetuning against used multiply-adds."""
    one = measured(rows)
    return {plot_name(one, name): _plot(one, name) for name in one.dense}


def plot_name(one: Measured, instance: str) -> str:
    """The file of a plot."""
    epochs, batches = one.schedules[instance]
    return f"accuracy-{instance}-{epochs}x{batches}.svg"


def _instance(one: Measured, instance: str) -> Iterator[str]:
    budgets = one.budgets(instance)
    epochs, batches = one.schedules[instance]
    yield f"{instance}, finetuned for {epochs} epochs of {batches} batches of 128 images:"
    yield ""
    yield f"| {instance}, dense {one.dense[instance]:.2f} | {' | '.join(f'{b} MACs' for b in budgets)} |"
    yield "|---|" + "---|" * len(budgets)
    best = [max(cell.mean for cell in one.cells[instance, b].values()) for b in budgets]
    for method in one.methods:
        cells = [one.cells[instance, b].get(method) for b in budgets]
        if any(cells):
            texts = [_text(cell, top) for cell, top in zip(cells, best, strict=True)]
            yield f"| {method} | {' | '.join(texts)} |"
    below = [
        f"{method} {cell.share:.1f} of {budget}"
        for method in one.methods
        for budget in budgets
        if (cell := one.cells[instance, budget].get(method))
        and float(budget.rstrip("%")) - cell.share > UNUSED
    ]
    if below:
        yield ""
        yield f"More than half a point of the MACs is left unused by: {', '.join(below)}."


def _text(cell: Cell | None, best: float) -> str:
    if cell is None:
        return "-"
    value = f"**{cell.mean:.2f}**" if cell.mean >= best - 0.005 else f"{cell.mean:.2f}"
    spread = "" if cell.error is None else f" ± {cell.error:.2f}"
    return f"{value}{spread} ({cell.before:.1f})"


@dataclass(frozen=True)
class Standing:
    """A method over its cells that every rival has, in points.

    Attributes:
        cells: how many they are.
        mean, before: accuracy after and before finetuning.
        ahead, before_ahead: of the rival whose mean over these cells is the highest, after and before finetuning.
        best_of_each: mean difference after finetuning to the best rival of each cell.
        level: cells in which it is at or above every rival's mean, less the standard error of the difference.
    """

    cells: int
    mean: float
    before: float
    ahead: float
    before_ahead: float
    best_of_each: float
    level: int


def standings(one: Measured) -> dict[str, Standing]:
    """How each method stands where it and every rival were measured with as many seeds; a rival, beside the others."""
    everyone, all_cells = {name for name in one.methods if name not in one.ours}, _with_inner(one)
    found: dict[str, Standing] = {}
    for method in one.methods:
        rivals = [name for name in one.methods if name in everyone and name != method]
        places = [place for place, cells in all_cells.items() if _comparable(cells, {*everyone, method})]
        if not rivals or not places:
            continue
        mine = [all_cells[p][method] for p in places]
        theirs = [[all_cells[p][name] for p in places] for name in rivals]
        after, before = mean(c.mean for c in mine), mean(c.before for c in mine)
        found[method] = Standing(
            len(places),
            after,
            before,
            after - max(mean(c.mean for c in cells) for cells in theirs),
            before - max(mean(c.before for c in cells) for cells in theirs),
            mean(c.mean - max(cells[k].mean for cells in theirs) for k, c in enumerate(mine)),
            sum(all(_is_level(c, cells[k]) for cells in theirs) for k, c in enumerate(mine)),
        )
    return found


def _with_inner(one: Measured) -> dict[Place, dict[str, Cell]]:
    """The cells, where a method of inner layers has those of the method itself if an instance has no other layers."""
    apart = {(place[0], name) for place, cells in one.cells.items() for name in cells}
    found = {place: dict(cells) for place, cells in one.cells.items()}
    for name in one.methods:
        same = name.removesuffix(INNER)
        for place, cells in found.items():
            if same in cells and (place[0], name) not in apart:
                cells[name] = cells[same]
    return found


def _comparable(cells: dict[str, Cell], methods: set[str]) -> bool:
    return set(cells) >= methods and len({len(cells[name].finetuned) for name in methods}) == 1


def _is_level(mine: Cell, theirs: Cell) -> bool:
    return mine.mean + math.hypot(mine.error or 0.0, theirs.error or 0.0) >= theirs.mean


def _summary(one: Measured) -> Iterator[str]:
    found = standings(one)
    if not found:
        yield "No cell has every rival yet, so there is no mean over cells."
        return
    yield (
        f"Each method over its cells (network and budget, {len(one.cells)} in all) that every rival has, in points, "
        "with as many seeds. The best rival is the one with the highest mean over these cells. A rival is compared "
        "with the other rivals."
    )
    yield ""
    yield (
        "| method | cells | mean | above the best rival | above the best rival of each cell | at or above every rival "
        "within one standard error of the difference | mean before finetuning | above the best rival there |"
    )
    yield "|---|---|---|---|---|---|---|---|"
    for method, s in found.items():
        yield (
            f"| {method} | {s.cells} | {s.mean:.2f} | {s.ahead:+.2f} | {s.best_of_each:+.2f} | "
            f"{s.level} of {s.cells} | {s.before:.2f} | {s.before_ahead:+.2f} |"
        )


def _plot(one: Measured, instance: str) -> str:
    lines = []
    for method in one.methods:
        cells = [
            one.cells[instance, b][method] for b in one.budgets(instance) if method in one.cells[instance, b]
        ]
        if cells:
            x, y = [c.share for c in cells], [c.mean for c in cells]
            lines.append(Line(method, x, y, [c.error or 0.0 for c in cells], dashed=method not in one.ours))
    title = f"{instance}: accuracy after finetuning, dense {one.dense[instance]:.2f} %"
    return accuracies(title, ("MACs used, % of the dense network", "accuracy, %"), lines)


def published(rows: list[Row]) -> str:
    """Table 2 of the discrete-QCQP paper beside our rows, Markdown."""
    lines = [
        "The paper's recipe of finetuning. A drop is what accuracy falls by from the dense network's, in points; the "
        "paper's dense networks are others than these, so drops are what can be compared. Means are of the seeds whose "
        "training did not diverge.",
        "",
        "| network | units | MACs at most | used | method | epochs | seeds | dense | before finetuning | finetuned | "
        "drop | drop in the paper |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    runs: dict[str, list[Row]] = {}
    for row in rows:
        epochs, batches = row["schedule"]
        schedule = f"{epochs}" if batches is None else f"{epochs} of {batches} batches"
        share = f"{100 * row['macs']['share']:.2f} %"
        names = (row["network"], row["units"], row["budget"], share, row["method"], schedule)
        runs.setdefault(" | ".join(names), []).append(row)
    for start, group in runs.items():
        first, theirs = group[0]["accuracy"], group[0]["published"]
        dense, before = 100 * first["dense"], 100 * first["before"]
        good = [100 * row["accuracy"]["finetuned"] for row in group if "error" not in row]
        after = f"{mean(good):.2f} | {dense - mean(good):.2f}" if good else "- | -"
        lines.append(
            f"| {start} | {seed_count(group)} | {dense:.2f} | {before:.2f} | {after} | "
            f"{theirs['dense'] - theirs['accuracy']:.2f} |"
        )
    return "\n".join(lines)
