"""Prune the published CIFAR-10 ResNets to exact budgets and record what the solver proved and what was verified.

    python -m benchmarks.pretrained_resnets [--networks resnet20 resnet32 resnet56] [--time-limit 60]

Accuracy is of the 10,000 CIFAR-10 test images where QCQP_PRUNE_DATA is set (or the data is unpacked in .cache/data):
dense, straight after pruning, and after re-estimating batch norm statistics; nothing is finetuned here.
"""

from __future__ import annotations

import argparse
import os
import time
from typing import Any

import torch

import qcqp_prune as qp
from benchmarks.instances import DATA, INSTANCES
from benchmarks.recording import record

BUDGETS: tuple[dict[str, str], ...] = (
    {"macs": "58%"},
    {"macs": "50%"},
    {"macs": "46%"},
    {"macs": "50%", "params": "50%"},
)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--networks", nargs="+", default=["resnet20", "resnet32", "resnet56"])
    parser.add_argument("--time-limit", type=float, default=60.0)
    options = parser.parse_args()
    torch.set_num_threads(os.cpu_count() or 1)
    data = _data()
    rows = []
    for name in options.networks:
        instance = INSTANCES[name]
        model = instance.build()
        dense = None if data is None else qp.evaluate(model, data.test.loader(500)).accuracy
        graph = qp.trace(model, instance.example())
        importance = qp.Magnitude()(model, graph)
        for budgets in BUDGETS:
            rows.append(
                {"network": name, "dense_accuracy": dense}
                | _one(model, graph, importance, budgets, options, data)
            )
            print(rows[-1], flush=True)
    print("written:", record("pretrained_resnets", rows))


def _data() -> Any:
    from qcqp_prune.data import cifar10

    return cifar10(DATA / "cifar-10-batches-bin") if DATA.is_dir() else None


def _one(
    model: Any, graph: Any, importance: Any, budgets: dict[str, str], options: Any, data: Any
) -> dict[str, Any]:
    problem = qp.PruningProblem.build(graph, importance, budgets)
    start = time.perf_counter()
    report = qp.solve(problem, time_limit=options.time_limit, seed=0)
    seconds = time.perf_counter() - start
    small, verification = qp.shrink_and_verify(model, graph, report.masks)
    row: dict[str, Any] = {
        "budgets": budgets,
        "solver": report.solver,
        "objective": report.objective,
        "bound": report.bound,
        "gap": report.gap,
        "seconds": round(seconds, 2),
        "used": {u: {"used": x.used, "limit": x.limit, "dense": x.dense} for u, x in report.usage.items()},
        "counts_equal": all(c.predicted == c.measured for c in verification.counts),
        "max_relative_error": verification.max_relative_error,
        "kept": {g.id: int(k.sum()) for g, k in zip(graph.groups, report.masks.keep.values(), strict=True)},
    }
    if data is not None:
        row["accuracy_after_pruning"] = qp.evaluate(small, data.test.loader(500)).accuracy
        qp.recalibrate_batch_norm(small, data.train.loader(250, shuffle=True), batches=20)
        row["accuracy_recalibrated"] = qp.evaluate(small, data.test.loader(500)).accuracy
    return row


if __name__ == "__main__":
    main()
