"""Reports as tables for the terminal. Everything here returns something that rich can print; nothing prints."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Literal

from rich import box
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.markup import escape
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from qcqp_prune.apply.verification import Verification
from qcqp_prune.graph.channels import ChannelGraph
from qcqp_prune.program.relaxed import ControlPoint
from qcqp_prune.report.accuracy import Accuracy
from qcqp_prune.report.budgets import BudgetLine, ResourceRange
from qcqp_prune.report.content import PruneReport
from qcqp_prune.report.layers import LayerRow, OtherParameters
from qcqp_prune.report.prices import price_lines
from qcqp_prune.report.rounds import Round
from qcqp_prune.solve.backend import SolverInfo
from qcqp_prune.solve.report import SolveReport, Usage


def report_view(report: PruneReport) -> RenderableType:
    """The whole report."""
    parts: list[RenderableType] = [
        Text(f"{report.model}, scored by {report.importance}", style="bold"),
        layers_table(report.layers, report.other),
        budgets_table(report.budgets),
        *tightness_lines(report.budgets),
        *solve_lines(report.solve),
    ]
    if report.verification is not None:
        lines = verification_lines(report.verification)
        if report.verification.caution:
            parts.insert(1, lines.pop(0))
        parts += lines
    if report.regularised is not None and report.regularised.trace:
        parts.append(control_table(report.regularised.trace))
    if report.rounds:
        parts.append(rounds_table(report.rounds))
    if report.accuracy.dense is not None:
        parts.append(accuracy_table(report.accuracy))
    if report.accuracy.losses:
        parts.append(losses_table(report.accuracy))
    if report.repair:
        parts.append(Text(f"repaired by {report.repair}"))
    if report.recipe:
        parts.append(Text(f"finetuned by {report.recipe}"))
    parts += [Text(f"note: {note}", style="dim") for note in report.notes]
    return Group(*parts)


def ranges_table(ranges: Iterable[ResourceRange]) -> Table:
    """What budgets can be met at all; shown before solving."""
    table = _table("attainable", "resource", "smallest", "largest", "unit")
    for r in ranges:
        share = f" ({r.smallest / r.largest:.2%})" if r.largest else ""
        table.add_row(r.resource, f"{r.smallest:,}{share}", f"{r.largest:,}", r.unit)
    return table


def frozen_lines(graph: ChannelGraph) -> list[RenderableType]:
    """Before solving: which layers lose no output whatever the budget, and why; then the extractor's notes."""
    names: dict[str, list[str]] = {}
    for layer in graph.layers:
        if reason := graph.why_not_pruned(layer):
            names.setdefault(reason, []).append(layer.name)
    lines: list[RenderableType] = [
        Text(f"kept whole ({reason}): {_listed(layers)}") for reason, layers in names.items()
    ]
    return lines + [Text(f"note: {note.where}: {note.text}", style="dim") for note in graph.notes]


def _listed(names: Sequence[str], most: int = 8) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def layers_table(rows: Sequence[LayerRow], other: OtherParameters) -> RenderableType:
    """Layers before and after; where nothing was removed, a number that stands for the reason below the table."""
    reasons = {reason: k for k, reason in enumerate(dict.fromkeys(r.why_not for r in rows if r.why_not), 1)}
    short = _layers("layers, numbers rounded", rows, other, reasons, _short)
    table = _FirstThatFits(_layers("layers", rows, other, reasons, _exact), otherwise=short)
    return Group(table, *(Text(f"  ({k}) {reason}", style="dim") for reason, k in reasons.items()), Text())


def _layers(
    title: str,
    rows: Sequence[LayerRow],
    other: OtherParameters,
    reasons: dict[str, int],
    write: Callable[[int], str],
) -> Table:
    split = any(row.columns is not None for row in rows)
    table = _table(title, "layer", "in", "out", *["columns"] * split, "MACs", "parameters", "why")
    for row in rows:
        widths = [_arrow(pair) for pair in (row.inputs, row.outputs)]
        if split:
            widths.append("" if row.columns is None else _arrow(row.columns))
        costs = (_arrow(pair, write) for pair in (row.macs, row.params))
        table.add_row(escape(row.name), *widths, *costs, f"({reasons[row.why_not]})" if row.why_not else "")
    macs = (sum(r.macs[0] for r in rows), sum(r.macs[1] for r in rows))
    params = (other.before + sum(r.params[0] for r in rows), other.after + sum(r.params[1] for r in rows))
    if other.before:
        table.add_row(
            "norms etc.", *[""] * (2 + split), "", _arrow((other.before, other.after), write), "", style="dim"
        )
    table.add_section()
    table.add_row("total", *[""] * (2 + split), _arrow(macs, write), _arrow(params, write), "", style="bold")
    return table


def budgets_table(lines: Iterable[BudgetLine]) -> RenderableType:
    """What was asked, limit, use and slack of each resource, and what the cheapest further unit would add.

    These numbers are never rounded nor cut: where the terminal has no room for the table they stand in lines.
    """
    columns = ("resource", "asked", "limit", "used", "share", "slack", "next unit", "smallest")
    cells = [
        (
            line.resource,
            "" if line.requested is None else str(line.requested),
            _number(line.limit),
            _exact(line.used),
            f"{line.share:.2%}",
            _number(line.slack),
            _number(line.cheapest_step),
            _exact(line.smallest),
        )
        for line in lines
    ]
    return _exact_table("budgets", columns, cells)


def tightness_lines(lines: Iterable[BudgetLine]) -> list[RenderableType]:
    """For each budget that leaves no room for one further unit, a line that says so."""
    return [
        Text(
            f"{x.resource}: the slack of {x.slack:,} is less than the cheapest further unit, "
            f"{x.cheapest_step:,} {x.unit}"
        )
        for x in lines
        if x.slack is not None and x.cheapest_step is not None and x.slack < x.cheapest_step
    ]


def usage_table(usage: Iterable[tuple[str, Usage]]) -> RenderableType:
    """The same from a solve report alone."""
    columns = ("resource", "limit", "used", "share", "slack", "smallest")
    cells = [
        (
            name,
            _number(use.limit),
            _exact(use.used),
            f"{use.share:.2%}",
            _number(use.slack),
            _exact(use.smallest),
        )
        for name, use in usage
    ]
    return _exact_table("budgets", columns, cells)


def solve_lines(report: SolveReport) -> list[RenderableType]:
    """Objective, bound and gap, and how they were come by."""
    proof = "no valid bound was proved" if report.bound is None else f"bound {report.bound:.6g}"
    if report.gap is not None:
        proof += f", gap {report.gap:.3%}"
    lines = [
        f"objective {report.objective:.6g}, {proof}",
        f"{report.solver} ({report.version}), seed {report.seed}, {report.seconds:.2f} s",
        report.termination.sentence,
        *price_lines(report),
        *report.notes,
    ]
    return [Text(line) for line in lines]


def verification_lines(checked: Verification) -> list[RenderableType]:
    """Identities 2 and 3, as checked; first of all a caution where the outputs say little."""
    exact = [f"{c.resource} {c.predicted:,} = {c.measured:,} {c.unit}" for c in checked.counts]
    realised = "the model's own modules" if checked.realisation == "modules" else "a rewritten graph"
    lines = [
        f"identity 2 checked: predicted = measured on the smaller network: {'; '.join(exact)}",
        f"identity 3 checked: smaller = masked network within {checked.max_relative_error:.1e} relative "
        f"({checked.dtype}, at most {checked.tolerance:.0e})",
        f"realised as {realised}" + (f": {checked.note}" if checked.note else ""),
    ]
    if checked.removed_blocks:
        lines.append(f"residual branches removed as a whole: {_listed(checked.removed_blocks)}")
    if checked.config:
        lines.append(checked.config)
    if checked.column_layers:
        lines.append(
            f"kernel columns stored and computed alone (ShapeConv2d): {_listed(checked.column_layers)}"
        )
    if checked.attention_layers:
        lines.append(f"attention of other widths (SlimAttention): {_listed(checked.attention_layers)}")
    shown = [Text(line, style="green" if line.startswith("identity") else "") for line in lines]
    if checked.caution:
        shown[1].style = ""
        warning: RenderableType = Text(f"CAUTION: {checked.caution}", style="bold yellow")
        return [warning, *shown]
    return [*shown]


def control_table(trace: Sequence[ControlPoint], most: int = 6) -> Table:
    """How the relaxed network came to its budgets: a few moments of the training, the first and the last among them."""
    last = len(trace) - 1
    shown = sorted({round(k * last / (most - 1)) for k in range(most)})
    names = list(trace[0].used)
    table = _table("relaxed use", "step", *names, "violation")
    for point in (trace[k] for k in shown):
        cells = (
            f"{point.used[name]:.1%} of the limit, price {point.multipliers[name]:.3g}" for name in names
        )
        table.add_row(_exact(point.step), *cells, f"{point.violation:.2%}")
    return table


def rounds_table(rounds: Sequence[Round]) -> RenderableType:
    """How several rounds came to the budgets; all counts are of the network that was traced."""
    limits = list(rounds[0].limits)
    steps = ("pruned", "repaired", "finetuned")
    shown = [step for step in steps if any(getattr(r.accuracy, step) is not None for r in rounds)]
    lost = [step for step in steps if any(step in r.accuracy.losses for r in rounds)]
    columns = ["round", *limits, "units", "solver", "gap", "relative error", *shown]
    columns += [f"loss {step}" for step in lost]
    rows = [
        (
            f"{number} of {len(rounds)}",
            *(f"{_exact(r.used[name])} of {_exact(r.limits[name])}" for name in limits),
            _exact(r.kept),
            r.solver,
            "" if r.gap is None else f"{r.gap:.3%}",
            f"{r.verification.max_relative_error:.1e}",
            *("" if (value := getattr(r.accuracy, step)) is None else f"{value:.2%}" for step in shown),
            *(f"{r.accuracy.losses[step]:.4g}" if step in r.accuracy.losses else "" for step in lost),
        )
        for number, r in enumerate(rounds, 1)
    ]
    return _exact_table("rounds", columns, rows)


def accuracy_table(accuracy: Accuracy) -> Table:
    """One column for each step that was taken."""
    steps = {
        "dense": accuracy.dense,
        "regularised": accuracy.regularised,
        "pruned": accuracy.pruned,
        "repaired": accuracy.repaired,
        "finetuned": accuracy.finetuned,
    }
    taken = {name: value for name, value in steps.items() if value is not None}
    table = _table(f"accuracy on {_number(accuracy.samples)} samples", *taken)
    table.add_row(*(f"{value:.2%}" for value in taken.values()))
    return table


def losses_table(accuracy: Accuracy) -> Table:
    """The same of a loss that was given."""
    table = _table(f"loss on {_number(accuracy.samples)} samples", *accuracy.losses)
    table.add_row(*(f"{value:.4g}" for value in accuracy.losses.values()))
    return table


def solvers_table(solvers: Iterable[SolverInfo]) -> Table:
    """Which solvers can run here, and what each gives up to which size; its problem classes where it does not say."""
    table = _table("solvers", "solver", "version", "available", "what it gives")
    for info in solvers:
        state = "yes" if info.availability.ok else f"no: {info.availability.reason}"
        gives = info.scope or "\n".join(str(c) for c in info.classes)
        table.add_row(info.name, info.availability.version, escape(state), escape(gives))
    return table


_WORDS = {"unit", "asked", "what it gives", "version", "available"}


def _table(title: str, *columns: str) -> Table:
    table = Table(
        title=title,
        title_justify="left",
        title_style="bold",
        header_style="",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        padding=0,
    )
    for k, column in enumerate(columns):
        words = k == 0 or column in _WORDS
        justify: Literal["left", "right"] = "left" if words else "right"
        table.add_column(column, justify=justify, no_wrap=not words, overflow="fold", min_width=4 * words)
    return table


def _exact_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> RenderableType:
    table = _table(title, *columns)
    for row in rows:
        table.add_row(*row)
    texts = [
        Text(f"{row[0]}: " + ", ".join(f"{c} {x}" for c, x in zip(columns[1:], row[1:], strict=True) if x))
        for row in rows
    ]
    return _FirstThatFits(table, otherwise=Group(Text(title, style="bold"), *texts, Text()))


class _FirstThatFits:
    """The first of several tables that is no wider than the terminal, else what stands in for all of them."""

    def __init__(self, *tables: Table, otherwise: RenderableType) -> None:
        self._tables = tables
        self._otherwise = otherwise

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        wide = options.update_width(_UNBOUNDED)
        for table in self._tables:
            if Measurement.get(console, wide, table).maximum <= options.max_width:
                yield table
                return
        yield self._otherwise


_UNBOUNDED = 10_000
_LETTERS = ("", "k", "M", "G", "T", "P")


def _exact(value: int) -> str:
    return f"{value:,}"


def _short(value: int) -> str:
    """Three digits and a letter: 118013952 is 118M."""
    thousands = 0
    while value >= 999.5 * 1000**thousands and thousands < len(_LETTERS) - 1:
        thousands += 1
    return f"{value / 1000**thousands:.3g}{_LETTERS[thousands]}"


def _arrow(pair: tuple[int, int], write: Callable[[int], str] = _exact) -> str:
    before, after = pair
    return write(before) if before == after else f"{write(before)}→{write(after)}"


def _number(value: int | None) -> str:
    return "" if value is None else _exact(value)
