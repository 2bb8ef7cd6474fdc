"""Ctrl-C returns what is held; a second one aborts."""

from __future__ import annotations

import signal
from collections.abc import Iterator

import pytest

from qcqp_prune.errors import NoIncumbentError
from qcqp_prune.program.program import Program
from qcqp_prune.solve.interrupt import catch_interrupt
from qcqp_prune.solve.options import SolveOptions, never
from qcqp_prune.solve.result import Reason, TracePoint
from qcqp_prune.solve.run import solve
from qcqp_prune.testing import chain_problem, random_problem
from qcqp_prune.testing.instances import LINKED


@pytest.fixture(autouse=True)
def heard() -> Iterator[None]:
    """What a shell starts in the background ignores Ctrl-C."""
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, previous)


@pytest.mark.parametrize(
    "solver", ["scip", "highs", "relaxation", "decomposition", "block_coordinate", "auto"]
)
def test_control_c_returns_the_incumbent(solver: str) -> None:
    pressed = []

    def press(point: TracePoint) -> None:
        if point.incumbent is not None and not pressed:
            pressed.append(point.seconds)
            signal.raise_signal(signal.SIGINT)

    problem = chain_problem("medium")
    start = solve(problem, "block_coordinate", options=SolveOptions(work_limit=1))
    options = SolveOptions(on_event=press, gap_limit=0.0, time_limit=60)
    report = solve(problem, solver, warm_start=start, options=options)
    assert pressed
    assert report.termination.reason is Reason.INTERRUPTED
    assert report.objective >= start.objective
    assert report.seconds < 30
    assert Program.from_problem(problem).is_feasible(report.masks.flat(problem.graph)[3:-10])
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_auto_interrupted_at_once_returns_the_least_selection() -> None:
    problem = chain_problem("medium")
    report = solve(problem, "auto", options=SolveOptions(stop=lambda: True))
    assert report.termination.reason is Reason.INTERRUPTED
    assert report.objective == pytest.approx(problem.objective.evaluate(report.masks.flat(problem.graph)))
    assert report.bound is None
    usage = report.usage["macs"]
    assert usage.limit is not None
    assert usage.used <= usage.limit


@pytest.mark.parametrize("structure", LINKED)
def test_auto_interrupted_at_once_returns_no_selection_against_the_links(structure: str) -> None:
    """The best units at the least counts of linked groups need not belong together."""
    held = 0
    for seed in range(6):
        problem = random_problem(seed, structure)
        program = Program.from_problem(problem)
        try:
            report = solve(problem, "auto", options=SolveOptions(stop=lambda: True))
        except NoIncumbentError:
            continue
        held += 1
        assert program.is_feasible(report.masks.flat(problem.graph)[program.units])
    assert held


def test_the_second_control_c_aborts() -> None:
    with catch_interrupt(never) as stop:
        assert not stop()
        signal.raise_signal(signal.SIGINT)
        assert stop()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_a_callers_own_handler_is_left_alone() -> None:
    caught = []
    previous = signal.signal(signal.SIGINT, lambda *_: caught.append(1))
    try:
        with catch_interrupt(lambda: bool(caught)) as stop:
            signal.raise_signal(signal.SIGINT)
            assert stop()
    finally:
        signal.signal(signal.SIGINT, previous)
    assert caught
