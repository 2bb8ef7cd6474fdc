"""Commands about what is proved: ``certify`` and ``pareto``. Neither needs torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from qcqp_prune.certify import Rejected
from qcqp_prune.certify import certify as check
from qcqp_prune.cli.arguments import further_resources, parse_budgets
from qcqp_prune.cli.console import OUT, Spinner, wrote
from qcqp_prune.errors import CertificateError, ConfigError
from qcqp_prune.program.files import read_traced
from qcqp_prune.program.problem import PruningProblem, Resource
from qcqp_prune.report.pareto import pareto_html, pareto_table
from qcqp_prune.solve.certificate import differences, stored_limits
from qcqp_prune.solve.options import SolveOptions
from qcqp_prune.solve.pareto import ParetoFront
from qcqp_prune.solve.pareto import pareto as trade_off
from qcqp_prune.storage import require_file_place, write_bytes, write_json

LatencyFile = Annotated[
    Path | None, typer.Option(help="What `latency` wrote, where a budget or the curve is of latency.")
]
Accelerator = Annotated[
    str | None, typer.Option(help="Channels read x written at a time, where a budget is of cycles: 8x8.")
]
GraphFile = Annotated[Path, typer.Argument(help="The file that `trace` wrote; its scores lie beside it.")]


def certify(
    file: Annotated[
        Path, typer.Argument(help="The file that --certificate wrote; its arrays lie beside it.")
    ],
    network: Annotated[
        Path | None,
        typer.Option(help="What `trace` wrote: also check that the certificate speaks of this network."),
    ] = None,
    latency_table: LatencyFile = None,
    accelerator: Accelerator = None,
) -> None:
    """Check a certificate with the independent checker; leave with 1 where it does not prove what it claims."""
    try:
        verdict = check(file)
    except Rejected as why:
        raise CertificateError(
            f"{file} is rejected: {why}. Believe neither its bound nor its gap; write it again with --certificate"
        ) from why
    OUT.print(f"accepted: {file}", highlight=False, markup=False, soft_wrap=True)
    for name, limit in stored_limits(file).items():
        OUT.print(f"  {name}: at most {limit:,}, met by the selection in integers", highlight=False)
    OUT.print(f"  the selection is worth {verdict.objective:.9g}, recomputed", highlight=False)
    OUT.print(
        f"  no selection within the budgets is worth more than {verdict.claimed:.9g} (the multipliers prove "
        f"{verdict.bound:.12g}, rounding included)",
        highlight=False,
        soft_wrap=True,
    )
    if verdict.gap is not None:
        OUT.print(f"  so it is within {verdict.gap:.4%} of the best", highlight=False)
    if network is None:
        OUT.print("  of which network is not checked: give --network", highlight=False)
    else:
        _require_same(file, network, further_resources(latency_table, accelerator))
        OUT.print(f"  the program is that of {network}", highlight=False, markup=False, soft_wrap=True)
    OUT.print(f"  checked in {verdict.seconds:.1f} s", highlight=False)


def _require_same(file: Path, network: Path, resources: Sequence[Resource]) -> None:
    traced = read_traced(network)
    problem = PruningProblem.build(
        traced.graph, traced.objective, dict(stored_limits(file)), resources=resources
    )
    found = differences(file, problem)
    if found:
        raise CertificateError(
            f"{file} proves a bound for another program than that of {network}: {', '.join(found[:5])} differ. Give "
            "the traced network that was solved"
        )


def pareto(
    graph: GraphFile,
    output: Annotated[Path, typer.Option("--output", "-o", help="The curve and its selections, as JSON.")],
    resource: Annotated[str, typer.Option(help="Whose limit varies.")] = "macs",
    lowest: Annotated[
        float, typer.Option("--from", help="Lowest limit, a share of the dense network's.")
    ] = 0.2,
    highest: Annotated[float, typer.Option("--to", help="Highest limit.")] = 0.9,
    points: Annotated[int, typer.Option(help="How many limits.")] = 8,
    bounds: Annotated[int, typer.Option(help="At how many of them a bound is computed.")] = 3,
    budget: Annotated[
        list[str] | None, typer.Option("--budget", "-b", help="Further budgets, which stay: params=2M.")
    ] = None,
    time_limit: Annotated[float, typer.Option(help="Seconds for everything.")] = 60.0,
    seed: Annotated[int, typer.Option(help="Of everything random.")] = 0,
    latency_table: LatencyFile = None,
    accelerator: Accelerator = None,
    csv: Annotated[Path | None, typer.Option(help="The points as a table.")] = None,
    html: Annotated[Path | None, typer.Option(help="A page with the drawing.")] = None,
) -> None:
    """Trade a resource against what is kept: selections at several budgets, and a bound for every budget."""
    for place in (output, csv, html):
        if place is not None:
            require_file_place(place)
    if not (0 < lowest <= highest <= 1 and points >= 1):
        raise ConfigError(
            f"--from {lowest} --to {highest} --points {points}: give shares with 0 < from <= to <= 1 and at least 1 "
            "point"
        )
    traced = read_traced(graph)
    budgets = {**parse_budgets(budget or []), resource: highest}
    resources = further_resources(latency_table, accelerator)
    problem = PruningProblem.build(traced.graph, traced.objective, budgets, resources=resources)
    dense = next(row.dense for row in problem.rows if row.resource == resource)
    step = (highest - lowest) / max(points - 1, 1)
    limits = [int((lowest + k * step) * dense) for k in range(points)]
    with Spinner().running() as spinner:
        options = replace(SolveOptions(seed=seed), on_event=spinner.progress)
        front = trade_off(
            problem, limits, resource=resource, bounds=bounds, time_limit=time_limit, options=options
        )
    OUT.print(pareto_table(front))
    for note in front.notes:
        OUT.print(f"note: {note}", markup=False)
    _write(front, output, csv, html)


def _write(front: ParetoFront, output: Path, csv: Path | None, html: Path | None) -> None:
    wrote("the curve", write_json(output, front.to_json()))
    if csv is not None:
        wrote("the table", write_bytes(csv, front.to_csv().encode()))
    if html is not None:
        wrote("the page", write_bytes(html, pareto_html(front).encode()))
