"""What it brings that residual branches may go as a whole: ResNet-56 at small budgets, with and without.

    python -m benchmarks.blocks [--seconds 30]

Random weights of a fixed seed, magnitude scores, one search each. ``smallest`` is the least share of multiply-adds
that any selection reaches; a row without an objective has no selection within its budget.
"""

from __future__ import annotations

import argparse
from typing import Any

from benchmarks.recording import in_a_process, record

BUDGETS = (10, 15, 25, 50)
FLOORS = (1, 0.5)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=30.0)
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for floor in FLOORS:
        for blocks in (False, True):
            rows += in_a_process("benchmarks.blocks:measure", floor, blocks, options.seconds)["rows"]
            for row in rows[-len(BUDGETS) :]:
                print(row, flush=True)
    record("blocks", rows)


def measure(floor: float, blocks: bool, seconds: float) -> dict[str, Any]:
    """The rows of one way to trace."""
    import torch

    import qcqp_prune as qp
    from qcqp_prune.models import resnet56

    torch.manual_seed(0)
    model = resnet56().eval()
    graph = qp.trace(model, torch.zeros(1, 3, 32, 32), blocks=blocks, min_keep=floor)
    scores = qp.Magnitude()(model, graph)
    (macs,) = (
        r for r in qp.PruningProblem.build(graph, scores, {"macs": "100%"}).rows if r.resource == "macs"
    )
    rows = []
    for budget in BUDGETS:
        row: dict[str, Any] = {
            "min_keep": floor,
            "blocks": blocks,
            "smallest": macs.smallest / macs.dense,
            "budget": budget,
            "objective": None,
            "removed": None,
        }
        if macs.smallest <= macs.dense * budget // 100:
            problem = qp.PruningProblem.build(graph, scores, {"macs": f"{budget}%"})
            report = qp.solve(problem, "block_coordinate", time_limit=seconds, seed=0)
            row["objective"] = report.objective
            row["removed"] = len(graph.removed_blocks(report.masks.flat(graph))) if report.masks else None
        rows.append(row)
    return {"rows": rows}


if __name__ == "__main__":
    main()
