"""What a solver hands back: why it stopped is one thing, what is held another."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Any

import numpy as np
import numpy.typing as npt

from qcqp_prune.program.coefficients import FloatArray
from qcqp_prune.program.restriction import Restriction
from qcqp_prune.solve.proof import AnyProof, Tangent


class Reason(Enum):
    """Why a solver stopped. The value is a sentence that ends with what can be done."""

    OPTIMAL = (
        "The gap asked for is closed: the selection is proved best to within it; nothing more is needed."
    )
    TIME_LIMIT = "The time limit was reached: raise time_limit for a better selection or a smaller gap."
    WORK_LIMIT = "The work limit was reached: raise work_limit for a better selection or a smaller gap."
    MEMORY_LIMIT = "Memory ran out: use a machine with more, or a solver for larger problems."
    SEARCH_ENDED = 'The search came to its end, which proves nothing: solve with solver="auto" for a bound.'
    BOUND_COMPUTED = (
        "The relaxation is solved and its bound is valid. For a smaller gap name a solver that proves (`qcqp-prune "
        "solvers` lists them, solver=... takes one), or accept this one: gap_limit=0.01 calls a gap of 1 % closed."
    )
    INTERRUPTED = "The run was interrupted and returned what it held: solve again from it with warm_start."
    INFEASIBLE = "The solver proved that no selection meets every budget: raise a budget or lower min_keep."
    NOTHING_FOUND = (
        "The search found no selection within the budgets: loosen them, or name a solver that proves."
    )
    FAILED = "The solver failed: read the log in the report, and try another solver."


@dataclass(frozen=True)
class Termination:
    """Why a run ended.

    Attributes:
        reason: the kind of ending.
        limit: the limit that was hit, as text (``"time_limit=60"``), None where none was.
    """

    reason: Reason
    limit: str | None = None

    @property
    def sentence(self) -> str:
        """The reason in words, with a remedy."""
        return f"{self.reason.value} ({self.limit})" if self.limit else self.reason.value

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {"reason": self.reason.name, "limit": self.limit, "sentence": self.sentence}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Termination:
        """The inverse of ``to_json``."""
        return cls(Reason[data["reason"]], data["limit"])


@dataclass(frozen=True)
class TracePoint:
    """Progress at one moment: what was held and what was proved.

    Attributes:
        seconds: since the solver was called.
        work: units of work done so far (nodes, moves).
        incumbent: best objective held, None before there is one.
        bound: upper bound on the objective, None before there is one.
        prices: by resource, what one more unit of it is worth at most by the multipliers at hand; empty where the
            backend has none.
    """

    seconds: float
    work: int
    incumbent: float | None
    bound: float | None
    prices: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class RawSolution:
    """A backend's answer before it is checked. Nothing in it is believed.

    Attributes:
        termination: why the backend stopped.
        x: ``(n,)`` the point held, bool or float; floats are rounded by the core, never truncated. None where the
            backend holds no point.
        bound: upper bound on the objective with the program's constant, None where nothing is proved.
        objective: what the backend believes the point to be worth, None where it does not say.
        trace: progress over time.
        log: the solver's own text.
        solver_version: of the package behind the backend.
        reduction: the reformulation that was solved, empty for the program itself.
        statistics: further numbers worth keeping.
        proof: what proves a bound of at most ``bound``, None where that cannot be written down.
        tangents: bounds as functions of the limits.
        restriction: what the backend proved of single units and counts; ``auto`` hands the rest to other solvers.
        near: where no point is held, one that misses nothing but the lower end of a band, for the message.
        relaxed: ``(n,) float64``, the point of the continuous relaxation that was solved, where there is one.
    """

    termination: Termination
    x: npt.NDArray[Any] | None = None
    bound: float | None = None
    objective: float | None = None
    trace: tuple[TracePoint, ...] = ()
    log: str = ""
    solver_version: str = ""
    reduction: str = ""
    statistics: Mapping[str, float] = field(default_factory=dict)
    proof: AnyProof | None = field(default=None, repr=False)
    tangents: tuple[Tangent, ...] = field(default=(), repr=False)
    restriction: Restriction | None = None
    near: npt.NDArray[Any] | None = None
    relaxed: FloatArray | None = field(default=None, repr=False)


class TraceRecorder:
    """Collects trace points that say something new, and passes them to a listener."""

    def __init__(self, listener: Callable[[TracePoint], None] | None = None) -> None:
        self._points: list[TracePoint] = []
        self._listener = listener

    def add(self, point: TracePoint) -> None:
        """Keep a point whose incumbent or bound is new."""
        point = replace(point, incumbent=_plain(point.incumbent), bound=_plain(point.bound))
        last = self._points[-1] if self._points else None
        if last is not None and (last.incumbent, last.bound) == (point.incumbent, point.bound):
            return
        self._points.append(point)
        if self._listener is not None:
            self._listener(point)

    def revise(self, first: int, incumbent: float | None, bound: float | None) -> None:
        """Take back what points claimed and a check did not confirm.

        Args:
            first: index of the first point in question.
            incumbent: the best objective that passed the check; higher claims fall back to what was held before them.
            bound: the lowest bound that passed; lower claims likewise.
        """
        kept, doubtful = self._points[:first], self._points[first:]
        self._points = kept
        held = kept[-1] if kept else TracePoint(0.0, 0, None, None)
        for claimed in doubtful:
            point = claimed
            if point.incumbent is not None and (incumbent is None or point.incumbent > incumbent):
                point = replace(point, incumbent=held.incumbent)
            if point.bound is not None and (bound is None or point.bound < bound):
                point = replace(point, bound=held.bound)
            if point is claimed or (point.incumbent, point.bound) != (held.incumbent, held.bound):
                self._points.append(point)
                held = point

    @property
    def points(self) -> tuple[TracePoint, ...]:
        """Everything kept so far."""
        return tuple(self._points)


def _plain(value: float | None) -> float | None:
    """A Python float, so that a report can be written as JSON."""
    return None if value is None else float(value)


def relative_gap(objective: float, bound: float | None) -> float | None:
    """``(bound - objective) / |objective|``; None where there is no valid bound or the quotient has no meaning."""
    if bound is None or not np.isfinite(bound):
        return None
    if bound <= objective:
        return 0.0
    return (bound - objective) / abs(objective) if objective else None
