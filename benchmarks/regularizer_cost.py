"""What a regulariser adds to the time of an epoch: the same epoch with and without, taking turns in one process.

    python -m benchmarks.regularizer_cost [--networks resnet20 resnet56] [--rounds 9] [--batches 4] [--threads 2]
                                          [--device cpu]

Each contestant trains a copy of its own by ``finetune``, epochs of a few batches of 128 random images; in each round
every one of them trains one epoch, in an order that turns from round to round. The ratio is the median over rounds of
its seconds over those without a regulariser in the same round. Images lie ready in memory, so that reading and
augmentation, which cost both sides the same, do not make the ratio smaller.
"""

from __future__ import annotations

import argparse
import copy
import os
import statistics
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import qcqp_prune as qp
from benchmarks.recording import library_commit, record, recorded
from qcqp_prune import models
from qcqp_prune.train import PSP, SPR, BudgetController, FinetuneConfig, PSPConfig, SPRConfig, finetune
from qcqp_prune.train.regularizer import Regularizer

BATCH = 128
BUDGET = {"params": "50%"}

Make = Callable[[nn.Module, qp.ChannelGraph], Regularizer | None]


def _spr(model: nn.Module, graph: qp.ChannelGraph) -> SPR:
    return SPR(model, graph, SPRConfig(strength=0.2, alpha=0.3))


def _psp(structure: Any) -> Make:
    return lambda model, graph: PSP(model, PSPConfig(structure), graph=graph)


CONTESTANTS: dict[str, Make] = {
    "none": lambda model, graph: None,
    "spr": _spr,
    "spr with a budget": lambda model, graph: BudgetController(_spr(model, graph), graph, BUDGET),
    "psp channel": _psp("channel"),
    "psp column": _psp("column"),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--networks", nargs="+", default=["resnet20", "resnet56"])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--batches", type=int, default=4)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    device = torch.cuda.get_device_name() if options.device == "cuda" else "cpu"
    rows = [
        r
        for r in recorded("regularizer_cost")
        if r["device"] != device or r["network"] not in options.networks
    ]
    for name in options.networks:
        for row in measured(name, options.rounds, options.batches, options.device):
            rows.append({"device": device, "threads": options.threads, "commit": library_commit(), **row})
            print(rows[-1], flush=True)
    print("written:", record("regularizer_cost", rows))


def measured(name: str, rounds: int, batches: int, device: str) -> list[dict[str, Any]]:
    """Seconds of a batch and ratios of one network, a row for each contestant."""
    torch.manual_seed(0)
    dense: nn.Module = getattr(models, name)().to(device)
    images, labels = torch.randn(BATCH, 3, 32, 32), torch.randint(10, (BATCH,))
    loader = [(images, labels)] * batches
    graph = qp.trace(dense, images[:1].to(device))
    recipe = FinetuneConfig(lr=1e-3, device=device)
    runs = {}
    for contestant, make in CONTESTANTS.items():
        model = copy.deepcopy(dense)
        runs[contestant] = (model, make(model, graph))
    seconds: dict[str, list[float]] = {contestant: [] for contestant in runs}
    for turn in range(-1, rounds):  # the first round warms up
        order = list(runs)[turn % len(runs) :] + list(runs)[: turn % len(runs)]
        for contestant in order:
            taken = _epoch(*runs[contestant], loader, recipe)
            if turn >= 0:
                seconds[contestant].append(taken / batches)
    rows = []
    for contestant, own in seconds.items():
        ratios = [a / b for a, b in zip(own, seconds["none"], strict=True)]
        quartiles = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
        rows.append(
            {
                "network": name,
                "regularizer": contestant,
                "rounds": rounds,
                "batches": batches,
                "seconds_per_batch": round(statistics.median(own), 4),
                "ratio": round(quartiles[1], 4),
                "quartiles": [round(quartiles[0], 4), round(quartiles[2], 4)],
            }
        )
    return rows


def _epoch(
    model: nn.Module,
    regularizer: Regularizer | None,
    loader: list[tuple[Tensor, Tensor]],
    recipe: FinetuneConfig,
) -> float:
    return finetune(model, loader, epochs=1, config=recipe, regularizer=regularizer).seconds


if __name__ == "__main__":
    main()
