"""Choosing solvers by what they say of themselves. No backend is named here."""

from __future__ import annotations

from qcqp_prune.errors import BackendError, SolverIncapableError, SolverUnavailableError
from qcqp_prune.program.program import Program
from qcqp_prune.program.restriction import Folded
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
# A bound gets this share of the time left, and is asked again as long as it decides this share of what was open.
BOUND_SHARE, PROGRESS = 0.5, 0.1
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
    """Search, bound and decide what the bound allows, prove what is left; more bounds where no proof is in reach."""
    team = choose(held.program)
    total = held.options.time_limit or DEFAULT_SECONDS
    if held.options.time_limit is None:
        held.notes.append(
            f"auto: without a time limit it takes {total:.0f} s at most; give more with time_limit=300, or "
            "--time-limit 300 on the command line"
        )
    for offer in team[Role.SEARCHES][:1]:
        _stage(held, offer, SEARCH_SHARE * total)
    used = _prove(held, team, total)
    if held.bound is None or not used[Role.PROVES]:
        for offer in team[Role.BOUNDS]:
            if offer[0].name not in used[Role.BOUNDS]:
                _stage(held, offer, _left(held, total), bound_only=held.x is not None)
    if held.x is None and held.interrupted and not held.program.has_bands:
        held.hold_least()
    if held.bound is None and not held.interrupted:
        held.notes.append(
            "auto: no solver gave a bound in the time allowed, so there is no gap: give a larger time_limit"
        )
    if held.is_closed and not held.interrupted:
        held.termination = Termination(Reason.OPTIMAL)
    elif held.termination is not None and held.termination.reason is Reason.TIME_LIMIT:
        # What the last solver hit is its share; the user gave the whole.
        held.termination = Termination(Reason.TIME_LIMIT, f"time_limit={total:g}")


def _prove(held: Held, team: Team, total: float) -> dict[Role, set[str]]:
    """Bounds and proofs by turns, each on what the ones before left undecided; the names that ran, by role.

    A prover goes at once where it expects to be quicker than the bound, or where the bound decides nothing any more.
    """
    used: dict[Role, set[str]] = {role: set() for role in Role}
    folded, stalled = None, False
    while not (held.interrupted or held.is_closed) and _left(held, total) > 0:
        provers, bounders = team[Role.PROVES][:1], team[Role.BOUNDS][:1]
        if provers and (stalled or not bounders or provers[0][1].seconds <= bounders[0][1].seconds):
            _stage(held, provers[0], _left(held, total), folded=folded)
            used[Role.PROVES].add(provers[0][0].name)
            break
        if not bounders or stalled:
            break
        # A prover may want the rest of the time, now or once more is decided.
        before = held.program if folded is None else folded.program
        _stage(held, bounders[0], BOUND_SHARE * _left(held, total), folded=folded)
        used[Role.BOUNDS].add(bounders[0][0].name)
        folded = held.undecided()
        if held.x is not None and not (folded.is_possible and folded.program.size):
            held.settle()
            held.notes.append("auto: the bound decided every unit")
            break
        stalled = _freedom(folded.program) > (1 - PROGRESS) * _freedom(before)
        if not stalled:
            decided = held.program.size - folded.program.size
            held.notes.append(f"auto: the bound decided {decided:,} of {held.program.size:,} units")
        team = choose(folded.program)
    return used


def _freedom(program: Program) -> int:
    """Units and counts that a program leaves open."""
    return program.size + sum(len(g.counts) for g in program.groups)


def _left(held: Held, total: float) -> float:
    return total * (1 - RESERVE) - held.seconds


def _stage(
    held: Held, offer: Offer, seconds: float, *, folded: Folded | None = None, bound_only: bool = False
) -> None:
    """Run one backend, unless the time is over, the user stopped, or the gap is closed already."""
    backend, outlook = offer
    if held.interrupted or held.is_closed or seconds <= 0:
        return
    held.notes.append(f"auto: {backend.name} {outlook.role.value}: {outlook.why}")
    try:
        held.run(backend, folded=folded, time_limit=max(seconds, 0.1), bound_only=bound_only)
    except (SolverIncapableError, BackendError, MemoryError) as error:
        # What was checked before stays good; without it there is nothing to go on with.
        if held.x is None and not isinstance(error, SolverIncapableError):
            raise
        held.notes.append(f"auto: {backend.name} gave nothing: {error}")
