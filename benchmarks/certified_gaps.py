"""How far from the best possible the decomposition's selections can be, and after how many seconds it is proved.

    python -m benchmarks.certified_gaps [INSTANCE ...]

Each row is one run of ``solve(problem, "decomposition")`` with the paper's objective; seconds include the search. A gap
at a moment is between the bound and the incumbent held at that moment. torchvision networks have random weights.
"""

from __future__ import annotations

import resource
import sys
import time
from dataclasses import dataclass
from typing import Any

import qcqp_prune as qp
from benchmarks.instances import INSTANCES
from benchmarks.latency_model import roofline
from benchmarks.recording import record
from qcqp_prune.program.program import Program


@dataclass(frozen=True)
class Case:
    """An instance, its budgets, and the time it gets."""

    name: str
    budgets: dict[str, str]
    seconds: float


CASES = [
    *(Case(n, {"macs": b}, 10) for n in ("resnet20", "resnet32", "resnet56") for b in ("58%", "50%", "46%")),
    *(Case(n, {"macs": "25%"}, 60) for n in ("resnet20", "resnet32", "resnet56")),
    *(Case(n, {"macs": "10%"}, 60) for n in ("resnet20", "resnet32", "resnet56")),
    Case("tv_vgg16_bn", {"macs": "50%"}, 30),
    Case("tv_resnet50", {"macs": "50%"}, 30),
    Case("tv_resnet50", {"params": "50%"}, 30),
    Case("tv_resnet50", {"macs": "50%", "params": "50%"}, 60),
    Case("tv_resnet50", {"macs": "25%"}, 60),
    Case("tv_resnet50", {"latency": "50%"}, 120),
    *(
        Case(n, {"macs": "50%"}, 60)
        for n in ("tv_densenet121", "tv_mobilenet_v2", "tv_efficientnet_b0", "tv_convnext_tiny")
    ),
]


def main() -> None:
    names = sys.argv[1:]
    rows = []
    prepared: tuple[str, Any] = ("", None)
    for case in CASES:
        if names and case.name not in names:
            continue
        if prepared[0] != case.name:
            prepared = (case.name, _prepare(case.name))
        rows.append(_run(case, *prepared[1]))
        print(rows[-1], flush=True)
    print("written:", record("certified_gaps", rows))


def _prepare(name: str) -> tuple[Any, Any]:
    model, graph = INSTANCES[name].traced()
    return graph, qp.Magnitude()(model, graph)


def _run(case: Case, graph: Any, objective: Any) -> dict[str, Any]:
    resources = [roofline(graph)] if "latency" in case.budgets else []
    problem = qp.PruningProblem.build(graph, objective, case.budgets, resources=resources)
    program = Program.from_problem(problem)
    start = time.perf_counter()
    report = qp.solve(problem, "decomposition", time_limit=case.seconds, seed=0)
    seconds = time.perf_counter() - start
    return {
        "network": case.name,
        "budgets": case.budgets,
        "units": program.size,
        "pairs": program.pair_count,
        "objective": report.objective,
        "bound": report.bound,
        "gap": report.gap,
        "seconds": round(seconds, 1),
        "seconds_to_1_percent": _reached(report, 0.01),
        "time_limit": case.seconds,
        "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
    }


def _reached(report: Any, gap: float) -> float | None:
    for point in report.trace:
        if point.bound is not None and point.incumbent and point.bound / point.incumbent - 1 <= gap:
            return round(point.seconds, 2)
    return None


if __name__ == "__main__":
    main()
