"""A backend is never trusted: every kind of wrong answer is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from qcqp_prune.errors import BackendError, NoIncumbentError, SolverIncapableError, SolverUnavailableError
from qcqp_prune.program.problem import PruningProblem
from qcqp_prune.program.program import Program
from qcqp_prune.solve.backend import Availability, Outlook, ProblemClass
from qcqp_prune.solve.options import SolveOptions
from qcqp_prune.solve.result import RawSolution, Reason, Termination
from qcqp_prune.solve.run import solve
from qcqp_prune.solve.stages import Held
from qcqp_prune.testing import exhaustive, random_problem

OPTIMAL = Termination(Reason.OPTIMAL)
Answer = Callable[[Program, np.ndarray[Any, Any], float], RawSolution]


class Scripted:
    """Answers what the test says, from the true optimum."""

    name = "scripted"
    classes: tuple[ProblemClass, ...] = (ProblemClass(2, 2),)

    def __init__(self, problem: PruningProblem, answer: Answer) -> None:
        self.optimum, self.answer = exhaustive(problem), answer

    def availability(self) -> Availability:
        return Availability(True)

    def outlook(self, program: Program) -> Outlook | None:
        return None

    def solve(self, program: Program, options: SolveOptions) -> RawSolution:
        return self.answer(program, self.optimum.mask[program.units], self.optimum.objective)


def run(answer: Answer, structure: str = "chain", seed: int = 0):  # type: ignore[no-untyped-def]
    problem = random_problem(seed, structure)
    return solve(problem, Scripted(problem, answer)), exhaustive(problem)


def test_an_honest_answer_passes() -> None:
    report, optimum = run(lambda p, x, v: RawSolution(OPTIMAL, x=x, objective=v, bound=v))
    assert report.objective == pytest.approx(optimum.objective)
    assert report.gap == 0.0


def test_values_near_0_and_1_are_rounded_not_truncated() -> None:
    report, optimum = run(lambda p, x, v: RawSolution(OPTIMAL, x=np.where(x, 0.99999, 1e-5), bound=v))
    assert report.objective == pytest.approx(optimum.objective)
    assert report.masks.flat(random_problem(0).graph).tolist() == optimum.mask.tolist()


def flipped(x: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    return np.ones_like(x)


LIES: dict[str, tuple[Answer, str]] = {
    "objective": (lambda p, x, v: RawSolution(OPTIMAL, x=x, objective=1.01 * v), "claims an objective"),
    "objective of nothing": (
        lambda p, x, v: RawSolution(OPTIMAL, x=x, objective=float("nan")),
        "claims an objective",
    ),
    "over budget": (lambda p, x, v: RawSolution(OPTIMAL, x=flipped(x)), "the budget is"),
    "no unit of a group": (lambda p, x, v: RawSolution(OPTIMAL, x=np.zeros_like(x)), "which is not allowed"),
    "fraction": (lambda p, x, v: RawSolution(OPTIMAL, x=x * 0.9), "neither 0 nor 1"),
    "not a number": (lambda p, x, v: RawSolution(OPTIMAL, x=x * np.nan), "neither 0 nor 1"),
    "two": (lambda p, x, v: RawSolution(OPTIMAL, x=x * 2.0), "neither 0 nor 1"),
    "shape": (lambda p, x, v: RawSolution(OPTIMAL, x=x[:-1]), "values for"),
    "bound below": (lambda p, x, v: RawSolution(OPTIMAL, x=x, bound=0.99 * v), "claims the bound"),
    "bound of nothing": (lambda p, x, v: RawSolution(OPTIMAL, x=x, bound=float("nan")), "claims the bound"),
    "optimal without a point": (lambda p, x, v: RawSolution(OPTIMAL, bound=v), "without a selection"),
    "infeasible": (lambda p, x, v: RawSolution(Termination(Reason.INFEASIBLE)), "claims that no selection"),
}


@pytest.mark.parametrize("lie", LIES)
def test_lies_are_refused(lie: str) -> None:
    answer, message = LIES[lie]
    with pytest.raises(BackendError, match=message):
        run(answer)


def test_broken_ties_are_refused() -> None:
    def answer(program: Program, x: np.ndarray[Any, Any], value: float) -> RawSolution:
        """One unit of each group, two of one half of the tie: cheap, but unequal."""
        first = np.zeros(program.size, np.bool_)
        for group in program.groups:
            first[group.start] = True
        half = next(g for g in program.groups if sum(h.tie == g.tie for h in program.groups) == 2)
        first[half.start + 1] = True
        return RawSolution(OPTIMAL, x=first)

    with pytest.raises(BackendError, match="unequal counts in the tied groups"):
        run(answer, "ties", seed=1)


def test_a_bound_below_the_warm_start_is_refused() -> None:
    problem = random_problem(2)
    optimum = exhaustive(problem)
    liar = Scripted(problem, lambda p, x, v: RawSolution(Termination(Reason.TIME_LIMIT), bound=0.5 * v))
    with pytest.raises(BackendError, match="claims the bound"):
        solve(problem, liar, warm_start=optimum.mask)


def test_a_worse_answer_than_the_warm_start_is_not_taken() -> None:
    problem = random_problem(2)
    optimum = exhaustive(problem)

    def least(program: Program, x: np.ndarray[Any, Any], value: float) -> RawSolution:
        point = np.zeros(program.size, np.bool_)
        point[[g.start for g in program.groups]] = True
        return RawSolution(Termination(Reason.SEARCH_ENDED), x=point)

    report = solve(problem, Scripted(problem, least), warm_start=optimum.mask)
    assert report.objective == pytest.approx(optimum.objective)
    assert report.bound is None
    assert report.gap is None


def test_a_backend_that_raises_is_named() -> None:
    def answer(program: Program, x: np.ndarray[Any, Any], value: float) -> RawSolution:
        raise ZeroDivisionError("inside")

    with pytest.raises(BackendError, match="'scripted' failed with ZeroDivisionError: inside"):
        run(answer)


def test_failed_and_empty_handed() -> None:
    with pytest.raises(BackendError, match="failed and holds no selection"):
        run(lambda p, x, v: RawSolution(Termination(Reason.FAILED)))
    with pytest.raises(NoIncumbentError, match="raise time_limit"):
        run(lambda p, x, v: RawSolution(Termination(Reason.TIME_LIMIT, "time_limit=1")))


def test_a_linear_solver_is_not_given_a_quadratic_problem() -> None:
    problem = random_problem(0)
    linear = Scripted(problem, lambda p, x, v: RawSolution(OPTIMAL, x=x))
    linear.classes = (ProblemClass(1, 1, integral=True, convex=True), ProblemClass(2, 2, integral=False))
    with pytest.raises(SolverIncapableError, match=r"does not take this problem .*quadratic"):
        solve(problem, linear)


def test_a_backend_object_that_cannot_run_is_refused() -> None:
    problem = random_problem(0)
    backend = Scripted(problem, lambda p, x, v: RawSolution(OPTIMAL, x=x))
    backend.availability = lambda: Availability(False, "no licence: buy one")  # type: ignore[method-assign]
    with pytest.raises(SolverUnavailableError, match="no licence: buy one"):
        solve(problem, backend)


def test_what_is_held_is_checked_again_before_it_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    """However a point came to be held: here an interrupted `auto` is made to hold all units, beyond the budget."""

    def hold_all(held: Held) -> None:
        held.x = np.ones(held.program.size, np.bool_)
        held.objective = held.problem.objective.evaluate(held.program.mask(held.x))

    monkeypatch.setattr(Held, "hold_least", hold_all)
    with pytest.raises(BackendError, match="the budget is"):
        solve(random_problem(0, "chain"), "auto", options=SolveOptions(stop=lambda: True))
