"""Accuracy at equal counted multiply-adds: our objectives and solvers beside what people use, equally finetuned.

    python -m benchmarks.accuracy [--instances resnet20 ...] [--methods 'paper, auto' ...] [--budgets 58% ...]
                                  [--seeds 0 1 2] [--epochs 3] [--batches N] [--threads 1] [--again] [--dry]

One row for each instance, method, budget and seed. Every method starts from the same dense network, may look at the
same 2,500 training images, and gets the same finetuning: the same recipe and, for one seed, the same batches in the
same order. A training that diverges is a result: its row says so. An "epoch" has ``--batches`` batches of 128 images,
100 by default and 50 for ResNet-56. Accuracy is of the whole test set: dense, straight after the cut, *before
finetuning*, and finetuned. Before finetuning a method with a repair of its own is repaired by it, and the batch norms
of every other are recalibrated on the 2,500 images (which would undo part of a least squares repair).

Rows that are recorded are not measured again (``--again`` does so), so a stopped run goes on with the row that it was
at; two processes may measure different instances or budgets. ``--dry`` measures and writes nothing. Methods:
``benchmarks.accuracy_methods``. Torch-Pruning needs the extra ``bench``; data as in ``benchmarks.settings``.

Processor seconds of one thread for a batch of 128 were 0.19 to 0.30 for ResNet-20 cut to between 30 and 58 % of its
MACs, and 0.45 for ResNet-56 cut to half, whose weights lie channels last and whose tests run under bfloat16, too
(``Setting.quick``); a test set took 6 to 12 for either. So a network of its own with three seeds takes a quarter of an
hour of one core at the four budgets of either, and the default objective with the nine rivals five and a half hours of
one core, selections and small networks aside; ``--methods`` names a part of all methods. In halves::

    python -m benchmarks.accuracy --instances resnet56 --budgets 58% 50% 46%
    python -m benchmarks.accuracy --instances resnet20 lenet5 small_vgg && \\
        python -m benchmarks.accuracy --instances resnet56 --budgets 30%
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import nn

import qcqp_prune as qp
from benchmarks.accuracy_methods import METHODS, OURS, Method
from benchmarks.recording import library_commit, matches, record, recorded, said
from benchmarks.settings import SETTINGS, Setting, shared
from qcqp_prune.apply.shape_conv import ShapeConv2d
from qcqp_prune.storage import digest_of, sha256

NAME = "accuracy"
RESNET, FASHION = ("58%", "50%", "46%", "30%"), ("50%", "25%", "10%")
BUDGETS = {"resnet20": RESNET, "resnet56": RESNET, "lenet5": FASHION, "small_vgg": FASHION}
BATCHES = {"resnet56": 50}
"""Of an epoch, where they are not 100."""
Row = dict[str, Any]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--instances", nargs="+", default=list(BUDGETS), choices=list(BUDGETS))
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--budgets", nargs="+", help="of the MACs; by default those of the instance")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=3, help="0 finetunes nothing")
    parser.add_argument("--batches", type=int, help="of an epoch; by default those of the instance")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--again", action="store_true")
    parser.add_argument("--dry", action="store_true")
    options = parser.parse_args(arguments)
    if options.epochs < 0 or (options.batches is not None and options.batches < 1):
        parser.error("give epochs from 0 up, and batches from 1 up")
    torch.set_num_threads(options.threads)
    fresh: list[Row] = []
    for name in options.instances:
        setting = SETTINGS[name]()
        batches = BATCHES.get(name, 100) if options.batches is None else options.batches
        schedule = (options.epochs, batches)
        for budget in options.budgets or BUDGETS[name]:
            for method in options.methods:
                if getattr(METHODS[method], "inner", False) and not shared(setting.graph):
                    continue  # all layers are inner ones: the method without it is this one
                cell = Cell(setting, method, budget, schedule, known=fresh if options.again else None)
                seeds = [s for s in options.seeds if options.again or not _is_measured(cell.key(s))]
                for row in cell.rows(seeds):
                    fresh.append(row)
                    print({k: v for k, v in row.items() if not isinstance(v, list | dict)}, flush=True)
                    print("  ", row.get("macs"), row.get("accuracy"), flush=True)
                    if not options.dry:
                        _write(row)


def _is_measured(key: Row) -> bool:
    """Whether a row is there; one that says what went wrong is measured anew, unless it would go wrong again."""
    return any(matches(row, key) and ("error" not in row or "diverged" in row) for row in recorded(NAME))


def _write(row: Row) -> None:
    key = {k: row[k] for k in ("instance", "method", "budget", "seed", "schedule")}
    # Read anew: another process may measure another instance meanwhile.
    rows = [r for r in recorded(NAME) if not matches(r, key)] + [row]
    record(NAME, rows, packages=("torch-pruning",))


@dataclass(frozen=True)
class Cell:
    """A method at a budget of a setting, for all seeds.

    Attributes:
        known: rows that say how a network does that is the same; what is recorded where None.
    """

    setting: Setting
    method: str
    budget: str
    schedule: tuple[int, int]
    known: list[Row] | None = None

    def key(self, seed: int) -> Row:
        """What names one run."""
        return {
            "instance": self.setting.name,
            "method": self.method,
            "budget": self.budget,
            "seed": seed,
            "schedule": list(self.schedule),
        }

    def rows(self, seeds: list[int]) -> Iterator[Row]:
        """The rows of some seeds; a method that fails has rows that say why."""
        if not seeds:
            return
        about: Row = {"commit": library_commit(), "ours": self.method in OURS}
        try:
            small, cut = prepared(self.setting, METHODS[self.method], self.budget)
        except Exception as error:  # noqa: BLE001 - whatever stops a method is its result
            yield from (self.key(seed) | about | {"error": said(error)} for seed in seeds)
            return
        for seed in seeds:
            try:
                yield self.key(seed) | about | self._finetuned(small, cut, seed)
            except qp.TrainingError as error:  # the same again after a restart, so it is the result
                yield self.key(seed) | about | cut | {"error": said(error), "diverged": True}

    def _finetuned(self, small: nn.Module, cut: Row, seed: int) -> Row:
        """The row of one seed. The same network with the same seed was perhaps finetuned for another method."""
        epochs, batches = self.schedule
        if not epochs:
            return cut
        key = {k: v for k, v in self.key(seed).items() if k != "method"} | {"weights": cut["weights"]}
        for row in recorded(NAME) if self.known is None else self.known:
            if row["method"] != self.method and "error" not in row and matches(row, key):
                accuracy = cut["accuracy"] | {"finetuned": row["accuracy"]["finetuned"]}
                return cut | {"accuracy": accuracy, "same_network_as": row["method"]}
        model, started = copy.deepcopy(small), time.perf_counter()
        config = replace(self.setting.recipe, seed=seed)
        qp.finetune(model, self.setting.loader(seed, batches), epochs=epochs, config=config)
        seconds = cut["seconds"] | {"finetune": round(time.perf_counter() - started, 1)}
        accuracy = cut["accuracy"] | {"finetuned": accuracy_of(model, self.setting)}
        return cut | {"accuracy": accuracy, "seconds": seconds}


def prepared(setting: Setting, method: Method, budget: str) -> tuple[nn.Module, Row]:
    """The smaller network, repaired or recalibrated, and what a row says of it before finetuning."""
    started = time.perf_counter()
    small, about = method(setting, budget)
    layout = torch.channels_last if setting.quick else torch.preserve_format
    small = small.to(memory_format=layout)
    cut = accuracy_of(small, setting)
    repair = getattr(method, "repair", None)
    if repair is None:
        qp.recalibrate_batch_norm(small, setting.calibration(), device=setting.recipe.device)
    else:
        repair(setting, about.pop("masks"), small)
        small = small.to(memory_format=layout)  # of the weights that the repair has put in
    seconds = {"cut": round(time.perf_counter() - started, 1)}
    used, limit = qp.Macs().measure(small, setting.example), setting.limit(budget)
    if used > limit:
        raise RuntimeError(f"{used:,} MACs where {limit:,} are allowed")
    macs = {"used": used, "limit": limit, "dense": setting.macs, "share": used / setting.macs}
    accuracy = {"dense": dense_accuracy(setting), "cut": cut, "before": accuracy_of(small, setting)}
    row = {"macs": macs, "accuracy": accuracy, "seconds": seconds, "kept": _kept(small)}
    return small, about | row | {"weights": _digest(small)}


@cache
def dense_accuracy(setting: Setting) -> float:
    return accuracy_of(setting.model, setting)


def accuracy_of(model: nn.Module, setting: Setting) -> float:
    """Of the whole test set."""
    loader = setting.data.test.loader(500)
    with torch.autocast("cpu", torch.bfloat16, enabled=setting.quick):
        return qp.evaluate(model, loader, device=setting.recipe.device).accuracy


def _kept(model: nn.Module) -> dict[str, int]:
    """Outputs that each convolution and linear layer still has; columns of one that chooses them."""
    kinds = nn.Conv2d | nn.Linear | ShapeConv2d
    layers = ((name, m) for name, m in model.named_modules() if isinstance(m, kinds))
    return {name: m.weight.shape[0] for name, m in layers}


def _digest(model: nn.Module) -> str:
    """Equal for networks of the same weights."""
    state = {name: sha256(value.numpy().tobytes()) for name, value in model.state_dict().items()}
    return digest_of(state)[:16]


if __name__ == "__main__":
    main()
