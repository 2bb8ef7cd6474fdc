"""The command ``compare``: selections of any origin on one instance. It does not need torch."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from rich import box
from rich.table import Table

from qcqp_prune.analyse import Comparison, RelaxedMasks, compare, relax, thresholded
from qcqp_prune.analyse.compare import Selection
from qcqp_prune.cli.arguments import further_resources, parse_budgets
from qcqp_prune.cli.commands import GraphFile, read_masks
from qcqp_prune.cli.console import OUT, Spinner, wrote
from qcqp_prune.cli.proofs import Accelerator, LatencyFile
from qcqp_prune.errors import ConfigError
from qcqp_prune.program.files import read_traced
from qcqp_prune.program.problem import PruningProblem
from qcqp_prune.solve.report import SolveReport
from qcqp_prune.solve.run import solve
from qcqp_prune.storage import read_json, require_file_place, write_json

TOP_K = "top-k"


def compare_selections(
    graph: GraphFile,
    budget: Annotated[list[str], typer.Option("--budget", "-b", help="resource=limit, such as macs=50%.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The comparison, as JSON.")],
    selection: Annotated[
        list[str] | None,
        typer.Argument(help='NAME=FILE: what `solve` wrote, or relaxed masks as {"values": [...]}.'),
    ] = None,
    solver: Annotated[
        list[str] | None, typer.Option(help="Also solve by this solver; may be repeated.")
    ] = None,
    relaxation: Annotated[
        list[str] | None,
        typer.Option(help="Also relax: mccormick, cardinality_rlt, perspective; may be repeated."),
    ] = None,
    top_k: Annotated[bool, typer.Option(help="Also keep the units of largest worth, by a threshold.")] = True,
    reference: Annotated[
        str | None, typer.Option(help="Compare with this one; the best where not given.")
    ] = None,
    rounding: Annotated[str, typer.Option(help="The solver that rounds relaxed masks.")] = "auto",
    time_limit: Annotated[
        float, typer.Option(help="Seconds for each solve, relaxation and rounding.")
    ] = 60.0,
    latency_table: LatencyFile = None,
    accelerator: Accelerator = None,
) -> None:
    """Lay selections of any origin side by side: worth, use, gap, distance, and what the differences cost."""
    require_file_place(output)
    traced = read_traced(graph)
    resources = further_resources(latency_table, accelerator)
    problem = PruningProblem.build(traced.graph, traced.objective, parse_budgets(budget), resources=resources)
    found: dict[str, Selection] = {}
    for word in selection or []:
        name, equals, file = word.partition("=")
        if not equals or not name or not file:
            raise ConfigError(f"{word!r} cannot be read: write NAME=FILE")
        _require_new(name, found)
        found[name] = _read(problem, Path(file), name)
    with Spinner().running():
        for name in solver or []:
            _require_new(name, found)
            found[name] = solve(problem, name, time_limit=time_limit)
        for name in relaxation or []:
            _require_new(name, found)
            found[name] = relax(problem, name, time_limit=time_limit)
        if top_k and not len(problem.graph.links):
            _require_new(TOP_K, found)
            found[TOP_K] = thresholded(problem, _worth(problem))
        result = compare(problem, found, reference=reference, solver=rounding, time_limit=time_limit)
    OUT.print(comparison_table(result))
    for line in _lines(result):
        OUT.print(line, highlight=False, markup=False, soft_wrap=True)
    wrote("the comparison", write_json(output, result.to_json()))


def comparison_table(result: Comparison) -> Table:
    """One line for each origin."""
    table = Table(title=f"compared with {result.reference}", title_justify="left", box=box.SIMPLE_HEAD)
    columns = (
        "origin",
        "worth",
        "gap",
        *result.limits,
        "Jaccard",
        "rank corr.",
        "by threshold",
        "own bound's gap",
    )
    for k, column in enumerate(columns):
        table.add_column(column, justify="left" if k == 0 else "right", no_wrap=True)
    for o in result.origins:
        table.add_row(
            o.name + ("" if o.feasible else " (breaks a budget)"),
            f"{o.objective:.6g}",
            _share(o.gap),
            *(f"{o.used[name]:,}" for name in result.limits),
            f"{o.jaccard:.3f}",
            "-" if o.rank_correlation is None else f"{o.rank_correlation:.3f}",
            "-" if o.threshold_objective is None else f"{o.threshold_objective:.6g}",
            _share(o.bound_gap),
        )
    return table


def _lines(result: Comparison) -> list[str]:
    lines = []
    if result.proved:
        lines.append(f"{result.reference} is proved best")
    for o in result.origins:
        if o.groups:
            worst = o.groups[0]
            lines.append(
                f"{o.name} differs in {len(o.groups)} groups, most in {worst.group}: keeps {worst.kept}, not "
                f"{worst.reference_kept}, which alone costs {worst.cost:.4g}"
            )
    return lines


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.3%}"


def _worth(problem: PruningProblem) -> RelaxedMasks:
    """Each unit's worth in the dense network, scaled to [0, 1]: what a global magnitude threshold goes by."""
    objective = problem.objective
    worth = objective.unary.copy()
    for term in objective.pairs:
        block = term.dense()
        np.add.at(worth, term.rows, block.sum(1))
        np.add.at(worth, term.cols, block.sum(0))
    worth -= worth.min()
    return RelaxedMasks.of(problem.graph, worth / max(float(worth.max()), np.finfo(np.float64).tiny), "worth")


def _require_new(name: str, found: dict[str, Selection]) -> None:
    if name in found:
        raise ConfigError(f"two selections are called {name!r}: give each a name of its own")


def _read(problem: PruningProblem, path: Path, name: str) -> Selection:
    data = read_json(path, "masks, a report or relaxed values")
    if "values" in data:
        return RelaxedMasks.of(problem.graph, data["values"], str(data.get("by", name)))
    if "termination" in data:
        return SolveReport.from_json(data)
    return read_masks(path)
