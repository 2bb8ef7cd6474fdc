"""What a caller may ask of any solver."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from qcqp_prune.errors import InvalidOptionError
from qcqp_prune.program.coefficients import BoolArray
from qcqp_prune.solve.result import TracePoint


def never() -> bool:
    """The default of ``SolveOptions.stop``: nobody asks to stop."""
    return False


@dataclass(frozen=True, eq=False)
class SolveOptions:
    """Limits and wishes, the same for every backend.

    Attributes:
        time_limit: seconds of wall clock, None for no limit. What a run finds under it depends on the machine.
        gap_limit: stop once ``(bound - objective) / |objective|`` is at most this; 0 asks for a full proof.
        work_limit: largest amount of work in the backend's own unit (branch-and-bound nodes, or moves of a search);
            None for no limit. The same seed and the same work give the same masks.
        seed: of everything random.
        threads: most threads to use.
        warm_start: a 0/1 point of the program to start from, ``(n,) bool``.
        known_bound: an upper bound on the objective that is proved already. A backend may search below it only, stop
            once it is met, and return it as its own bound.
        bound_only: an incumbent is held already, and what is wanted is a valid bound.
        log_level: of the messages a backend writes to its log, as in ``logging``.
        on_event: called with each new trace point, from inside the solver's loop.
        stop: polled by the backend; once it returns True the backend returns what it holds.
    """

    time_limit: float | None = None
    gap_limit: float = 1e-4
    work_limit: int | None = None
    seed: int = 0
    threads: int = 1
    warm_start: BoolArray | None = None
    known_bound: float | None = None
    bound_only: bool = False
    log_level: int = logging.INFO
    on_event: Callable[[TracePoint], None] | None = field(default=None, repr=False)
    stop: Callable[[], bool] = field(default=never, repr=False)

    def __post_init__(self) -> None:
        _require_positive("time_limit", self.time_limit, whole=False)
        _require_positive("work_limit", self.work_limit, whole=True)
        _require_positive("threads", self.threads, whole=True)
        if not _is_number(self.gap_limit) or not 0 <= self.gap_limit < math.inf:
            raise InvalidOptionError(
                f"gap_limit is {self.gap_limit!r}: give a finite number of at least 0, such as 1e-4"
            )
        if self.known_bound is not None and not (
            _is_number(self.known_bound) and math.isfinite(self.known_bound)
        ):
            raise InvalidOptionError(
                f"known_bound is {self.known_bound!r}: give a finite number that no selection exceeds, or None"
            )
        if isinstance(self.seed, bool) or not isinstance(self.seed, int) or not 0 <= self.seed < 2**31:
            raise InvalidOptionError(f"seed is {self.seed!r}: give a whole number from 0 to 2**31 - 1")

    def to_json(self) -> dict[str, Any]:
        """Everything that can be written down, for the report."""
        return {
            "time_limit": self.time_limit,
            "gap_limit": self.gap_limit,
            "work_limit": self.work_limit,
            "seed": self.seed,
            "threads": self.threads,
            "warm_start": self.warm_start is not None,
            "known_bound": self.known_bound,
        }


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _require_positive(name: str, value: float | None, *, whole: bool) -> None:
    if value is None:
        return
    kind = "whole number" if whole else "finite number"
    if (
        not _is_number(value)
        or (whole and not isinstance(value, int))
        or not math.isfinite(value)
        or value <= 0
    ):
        none = "" if name == "threads" else ", or None for no limit"
        raise InvalidOptionError(f"{name} is {value!r}: give a {kind} above 0{none}")
