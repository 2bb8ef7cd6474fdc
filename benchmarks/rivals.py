"""The solvers of this library against what else there is, on the same instances: objective and bound after a minute.

    python -m benchmarks.rivals [--seconds 60] [--instances NAME ...] [--methods NAME ...] [--again] [--quick]

Every row runs in a process of its own, without a warm start, with one thread; its seconds include the building of a
model. Rows are written as they come, and rows that are there already are not run again (``--again`` runs them anew).
``--quick`` takes the two smallest chains for three seconds each and writes nothing. The mask of every method is checked
with the problem's own exact integers. CP-SAT needs the extra ``bench``.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from benchmarks.recording import Limits, ProcessFailed, in_a_process, peak_mb, record, recorded
from benchmarks.rival_heuristics import alternating_blocks, greedy_l1, halp, uniform_l1
from benchmarks.rival_models import Declined, cp_sat, mdp_mindtpy, mdp_scip
from qcqp_prune.errors import BackendError, QcqpPruneError
from qcqp_prune.program.problem import PruningProblem
from qcqp_prune.program.program import Program
from qcqp_prune.solve.backend import get_backend
from qcqp_prune.solve.options import SolveOptions
from qcqp_prune.solve.result import RawSolution, Reason, Termination, relative_gap
from qcqp_prune.solve.run import solve
from qcqp_prune.solve.verify import checked
from qcqp_prune.testing import chain_problem

INSTANCES: tuple[tuple[str, str], ...] = (
    ("chain:tiny", "50%"),
    ("chain:small", "50%"),
    ("chain:medium", "50%"),
    ("chain:resnet20", "50%"),
    ("resnet20", "50%"),
    ("resnet20", "25%"),
    ("resnet56", "50%"),
    ("resnet56", "25%"),
    ("tv_resnet50", "50%"),
)
QUICK = INSTANCES[:2]
HEURISTICS: dict[str, Callable[[Program, float], np.ndarray]] = {
    "uniform l1": uniform_l1,
    "greedy l1": greedy_l1,
    "alternating blocks": alternating_blocks,
    "HALP knapsack": halp,
}
MODELS: dict[str, Callable[[Program, float], tuple[np.ndarray | None, float | None, str]]] = {
    "CP-SAT": cp_sat,
    "MDP, MindtPy OA": mdp_mindtpy,
    "MDP, SCIP": mdp_scip,
}
SOLVERS = {
    "SCIP native": "scip",
    "HiGHS McCormick": "highs:mccormick",
    "HiGHS RLT": "highs:cardinality_rlt",
    "SCIP RLT": "scip:cardinality_rlt",
    "decomposition": "decomposition",
    "auto": "auto",
}
METHODS = (*HEURISTICS, *MODELS, *SOLVERS)
GRACE = 240.0
"""Seconds that a process gets beside its time limit: for tracing, and for solvers that look at the clock rarely."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--instances", nargs="+", choices=sorted({n for n, _ in INSTANCES}))
    parser.add_argument("--methods", nargs="+", choices=METHODS)
    parser.add_argument("--again", action="store_true")
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    seconds = 3.0 if options.quick else options.seconds
    rows = [] if options.quick else recorded("rivals")
    for name, share in QUICK if options.quick else INSTANCES:
        if options.instances and name not in options.instances:
            continue
        for method in options.methods or METHODS:
            key = (name, share, method, seconds)
            if not options.again and any(_key(row) == key for row in rows):
                continue
            row = _in_a_process(key)
            # Read again: another process may have added rows of other instances meanwhile.
            rows = [r for r in (rows if options.quick else recorded("rivals")) if _key(r) != key] + [row]
            rows.sort(key=_place)
            print(row, flush=True)
            if not options.quick:
                record("rivals", rows, packages=("ortools", "pyomo"))


def _key(row: dict[str, Any]) -> tuple[str, str, str, float]:
    return row["network"], row["budgets"]["macs"], row["method"], row["time_limit"]


def _place(row: dict[str, Any]) -> tuple[int, int]:
    return INSTANCES.index((row["network"], row["budgets"]["macs"])), METHODS.index(row["method"])


def _in_a_process(key: tuple[str, str, str, float]) -> dict[str, Any]:
    """Run one row; a process that dies or does not end gives a row that says so."""
    name, share, method, seconds = key
    row = {"network": name, "budgets": {"macs": share}, "method": method, "time_limit": seconds}
    try:
        found = in_a_process("benchmarks.rivals:measure", *key, limits=Limits(seconds + GRACE))
    except ProcessFailed as failed:
        return row | {"note": f"failed: {failed}"}
    return row | found


def measure(name: str, share: str, method: str, seconds: float) -> dict[str, Any]:
    """One row."""
    return run(build(name, share), method, seconds)


def build(name: str, share: str) -> PruningProblem:
    """The problem of an instance."""
    kind, _, chain = name.partition(":")
    if kind == "chain":
        return chain_problem(chain, fractions=(("macs", float(share.rstrip("%")) / 100),))
    import qcqp_prune as qp
    from benchmarks.instances import INSTANCES as NETWORKS

    instance = NETWORKS[name]
    model = instance.build()
    graph = qp.trace(model, instance.example())
    return qp.PruningProblem.build(graph, qp.Magnitude()(model, graph), {"macs": share})


def run(problem: PruningProblem, method: str, seconds: float) -> dict[str, Any]:
    """Let one method loose on a problem, and check its mask and its bound."""
    program = Program.from_problem(problem)
    row: dict[str, Any] = {"units": program.size, "pairs": program.pair_count}
    started = time.perf_counter()
    try:
        raw, note = _answer(problem, program, method, seconds)
        took = time.perf_counter() - started
        answer = checked(problem, program, raw, method)
    except (Declined, QcqpPruneError, MemoryError) as error:
        kind = "refused by the check: " if isinstance(error, BackendError) else ""
        return row | {"note": f"{kind}{error}", "seconds": round(time.perf_counter() - started, 1)}
    objective = None if answer is None else answer.objective
    bound = raw.bound if answer is None else answer.bound
    return row | {
        "objective": objective,
        "bound": bound,
        "gap": None if objective is None else relative_gap(objective, bound),
        "proved": raw.termination.reason is Reason.OPTIMAL,
        "seconds": round(took, 1),
        "peak_mb": peak_mb(),
        "note": note,
    }


def _answer(
    problem: PruningProblem, program: Program, method: str, seconds: float
) -> tuple[RawSolution, str]:
    if method == "auto":
        report = solve(problem, "auto", time_limit=seconds, seed=0)
        x = report.masks.flat(problem.graph)[program.units]
        return RawSolution(report.termination, x=x, bound=report.bound), report.solver
    if method in SOLVERS:
        options = SolveOptions(time_limit=seconds, seed=0)
        return get_backend(SOLVERS[method]).solve(program, options), ""
    stopped = Termination(Reason.TIME_LIMIT)
    if method in HEURISTICS:
        return RawSolution(stopped, x=HEURISTICS[method](program, seconds)), ""
    x, bound, note = MODELS[method](program, seconds)
    return RawSolution(stopped, x=x, bound=bound), note


if __name__ == "__main__":
    main()
