"""Choosing solvers by what they say of themselves. No backend is named here."""

from __future__ import annotations

from qcqp_prune.errors import SolverIncapableError, SolverUnavailableError
from qcqp_prune.program.program import Program
from qcqp_prune.solve.backend import (
    Backend,
    Outlook,
    Role,
    load_backend,
    problem_class,
    registered_solvers,
    require_capable,
)
from qcqp_prune.solve.result import Reason, Termination
from qcqp_prune.solve.stages import Held

DEFAULT_SECONDS = 50.0
SEARCH_SHARE = 0.25
# The clock of a backend starts after its model is built, and stopping takes it a moment.
RESERVE = 0.05

Team = dict[Role, tuple[Backend, Outlook]]


def choose(program: Program) -> Team:
    """For each role the available backend with the highest rank on this program.

    Raises:
        SolverUnavailableError: no installed backend offers itself.
    """
    team: Team = {}
    for name in registered_solvers():
        try:
            backend = load_backend(name)
        except SolverUnavailableError:
            continue
        outlook = backend.outlook(program)
        # Whether a backend can run is asked last: to find out may import its package.
        if (
            outlook is not None
            and (outlook.role not in team or outlook.rank > team[outlook.role][1].rank)
            and any(c.covers(problem_class(program)) for c in backend.classes)
            and backend.availability().ok
        ):
            team[outlook.role] = (backend, outlook)
    if not team:
        raise SolverUnavailableError(
            "no installed solver offers itself for this problem: install the package with its default dependencies, or "
            "name a solver"
        )
    return team


def run_auto(held: Held) -> None:
    """Search first, then prove from what was found, or bound it where a proof is out of reach."""
    team = choose(held.program)
    total = held.options.time_limit or DEFAULT_SECONDS
    if held.options.time_limit is None:
        held.notes.append(f"auto: no time limit was given, {total:.0f} s were used")
    if Role.SEARCHES in team:
        _stage(held, team, Role.SEARCHES, SEARCH_SHARE * total)
    if held.interrupted:
        return
    if Role.PROVES in team:
        _stage(held, team, Role.PROVES, total * (1 - RESERVE) - held.seconds)
    left = total * (1 - RESERVE) - held.seconds
    if Role.BOUNDS in team and held.bound is None and not held.interrupted and left > 0:
        _stage(held, team, Role.BOUNDS, left, bound_only=held.x is not None)
    if held.bound is None and not held.interrupted:
        held.notes.append(
            "auto: no solver gave a bound in the time allowed, so there is no gap: raise time_limit"
        )
    if held.is_closed and not held.interrupted:
        held.termination = Termination(Reason.OPTIMAL)


def _stage(held: Held, team: Team, role: Role, seconds: float, *, bound_only: bool = False) -> None:
    backend, outlook = team[role]
    held.notes.append(f"auto: {backend.name} {role.value}: {outlook.why}")
    try:
        require_capable(backend, held.program)
        held.run(backend, time_limit=max(seconds, 0.1), bound_only=bound_only)
    except SolverIncapableError as error:
        held.notes.append(f"auto: {backend.name} declined: {error}")
