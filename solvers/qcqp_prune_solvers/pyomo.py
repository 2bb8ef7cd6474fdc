"""Any solver that Pyomo knows, by name: ``pyomo:scip_direct`` gets the quadratic program, others the linear model."""

from __future__ import annotations

import importlib.util
import io
import logging
import math
import time
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

import numpy as np

from qcqp_prune.errors import InvalidOptionError, SolverIncapableError, SolverUnavailableError
from qcqp_prune.program.coefficients import BoolArray, IntArray, dense
from qcqp_prune.program.program import Program
from qcqp_prune.program.reductions.cardinality_rlt import CardinalityRLT
from qcqp_prune.program.reductions.counts import reachable_counts, scaled_side
from qcqp_prune.program.reductions.levels import reachable_levels
from qcqp_prune.program.reductions.linear_model import LinearModel
from qcqp_prune.program.tables import CountTable, Shares, share_sum
from qcqp_prune.solve.backend import Availability, Outlook, ProblemClass
from qcqp_prune.solve.options import SolveOptions
from qcqp_prune.solve.result import RawSolution, Reason, Termination, TracePoint, TraceRecorder
from qcqp_prune_solvers.linear import lower_of, meets, ordered_pairs, strengthened
from qcqp_prune_solvers.retry import solve_exactly

DEFAULT = "scip_direct"
# These take nonconvex quadratic rows over integers. Every other solver gets the linear model, which MILP codes take.
QUADRATIC = ("scip_direct", "scip_persistent", "scip", "gurobi_direct_minlp", "gams", "baron", "couenne")
CONTINUOUS = ("ipopt", "ipopt_v2", "cyipopt", "knitro_direct")
LARGEST = 60_000
# Room for rounding above a bound that is known: the row is not to cut off a selection that attains it.
CUT_OFF = 1e-9
# What a limit by nodes and a seed are called by the solvers behind the names, by prefix.
DIALECTS = {
    "scip": ("limits/nodes", "randomization/randomseedshift"),
    "highs": ("mip_max_nodes", "random_seed"),
    "gurobi": ("NodeLimit", "Seed"),
}


class PyomoBackend:
    """A solver behind Pyomo.

    Progress and Ctrl-C do not reach through Pyomo: the trace has one point, and a run ends at its limits, unless the
    solver itself catches the signal.

    Args:
        solver: Pyomo's name for it.

    References:
        Bynum et al., "Pyomo: Optimization Modeling in Python" (2021).
    """

    name = "pyomo"
    scope = "proves: whatever solver Pyomo finds, as pyomo:NAME, about 40 channels; for comparison"
    classes = (ProblemClass(2, 2, integral=True, convex=False, tables=True),)

    def __init__(self, solver: str = DEFAULT) -> None:
        self.solver = solver
        self.name = "pyomo" if solver == DEFAULT else f"pyomo:{solver}"

    def availability(self) -> Availability:
        """Whether Pyomo can be imported and finds the solver."""
        if importlib.util.find_spec("pyomo") is None:
            return Availability(False, "Pyomo is not installed: pip install pyomo")
        try:
            found = _Solver(self.solver)
        except SolverUnavailableError as error:
            return Availability(False, str(error))
        if not found.is_available():
            return Availability(
                False,
                f"Pyomo knows {self.solver!r} but cannot run it here: install that solver, or use pyomo:{DEFAULT} "
                "(pip install pyscipopt) or pyomo:highs (pip install highspy)",
            )
        return Availability(True, version=f"{version('pyomo')} with {self.solver} {found.version()}".strip())

    def outlook(self, program: Program) -> Outlook | None:
        """Never chosen by itself: the same solvers report more when they are called directly."""
        return None

    def solve(self, program: Program, options: SolveOptions) -> RawSolution:
        """Build a Pyomo model and solve it.

        Raises:
            SolverIncapableError: the solver has no integers, or the program is too large for a Pyomo model.
            InvalidOptionError: a work limit was given that this solver is not known to take.
        """
        if self.solver in CONTINUOUS:
            raise SolverIncapableError(
                f"{self.solver} has no 0/1 variables: choose pyomo:{DEFAULT} or pyomo:highs"
            )
        if program.pair_count > LARGEST:
            raise SolverIncapableError(
                f"{program.pair_count:,} products are too many for a Pyomo model ({LARGEST:,}): use "
                'solver="block_coordinate" or "auto"'
            )
        dialect = next((d for prefix, d in DIALECTS.items() if prefix in self.solver), None)
        if options.work_limit is not None and dialect is None:
            raise InvalidOptionError(
                f"how {self.solver!r} limits its nodes is not known here: leave out work_limit and give time_limit"
            )
        return solve_exactly(program, options, self._attempt)

    def _attempt(self, program: Program, options: SolveOptions) -> RawSolution:
        started = time.perf_counter()
        if options.stop():
            return RawSolution(Termination(Reason.INTERRUPTED))
        quadratic = self.solver in QUADRATIC
        model, x = _quadratic_model(program) if quadratic else _linear_model(program)
        if options.warm_start is not None:
            # Every variable needs a value: the interfaces hand over complete points only.
            (_start_quadratic if quadratic else _start_linear)(model, program, options.warm_start)
        if options.known_bound is not None:
            # There is no way to stop from outside: cut off by the bound, the solver notices by itself.
            model.rows.add(model.worth.expr <= options.known_bound + CUT_OFF * abs(options.known_bound))
        raw = _Solver(self.solver).solve(model, x, options)
        bound = lower_of(raw.bound, options.known_bound)
        objective = None if raw.x is None else program.objective(raw.x)
        recorder = TraceRecorder(options.on_event)
        recorder.add(TracePoint(time.perf_counter() - started, 0, objective, bound))
        closed = meets(objective, bound, options)
        return RawSolution(
            termination=Termination(Reason.OPTIMAL) if closed else raw.termination,
            x=raw.x,
            bound=bound,
            objective=objective,
            trace=recorder.points,
            log=raw.log,
            solver_version=f"{version('pyomo')} with {self.solver}",
            reduction="" if quadratic else CardinalityRLT.name,
        )


class _Solver:
    """One of Pyomo's two solver interfaces, the newer one where it knows the name."""

    def __init__(self, name: str) -> None:
        import pyomo.environ as pyo
        from pyomo.contrib.solver.common.factory import SolverFactory

        self._name = name
        self._is_new = name in list(SolverFactory)
        self._solver: Any = SolverFactory(name) if self._is_new else None
        if not self._is_new:
            known = sorted(n for n in pyo.SolverFactory if not n.startswith("_"))
            if name not in known:
                runs = sorted(n for n in SolverFactory if bool(SolverFactory(n).available()))
                raise SolverUnavailableError(
                    f"Pyomo knows no solver {name!r}: choose pyomo:NAME with one that runs here: {', '.join(runs)}"
                )
            self._solver = pyo.SolverFactory(name)

    def is_available(self) -> bool:
        if self._is_new:
            return bool(self._solver.available())
        return bool(self._solver.available(exception_flag=False))

    def version(self) -> str:
        try:
            found = self._solver.version()
        except (AttributeError, TypeError, RuntimeError):
            return ""
        return ".".join(map(str, found)) if isinstance(found, tuple) else str(found or "")

    def solve(self, model: Any, x: list[Any], options: SolveOptions) -> RawSolution:
        return self._solve_new(model, x, options) if self._is_new else self._solve_old(model, x, options)

    def _solve_new(self, model: Any, x: list[Any], options: SolveOptions) -> RawSolution:
        from pyomo.contrib.solver.common.results import SolutionStatus, TerminationCondition

        limits: dict[str, Any] = {
            "load_solutions": False,
            "raise_exception_on_nonoptimal_result": False,
            "rel_gap": options.gap_limit,
            "threads": options.threads,
            "solver_options": self._solver_options(options),
        }
        if options.time_limit is not None:
            limits["time_limit"] = options.time_limit
        if options.warm_start is not None and "warmstart_discrete_vars" in self._solver.config:
            limits["warmstart_discrete_vars"] = True
        result = self._solver.solve(model, **limits)
        has_point = result.solution_status in (SolutionStatus.feasible, SolutionStatus.optimal)
        if has_point:
            result.solution_loader.load_vars()
        conditions = TerminationCondition
        reasons = {
            conditions.convergenceCriteriaSatisfied: Reason.OPTIMAL,
            conditions.maxTimeLimit: Reason.TIME_LIMIT,
            conditions.iterationLimit: Reason.WORK_LIMIT,
            conditions.interrupted: Reason.INTERRUPTED,
            conditions.provenInfeasible: Reason.INFEASIBLE,
        }
        condition = result.termination_condition
        reason = reasons.get(condition)
        if reason is None:
            is_limit = options.work_limit is not None
            reason = Reason.WORK_LIMIT if is_limit else Reason.FAILED
        return RawSolution(
            Termination(reason, None if reason is Reason.OPTIMAL else condition.name),
            x=_values(x) if has_point else None,
            bound=_finite(result.objective_bound),
            log=result.solver_log or "",
        )

    def _solve_old(self, model: Any, x: list[Any], options: SolveOptions) -> RawSolution:
        from pyomo.common.log import LoggingIntercept
        from pyomo.opt import TerminationCondition

        limits: dict[str, Any] = {"load_solutions": False}
        if options.time_limit is not None:
            limits["timelimit"] = options.time_limit
        for key, value in self._solver_options(options).items():
            self._solver.options[key] = value
        text = io.StringIO()
        with LoggingIntercept(text, "pyomo", logging.WARNING):
            result = self._solver.solve(model, **limits)
            has_point = len(result.solution) > 0
            if has_point:
                model.solutions.load_from(result)
        reasons = {
            TerminationCondition.optimal: Reason.OPTIMAL,
            TerminationCondition.maxTimeLimit: Reason.TIME_LIMIT,
            TerminationCondition.maxIterations: Reason.WORK_LIMIT,
            TerminationCondition.userInterrupt: Reason.INTERRUPTED,
            TerminationCondition.infeasible: Reason.INFEASIBLE,
        }
        condition = result.solver.termination_condition
        reason = reasons.get(condition, Reason.FAILED)
        return RawSolution(
            Termination(reason, None if reason is Reason.OPTIMAL else str(condition)),
            x=_values(x) if has_point else None,
            bound=_finite(result.problem.upper_bound),
            log=text.getvalue(),
        )

    def _solver_options(self, options: SolveOptions) -> dict[str, Any]:
        dialect = next((d for prefix, d in DIALECTS.items() if prefix in self._name), None)
        if dialect is None:
            return {}
        chosen: dict[str, Any] = {dialect[1]: options.seed}
        if options.work_limit is not None:
            chosen[dialect[0]] = options.work_limit
        return chosen


def _values(x: list[Any]) -> np.ndarray[Any, Any]:
    return np.asarray(np.rint([float(v.value or 0.0) for v in x]) == 1.0)


def _finite(value: Any) -> float | None:
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return number if math.isfinite(number) and abs(number) < 1e19 else None


def _quadratic_model(program: Program) -> tuple[Any, list[Any]]:
    """The program itself: products of variables in the objective, products of integer counts in the budgets."""
    import pyomo.environ as pyo

    m = pyo.ConcreteModel()
    m.x = pyo.Var(range(program.size), domain=pyo.Binary)
    allowed = reachable_counts(program)
    m.n = pyo.Var(
        range(len(allowed)), domain=pyo.Integers, bounds=lambda _, g: (allowed[g][0], allowed[g][-1])
    )
    m.z = pyo.Var(
        [(g, k) for g, a in enumerate(allowed) if len(a) < a[-1] - a[0] + 1 for k in a], domain=pyo.Binary
    )
    m.rows = pyo.ConstraintList()
    first: dict[int, int] = {}
    for g, group in enumerate(program.groups):
        m.rows.add(sum(m.x[i] for i in range(group.start, group.start + group.width)) == m.n[g])
        if (g, allowed[g][0]) in m.z:
            m.rows.add(sum(m.z[g, k] for k in allowed[g]) == 1)
            m.rows.add(sum(k * m.z[g, k] for k in allowed[g]) == m.n[g])
        head = first.setdefault(group.tie, g)
        if head != g:
            m.rows.add(m.n[g] == m.n[head])
    for whole, part in zip(program.links.wholes.tolist(), program.links.parts.tolist(), strict=True):
        m.rows.add(m.x[part] <= m.x[whole])
    for g, h in program.needs.pairs:
        for i in range(program.groups[g].start, program.groups[g].start + program.groups[g].width):
            m.rows.add(m.x[i] <= m.n[h])
    for wholes, parts in program.links.by_size:
        for whole, row in zip(wholes.tolist(), parts.tolist(), strict=True):
            m.rows.add(sum(m.x[i] for i in row) >= m.x[whole])
    for i, j in ordered_pairs(program).tolist():
        m.rows.add(m.x[i] >= m.x[j])
    _add_worth(m, program)
    m.steps = pyo.VarList(domain=pyo.Binary)
    m.levels = {}
    for constraint in program.constraints:
        form = constraint.form
        terms = [(c, m.n[g]) for g, c in enumerate(form.linear.tolist()) if c]
        for g, h, c in zip(form.rows.tolist(), form.cols.tolist(), form.coefs.tolist(), strict=True):
            terms.append((c, m.n[g] * m.n[h]))
        for table in form.tables:
            terms += _table_terms(m, table, allowed)
        if terms:
            divisor, side = scaled_side([int(c) for c, _ in terms], constraint.limit - form.constant)
            total = sum(c / divisor * term for c, term in terms)
            if constraint.at_least is None:
                m.rows.add(total <= side)
            else:
                # One row with two ends: SCIP 10.0 crashes where the same products stand in two rows.
                m.rows.add(pyo.inequality((constraint.at_least - form.constant) / divisor, total, side))
    return m, [m.x[i] for i in range(program.size)]


def _table_terms(m: Any, table: CountTable, allowed: Sequence[tuple[int, ...]]) -> list[tuple[int, Any]]:
    """A table as integers times products of levels."""
    rows, first = _level(m, table.first, table.first_levels, allowed)
    if not table.second:
        return [(int(v), z) for v, z in zip(table.values[rows, 0], first, strict=True) if v]
    cols, second = _level(m, table.second, table.second_levels, allowed)
    values = table.values[rows, cols].tolist()
    return [
        (v, a * b)
        for a, row in zip(first, values, strict=True)
        for b, v in zip(second, row, strict=True)
        if v
    ]


def _level(
    m: Any, shares: Shares, levels: IntArray, allowed: Sequence[tuple[int, ...]]
) -> tuple[slice, list[Any]]:
    """0/1 variables for the level of a sum of counts, one of which is 1."""
    low, high = [a[0] for a in allowed], [a[-1] for a in allowed]
    part, bottoms, tops = reachable_levels(shares, levels, low, high)
    key = (shares, levels.tobytes())
    if key not in m.levels:
        total = sum(n * m.n[g] for g, n in shares)
        pick = [m.steps.add() for _ in tops]
        m.rows.add(sum(pick) == 1)
        m.rows.add(total <= sum(int(t) * z for t, z in zip(tops, pick, strict=True)))
        m.rows.add(total >= sum(int(t) * z for t, z in zip(bottoms, pick, strict=True)))
        m.levels[key] = (levels[part], pick)
    return part, m.levels[key][1]


def _start_quadratic(m: Any, program: Program, x: BoolArray) -> None:
    counts, point = program.counts(x).tolist(), x.astype(np.float64)
    for i, value in enumerate(x.tolist()):
        m.x[i].set_value(int(value))
    for g, n in enumerate(counts):
        m.n[g].set_value(n)
    for g, k in m.z:
        m.z[g, k].set_value(int(counts[g] == k))
    for (shares, _), (levels, pick) in m.levels.items():
        place = int(np.searchsorted(levels, share_sum(shares, program.counts(x))))
        for k, z in enumerate(pick):
            z.set_value(int(k == place))
    for t, pair in enumerate(program.pairs):
        first, second = (point[program.groups[g].span] for g in (pair.first, pair.second))
        m.t[t].set_value(float(first @ dense(pair.coef, (len(first), len(second))) @ second))


def _start_linear(m: Any, program: Program, x: BoolArray) -> None:
    values = CardinalityRLT().apply(program).extend(x)
    for j, v in m.v.items():
        v.set_value(float(values[j]), skip_validation=True)


def _add_worth(m: Any, program: Program) -> None:
    """An epigraph variable for each pair of groups: not every interface takes a quadratic objective."""
    import pyomo.environ as pyo

    m.t = pyo.Var(range(len(program.pairs)))
    for k, pair in enumerate(program.pairs):
        first, second = program.groups[pair.first], program.groups[pair.second]
        weights = dense(pair.coef, (first.width, second.width))
        top = float(np.abs(weights).sum()) + 1.0
        m.t[k].setlb(-top)
        m.t[k].setub(top)
        m.rows.add(
            m.t[k]
            <= sum(
                float(weights[i, j]) * m.x[first.start + int(i)] * m.x[second.start + int(j)]
                for i, j in zip(*np.nonzero(weights), strict=True)
            )
        )
    linear = sum(float(program.linear[i]) * m.x[int(i)] for i in np.flatnonzero(program.linear))
    m.worth = pyo.Objective(expr=program.constant + linear + sum(m.t[k] for k in m.t), sense=pyo.maximize)


def _linear_model(program: Program) -> tuple[Any, list[Any]]:
    """The cardinality-RLT model, with interchangeable units in order."""
    import pyomo.environ as pyo
    from pyomo.core.expr.numeric_expr import LinearExpression

    model: LinearModel = strengthened(program, CardinalityRLT())
    m = pyo.ConcreteModel()
    m.v = pyo.Var(range(len(model.objective)))
    for j, v in m.v.items():
        v.setlb(float(model.lower[j]))
        v.setub(float(model.upper[j]))
        if model.integer[j]:
            v.domain = pyo.Integers
    m.rows = pyo.ConstraintList()
    matrix = model.matrix
    for i in range(matrix.shape[0]):
        part = slice(matrix.indptr[i], matrix.indptr[i + 1])
        columns = [m.v[int(j)] for j in matrix.indices[part]]
        if not columns:
            continue
        body = LinearExpression(linear_coefs=matrix.data[part].tolist(), linear_vars=columns, constant=0.0)
        low, high = _finite(model.row_lower[i]), _finite(model.row_upper[i])
        m.rows.add(body == high if low == high else pyo.inequality(low, body, high))
    used = np.flatnonzero(model.objective).tolist()
    worth = LinearExpression(
        linear_coefs=model.objective[used].tolist(),
        linear_vars=[m.v[j] for j in used],
        constant=model.constant,
    )
    m.worth = pyo.Objective(expr=worth, sense=pyo.maximize)
    return m, [m.v[i] for i in range(model.size)]
