"""The contract of a solver backend, and the registry that finds backends by name.

A backend registers its class under the entry points ``qcqp_prune.solvers``, the same door for ours and anyone's.
"""

from __future__ import annotations

import difflib
import math
from dataclasses import dataclass
from enum import Enum
from importlib.metadata import EntryPoint, entry_points
from typing import Protocol, runtime_checkable

import numpy as np

from qcqp_prune.errors import SolverIncapableError, SolverUnavailableError
from qcqp_prune.program.program import Program
from qcqp_prune.solve.options import SolveOptions
from qcqp_prune.solve.result import RawSolution, Reason, Termination

SOLVER_ENTRY_POINTS = "qcqp_prune.solvers"


@dataclass(frozen=True)
class ProblemClass:
    """A joint class of problems. What a solver can do is a set of these, not of independent flags.

    Attributes:
        objective_degree, constraint_degree: 1 linear, 2 quadratic.
        integral: whether variables are 0/1.
        convex: whether the continuous relaxation is a convex problem.
        tables: whether constraints may hold costs that are looked up.
    """

    objective_degree: int
    constraint_degree: int
    integral: bool = True
    convex: bool = False
    tables: bool = False

    def covers(self, other: ProblemClass) -> bool:
        """Whether a solver of this class takes a problem of the other."""
        return (
            self.objective_degree >= other.objective_degree
            and self.constraint_degree >= other.constraint_degree
            and (self.integral or not other.integral)
            and (not self.convex or other.convex)
            and (self.tables or not other.tables)
        )

    def __str__(self) -> str:
        degree = {1: "linear", 2: "quadratic"}
        kind = "0/1" if self.integral else "continuous"
        shape = "convex" if self.convex else "nonconvex"
        return (
            f"{kind}, {degree[self.objective_degree]} objective, {degree[self.constraint_degree]} constraints, "
            f"{shape}{', with tables' if self.tables else ''}"
        )


def problem_class(program: Program) -> ProblemClass:
    """The class a program belongs to."""
    objective = 2 if program.pairs else 1
    constraint = 1 if all(c.form.is_linear for c in program.constraints) else 2
    tables = any(c.form.tables for c in program.constraints)
    return ProblemClass(
        objective, constraint, integral=True, convex=objective == constraint == 1, tables=tables
    )


@dataclass(frozen=True)
class Availability:
    """Whether a backend can run here; where it cannot, ``reason`` says why and what to install."""

    ok: bool
    reason: str = ""
    version: str = ""


class Role(Enum):
    """What a backend expects to achieve on a program within about a minute. ``auto`` goes by it."""

    PROVES = "finds the best selection and proves it"
    BOUNDS = "proves a valid bound, without closing the gap"
    SEARCHES = "finds a good selection, without a bound"


@dataclass(frozen=True)
class Outlook:
    """A backend's own judgement of a program.

    Attributes:
        role: what it expects to achieve.
        rank: among backends of one role, the highest goes first.
        why: one clause for the report.
        seconds: how long it expects to take, infinite where it cannot say. ``auto`` runs a quick bound before a slower
            proof, because what the bound decides makes the proof shorter.
    """

    role: Role
    rank: int
    why: str
    seconds: float = math.inf


@runtime_checkable
class Backend(Protocol):
    """A solver. Any object with these members will do; ``qcqp_prune.testing.check_backend`` tests it.

    Attributes:
        name: as it is asked for.
        classes: the joint problem classes it takes.
    """

    name: str
    classes: tuple[ProblemClass, ...]

    def availability(self) -> Availability:
        """Whether it can run here."""

    def outlook(self, program: Program) -> Outlook | None:
        """What it expects to achieve on a program; None keeps it out of ``auto``."""

    def solve(self, program: Program, options: SolveOptions) -> RawSolution:
        """Maximise the program. Must honour every limit of the options and poll ``options.stop``."""


@dataclass(frozen=True)
class SolverInfo:
    """One line of the list of solvers.

    Attributes:
        name: as it is asked for.
        availability: whether it can run here.
        classes: the joint problem classes it takes.
        scope: what it gives and up to which size, in the backend's own words: its attribute ``scope``, if any.
    """

    name: str
    availability: Availability
    classes: tuple[ProblemClass, ...]
    scope: str = ""


def available_solvers() -> tuple[SolverInfo, ...]:
    """Every registered solver, whether it can run here, and what it takes; sorted by name."""
    found = []
    for name in registered_solvers():
        try:
            backend = load_backend(name)
        except SolverUnavailableError as error:
            found.append(SolverInfo(name, Availability(False, str(error)), ()))
        else:
            scope = str(getattr(backend, "scope", ""))
            found.append(SolverInfo(name, backend.availability(), backend.classes, scope))
    return tuple(found)


def registered_solvers() -> tuple[str, ...]:
    """Names of all registered backends, sorted, whether or not they can run here."""
    return tuple(sorted(_entry_points()))


def get_backend(name: str) -> Backend:
    """The backend of that name. ``"name:argument"`` passes the argument to its constructor.

    Raises:
        SolverUnavailableError: no backend has that name, or its package is not installed.
    """
    base, _, argument = name.partition(":")
    points = _entry_points()
    if base not in points:
        near = difflib.get_close_matches(base, ["auto", *points], n=1, cutoff=0.4)
        hint = f"did you mean {near[0]!r}? " if near else ""
        known = ", ".join(["auto", *sorted(points)])
        raise SolverUnavailableError(f"no solver is called {name!r}: {hint}Choose from {known}")
    backend = load_backend(base, argument or None)
    require_available(backend)
    return backend


def require_available(backend: Backend) -> None:
    """Raise ``SolverUnavailableError`` where a backend cannot run here."""
    state = backend.availability()
    if not state.ok:
        raise SolverUnavailableError(f"solver {backend.name!r} cannot run here: {state.reason}")


def require_capable(backend: Backend, program: Program) -> None:
    """Raise ``SolverIncapableError`` where a backend does not take a program's class."""
    wanted = problem_class(program)
    if not any(c.covers(wanted) for c in backend.classes):
        takes = "; ".join(map(str, backend.classes)) or "nothing"
        raise SolverIncapableError(
            f"solver {backend.name!r} does not take this problem ({wanted}), only: {takes}. Choose another solver, "
            'or "auto"'
        )


def answer_to_nothing(program: Program) -> RawSolution | None:
    """The answer to a program without variables, which solvers need not be able to state; None where there are some."""
    if program.size:
        return None
    x = np.zeros(0, np.bool_)
    if not program.is_feasible(x):
        return RawSolution(Termination(Reason.INFEASIBLE))
    return RawSolution(Termination(Reason.OPTIMAL), x=x, bound=program.constant, objective=program.constant)


def _entry_points() -> dict[str, EntryPoint]:
    return {point.name: point for point in entry_points(group=SOLVER_ENTRY_POINTS)}


def load_backend(name: str, argument: str | None = None) -> Backend:
    """Make a registered backend, whether or not it can run here.

    Raises:
        SolverUnavailableError: its module cannot be imported, or its constructor refuses the argument.
    """
    point = _entry_points()[name]
    try:
        factory = point.load()
    except (ImportError, AttributeError) as error:
        raise SolverUnavailableError(
            f"solver {name!r} is registered by {point.value} but cannot be imported ({error}): reinstall the package "
            "that provides it"
        ) from error
    try:
        backend: Backend = factory(argument) if argument is not None else factory()
    except TypeError as error:
        raise SolverUnavailableError(
            f"solver {name!r} cannot be made from {name}:{argument or ''} ({error}): leave out what follows the colon"
        ) from error
    return backend
