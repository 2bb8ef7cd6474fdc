"""``solve``: the one door from a problem to a checked report."""

from __future__ import annotations

from dataclasses import replace
from typing import NoReturn

import numpy as np

from qcqp_prune.errors import BackendError, InfeasibleError, InvalidOptionError, NoIncumbentError
from qcqp_prune.graph.masks import Masks
from qcqp_prune.program.coefficients import BoolArray
from qcqp_prune.program.problem import PruningProblem
from qcqp_prune.program.program import Program
from qcqp_prune.solve.auto import run_auto
from qcqp_prune.solve.backend import Backend, get_backend, require_available, require_capable
from qcqp_prune.solve.certificate import Certificate
from qcqp_prune.solve.interrupt import catch_interrupt
from qcqp_prune.solve.options import SolveOptions
from qcqp_prune.solve.report import SolveReport, Usage
from qcqp_prune.solve.result import RawSolution, Reason, Termination
from qcqp_prune.solve.stages import Held
from qcqp_prune.solve.verify import checked

WarmStart = Masks | SolveReport | BoolArray


def solve(
    problem: PruningProblem,
    solver: str | Backend = "auto",
    *,
    time_limit: float | None = None,
    gap_limit: float | None = None,
    seed: int | None = None,
    threads: int | None = None,
    warm_start: WarmStart | None = None,
    options: SolveOptions | None = None,
) -> SolveReport:
    """Choose the units to keep: ``max objective(x)`` so that every budget is met.

    Objective, budgets, allowed counts and integrality of the answer are recomputed from the problem; an answer that
    fails is an error, never a result. Ctrl-C returns the best selection held so far.

    Args:
        problem: from ``PruningProblem.build``.
        solver: ``"auto"``, the name of a registered solver (``"name:argument"`` passes it an argument), or a backend
            object.
        time_limit: seconds of wall clock for the solver.
        gap_limit: stop at this relative gap; 1e-4 unless given.
        seed: of everything random; 0 unless given.
        threads: most threads to use; 1 unless given.
        warm_start: a selection to start from: masks, an earlier report, or a mask over all units,
            ``(unit_count,) bool``. The result is never worth less. One that does not meet the budgets is left out and
            noted.
        options: further limits, overridden by the arguments above.

    Returns:
        The report: masks, objective, bound, gap, exact usage, and how they were come by.

    Raises:
        InvalidOptionError: a limit, the seed or the warm start makes no sense.
        MaskMismatchError: the warm start belongs to another graph.
        SolverUnavailableError: the solver is unknown or not installed.
        SolverIncapableError: the solver does not take this problem.
        InfeasibleError: no selection meets every budget.
        NoIncumbentError: the solver stopped at a limit without any selection.
        BackendError: the solver failed, or its answer failed the check.

    References:
        Jeong et al., "Optimal channel selection with discrete QCQP" (AISTATS 2022), eq. 2.
    """
    given = {"time_limit": time_limit, "gap_limit": gap_limit, "seed": seed, "threads": threads}
    base = options or SolveOptions()
    base = replace(base, **{k: v for k, v in given.items() if v is not None})  # type: ignore[arg-type]
    problem.require_feasible()
    program = Program.from_problem(problem)
    notes = _idle_budgets(problem)
    if warm_start is not None:
        x = _start_point(problem, program, warm_start)
        if program.is_feasible(x):
            base = replace(base, warm_start=x)
        else:
            notes.append("the warm start does not meet the budgets or allowed counts and was left out")
    elif base.warm_start is not None and not _is_start(program, base.warm_start):
        raise InvalidOptionError(
            "options.warm_start is not a feasible point of this program: pass warm_start to solve() instead"
        )
    with catch_interrupt(base.stop) as stop:
        held = Held(problem, program, replace(base, stop=stop), notes=notes)
        _run(held, solver)
        interrupted = stop()
    return _report(held, base, interrupted)


def _run(held: Held, solver: str | Backend) -> None:
    if held.program.size == 0:
        held.x = np.zeros(0, np.bool_)
        held.objective = held.bound = held.problem.objective.evaluate(held.program.mask(held.x))
        held.termination = Termination(Reason.OPTIMAL)
        held.notes.append("every group has one allowed count only: there was nothing to choose")
        return
    if solver == "auto":
        run_auto(held)
        return
    backend = get_backend(solver) if isinstance(solver, str) else solver
    require_available(backend)
    require_capable(backend, held.program)
    held.run(backend)


def _idle_budgets(problem: PruningProblem) -> list[str]:
    """Budgets that the whole network meets, which are likely slips of the pen."""
    return [
        f"the budget of {row.resource}, {row.limit:,} {row.unit}, is not below the {row.dense:,} that the whole "
        "network uses, so it asks for nothing: check the number"
        for row in problem.budgeted
        if row.limit is not None and row.limit >= row.dense
    ]


def _start_point(problem: PruningProblem, program: Program, start: WarmStart) -> BoolArray:
    masks = start.masks if isinstance(start, SolveReport) else start
    if isinstance(masks, Masks):
        flat = masks.flat(problem.graph)
    else:
        flat = np.asarray(masks)
        if flat.shape != (problem.graph.unit_count,) or flat.dtype != np.bool_:
            raise InvalidOptionError(
                f"warm_start is {flat.dtype} of shape {flat.shape}: give Masks, a SolveReport, or a bool array over "
                f"the {problem.graph.unit_count} units"
            )
    return flat[program.units]


def _is_start(program: Program, x: BoolArray) -> bool:
    return x.shape == (program.size,) and x.dtype == np.bool_ and program.is_feasible(x)


def _report(held: Held, options: SolveOptions, interrupted: bool) -> SolveReport:
    termination = held.termination or Termination(Reason.INTERRUPTED)
    name = " + ".join(held.solvers) or "none"
    if held.x is None or held.objective is None:
        _raise_without(held, termination, name)
    if interrupted and termination.reason is not Reason.OPTIMAL:
        termination = Termination(Reason.INTERRUPTED)
    # Once more, whichever way the point came to be held.
    checked(held.problem, held.program, RawSolution(termination, x=held.x), name)
    mask = held.program.mask(held.x)
    used = held.problem.usage(mask)
    usage = {
        row.resource: Usage(used[row.resource], row.limit, row.unit, row.dense, row.smallest, row.least)
        for row in held.problem.rows
    }
    return SolveReport(
        masks=Masks.from_flat(held.problem.graph, mask),
        termination=termination,
        objective=held.objective,
        bound=held.bound,
        usage=usage,
        solver=name,
        version=", ".join(held.versions),
        options=options.to_json(),
        seed=options.seed,
        seconds=held.seconds,
        trace=held.recorder.points,
        log="\n".join(held.logs),
        reductions=tuple(dict.fromkeys(held.reductions)),
        notes=tuple(held.notes),
        statistics=held.statistics,
        tangents=tuple(held.tangents),
        certificate=_certificate(held),
    )


def _certificate(held: Held) -> Certificate | None:
    """What proves the bound, or the lowest one that can be written down; None where no backend could."""
    if held.proof is None or held.bound is None or held.x is None or held.objective is None:
        return None
    bound = max(held.bound, held.proof.bound)
    return Certificate(held.problem, held.x, held.objective, bound, held.proof)


def _raise_without(held: Held, termination: Termination, name: str) -> NoReturn:
    if held.program.has_bands:
        _raise_outside(held, termination, name)
    if termination.reason is Reason.INFEASIBLE:
        raise BackendError(
            f"solver {name!r} claims that no selection meets the budgets, but the least allowed counts do: choose "
            "another solver, and report this with the problem file"
        )
    if termination.reason is Reason.FAILED:
        raise BackendError(f"solver {name!r} failed and holds no selection: try another solver")
    why = "It was interrupted." if termination.reason is Reason.INTERRUPTED else termination.sentence
    raise NoIncumbentError(
        f"solver {name!r} stopped without any selection. {why} Give it one to start from "
        '(warm_start), or use solver="auto", which always searches first'
    )


def _raise_outside(held: Held, termination: Termination, name: str) -> NoReturn:
    """No selection within the bands of budgets that also have a lower end."""
    rows = [r for r in held.problem.rows if r.least is not None]
    used = None if held.near is None else held.problem.usage(held.program.mask(held.near))
    wanted = "; ".join(
        f"{r.resource}: {r.least:,} to {r.limit:,} {r.unit} were asked for"
        + ("" if used is None else f", the nearest reached is {used[r.resource]:,}")
        for r in rows
    )
    advice = "Widen the band, lower round_to, or give more time"
    if termination.reason is Reason.INFEASIBLE:
        row = rows[0]
        raise InfeasibleError(
            f"no selection lies in the band, which solver {name!r} proved. {wanted}. {advice}",
            resource=row.resource,
            limit=row.limit or 0,
            smallest=row.smallest,
        )
    raise NoIncumbentError(f"solver {name!r} found no selection in the band. {wanted}. {advice}")
