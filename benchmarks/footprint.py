"""Seconds and peak memory of tracing a network and building its problem, each network in a process of its own.

python -m benchmarks.footprint [tv_resnet50 tv_mobilenet_v2 ...]
"""

from __future__ import annotations

import sys
import time
from typing import Any

from benchmarks.recording import in_a_process, peak_mb, record


def main() -> None:
    names = sys.argv[1:] or ["resnet20", "resnet56", "tv_mobilenet_v2", "tv_resnet50"]
    rows = []
    for name in names:
        rows.append(in_a_process("benchmarks.footprint:measure", name))
        print(rows[-1], flush=True)
    print("written:", record("footprint", rows))


def measure(name: str) -> dict[str, Any]:
    """One row; memory is this process's, the framework and the model included."""
    import qcqp_prune as qp
    from benchmarks.instances import INSTANCES
    from qcqp_prune.program.program import Program

    instance = INSTANCES[name]
    model = instance.build()
    imported = peak_mb()
    start = time.perf_counter()
    graph = qp.trace(model, instance.example())
    traced = time.perf_counter()
    problem = qp.PruningProblem.build(graph, qp.Magnitude()(model, graph), "50%")
    program = Program.from_problem(problem)
    built = time.perf_counter()
    return {
        "network": name,
        "units": graph.prunable_count,
        "groups": len(program.groups),
        "pairs": program.pair_count,
        "trace_seconds": round(traced - start, 2),
        "build_seconds": round(built - traced, 2),
        "peak_mb_before": imported,
        "peak_mb_after": peak_mb(),
    }


if __name__ == "__main__":
    main()
