"""What the commands write to: results to standard output, progress and errors to standard error."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.status import Status

from qcqp_prune.graph.channels import ChannelGraph
from qcqp_prune.program.problem import Resource
from qcqp_prune.report.budgets import feasible_ranges
from qcqp_prune.report.terminal import ranges_table
from qcqp_prune.solve.report import SolveReport
from qcqp_prune.solve.result import TracePoint, relative_gap

if TYPE_CHECKING:
    from pathlib import Path

# Into a file or a pipe, lines may be longer than the 80 columns that rich takes where it sees no terminal.
OUT = Console(width=None if sys.stdout.isatty() or "COLUMNS" in os.environ else 120)
ERR = Console(stderr=True)


def show_ranges(graph: ChannelGraph, resources: Sequence[Resource] = ()) -> None:
    """Print what budgets can be met, before anything is solved."""
    OUT.print(ranges_table(feasible_ranges(graph, resources)))


def wrote(what: str, path: Path) -> None:
    """Say where a result lies."""
    OUT.print(f"wrote {what}: {path}", markup=False, highlight=False, soft_wrap=True)


def wrote_certificate(report: SolveReport, path: Path) -> None:
    """Write a report's certificate, and say what it proves where the report's bound is a better one."""
    wrote("the certificate", report.write_certificate(path)[0])
    certificate = report.certificate
    if certificate is None or report.bound is None or certificate.bound <= report.bound:
        return
    gap = relative_gap(report.objective, certificate.bound)
    shown = f"{certificate.bound:.6g}" if gap is None else f"a gap of {gap:.3%}"
    ERR.print(
        f"The certificate proves {shown}: the rest of the reported bound came from branch and cut, which leaves no "
        "multipliers. --solver decomposition gives a bound that can all be written down."
    )


class Spinner:
    """One line on the terminal that says what is being done; silent where standard error is no terminal."""

    def __init__(self) -> None:
        self._status = Status("", console=ERR)

    @contextmanager
    def running(self) -> Iterator[Spinner]:
        """Show it while the block lasts."""
        try:
            yield self
        finally:
            self._status.stop()

    def say(self, text: str) -> None:
        """Change the line."""
        self._status.update(text)
        if ERR.is_terminal:
            self._status.start()

    def pause(self) -> None:
        """Leave the line to someone else, such as a progress bar."""
        self._status.stop()

    def progress(self, point: TracePoint) -> None:
        """Show a solver's incumbent, bound and gap."""
        parts = [f"solving, {point.seconds:.0f} s"]
        if point.incumbent is not None:
            parts.append(f"selection worth {point.incumbent:.6g}")
        if point.bound is not None:
            parts.append(f"bound {point.bound:.6g}")
        if point.incumbent is not None and (gap := relative_gap(point.incumbent, point.bound)) is not None:
            parts.append(f"gap {gap:.2%}")
        self.say(", ".join(parts))


class TraceBar:
    """How far a trace is, from two seconds after it began; silent where standard error is no terminal."""

    def __init__(self, console: Console = ERR, *, patience: float = 2.0) -> None:
        self._columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
        )
        self._console, self._patience = console, patience
        self._progress: Progress | None = None
        self._timer: threading.Timer | None = None

    @contextmanager
    def running(self) -> Iterator[TraceBar]:
        """Show it while the block lasts."""
        with self.closing():
            self.start()
            yield self

    @contextmanager
    def closing(self) -> Iterator[TraceBar]:
        """Leave nothing of it behind the block, however it ends."""
        try:
            yield self
        finally:
            self.stop()

    def start(self) -> None:
        """Begin to wait."""
        if not self._console.is_terminal:
            return
        self._progress = Progress(*self._columns, console=self._console, transient=True)
        self._task = self._progress.add_task("tracing the network", total=None)
        # The export is one call that takes long: only another thread can show something meanwhile.
        self._timer = threading.Timer(self._patience, self._progress.start)
        self._timer.daemon = True
        self._timer.start()

    def show(self, what: str, done: int, total: int) -> None:
        """Change what it says; as ``trace`` calls it."""
        if self._progress is not None:
            self._progress.update(self._task, description=what, completed=done, total=total or None)

    def stop(self) -> None:
        """Take it away."""
        if self._timer is None or self._progress is None:
            return
        self._timer.cancel()
        self._timer.join()  # it may be about to show the bar
        self._progress.stop()
        self._timer = self._progress = None
