"""SPR and PSP with a hard budget beside plain SPR, the exact QCQP and magnitude top-k: accuracy at equal parameters.

    python -m benchmarks.continuous [--instances lenet5 resnet20] [--arms ...] [--seeds 0] [--share 50%]
                                    [--train 6] [--finetune 4] [--batches 100] [--again]

Every arm starts from the same dense network, trains as many batches in the same order with the same recipe (those
that select by the exact solver or by magnitude without a penalty), selects at most the share of the parameters, and
is finetuned equally. An "epoch" has ``--batches`` batches of 128 images here: a schedule that two cores can run.
Rows that are recorded are not measured again; checkpoints lie in .cache/continuous, so a stopped run goes on.

The data is read from QCQP_PRUNE_DATA, or .cache/data.
"""

from __future__ import annotations

import argparse
import copy
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

import qcqp_prune as qp
from benchmarks.instances import ROOT
from benchmarks.recording import library_commit, matches, record, recorded
from benchmarks.rival_heuristics import AsSolver, greedy_l1
from benchmarks.settings import SETTINGS, Setting, Some
from qcqp_prune.train import Control, PSPConfig, SPRConfig, finetune

CACHE = ROOT / ".cache" / "continuous"
ALPHA = 0.3
PLAIN = (0.1, 0.5, 2.0)
"""Strengths of SPR without a budget. What each would leave by its own rule is recorded beside the rest."""
TOP_K = AsSolver("top-k", greedy_l1)
"""Units go in the order of the l1 norm of their weights, over the whole network."""
ARMS = ("spr budget", *(f"spr {strength}" for strength in PLAIN), "psp budget", "exact", "top-k")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--instances", nargs="+", default=["lenet5", "resnet20"], choices=list(SETTINGS))
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=ARMS)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--share", default="50%")
    parser.add_argument("--train", type=int, default=6)
    parser.add_argument("--finetune", type=int, default=4)
    parser.add_argument("--batches", type=int, default=100)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--again", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    for name in options.instances:
        setting = SETTINGS[name]()
        for seed in options.seeds:
            for arm in options.arms:
                key = {
                    "instance": name,
                    "arm": arm,
                    "share": options.share,
                    "seed": seed,
                    "schedule": [options.train, options.finetune, options.batches],
                }
                if any(matches(row, key) for row in recorded("continuous")) and not options.again:
                    continue
                row = key | {"commit": library_commit()} | Run(setting, seed, options).row(arm)
                # Read anew: another process may measure another instance meanwhile.
                record("continuous", [r for r in recorded("continuous") if not matches(r, key)] + [row])
                print({k: v for k, v in row.items() if not isinstance(v, list | dict)}, flush=True)


@dataclass(frozen=True)
class Run:
    """One seed of a setting."""

    setting: Setting
    seed: int
    options: argparse.Namespace

    def row(self, arm: str) -> dict[str, Any]:
        """Train, select and finetune as an arm does."""
        started = time.perf_counter()
        budgets = {"params": self.options.share}
        validation = self.setting.data.test.loader(500)
        recovery = qp.Recovery(
            validation=validation,
            train=self.setting.loader(1000 + self.seed, self.options.batches),
            repair="batch_norm",
            batches=20,
            epochs=self.options.finetune,
            config=replace(self.setting.recipe, seed=1000 + self.seed),
        )
        call: dict[str, Any] = {"budgets": budgets, "recovery": recovery, "time_limit": 20.0}
        if arm in ("exact", "top-k"):
            model, training = self._without_penalty(), None
            call |= {"importance": qp.Magnitude(), "solver": "auto" if arm == "exact" else TOP_K}
        else:
            model, training = self.setting.model, self._training(arm)
        _, report = qp.prune(model, self.setting.example, training=training, **call)
        row = _figures(report)
        if training is not None and training.control is None:
            # The training is complete in its checkpoint, so this second call only selects and measures.
            _, alone = qp.prune(
                model, self.setting.example, training=training, recovery=replace(recovery, epochs=0)
            )
            row["by its own rule"] = {k: v for k, v in _figures(alone).items() if k in ("params", "accuracy")}
        return row | {"seconds": round(time.perf_counter() - started, 1)}

    def _training(self, arm: str) -> qp.Training:
        method, _, rest = arm.partition(" ")
        strength = 0.0 if rest == "budget" else float(rest)
        return qp.Training(
            self._loader(),
            self.options.train,
            # Published SPR takes filters; what a budget is to remove has its norms and biases with it.
            SPRConfig(strength, ALPHA, structure="units" if rest == "budget" else "filters")
            if method == "spr"
            else PSPConfig("channel", spread=None),
            control=Control() if rest == "budget" else None,
            config=replace(self.setting.recipe, seed=self.seed),
            checkpoint=self._checkpoint(arm),
        )

    def _without_penalty(self) -> nn.Module:
        """The dense network after the same training without a penalty."""
        model = copy.deepcopy(self.setting.model)
        recipe = replace(self.setting.recipe, seed=self.seed)
        finetune(
            model,
            self._loader(),
            epochs=self.options.train,
            config=recipe,
            checkpoint=self._checkpoint("plain"),
        )
        return model

    def _loader(self) -> Some:
        return self.setting.loader(self.seed, self.options.batches)

    def _checkpoint(self, arm: str) -> Path:
        CACHE.mkdir(parents=True, exist_ok=True)
        o = self.options
        share = o.share if "budget" in arm else "any"
        return CACHE / f"{self.setting.name}-{arm}-{share}-{self.seed}-{o.train}x{o.batches}".replace(
            " ", "_"
        )


def _figures(report: qp.PruneReport) -> dict[str, Any]:
    """What a row records of a report."""
    params = next(line for line in report.budgets if line.resource == "params")
    row: dict[str, Any] = {
        "params": {"used": params.used, "limit": params.limit, "dense": params.dense},
        "accuracy": {k: v for k, v in asdict(report.accuracy).items() if v is not None},
        "solver": report.solve.solver,
        "gap": report.solve.gap,
        "kept": {name: int(keep.sum()) for name, keep in report.masks.keep.items()},
    }
    if report.regularised is not None:
        trained = report.regularised.to_json()
        row["training"], row["control"] = trained["history"]["epochs"], trained["trace"]
    if report.training is not None:
        row["finetuning"] = report.training["epochs"]
    return row


if __name__ == "__main__":
    main()
