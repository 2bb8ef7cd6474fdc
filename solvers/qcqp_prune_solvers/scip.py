"""SCIP on the program itself: 0/1 variables, integer counts, bilinear budgets, and an epigraph for the objective."""

from __future__ import annotations

import importlib.util
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from qcqp_prune.errors import SolverIncapableError
from qcqp_prune.program.coefficients import BoolArray, IntArray, dense
from qcqp_prune.program.program import CountConstraint, GroupPair, Program
from qcqp_prune.program.reductions.cardinality_rlt import is_scalar
from qcqp_prune.program.reductions.counts import reachable_counts
from qcqp_prune.program.reductions.levels import reachable_levels
from qcqp_prune.program.tables import CountTable, Shares, share_sum
from qcqp_prune.solve.backend import Availability, Outlook, ProblemClass, Role
from qcqp_prune.solve.options import SolveOptions
from qcqp_prune.solve.result import RawSolution, Reason, Termination, TracePoint, TraceRecorder
from qcqp_prune_solvers.retry import solve_exactly

LARGEST = 400_000
CLOSES = 150
# SCIP compares sides of a row relative to their size, so a large budget needs a small tolerance to be kept.
LOOSEST, TIGHTEST = 1e-6, 1e-9


class ScipBackend:
    """Branch and cut for nonconvex mixed-integer quadratic problems.

    References:
        Bolusani et al., "The SCIP Optimization Suite 9.0" (2024); Jeong et al. (AISTATS 2022), eq. 2 for the model.
    """

    name = "scip"
    scope = "proves: up to about 40 channels in a minute; takes the quadratic program as it is"
    classes = (ProblemClass(2, 2, integral=True, convex=False, tables=True),)

    def availability(self) -> Availability:
        """Whether PySCIPOpt can be imported."""
        if importlib.util.find_spec("pyscipopt") is None:
            return Availability(False, "PySCIPOpt is not installed: pip install pyscipopt")
        import pyscipopt

        return Availability(True, version=_version(pyscipopt.Model()))

    def outlook(self, program: Program) -> Outlook | None:
        """A proof for about 40 units; more are better left to linear models."""
        if program.pair_count > CLOSES:
            return None
        return Outlook(
            Role.PROVES, 10, f"{program.pair_count} products are few enough for spatial branch and cut"
        )

    def solve(self, program: Program, options: SolveOptions) -> RawSolution:
        """Branch and cut until the gap is closed or a limit is met.

        Raises:
            SolverIncapableError: the program has so many products that building the model would take minutes.
        """
        if program.pair_count > LARGEST:
            raise SolverIncapableError(
                f"{program.pair_count:,} products are too many for SCIP's model ({LARGEST:,}): use "
                'solver="block_coordinate" or "auto"'
            )
        return solve_exactly(program, options, _solve)


def _solve(program: Program, options: SolveOptions) -> RawSolution:
    build = _ScipModel(program, options)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "scip.log"
        build.model.setLogfile(str(path))
        build.model.optimize()
        build.model.setLogfile(None)
        log = path.read_text(errors="replace") if path.exists() else ""
    return build.result(log)


class _ScipModel:
    """A program as a PySCIPOpt model, with listeners for progress."""

    def __init__(self, program: Program, options: SolveOptions) -> None:
        from pyscipopt import Model

        self.program, self.options = program, options
        self.started = time.perf_counter()
        self.recorder = TraceRecorder(options.on_event)
        self.model = Model("program")
        self.model.hideOutput()
        self._variables()
        self._objective()
        for constraint in program.constraints:
            self._budget(constraint)
        self._parameters()
        if options.warm_start is not None:
            self._warm_start(options.warm_start)
        self._listen()

    def _variables(self) -> None:
        from pyscipopt import quicksum

        m = self.model
        self.x = [m.addVar(f"x{i}", vtype="B") for i in range(self.program.size)]
        self.n: list[Any] = []
        self.levels: dict[int, list[tuple[int, Any]]] = {}
        self.steps: dict[tuple[Shares, bytes], tuple[IntArray, list[Any]]] = {}
        first: dict[int, int] = {}
        self.allowed = reachable_counts(self.program)
        for g, (group, allowed) in enumerate(zip(self.program.groups, self.allowed, strict=True)):
            n = m.addVar(f"n{g}", vtype="I", lb=allowed[0], ub=allowed[-1])
            m.addCons(quicksum(self.x[group.span]) == n)
            if len(allowed) < allowed[-1] - allowed[0] + 1:
                pick = [(k, m.addVar(f"z{g}_{k}", vtype="B")) for k in allowed]
                m.addCons(quicksum(z for _, z in pick) == 1)
                m.addCons(quicksum(k * z for k, z in pick) == n)
                self.levels[g] = pick
            self.n.append(n)
            head = first.setdefault(group.tie, g)
            if head != g:
                m.addCons(n == self.n[head])
        for whole, part in zip(
            self.program.links.wholes.tolist(), self.program.links.parts.tolist(), strict=True
        ):
            m.addCons(self.x[part] <= self.x[whole])
        for wholes, parts in self.program.links.by_size:
            for whole, row in zip(wholes.tolist(), parts.tolist(), strict=True):
                m.addCons(quicksum(self.x[i] for i in row) >= self.x[whole])

    def _objective(self) -> None:
        from pyscipopt import quicksum

        m, linear = self.model, self.program.linear
        # One epigraph variable for each pair of groups, because SCIP takes linear objectives only.
        self.worth = []
        for pair in self.program.pairs:
            top = self._largest(pair)
            t = m.addVar(vtype="C", lb=-top, ub=top)
            m.addCons(t <= self._expression(pair))
            self.worth.append((t, pair))
        terms = [float(linear[i]) * self.x[i] for i in np.flatnonzero(linear)]
        m.setObjective(quicksum([*terms, *(t for t, _ in self.worth)]) + self.program.constant, "maximize")

    def _largest(self, pair: GroupPair) -> float:
        groups = self.program.groups
        shape = (groups[pair.first].width, groups[pair.second].width)
        return float(np.abs(dense(pair.coef, shape)).sum()) + 1.0

    def _expression(self, pair: GroupPair) -> Any:
        from pyscipopt import quicksum

        if is_scalar(pair.coef):
            return float(pair.coef) * self.n[pair.first] * self.n[pair.second]  # type: ignore[arg-type]
        first, second = self.program.groups[pair.first], self.program.groups[pair.second]
        weights = dense(pair.coef, (first.width, second.width))
        x, y = self.x[first.span], self.x[second.span]
        return quicksum(float(weights[i, j]) * x[i] * y[j] for i, j in zip(*np.nonzero(weights), strict=True))

    def _budget(self, constraint: CountConstraint) -> None:
        from pyscipopt import quicksum

        form = constraint.form
        looked_up = [pair for table in form.tables for pair in self._table(table)]
        coefficients = [*form.linear.tolist(), *form.coefs.tolist(), *(c for c, _ in looked_up)]
        common = int(np.gcd.reduce(coefficients)) if any(coefficients) else 1
        limit = (constraint.limit - form.constant) // common
        terms = [c // common * self.n[g] for g, c in enumerate(form.linear.tolist()) if c]
        for g, h, c in zip(form.rows.tolist(), form.cols.tolist(), form.coefs.tolist(), strict=True):
            terms.append(c // common * self.n[g] * self.n[h])
        terms += [c // common * column for c, column in looked_up]
        if terms:
            self.model.addCons(quicksum(terms) <= limit)
            tolerance = min(max(0.3 / max(limit, 1), TIGHTEST), LOOSEST)
            if tolerance < float(self.model.getParam("numerics/feastol")):
                self.model.setParam("numerics/feastol", tolerance)

    def _table(self, table: CountTable) -> list[tuple[int, Any]]:
        """A table as integers times products of levels."""
        rows, first = self._level(table.first, table.first_levels)
        if not table.second:
            return [(int(v), z) for v, z in zip(table.values[rows, 0], first, strict=True) if v]
        cols, second = self._level(table.second, table.second_levels)
        values = table.values[rows, cols].tolist()
        return [
            (v, a * b)
            for a, row in zip(first, values, strict=True)
            for b, v in zip(second, row, strict=True)
            if v
        ]

    def _level(self, shares: Shares, levels: IntArray) -> tuple[slice, list[Any]]:
        """0/1 variables for the level of a sum of counts, one of which is 1."""
        from pyscipopt import quicksum

        low, high = [a[0] for a in self.allowed], [a[-1] for a in self.allowed]
        part, bottoms, tops = reachable_levels(shares, levels, low, high)
        key = (shares, levels.tobytes())
        if key not in self.steps:
            m, total = self.model, quicksum(n * self.n[g] for g, n in shares)
            pick = [m.addVar(vtype="B") for _ in tops]
            m.addCons(quicksum(pick) == 1)
            m.addCons(total <= quicksum(int(t) * z for t, z in zip(tops, pick, strict=True)))
            m.addCons(total >= quicksum(int(t) * z for t, z in zip(bottoms, pick, strict=True)))
            self.steps[key] = (levels[part], pick)
        return part, self.steps[key][1]

    def _parameters(self) -> None:
        options = self.options
        wanted: dict[str, Any] = {
            "limits/gap": options.gap_limit,
            "randomization/randomseedshift": options.seed,
            "parallel/maxnthreads": options.threads,
            "lp/threads": options.threads,
            "display/verblevel": 4,
        }
        if options.time_limit is not None:
            wanted["limits/time"] = max(options.time_limit - (time.perf_counter() - self.started), 0.05)
        if options.work_limit is not None:
            wanted["limits/nodes"] = options.work_limit
        for name, value in wanted.items():
            self.model.setParam(name, value)

    def _warm_start(self, x: BoolArray) -> None:
        m, point = self.model, x.astype(np.float64)
        solution = m.createSol()
        for variable, value in zip(self.x, point.tolist(), strict=True):
            m.setSolVal(solution, variable, value)
        counts = self.program.counts(x)
        for g, n in enumerate(self.n):
            m.setSolVal(solution, n, float(counts[g]))
            for k, z in self.levels.get(g, []):
                m.setSolVal(solution, z, float(counts[g] == k))
        for (shares, _), (levels, pick) in self.steps.items():
            place = int(np.searchsorted(levels, share_sum(shares, counts)))
            for k, z in enumerate(pick):
                m.setSolVal(solution, z, float(k == place))
        for t, pair in self.worth:
            groups = self.program.groups
            first, second = point[groups[pair.first].span], point[groups[pair.second].span]
            weights = dense(pair.coef, (len(first), len(second)))
            m.setSolVal(solution, t, float(first @ weights @ second))
        m.addSol(solution)

    def _listen(self) -> None:
        from pyscipopt import SCIP_EVENTTYPE, Eventhdlr  # type: ignore[attr-defined]

        outer = self

        class Listener(Eventhdlr):
            events = (
                SCIP_EVENTTYPE.BESTSOLFOUND,
                SCIP_EVENTTYPE.DUALBOUNDIMPROVED,
                SCIP_EVENTTYPE.NODESOLVED,
                SCIP_EVENTTYPE.LPSOLVED,
                SCIP_EVENTTYPE.PRESOLVEROUND,
            )

            def eventinit(self) -> None:
                for event in self.events:
                    self.model.catchEvent(event, self)

            def eventexit(self) -> None:
                for event in self.events:
                    self.model.dropEvent(event, self)

            def eventexec(self, _event: Any) -> dict[str, Any]:
                outer.note()
                if outer.options.stop():
                    self.model.interruptSolve()
                return {}

        self.model.includeEventhdlr(
            Listener(), "progress", "records incumbents and bounds, and passes Ctrl-C on"
        )

    def note(self) -> None:
        """Record what SCIP holds now."""
        m = self.model
        incumbent = m.getPrimalbound() if m.getNSols() else None
        point = TracePoint(
            time.perf_counter() - self.started, int(m.getNTotalNodes()), incumbent, self._bound()
        )
        self.recorder.add(point)

    def _bound(self) -> float | None:
        bound = float(self.model.getDualbound())
        return bound if abs(bound) < self.model.infinity() else None

    def result(self, log: str) -> RawSolution:
        """Read the model's state after the solve."""
        m = self.model
        x = self._best_point()
        return RawSolution(
            termination=_termination(m.getStatus(), self.options),
            x=x,
            bound=self._bound(),
            objective=None if x is None else self.program.objective(x),
            trace=self.recorder.points,
            log=log,
            solver_version=_version(m),
            statistics={"nodes": float(m.getNTotalNodes()), "seconds": float(m.getSolvingTime())},
        )

    def _best_point(self) -> BoolArray | None:
        """The best stored point that meets the budgets to the last unit, else the best one."""
        points = []
        for solution in self.model.getSols():
            values = np.asarray([self.model.getSolVal(solution, v) for v in self.x])
            points.append(np.asarray(np.rint(values) == 1.0))
        exact = [x for x in points if self.program.is_feasible(x)]
        return max(exact, key=self.program.objective) if exact else (points[0] if points else None)


def _version(model: Any) -> str:
    return f"{model.getMajorVersion()}.{model.getMinorVersion()}.{model.getTechVersion()}"


def _termination(status: str, options: SolveOptions) -> Termination:
    if status in ("optimal", "gaplimit"):
        return Termination(Reason.OPTIMAL)
    if status == "timelimit":
        return Termination(Reason.TIME_LIMIT, f"time_limit={options.time_limit}")
    if status in ("nodelimit", "totalnodelimit"):
        return Termination(Reason.WORK_LIMIT, f"work_limit={options.work_limit}")
    if status == "memlimit":
        return Termination(Reason.MEMORY_LIMIT)
    if status == "userinterrupt":
        return Termination(Reason.INTERRUPTED)
    if status == "infeasible":
        return Termination(Reason.INFEASIBLE)
    return Termination(Reason.FAILED, status)
