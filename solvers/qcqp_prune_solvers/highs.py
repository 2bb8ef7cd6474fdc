"""HiGHS on linear reformulations: branch and cut where that closes, the relaxation's bound where it does not.

HiGHS never sees a quadratic model here. It refuses mixed-integer quadratic ones, and given the nonconvex QP
``min -x y`` over the unit square it reported the value 0 as optimal (the optimum is -1).
"""

from __future__ import annotations

import importlib.util
import time
from typing import Any

import numpy as np

from qcqp_prune.program.program import Program
from qcqp_prune.program.reductions.cardinality_rlt import CardinalityRLT
from qcqp_prune.program.reductions.linear_model import LinearModel, Reduction
from qcqp_prune.program.reductions.perspective import Perspective
from qcqp_prune.solve.backend import Availability, Outlook, ProblemClass, Role
from qcqp_prune.solve.options import SolveOptions
from qcqp_prune.solve.result import RawSolution, Reason, Termination, TracePoint, TraceRecorder
from qcqp_prune_solvers.linear import (
    REDUCTIONS,
    lower_of,
    meets,
    require_reduction,
    require_room,
    strengthened,
)
from qcqp_prune_solvers.retry import solve_exactly

# Nonzeros of the cardinality-RLT model up to which branch and cut on it is expected to close within a minute, and up to
# which its root relaxation still is.
CLOSES = 50_000
BRANCHES = 100_000


class HighsBackend:
    """Mixed-integer linear branch and cut.

    Args:
        reduction: ``cardinality_rlt``, ``perspective`` or ``mccormick``; one of the first two by size when None.

    References:
        Huangfu and Hall, "Parallelizing the dual revised simplex method" (Mathematical Programming Computation, 2018).
    """

    name = "highs"
    scope = (
        "proves: up to about 100 channels in a minute; beyond, a selection and a bound while its model fits"
    )
    classes = (ProblemClass(2, 2, integral=True, convex=False, tables=True),)

    def __init__(self, reduction: str | None = None) -> None:
        require_reduction("HiGHS", reduction)
        self._reduction = reduction

    def availability(self) -> Availability:
        """Whether highspy can be imported."""
        if importlib.util.find_spec("highspy") is None:
            return Availability(False, "highspy is not installed: pip install highspy")
        import highspy

        return Availability(True, version=highspy.Highs().version())  # type: ignore[no-untyped-call]

    def outlook(self, program: Program) -> Outlook | None:
        """A proof for about 100 units."""
        size = CardinalityRLT().nonzeros(program)
        if size > CLOSES:
            return None
        why = f"its linear model has about {size:,} entries, few enough to close"
        return Outlook(Role.PROVES, 20, why, seconds=0.1 + (size / 4000) ** 1.5)

    def solve(self, program: Program, options: SolveOptions) -> RawSolution:
        """Branch and cut on the reduction.

        Raises:
            SolverIncapableError: the reduction would not fit into memory.
        """
        reduction = self._choose(program)
        require_room(program, reduction)

        def attempt(smaller: Program, rest: SolveOptions) -> RawSolution:
            return _Run(smaller, reduction, rest).solve()

        return solve_exactly(program, options, attempt)

    def _choose(self, program: Program) -> Reduction:
        if self._reduction is not None:
            return REDUCTIONS[self._reduction]()
        rlt = CardinalityRLT()
        return rlt if rlt.nonzeros(program) <= BRANCHES else Perspective()


class _Run:
    """One solve of one model."""

    def __init__(self, program: Program, reduction: Reduction, options: SolveOptions) -> None:
        import highspy

        self.started = time.perf_counter()
        self.program, self.reduction, self.options = program, reduction, options
        self.recorder = TraceRecorder(options.on_event)
        self.model = strengthened(program, reduction)
        self.log: list[str] = []
        self.met = False
        self.h = highspy.Highs()  # type: ignore[no-untyped-call]
        self._parameters()
        self.h.passModel(as_highs(self.model))
        self._listen()

    def _parameters(self) -> None:
        options = self.options
        wanted: dict[str, Any] = {
            "log_to_console": False,
            "mip_rel_gap": options.gap_limit,
            "mip_abs_gap": 1e-9,
            "random_seed": options.seed,
            "threads": options.threads,
        }
        if options.time_limit is not None:
            wanted["time_limit"] = max(options.time_limit - (time.perf_counter() - self.started), 0.05)
        if options.work_limit is not None:
            wanted["mip_max_nodes"] = options.work_limit
        for name, value in wanted.items():
            self.h.setOptionValue(name, value)

    def _listen(self) -> None:
        h = self.h
        h.cbLogging += lambda event: self.log.append(event.message)
        h.cbMipInterrupt += self._poll
        h.cbSimplexInterrupt += self._stop
        h.cbIpmInterrupt += self._stop
        h.cbMipImprovingSolution += self._poll

    def _poll(self, event: Any) -> None:
        data = event.data_out
        incumbent, bound = data.mip_primal_bound, data.mip_dual_bound
        point = TracePoint(
            time.perf_counter() - self.started,
            int(data.mip_node_count),
            incumbent if np.isfinite(incumbent) else None,
            bound if np.isfinite(bound) else None,
        )
        self.recorder.add(point)
        if meets(point.incumbent, point.bound, self.options):
            self.met = True
            event.interrupt()
        self._stop(event)

    def _stop(self, event: Any) -> None:
        if self.options.stop():
            event.interrupt()

    def solve(self) -> RawSolution:
        """Run HiGHS and read what it holds."""
        import highspy

        if self.options.warm_start is not None:
            start = highspy.HighsSolution()
            start.col_value = self.model.extend(self.options.warm_start).tolist()
            self.h.setSolution(start)
        self.h.run()
        info = self.h.getInfo()
        x = None
        if info.primal_solution_status == highspy.SolutionStatus.kSolutionStatusFeasible:
            values = np.asarray(self.h.getSolution().col_value)
            x = np.asarray(np.rint(self.reduction.invert(self.program, values)) == 1.0)
        objective = None if x is None else self.program.objective(x)
        bound = lower_of(float(info.mip_dual_bound), self.options.known_bound)
        closed = x is not None and (self.met or meets(objective, bound, self.options))
        return RawSolution(
            termination=Termination(Reason.OPTIMAL) if closed else self._termination(),
            x=x,
            bound=bound,
            objective=objective,
            trace=self.recorder.points,
            log="".join(self.log),
            solver_version=self.h.version(),
            reduction=self.reduction.name,
            statistics={
                "nodes": float(info.mip_node_count),
                "columns": float(self.h.getNumCol()),
                "rows": float(self.h.getNumRow()),
            },
        )

    def _termination(self) -> Termination:
        from highspy import HighsModelStatus as Status

        status = self.h.getModelStatus()
        options = self.options
        known = {
            Status.kOptimal: Termination(Reason.OPTIMAL),
            Status.kTimeLimit: Termination(Reason.TIME_LIMIT, f"time_limit={options.time_limit}"),
            Status.kSolutionLimit: Termination(Reason.WORK_LIMIT, f"work_limit={options.work_limit}"),
            Status.kIterationLimit: Termination(Reason.WORK_LIMIT, f"work_limit={options.work_limit}"),
            Status.kInterrupt: Termination(Reason.INTERRUPTED),
            getattr(Status, "kHighsInterrupt", Status.kInterrupt): Termination(Reason.INTERRUPTED),
            Status.kInfeasible: Termination(Reason.INFEASIBLE),
            Status.kMemoryLimit: Termination(Reason.MEMORY_LIMIT),
        }
        return known.get(status, Termination(Reason.FAILED, self.h.modelStatusToString(status)))


def as_highs(model: LinearModel) -> Any:
    """The model in HiGHS's own structure."""
    import highspy

    lp = highspy.HighsLp()
    lp.num_row_, lp.num_col_ = model.matrix.shape
    lp.sense_, lp.offset_ = highspy.ObjSense.kMaximize, model.constant
    lp.col_cost_, lp.col_lower_, lp.col_upper_ = model.objective, model.lower, model.upper
    lp.row_lower_, lp.row_upper_ = model.row_lower, model.row_upper
    lp.a_matrix_.format_ = highspy.MatrixFormat.kRowwise
    lp.a_matrix_.start_ = model.matrix.indptr.astype(np.int32)
    lp.a_matrix_.index_ = model.matrix.indices.astype(np.int32)
    lp.a_matrix_.value_ = model.matrix.data
    kinds = highspy.HighsVarType
    lp.integrality_ = [kinds.kInteger if k else kinds.kContinuous for k in model.integer.tolist()]
    return lp
