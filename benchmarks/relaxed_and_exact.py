"""Relaxed masks beside exact ones on one instance: the pretrained ResNet-20 at half of its multiply-adds.

    python -m benchmarks.relaxed_and_exact [--budget 50%] [--seconds 120] [--train 4] [--batches 100] [--threads 1]

Origins: ``auto`` and ``block_coordinate``, magnitude top-k, the three relaxations with their bounds, and the indicators
of SPR (units) and PSP (channels) after a few short epochs with prices that follow the same budget. All are judged by
one objective, that of the dense weights (``Magnitude()``).
Data is needed for SPR and PSP only: QCQP_PRUNE_DATA, or .cache/data.
"""

from __future__ import annotations

import argparse
import copy
import time
from typing import Any

import torch
from torch import nn

import qcqp_prune as qp
from benchmarks.continuous import CACHE, TOP_K
from benchmarks.instances import DATA, INSTANCES
from benchmarks.recording import library_commit, record
from benchmarks.settings import SETTINGS
from qcqp_prune.continuous import train_regularised
from qcqp_prune.train import PSPConfig, SPRConfig

RELAXATIONS = ("mccormick", "cardinality_rlt", "perspective")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--budget", default="50%")
    parser.add_argument("--seconds", type=float, default=120.0)
    parser.add_argument("--train", type=int, default=4)
    parser.add_argument("--batches", type=int, default=100)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    model, graph = INSTANCES["resnet20"].traced()
    problem = qp.PruningProblem.build(graph, qp.Magnitude()(model, graph), {"macs": options.budget})
    seconds: dict[str, float] = {}
    origins: dict[str, Any] = {}
    for name in ("auto", "block_coordinate"):
        started = time.perf_counter()
        origins[name] = qp.solve(problem, name, time_limit=options.seconds)
        seconds[name] = time.perf_counter() - started
    origins["magnitude top-k"] = qp.solve(problem, TOP_K).masks
    for name in RELAXATIONS:
        origins[name] = qp.relax(problem, name, time_limit=options.seconds)
        seconds[name] = origins[name].seconds
    for name, relaxed in _trained(model, graph, options).items():
        origins[name] = relaxed
    comparison = qp.compare(problem, origins, time_limit=20.0)
    rows = [
        {
            "network": "resnet20",
            "budget": options.budget,
            "commit": library_commit(),
            "seconds": {name: round(value, 1) for name, value in seconds.items()},
            "comparison": comparison.to_json(),
        }
    ]
    for origin in comparison.origins:
        print(origin.name, origin.objective, origin.gap, origin.used, origin.bound, origin.jaccard)
    print("written:", record("relaxed_and_exact", rows))


def _trained(
    model: nn.Module, graph: qp.ChannelGraph, options: argparse.Namespace
) -> dict[str, qp.RelaxedMasks]:
    """Indicators after a short training under SPR and under PSP that follows the budget; none without data."""
    if not DATA.is_dir():
        print(f"no data in {DATA}: SPR and PSP are left out")
        return {}
    setting = SETTINGS["resnet20"]()
    CACHE.mkdir(parents=True, exist_ok=True)
    methods = {
        "spr": SPRConfig(alpha=0.3, structure="units"),
        "psp": PSPConfig("channel", spread=None),
    }
    found = {}
    for name, method in methods.items():
        training = qp.Training(
            setting.loader(0, options.batches),
            options.train,
            method,
            config=setting.recipe,
            checkpoint=CACHE / f"compare-{name}-{options.budget}-{options.train}x{options.batches}",
        )
        found[name] = train_regularised(
            copy.deepcopy(model), graph, training, {"macs": options.budget}
        ).relaxed
    return found


if __name__ == "__main__":
    main()
