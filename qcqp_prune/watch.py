"""Who listens while a network is pruned, and how long each phase takes."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from qcqp_prune.apply.verification import Verification
from qcqp_prune.graph.channels import ChannelGraph
from qcqp_prune.report import Regularised
from qcqp_prune.solve.report import SolveReport
from qcqp_prune.solve.result import TracePoint
from qcqp_prune.train import Evaluation


class Watcher:
    """Told what happens as it happens. A class that derives from this one defines only what it needs."""

    def phase(self, name: str) -> None:
        """A phase begins: trace, train, score, solve, shrink, repair, finetune or evaluate."""

    def tracing(self, what: str, done: int, total: int) -> None:
        """How far the trace is: what it does, how much of it is done, of how much; 0 of 0 where nobody knows."""

    def traced(self, graph: ChannelGraph) -> None:
        """The graph is there; nothing was asked of it yet."""

    def trained(self, training: Regularised) -> None:
        """The training under a regulariser is over; nothing was cut yet."""

    def round(self, number: int, count: int) -> None:
        """One of several rounds begins, counted from 1."""

    def progress(self, point: TracePoint) -> None:
        """The solver has a new incumbent or bound."""

    def solved(self, report: SolveReport) -> None:
        """The selection is made and checked; its masks are of the network that was traced."""

    def verified(self, checked: Verification) -> None:
        """The smaller network is there and checked."""

    def evaluated(self, step: str, result: Evaluation) -> None:
        """Accuracy was measured at a step: dense, regularised, pruned, repaired or finetuned."""


class Clock:
    """Announces phases and adds up their wall clock."""

    def __init__(self, watch: Watcher) -> None:
        self.seconds: dict[str, float] = {}
        self._watch = watch

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        """One phase, while the ``with`` block lasts."""
        self._watch.phase(phase)
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - start
