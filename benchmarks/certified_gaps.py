"""How far from the best possible the decomposition's selections can be, and after how many seconds it is proved.

    python -m benchmarks.certified_gaps [INSTANCE ...]

Each row is one run of ``solve(problem, "decomposition")`` with the paper's objective, in a process of its own; seconds
include the search. A gap at a moment is between the bound and the incumbent held at that moment. Every certificate is
written and given to the independent checker. torchvision networks have random weights. Rows of instances that are not
named on the command line stay as they were.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import qcqp_prune as qp
from benchmarks.instances import INSTANCES
from benchmarks.latency_model import roofline
from benchmarks.recording import in_a_process, peak_mb, record, recorded
from qcqp_prune.certify import Rejected, certify
from qcqp_prune.program.program import Program


@dataclass(frozen=True)
class Case:
    """An instance, its budgets, the time it gets, and the gap that it must reach."""

    name: str
    budgets: dict[str, str]
    seconds: float
    target: float


CIFAR = ("resnet20", "resnet32", "resnet56")
SMALL = ("tv_densenet121", "tv_mobilenet_v2", "tv_efficientnet_b0", "tv_convnext_tiny", "tv_vit_b_16")
CASES = [
    *(Case(n, {"macs": b}, 10, 0.007) for n in CIFAR for b in ("58%", "50%", "46%")),
    *(Case(n, {"macs": "25%"}, 60, 0.012) for n in CIFAR),
    *(Case(n, {"macs": "10%"}, 120, 0.05) for n in CIFAR),
    Case("tv_vgg16_bn", {"macs": "50%"}, 10, 0.005),
    Case("tv_resnet50", {"macs": "50%"}, 30, 0.01),
    Case("tv_resnet50", {"params": "50%"}, 30, 0.01),
    Case("tv_resnet50", {"macs": "50%", "params": "50%"}, 60, 0.02),
    Case("tv_resnet50", {"macs": "25%"}, 120, 0.03),
    Case("tv_resnet50_free", {"macs": "50%"}, 120, 0.02),
    *(Case(n, {"macs": "50%"}, 60, 0.02) for n in SMALL),
    Case("resnet20_columns", {"macs": "50%"}, 60, 0.01),
    Case("tv_resnet50", {"latency": "50%"}, 120, 0.03),
]


def main() -> None:
    names = sys.argv[1:]
    kept = {_key(row): row for row in recorded("certified_gaps")}
    for k, case in enumerate(CASES):
        if names and case.name not in names:
            continue
        row = in_a_process("benchmarks.certified_gaps:measure", k)
        kept[_key(row)] = row
        print(row, flush=True)
        rows = [kept[key] for key in map(_case_key, CASES) if key in kept]
        record("certified_gaps", rows)


def _key(row: dict[str, Any]) -> str:
    return json.dumps([row["network"], row["budgets"]])


def _case_key(case: Case) -> str:
    return json.dumps([case.name, case.budgets])


def measure(index: int) -> dict[str, Any]:
    """Run one case; the process ends afterwards, so that its peak of memory is the case's own."""
    case = CASES[index]
    model, graph = INSTANCES[case.name].traced()
    resources = [roofline(graph)] if "latency" in case.budgets else []
    problem = qp.PruningProblem.build(graph, qp.Magnitude()(model, graph), case.budgets, resources=resources)
    program = Program.from_problem(problem)
    start = time.perf_counter()
    report = qp.solve(problem, "decomposition", time_limit=case.seconds, seed=0)
    seconds = time.perf_counter() - start
    peak = peak_mb()
    return {
        "network": case.name,
        "budgets": case.budgets,
        "units": program.size,
        "pairs": program.pair_count,
        "objective": report.objective,
        "bound": report.bound,
        "gap": report.gap,
        "target": case.target,
        "seconds": round(seconds, 1),
        "seconds_to_target": _reached(report, case.target),
        "time_limit": case.seconds,
        "peak_mb": peak,
        **_checked(report),
    }


def _checked(report: Any) -> dict[str, Any]:
    """What the independent checker says of the certificate, and how long it took."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "certificate.json"
        report.write_certificate(path)
        try:
            verdict = certify(path)
        except Rejected as rejected:
            return {"certificate": f"rejected: {rejected}", "check_seconds": None}
    return {"certificate": "accepted", "check_seconds": round(verdict.seconds, 1)}


def _reached(report: Any, gap: float) -> float | None:
    for point in report.trace:
        if point.bound is not None and point.incumbent and point.bound / point.incumbent - 1 <= gap:
            return round(point.seconds, 2)
    return None


if __name__ == "__main__":
    main()
