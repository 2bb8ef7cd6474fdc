"""``auto`` chooses by what backends say of themselves, and puts their answers into one report."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import pytest

from qcqp_prune.errors import BackendError, SolverUnavailableError
from qcqp_prune.program.program import Program
from qcqp_prune.program.restriction import Restriction
from qcqp_prune.solve import auto
from qcqp_prune.solve.backend import Availability, Backend, Outlook, ProblemClass, Role, get_backend
from qcqp_prune.solve.options import SolveOptions
from qcqp_prune.solve.result import RawSolution, Reason, Termination, TracePoint
from qcqp_prune.solve.run import solve
from qcqp_prune.testing import exhaustive, random_problem


@dataclass
class Fake:
    """Says what it is told to say, and remembers how it was called."""

    name: str
    outlook_: Outlook | None
    bound: float | None = None
    uses: str | None = None
    available: bool = True
    classes: tuple[ProblemClass, ...] = (ProblemClass(2, 2),)
    calls: list[SolveOptions] = field(default_factory=list)
    restriction: Restriction | None = None

    def availability(self) -> Availability:
        return Availability(self.available, "" if self.available else "missing")

    def outlook(self, program: Program) -> Outlook | None:
        return self.outlook_

    def solve(self, program: Program, options: SolveOptions) -> RawSolution:
        self.calls.append(options)
        if self.uses is None:
            return RawSolution(
                Termination(Reason.BOUND_COMPUTED), bound=self.bound, restriction=self.restriction
            )
        return get_backend(self.uses).solve(program, SolveOptions(seed=options.seed, gap_limit=0.0))


@pytest.fixture
def cast(monkeypatch: pytest.MonkeyPatch):  # type: ignore[no-untyped-def]
    def use(*backends: Fake) -> None:
        named: dict[str, Backend] = {b.name: b for b in backends}
        monkeypatch.setattr(auto, "registered_solvers", lambda: tuple(sorted(named)))
        monkeypatch.setattr(auto, "load_backend", lambda name: named[name])

    return use


def searcher(rank: int = 1, name: str = "search") -> Fake:
    return Fake(name, Outlook(Role.SEARCHES, rank, "why s"), uses="block_coordinate")


def bounder(bound: float | None, rank: int = 1, name: str = "bound") -> Fake:
    return Fake(name, Outlook(Role.BOUNDS, rank, "why b"), bound=bound)


def prover(name: str = "prove", rank: int = 1) -> Fake:
    return Fake(name, Outlook(Role.PROVES, rank, "why p"), uses="highs")


def test_incumbent_and_bounds_are_merged(cast) -> None:  # type: ignore[no-untyped-def]
    problem = random_problem(0)
    best = exhaustive(problem).objective
    first, second = bounder(1.3 * best, rank=2, name="loose"), bounder(1.1 * best, rank=1, name="tight")
    cast(searcher(), second, first)
    report = solve(problem, "auto", time_limit=20)
    assert report.solver == "search + loose + tight"
    assert report.bound == pytest.approx(1.1 * best)
    assert report.objective == pytest.approx(best)
    assert report.gap == pytest.approx(0.1)
    assert report.termination.reason is Reason.BOUND_COMPUTED
    assert [n for n in report.notes if "why s" in n]
    assert [n for n in report.notes if "why b" in n]
    assert first.calls[0].warm_start is not None
    assert second.calls[0].bound_only
    assert second.calls[0].known_bound == pytest.approx(1.3 * best)
    assert first.calls[0].time_limit is not None
    assert first.calls[0].time_limit < 20
    bounds = [p.bound for p in report.trace if p.bound is not None]
    assert bounds == sorted(bounds, reverse=True)


def test_a_closed_gap_ends_the_run_as_proved(cast) -> None:  # type: ignore[no-untyped-def]
    problem = random_problem(0)
    best = exhaustive(problem).objective
    spare = bounder(best * 2, rank=1, name="spare")
    cast(searcher(), bounder(best, rank=5), spare)
    report = solve(problem, "auto")
    assert report.termination.reason is Reason.OPTIMAL
    assert report.gap == pytest.approx(0.0, abs=1e-12)
    assert not spare.calls


def test_a_prover_goes_before_bounds_and_starts_from_the_search(cast) -> None:  # type: ignore[no-untyped-def]
    exact, loose, worse = prover(rank=2), bounder(1e6), prover("slow", rank=1)
    cast(searcher(), exact, worse, loose)
    report = solve(random_problem(0), "auto", gap_limit=0.0)
    assert report.termination.reason is Reason.OPTIMAL
    assert exact.calls[0].warm_start is not None
    assert not exact.calls[0].bound_only
    assert not worse.calls
    assert not loose.calls


def test_what_is_unavailable_or_of_another_class_is_left_out(cast) -> None:  # type: ignore[no-untyped-def]
    missing, linear = prover("missing", rank=9), prover("linear", rank=8)
    missing.available = False
    linear.classes = (ProblemClass(1, 1, convex=True),)
    cast(searcher(), missing, linear)
    report = solve(random_problem(0), "auto")
    assert report.solver == "search"
    assert report.gap is None
    assert any("no solver gave a bound" in n for n in report.notes)
    cast(missing)
    with pytest.raises(SolverUnavailableError, match="name a solver"):
        solve(random_problem(0), "auto")


def test_nothing_that_a_refused_backend_announced_stays_in_the_trace(cast) -> None:  # type: ignore[no-untyped-def]
    problem = random_problem(0)
    best = exhaustive(problem).objective

    @dataclass
    class Boaster(Fake):
        def solve(self, program: Program, options: SolveOptions) -> RawSolution:
            assert options.on_event is not None
            options.on_event(TracePoint(0.1, 1, 2.0 * best, 1.05 * best))
            return RawSolution(Termination(Reason.OPTIMAL), x=np.full(program.size, 0.5))

    seen: list[TracePoint] = []
    cast(searcher(), Boaster("boaster", Outlook(Role.PROVES, 1, "x")), bounder(1.2 * best))
    report = solve(problem, "auto", options=SolveOptions(on_event=seen.append))
    assert any(point.incumbent == 2.0 * best for point in seen)
    assert any("boaster gave nothing" in note for note in report.notes)
    assert report.trace
    for point in report.trace:
        assert point.incumbent is None or point.incumbent <= report.objective * (1 + 1e-9)
        assert point.bound is None or point.bound == pytest.approx(1.2 * best)


def test_a_liar_loses_its_bound_not_the_selection(cast) -> None:  # type: ignore[no-untyped-def]
    problem = random_problem(0)
    best = exhaustive(problem).objective
    cast(searcher(), bounder(0.5 * best, rank=5, name="liar"), bounder(1.2 * best, rank=1))
    report = solve(problem, "auto")
    assert report.bound == pytest.approx(1.2 * best)
    assert any("liar gave nothing" in n and "claims the bound" in n for n in report.notes)
    cast(Fake("lost", Outlook(Role.SEARCHES, 1, "x"), bound=1.0), bounder(-1.0))
    with pytest.raises(BackendError):
        solve(problem, Fake("lost", None, uses=None, bound=float("nan")))


def test_a_false_restriction_is_noticed(cast) -> None:  # type: ignore[no-untyped-def]
    """A backend that rules out the selection held, which is worth more than it says, is not believed."""
    problem = random_problem(0)
    best = exhaustive(problem)
    liar = bounder(1.2 * best.objective, rank=5, name="liar")
    program = Program.from_problem(problem)
    nothing = np.zeros(program.size, np.bool_)
    counts = tuple(g.counts for g in program.groups)
    false = Restriction(nothing, best.mask[program.units], counts, 0.5 * best.objective)
    liar.restriction = false
    cast(searcher(), liar, bounder(1.1 * best.objective, rank=1))
    report = solve(problem, "auto")
    assert report.objective == pytest.approx(best.objective)
    assert report.bound == pytest.approx(1.1 * best.objective)
    assert any("liar gave nothing" in n and "restriction" in n for n in report.notes)
