"""Table 2 of the discrete-QCQP paper, by its whole recipe: CIFAR ResNets at its budgets, 200 epochs of finetuning.

    python -m benchmarks.published_table2 [--networks resnet20 resnet32 resnet56] [--units channels shape]
        [--method 'paper, auto'] [--seconds 300] [--seeds 0] [--epochs 200] [--device auto] [--threads N] [--again]

For a GPU: 200 epochs are 78,200 batches, of which a ResNet-20 takes three in a second of one core. Recipe: SGD with
Nesterov's momentum 0.9, rate 0.01 times 0.2 after 60, 120 and 160 epochs, weight decay 5e-4, batches of 128, random
crops and mirror images. ``shape`` also chooses kernel columns. What decides is how far accuracy falls from the dense
network's, because the dense networks are others: here the widespread published weights.

Each epoch leaves a checkpoint in .cache/published_table2, so a run that was stopped goes on from there; rows that are
recorded are not measured again (``--again`` does so), and a training that diverges is a row that says so. The selection
is kept in .cache/accuracy, as long as the files of the library are those of their commit; both folders go along to
another machine.

References:
    Jeong et al., "Optimal channel selection with discrete QCQP" (AISTATS 2022), Table 2.
"""

from __future__ import annotations

import argparse
import os
import time
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

import qcqp_prune as qp
from benchmarks.accuracy import accuracy_of, prepared
from benchmarks.accuracy_methods import OURS
from benchmarks.instances import ROOT
from benchmarks.recording import library_commit, matches, record, recorded, said
from benchmarks.settings import SETTINGS, Setting, Some
from qcqp_prune.train import FinetuneConfig

NAME = "published_table2"
CHECKPOINTS = ROOT / ".cache" / NAME


@dataclass(frozen=True)
class Published:
    """A row of the table: accuracies in percent, of the dense network and at a share of its multiply-adds."""

    network: str
    units: str
    budget: str
    dense: float
    accuracy: float


TABLE = (
    Published("resnet20", "channels", "58.3%", 92.21, 91.74),
    Published("resnet20", "channels", "46.0%", 92.21, 90.96),
    Published("resnet20", "shape", "57.8%", 92.21, 92.26),
    Published("resnet20", "shape", "46.0%", 92.21, 91.70),
    Published("resnet32", "channels", "57.2%", 92.88, 92.52),
    Published("resnet32", "shape", "57.9%", 92.88, 92.80),
    Published("resnet56", "channels", "47.4%", 93.59, 93.36),
    Published("resnet56", "shape", "47.4%", 93.59, 93.59),
)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    networks = list(dict.fromkeys(row.network for row in TABLE))
    parser.add_argument("--networks", nargs="+", default=networks, choices=networks)
    parser.add_argument("--units", nargs="+", default=["channels", "shape"], choices=["channels", "shape"])
    parser.add_argument("--method", default=next(iter(OURS)), choices=list(OURS))
    parser.add_argument("--seconds", type=float, default=300.0, help="of the solver")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--epochs", type=int, default=200)
    parser.add_argument("--batches", type=int, help="of an epoch, for trials; all of them unless given")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--again", action="store_true")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    for published in TABLE:
        if published.network not in options.networks or published.units not in options.units:
            continue
        keys = [_key(published, options, seed) for seed in options.seeds]
        missing = [key for key in keys if options.again or not _recorded(key)]
        if missing:
            _measure(published, options, missing)


def _key(published: Published, options: argparse.Namespace, seed: int) -> dict[str, Any]:
    """What names one run."""
    return {
        "network": published.network,
        "units": published.units,
        "budget": published.budget,
        "method": options.method,
        "seed": seed,
        "schedule": [options.epochs, options.batches],
    }


def _recorded(key: dict[str, Any]) -> bool:
    return any(matches(row, key) for row in recorded(NAME))


def _measure(published: Published, options: argparse.Namespace, keys: list[dict[str, Any]]) -> None:
    """Select and cut once, and finetune for each seed."""
    setting = SETTINGS[published.network]()
    trace = {"columns": True} if published.units == "shape" else {}
    setting = replace(setting, options=trace, recipe=FinetuneConfig(device=options.device))
    method = replace(OURS[options.method], seconds=options.seconds)
    small, cut = prepared(setting, method, published.budget)
    state = {name: value.clone() for name, value in small.state_dict().items()}
    for key in keys:
        small.load_state_dict(state)
        # Bound to the network: what another selection was trained to is not gone on from.
        name = "-".join(str(x) for x in (*key.values(), cut["weights"]))
        checkpoint = CHECKPOINTS / name.replace(" ", "")
        if options.again:
            checkpoint.unlink(missing_ok=True)
        started = time.perf_counter()
        row = key | {"commit": library_commit(), "published": asdict(published)} | cut
        try:
            history = qp.finetune(
                small,
                _loader(setting, key["seed"], options.batches),
                epochs=options.epochs,
                config=replace(setting.recipe, seed=key["seed"]),
                checkpoint=checkpoint,
            )
        except qp.TrainingError as error:
            row["error"] = said(error)
        else:
            row["accuracy"] = cut["accuracy"] | {"finetuned": accuracy_of(small, setting)}
            row["training"] = history.to_dict()["epochs"]
        row["seconds"] = cut["seconds"] | {"finetune": round(time.perf_counter() - started, 1)}
        record(NAME, [r for r in recorded(NAME) if not matches(r, key)] + [row])
        print({k: v for k, v in row.items() if not isinstance(v, list | dict)}, row["accuracy"], flush=True)


def _loader(setting: Setting, seed: int, batches: int | None) -> Any:
    loader = setting.data.train.loader(128, shuffle=True, augment=setting.augment, seed=seed)
    return loader if batches is None else Some(loader, batches)


if __name__ == "__main__":
    main()
