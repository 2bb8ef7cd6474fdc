"""SCIP on the program itself, a nonconvex MIQCQP, or on one of its linear reductions."""

from __future__ import annotations

import importlib.util
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from qcqp_prune.errors import SolverIncapableError
from qcqp_prune.program.coefficients import BoolArray
from qcqp_prune.program.program import Program
from qcqp_prune.program.reductions.linear_model import Reduction
from qcqp_prune.solve.backend import Availability, Outlook, ProblemClass, Role
from qcqp_prune.solve.options import SolveOptions
from qcqp_prune.solve.result import RawSolution, Reason, Termination, TracePoint, TraceRecorder
from qcqp_prune_solvers.linear import REDUCTIONS, lower_of, meets, require_reduction, require_room
from qcqp_prune_solvers.retry import solve_exactly
from qcqp_prune_solvers.scip_models import Built, NativeModel, ReducedModel

LARGEST = 400_000
CLOSES = 150


class ScipBackend:
    """Branch and cut for nonconvex mixed-integer quadratic problems.

    Args:
        reduction: ``cardinality_rlt``, ``perspective`` or ``mccormick`` for a linear model of the program; the program
            as it stands when None.

    References:
        Bolusani et al., "The SCIP Optimization Suite 9.0" (2024); Jeong et al. (AISTATS 2022), eq. 2 for the model.
    """

    name = "scip"
    scope = "proves: up to about 40 channels in a minute; takes the quadratic program as it is"
    classes = (ProblemClass(2, 2, integral=True, convex=False, tables=True),)

    def __init__(self, reduction: str | None = None) -> None:
        require_reduction("SCIP", reduction)
        self._reduction = reduction

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
        reduction = None if self._reduction is None else REDUCTIONS[self._reduction]()
        if reduction is not None:
            require_room(program, reduction)
        return solve_exactly(program, options, lambda part, rest: _solve(part, reduction, rest))


def _solve(program: Program, reduction: Reduction | None, options: SolveOptions) -> RawSolution:
    run = _Run(program, reduction, options)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "scip.log"
        run.model.setLogfile(str(path))
        run.model.optimize()
        run.model.setLogfile(None)
        log = path.read_text(errors="replace") if path.exists() else ""
    return run.result(log)


class _Run:
    """One solve of one model, with listeners for progress."""

    def __init__(self, program: Program, reduction: Reduction | None, options: SolveOptions) -> None:
        self.program, self.options = program, options
        self.started = time.perf_counter()
        self.recorder = TraceRecorder(options.on_event)
        self.met = False
        self.built: Built = NativeModel(program) if reduction is None else ReducedModel(program, reduction)
        self.model = self.built.model
        self.model.hideOutput()
        self._parameters()
        if options.warm_start is not None:
            self.built.start_from(options.warm_start)
        self._listen()

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
                if outer.note() or outer.options.stop():
                    self.model.interruptSolve()
                return {}

        self.model.includeEventhdlr(
            Listener(), "progress", "records incumbents and bounds, and passes Ctrl-C on"
        )

    def note(self) -> bool:
        """Record what SCIP holds now; whether it meets the bound."""
        m = self.model
        incumbent = m.getPrimalbound() if m.getNSols() else None
        point = TracePoint(
            time.perf_counter() - self.started, int(m.getNTotalNodes()), incumbent, self._bound()
        )
        self.recorder.add(point)
        self.met = self.met or meets(incumbent, point.bound, self.options)
        return self.met

    def _bound(self) -> float | None:
        bound = float(self.model.getDualbound())
        return lower_of(bound if abs(bound) < self.model.infinity() else None, self.options.known_bound)

    def result(self, log: str) -> RawSolution:
        """Read the model's state after the solve."""
        m = self.model
        x, bound = self._best_point(), self._bound()
        objective = None if x is None else self.program.objective(x)
        closed = x is not None and (self.met or meets(objective, bound, self.options))
        return RawSolution(
            termination=Termination(Reason.OPTIMAL) if closed else _termination(m.getStatus(), self.options),
            x=x,
            bound=bound,
            objective=objective,
            trace=self.recorder.points,
            log=log,
            solver_version=_version(m),
            reduction=self.built.reduction,
            statistics={"nodes": float(m.getNTotalNodes()), "seconds": float(m.getSolvingTime())},
        )

    def _best_point(self) -> BoolArray | None:
        """The best stored point that meets the budgets to the last unit, else the best one."""
        points = []
        for solution in self.model.getSols():
            values = np.asarray([self.model.getSolVal(solution, v) for v in self.built.x])
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
