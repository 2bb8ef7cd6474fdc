"""Choosing solvers by what they say of themselves. No backend is named here."""

from __future__ import annotations

from qcqp_prune.errors import BackendError, SolverIncapableError, SolverUnavailableError
from qcqp_prune.program.program import Program
from qcqp_prune.solve.backend import (
    Backend,
    Outlook,
    Role,
    load_backend,
    problem_class,
    registered_solvers,
)
from qcqp_prune.solve.result import Reason, Termination
from qcqp_prune.solve.stages import Held

DEFAULT_SECONDS = 50.0
SEARCH_SHARE = 0.25
# The clock of a backend starts after its model is built, and stopping takes it a moment.
RESERVE = 0.05

Offer = tuple[Backend, Outlook]
Team = dict[Role, list[Offer]]


def choose(program: Program) -> Team:
    """For each role the available backends that offer themselves for this program, the highest rank first.

    Raises:
        SolverUnavailableError: no installed backend offers itself.
    """
    team: Team = {role: [] for role in Role}
    for name in registered_solvers():
        try:
            backend = load_backend(name)
        except SolverUnavailableError:
            continue
        outlook = backend.outlook(program)
        # Whether a backend can run is asked last: to find out may import its package.
        if (
            outlook is not None
            and any(c.covers(problem_class(program)) for c in backend.classes)
            and backend.availability().ok
        ):
            team[outlook.role].append((backend, outlook))
    if not any(team.values()):
        raise SolverUnavailableError(
            "no installed solver offers itself for this problem: install the package with its default dependencies, or "
            "name a solver"
        )
    return {role: sorted(offers, key=lambda offer: -offer[1].rank) for role, offers in team.items()}


def run_auto(held: Held) -> None:
    """Search first, then prove from what was found; where a proof is out of reach, bound it in every way there is."""
    team = choose(held.program)
    total = held.options.time_limit or DEFAULT_SECONDS
    if held.options.time_limit is None:
        held.notes.append(
            f"auto: without a time limit it takes {total:.0f} s at most; give more with time_limit=300, or "
            "--time-limit 300 on the command line"
        )
    for offer in team[Role.SEARCHES][:1]:
        _stage(held, offer, SEARCH_SHARE * total)
    for offer in team[Role.PROVES][:1]:
        _stage(held, offer, _left(held, total))
    if held.bound is None or not team[Role.PROVES]:
        for offer in team[Role.BOUNDS]:
            _stage(held, offer, _left(held, total), bound_only=held.x is not None)
    if held.x is None and held.interrupted:
        held.hold_least()
    if held.bound is None and not held.interrupted:
        held.notes.append(
            "auto: no solver gave a bound in the time allowed, so there is no gap: give a larger time_limit"
        )
    if held.is_closed and not held.interrupted:
        held.termination = Termination(Reason.OPTIMAL)


def _left(held: Held, total: float) -> float:
    return total * (1 - RESERVE) - held.seconds


def _stage(held: Held, offer: Offer, seconds: float, *, bound_only: bool = False) -> None:
    """Run one backend, unless the time is over, the user stopped, or the gap is closed already."""
    backend, outlook = offer
    if held.interrupted or held.is_closed or seconds <= 0:
        return
    held.notes.append(f"auto: {backend.name} {outlook.role.value}: {outlook.why}")
    try:
        held.run(backend, time_limit=max(seconds, 0.1), bound_only=bound_only)
    except (SolverIncapableError, BackendError, MemoryError) as error:
        # What was checked before stays good; without it there is nothing to go on with.
        if held.x is None and not isinstance(error, SolverIncapableError):
            raise
        held.notes.append(f"auto: {backend.name} gave nothing: {error}")
