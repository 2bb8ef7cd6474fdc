"""Rivals are done justice: their selections are feasible, their bounds hold, their models are right."""

from __future__ import annotations

import importlib.util
import itertools
import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from benchmarks.growth import exponent
from benchmarks.plot import Series, log_log
from benchmarks.rival_heuristics import alternating_blocks, greedy_l1, halp, uniform_l1
from benchmarks.rival_models import mdp_scip, one_hot
from benchmarks.rivals import HEURISTICS, METHODS, build, run
from benchmarks.tables import _rivals
from qcqp_prune.program.program import Program
from qcqp_prune.testing import chain_problem, exhaustive, random_problem

ROOT = Path(__file__).resolve().parent.parent
STRUCTURES = ("chain", "residual", "two_budgets", "concat")


@pytest.mark.parametrize("method", sorted(HEURISTICS))
@pytest.mark.parametrize("structure", STRUCTURES)
def test_heuristics_meet_the_budgets_and_stay_below_the_optimum(method: str, structure: str) -> None:
    for seed in range(3):
        problem = random_problem(seed, structure)
        program, best = Program.from_problem(problem), exhaustive(problem).objective
        x = HEURISTICS[method](program, 10.0)
        assert program.is_feasible(x)
        assert program.objective(x) <= best + 1e-9 * abs(best)


def test_heuristics_do_what_they_are_called() -> None:
    program = Program.from_problem(chain_problem("small"))
    counts = program.counts(uniform_l1(program, 5.0))
    widths = np.asarray([g.width for g in program.groups])
    assert np.ptp(counts / widths) <= 1 / widths.min()
    greedy, scores = greedy_l1(program, 5.0), program.gradient(np.ones(program.size))
    # What is left out is below all that is kept, but for units that a floor protects.
    floor = np.isin(program.group_of, np.flatnonzero(program.counts(greedy) == 1))
    assert scores[~greedy].max() <= scores[greedy & ~floor].min()
    uniform, blocks = uniform_l1(program, 5.0), alternating_blocks(program, 20.0)
    assert program.objective(blocks) > program.objective(uniform)
    assert program.is_feasible(halp(program, 20.0))


def test_alternating_blocks_end_where_no_single_group_can_be_improved() -> None:
    program = Program.from_problem(random_problem(3, "chain"))
    x = alternating_blocks(program, 20.0)
    for group in program.groups:
        for bits in itertools.product((False, True), repeat=group.width):
            y = x.copy()
            y[group.span] = bits
            assert not program.is_feasible(y) or program.objective(y) <= program.objective(x) + 1e-6


@pytest.mark.skipif(
    importlib.util.find_spec("ortools") is None, reason="ortools is not installed: extra bench"
)
def test_cp_sat_agrees_with_trying_everything() -> None:
    """In a process of its own: ortools and highspy each bring a HiGHS, and cannot be loaded together."""
    code = """
import json
from benchmarks.rival_models import cp_sat
from qcqp_prune.program.program import Program
from qcqp_prune.testing import random_problem
for structure in ("residual", "negative", "two_budgets"):
    program = Program.from_problem(random_problem(1, structure))
    x, bound, _ = cp_sat(program, 10.0)
    print(json.dumps([structure, x.tolist(), bound]))
"""
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, cwd=ROOT)
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(lines) == 3
    for structure, point, bound in lines:
        problem = random_problem(1, structure)
        program, best = Program.from_problem(problem), exhaustive(problem).objective
        x = np.asarray(point, np.bool_)
        assert program.is_feasible(x)
        assert program.objective(x) == pytest.approx(best, rel=1e-4)
        assert best <= bound + 1e-9 <= best + 1e-3 * abs(best) + 1e-9


def test_the_one_hot_program_is_worth_what_its_selections_are() -> None:
    program = Program.from_problem(random_problem(2, "residual"))
    x, bound, _ = mdp_scip(program, 20.0)
    assert bound is None
    assert x is not None
    assert program.is_feasible(x)
    model, levels = one_hot(program)
    counts = program.counts(x).tolist()
    for (g, n), y in model.y.items():
        y.set_value(int(counts[g] == n))
    assert all(n in levels[g] for g, n in enumerate(counts))
    assert _worth(model) == pytest.approx(program.objective(x) - program.constant)


def _worth(model):  # type: ignore[no-untyped-def]
    """What the right-hand side of ``t <= worth`` is at the values set: minus the row's body at ``t = 0``."""
    import pyomo.environ as pyo

    model.t.set_value(0.0)
    return -pyo.value(model.worth_row.body)


def test_a_row_holds_what_was_checked_and_says_why_something_declined() -> None:
    problem = build("chain:tiny", "50%")
    rows = {m: run(problem, m, 2.0) for m in ("uniform l1", "SCIP native", "auto", "MDP, MindtPy OA")}
    assert rows["uniform l1"]["bound"] is None
    assert rows["auto"]["objective"] >= rows["uniform l1"]["objective"]
    assert rows["auto"]["bound"] >= rows["auto"]["objective"]
    large = run(build("chain:resnet50", "50%"), "SCIP RLT", 1.0)
    assert "too many for SCIP" in large["note"]
    assert "objective" not in large
    named = [
        row | {"network": "chain:tiny", "budgets": {"macs": "50%"}, "method": m} for m, row in rows.items()
    ]
    table = _rivals(named)
    assert table.count("| uniform l1 |") == 1
    assert f"**{rows['auto']['objective']:,.4f}**" in table
    assert set(rows) <= set(METHODS)


def test_the_exponent_of_a_power_law_by_hand() -> None:
    pairs = [1e4, 1e5, 1e6]
    assert exponent(pairs, [3 * p**0.7 for p in pairs]) == pytest.approx(0.7)
    # Doubling from 1 to 4: two per doubling of the first, so the square root.
    assert exponent([1.0, 4.0], [1.0, 2.0]) == pytest.approx(0.5)


def test_the_plot_has_every_point_and_the_fitted_line() -> None:
    series = Series("seconds", [1e4, 1e6], [1.0, 10.0], 0.5)
    svg = log_log("a < b", ("pairs", "s"), [series])
    assert svg.count("<circle") == 2
    assert "a &lt; b" in svg
    assert "exponent 0.50" in svg
    dots = [
        [float(part.split('"')[0]) for part in line.split('="')[1:3]] for line in svg.split("<circle ")[1:]
    ]
    line = svg.split("stroke-dasharray")[0].split('<path d="M')[-1].split('"')[0]
    ends = [[float(v) for v in end.split()] for end in line.split("L")]
    # The line of slope 1/2 goes through both points.
    assert np.allclose(ends, dots, atol=0.2)
    assert math.isfinite(sum(map(sum, dots)))
