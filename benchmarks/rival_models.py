"""Two further models of the same programs: CP-SAT on an integer objective, and a one-hot program over counts.

References:
    Perron and Furnon, OR-Tools CP-SAT, https://developers.google.com/optimization;
    Sun et al., "MDP: multidimensional vision model pruning with latency constraint" (arXiv 2504.02168): one variable
    for each layer and channel count, the importance of the best channels at that count, solved by MindtPy's OA;
    Bernal et al., "Mixed-integer nonlinear decomposition toolbox for Pyomo (MindtPy)" (2018).
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np

from benchmarks.rival_heuristics import l1_scores
from qcqp_prune.program.coefficients import dense
from qcqp_prune.program.program import Program

LARGEST = 400_000
DIGITS = 10**6
LEVELS = 17


class Declined(RuntimeError):
    """A rival that cannot run here, or not on this instance; the message says why."""


def cp_sat(program: Program, seconds: float) -> tuple[np.ndarray | None, float | None, str]:
    """One worker; coefficients are rounded up to a millionth of the largest, so that the bound stays valid."""
    try:
        from ortools.sat.python import cp_model
    except ImportError as error:
        raise Declined(f"ortools is not installed ({error}): pip install 'qcqp-prune[bench]'") from error
    if program.pair_count > LARGEST:
        raise Declined(f"{program.pair_count:,} products would take minutes to hand over")
    started = time.perf_counter()
    model = cp_model.CpModel()
    x = [model.new_bool_var("") for _ in range(program.size)]
    _cp_counts(model, x, program)
    entries = list(program.entries())
    largest = max([*np.abs(program.linear).tolist(), *(abs(c) for *_, c in entries)])
    scale = DIGITS / largest
    variables, worth = list(x), [int(np.ceil(c * scale)) for c in program.linear.tolist()]
    for i, j, coefficient in entries:
        z = model.new_bool_var("")
        model.add_implication(z, x[i])
        model.add_implication(z, x[j])
        if coefficient < 0:
            model.add_bool_or([z, x[i].negated(), x[j].negated()])
        variables.append(z)
        worth.append(int(np.ceil(coefficient * scale)))
    model.maximize(cp_model.LinearExpr.weighted_sum(variables, worth))
    solver = cp_model.CpSolver()
    solver.parameters.num_workers = 1
    solver.parameters.max_time_in_seconds = max(seconds - (time.perf_counter() - started), 1.0)
    status = solver.solve(model)
    bound = program.constant + solver.best_objective_bound / scale
    if status not in (cp_model.OPTIMAL, cp_model.FEASIBLE):
        return None, bound, solver.status_name(status)
    return np.asarray([bool(solver.value(v)) for v in x]), bound, ""


def _cp_counts(model: Any, x: list[Any], program: Program) -> None:
    """Counts, their products and the budgets, in integers."""
    counts = []
    for group in program.groups:
        n = model.new_int_var(group.counts[0], group.counts[-1], "")
        model.add(n == sum(x[group.span]))
        counts.append(n)
    products: dict[tuple[int, int], Any] = {}
    for constraint in program.constraints:
        form = constraint.form
        terms = [int(c) * counts[g] for g, c in enumerate(form.linear.tolist()) if c]
        for g, h, c in zip(form.rows.tolist(), form.cols.tolist(), form.coefs.tolist(), strict=True):
            if (g, h) not in products:
                top = program.groups[g].width * program.groups[h].width
                products[g, h] = model.new_int_var(0, top, "")
                model.add_multiplication_equality(products[g, h], [counts[g], counts[h]])
            terms.append(int(c) * products[g, h])
        model.add(sum(terms) <= constraint.limit - form.constant)


def mdp_mindtpy(program: Program, seconds: float) -> tuple[np.ndarray | None, float | None, str]:
    """The one-hot program by outer approximation, as the reference solves it."""
    import pyomo.environ as pyo

    nlp = next((n for n in ("ipopt", "cyipopt", "gams", "baron") if _has(n)), None)
    if nlp is None:
        raise Declined(
            "MindtPy solves nonlinear subproblems with ipopt, cyipopt, GAMS or BARON: none is installed"
        )
    model, levels = one_hot(program)
    pyo.SolverFactory("mindtpy").solve(
        model, strategy="OA", mip_solver="appsi_highs", nlp_solver=nlp, time_limit=int(seconds)
    )
    return chosen(program, model, levels), None, f"nested by l1; MindtPy OA with {nlp}"


def mdp_scip(program: Program, seconds: float) -> tuple[np.ndarray | None, float | None, str]:
    """The same program by SCIP through Pyomo. Its bound holds for nested selections only, so none is reported."""
    from pyomo.contrib.solver.common.factory import SolverFactory

    started = time.perf_counter()
    model, levels = one_hot(program)
    left = max(seconds - (time.perf_counter() - started), 1.0)
    solver = SolverFactory("scip_direct")
    result = solver.solve(
        model, time_limit=left, load_solutions=False, raise_exception_on_nonoptimal_result=False
    )
    if result.incumbent_objective is None:
        return None, None, "no selection in time"
    result.solution_loader.load_vars()
    return chosen(program, model, levels), None, "nested by l1, at most 17 counts a group"


def one_hot(program: Program) -> tuple[Any, list[list[int]]]:
    """``max sum y_g^T V_gh y_h``, ``V`` the worth of the best ``n`` and ``m`` units by l1 norm; budgets likewise."""
    import pyomo.environ as pyo

    order = _orders(program)
    levels = [
        sorted({g.counts[k] for k in np.linspace(0, len(g.counts) - 1, LEVELS).round().astype(int)})
        for g in program.groups
    ]
    m = pyo.ConcreteModel()
    m.y = pyo.Var([(g, n) for g, counts in enumerate(levels) for n in counts], domain=pyo.Binary)
    m.one = pyo.ConstraintList()
    for g, counts in enumerate(levels):
        m.one.add(sum(m.y[g, n] for n in counts) == 1)
    terms = [
        float(program.linear[order[g][:n] + program.groups[g].start].sum()) * m.y[g, n]
        for g, counts in enumerate(levels)
        for n in counts
    ]
    for pair in program.pairs:
        g, h = pair.first, pair.second
        matrix = dense(pair.coef, (program.groups[g].width, program.groups[h].width))
        sums = np.zeros((matrix.shape[0] + 1, matrix.shape[1] + 1))
        sums[1:, 1:] = matrix[np.ix_(order[g], order[h])].cumsum(0).cumsum(1)
        if g == h:
            terms += [float(sums[n, n]) * m.y[g, n] for n in levels[g]]
        else:
            terms += [float(sums[n, k]) * m.y[g, n] * m.y[h, k] for n in levels[g] for k in levels[h]]
    # SCIP takes linear objectives only.
    m.t = pyo.Var()
    m.worth_row = pyo.Constraint(expr=m.t <= sum(terms))
    m.worth = pyo.Objective(expr=m.t, sense=pyo.maximize)
    m.budgets = pyo.ConstraintList()
    for constraint in program.constraints:
        form = constraint.form
        counts = [sum(n * m.y[g, n] for n in levels[g]) for g in range(len(levels))]
        use = sum(int(c) * counts[g] for g, c in enumerate(form.linear.tolist()) if c)
        for g, h, c in zip(form.rows.tolist(), form.cols.tolist(), form.coefs.tolist(), strict=True):
            use += int(c) * counts[g] * counts[h]
        limit = constraint.limit - form.constant
        # In units of the limit, less a hair: a tolerance must not break an exact budget.
        m.budgets.add(use / limit <= 1 - 1e-6)
    return m, levels


def chosen(program: Program, model: Any, levels: list[list[int]]) -> np.ndarray:
    """The point that the chosen counts stand for."""
    x = np.zeros(program.size, np.bool_)
    for g, (group, order) in enumerate(zip(program.groups, _orders(program), strict=True)):
        n = max(levels[g], key=lambda n: model.y[g, n].value or 0.0)
        x[group.start + order[:n]] = True
    return x


def _orders(program: Program) -> list[np.ndarray]:
    scores = l1_scores(program)
    return [np.argsort(-scores[g.span], kind="stable") for g in program.groups]


def _has(name: str) -> bool:
    import pyomo.environ as pyo

    try:
        return bool(pyo.SolverFactory(name).available(exception_flag=False))
    except (ImportError, RuntimeError, AttributeError):
        return False
