"""One cut against several rounds of scoring, solving, cutting and finetuning, at equal multiply-adds and equal batches.

    python -m benchmarks.gradual [--instances lenet5 resnet20] [--objectives paper calibrated] [--rounds 1 2 4]
                                 [--budgets 50% 25%] [--seeds 0 1 2] [--spacing geometric] [--epochs 8]
                                 [--batches 100] [--again] [--dry]

The thesis compares pruning at once with pruning step by step (chapter 8). Here every arm starts from the same dense
network and is finetuned for ``--epochs`` epochs in all, on the same batches in the same order: at once after one cut,
or in equal parts after each of several. An "epoch" has ``--batches`` batches of 128 images, a schedule that two cores
can run. After each cut the network is repaired as ``prune`` does by default. Each part has the recipe of the setting
from its rise to its end, with a rise over half an epoch as ``FinetuneConfig.recommended`` has it. A training that
diverges is a result too: its row says so.

Rows that are recorded are not measured again (``--again`` does so); checkpoints lie in .cache/gradual, so a stopped run
goes on. ``--dry`` measures and writes nothing. Data as in ``benchmarks.settings``.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

import qcqp_prune as qp
from benchmarks.importances import CALIBRATED, PAPER, Objective
from benchmarks.instances import ROOT
from benchmarks.recording import library_commit, matches, record, recorded, said
from benchmarks.settings import SETTINGS, Setting

NAME = "gradual"
CACHE = ROOT / ".cache" / NAME
WARMUP = 0.5
"""Epochs."""
OBJECTIVES: dict[str, Objective] = {"paper": PAPER, "calibrated": CALIBRATED}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--instances", nargs="+", default=["lenet5", "resnet20"], choices=list(SETTINGS))
    parser.add_argument("--objectives", nargs="+", default=list(OBJECTIVES), choices=list(OBJECTIVES))
    parser.add_argument("--rounds", nargs="+", type=int, default=[1, 2, 4])
    parser.add_argument("--budgets", nargs="+", default=["50%", "25%"], help="of the MACs")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--spacing", default="geometric", choices=["geometric", "linear"])
    parser.add_argument("--epochs", type=int, default=8, help="in all, a multiple of each number of rounds")
    parser.add_argument("--batches", type=int, default=100)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--again", action="store_true")
    parser.add_argument("--dry", action="store_true")
    options = parser.parse_args(arguments)
    if any(options.epochs % count for count in options.rounds):
        parser.error(
            f"{options.epochs} epochs do not fall into equal parts for each of {options.rounds} rounds"
        )
    torch.set_num_threads(options.threads)
    for name in options.instances:
        setting = SETTINGS[name]()
        for budget in options.budgets:
            for objective in options.objectives:
                for count in options.rounds:
                    for seed in options.seeds:
                        rounds = qp.Rounds(count, options.epochs // count, options.spacing)
                        arm = Arm(setting, budget, objective, rounds, seed, options.batches)
                        _measure(arm, again=options.again, dry=options.dry)


def _measure(arm: Arm, *, again: bool, dry: bool) -> None:
    if not again and any(matches(row, arm.key) for row in recorded(NAME)):
        return
    row = arm.key | {"commit": library_commit()}
    try:
        row |= arm.row(fresh=again or dry)
    except qp.TrainingError as error:
        row |= {"error": said(error)}
    if not dry:
        # Read anew: another process may measure another instance meanwhile.
        record(NAME, [r for r in recorded(NAME) if not matches(r, arm.key)] + [row])
    print({k: v for k, v in row.items() if not isinstance(v, list)}, flush=True)


@dataclass(frozen=True)
class Arm:
    """One run."""

    setting: Setting
    budget: str
    objective: str
    rounds: qp.Rounds
    seed: int
    batches: int

    @property
    def key(self) -> dict[str, Any]:
        """What names it."""
        return {
            "instance": self.setting.name,
            "budget": self.budget,
            "objective": self.objective,
            **asdict(self.rounds),
            "seed": self.seed,
            "batches": self.batches,
        }

    def row(self, *, fresh: bool) -> dict[str, Any]:
        """Prune and finetune; without checkpoints where it is to be measured afresh."""
        started = time.perf_counter()
        recovery = qp.Recovery(
            validation=self.setting.data.test.loader(500),
            train=self.setting.loader(self.seed, self.batches),
            epochs=self.rounds.epochs,
            config=replace(self.setting.recipe, seed=self.seed, warmup=WARMUP),
            checkpoint=None if fresh else self._checkpoint(),
        )
        _, report = qp.prune(
            self.setting.model,
            self.setting.example,
            budgets={"macs": self.budget},
            importance=OBJECTIVES[self.objective](self.setting),
            rounds=self.rounds,
            recovery=recovery,
            time_limit=60.0,
            **self.setting.options,
        )
        macs = next(line for line in report.budgets if line.resource == "macs")
        return {
            "macs": {"used": macs.used, "limit": macs.limit, "dense": macs.dense},
            "accuracy": {k: v for k, v in asdict(report.accuracy).items() if v is not None},
            "solver": report.solve.solver,
            "gap": report.solve.gap,
            "kept": report.masks.counts(),
            "each": [
                {
                    "macs": r.used["macs"],
                    "limit": r.limits["macs"],
                    "gap": r.gap,
                    "accuracy": asdict(r.accuracy),
                }
                for r in report.rounds
            ],
            "seconds": round(time.perf_counter() - started, 1),
        }

    def _checkpoint(self) -> Path:
        CACHE.mkdir(parents=True, exist_ok=True)
        # Of one commit, for what another one began would be recorded as this one's.
        return CACHE / "-".join(str(value).rstrip("%") for value in (library_commit(), *self.key.values()))


if __name__ == "__main__":
    main()
