"""``sweep``: the published way to a size, as a table."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich import box
from rich.table import Table

from qcqp_prune.cli.console import OUT, wrote

if TYPE_CHECKING:
    from qcqp_prune.grid import SweepRow


def sweep(
    config: Annotated[Path, typer.Argument(help="A TOML file with the tables [training] and [sweep].")],
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="The rows, as JSON, instead of sweep.json in the file's folder."),
    ] = None,
) -> None:
    """Train by the published rule for each pair of strength and alpha; goes on where it was interrupted."""
    from qcqp_prune.cli.config import read_config
    from qcqp_prune.cli.work import sweep_job

    job = read_config(config)
    results = output or job.path(job.output.folder) / "sweep.json"
    rows = []
    for row in sweep_job(job, results):
        rows.append(row)
        OUT.print(f"strength {row.strength:g}, alpha {row.alpha:g}: {row.seconds:.0f} s", highlight=False)
    OUT.print(sweep_table(rows))
    wrote("the rows", results)


def sweep_table(rows: Sequence[SweepRow]) -> Table:
    """One line for each pair."""
    table = Table(box=box.SIMPLE_HEAD)
    resources = list(rows[0].used)
    columns = ("strength", "alpha", "units removed", *resources, "trained", "cut", "finetuned", "seconds")
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    for row in rows:
        steps = [_measured(row, step) for step in ("regularised", "pruned", "finetuned")]
        table.add_row(
            f"{row.strength:g}",
            f"{row.alpha:g}",
            f"{row.removed:.2%}",
            *(f"{row.used[name]:,}" for name in resources),
            *steps,
            f"{row.seconds:.0f}",
        )
    return table


def _measured(row: SweepRow, step: str) -> str:
    """The accuracy at a step, or else the loss that was given; a dash where neither was measured."""
    share, loss = getattr(row.accuracy, step), row.accuracy.losses.get(step)
    if share is not None:
        return f"{share:.2%}"
    return "-" if loss is None else f"{loss:.4g}"
