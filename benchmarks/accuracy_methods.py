"""What ``benchmarks.accuracy`` compares: methods that make a smaller network of a setting and a budget.

A method is called with a setting and a budget, such as ``"50%"`` of the multiply-adds, and returns the smaller network
and what a row is to say of it. None depends on the seed of the finetuning, so each is called once for all seeds.
"""

from __future__ import annotations

import pickle
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from torch import nn

import qcqp_prune as qp
from benchmarks.importances import (
    BY_LOSS,
    CALIBRATED,
    L2,
    MEDIAN,
    OBJECTIVES,
    PAPER,
    TAYLOR,
    Objective,
)
from benchmarks.instances import ROOT
from benchmarks.recording import library_commit
from benchmarks.rival_heuristics import AsSolver, greedy_filled, uniform_filled
from benchmarks.rival_torch_pruning import TorchPruning
from benchmarks.settings import Setting
from qcqp_prune.solve.backend import Backend
from qcqp_prune.storage import read_json, sha256, write_json

SELECTIONS = ROOT / ".cache" / "accuracy"
Method = Callable[[Setting, str], tuple[nn.Module, dict[str, Any]]]
Repair = Callable[[Setting, qp.Masks, nn.Module], None]


@dataclass(frozen=True)
class Solved:
    """Units are chosen by an objective and a solver, and cut by ``shrink``.

    Attributes:
        objective: gives the importance for a setting, which may read its calibration images.
        solver: for ``solve``.
        repair: changes the smaller network in place before it is finetuned, given the masks that it was cut by; it may
            read the calibration images, and counts as part of the method.
        seconds: that the solver has.
        inner: whether what several layers write, such as a residual stream, stays whole, as in the papers of the
            uniform rivals.
        min_keep: the least share of each layer that is kept, as ``trace`` has it, of the whole network; None
            for one unit.
    """

    objective: Objective
    solver: str | Backend
    repair: Repair | None = None
    seconds: float = 30.0
    inner: bool = False
    min_keep: float | None = None

    def __call__(self, setting: Setting, budget: str) -> tuple[nn.Module, dict[str, Any]]:
        """The smaller network, and how it was chosen."""
        masks, about = self.select(setting, budget)
        small = qp.shrink(setting.model, self.graph(setting), masks)
        return small, about if self.repair is None else about | {"masks": masks}

    def graph(self, setting: Setting) -> qp.ChannelGraph:
        """What is selected from."""
        if self.min_keep is not None:
            return floored(setting, self.min_keep)
        return setting.inner_graph if self.inner else setting.graph

    def select(self, setting: Setting, budget: str) -> tuple[qp.Masks, dict[str, Any]]:
        """What is kept, and how it was chosen."""
        form = scores(setting, self.objective, inner=self.inner)
        return self._selected(qp.PruningProblem.build(self.graph(setting), form, {"macs": budget}))

    def _selected(self, problem: qp.PruningProblem) -> tuple[qp.Masks, dict[str, Any]]:
        """What the solver chooses, read from a file where the same commit chose for the same problem before.

        A time limit makes a second answer another one, and seeds that are measured after an interruption should have
        the selection of those before it.
        """
        path = self._place(problem)
        if path is not None and path.is_file():
            data = read_json(path, "a selection")
            return qp.Masks.from_json(data["masks"]), data["about"]
        started = time.perf_counter()
        report = qp.solve(problem, self.solver, time_limit=self.seconds, seed=0)
        about: dict[str, Any] = {"solver": report.solver, "objective": report.objective, "gap": report.gap}
        about["solve_seconds"] = round(time.perf_counter() - started, 1)
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_json(path, {"masks": report.masks.to_json(), "about": about})
        return report.masks, about

    def _place(self, problem: qp.PruningProblem) -> Path | None:
        """Where the selection is kept; nowhere while files of the library differ from their commit."""
        commit = library_commit()
        if not isinstance(self.solver, str) or (commit or "").endswith("+"):
            return None
        # Pickled to be compared only, so that whatever an objective may hold enters.
        graph = problem.graph.fingerprint, problem.graph.groups
        whole = pickle.dumps((problem.objective, problem.limits, graph, self.seconds))
        return SELECTIONS / f"{commit}-{self.solver}-{sha256(whole)[:16]}.json"


@cache
def floored(setting: Setting, min_keep: float) -> qp.ChannelGraph:
    """The graph of a setting with a floor for each layer."""
    return qp.trace(setting.model, setting.example, **{**setting.options, "min_keep": min_keep})


@cache
def scores(setting: Setting, objective: Objective, *, inner: bool = False) -> qp.PairwiseForm:
    """The objective of a setting, the same for all budgets and solvers."""
    return objective(setting)(setting.model, setting.inner_graph if inner else setting.graph)


def reconstructed(setting: Setting, masks: qp.Masks, small: nn.Module) -> None:
    qp.reconstruct(small, setting.model, setting.graph, masks, setting.calibration())


UNIFORM = AsSolver("uniform", uniform_filled)

OURS: dict[str, Solved] = {
    "default": Solved(CALIBRATED, "auto", reconstructed),
    "default, without repair": Solved(CALIBRATED, "auto"),
    "Taylor, with repair": Solved(TAYLOR, "auto", reconstructed),
    "uniform l1, with repair": Solved(PAPER, UNIFORM, reconstructed),
    "default, block_coordinate": Solved(CALIBRATED, "block_coordinate", reconstructed),
    "paper, floors 30 %": Solved(PAPER, "auto", min_keep=0.3),
    **{
        f"{name}, {solver}": Solved(objective, solver)
        for name, objective in (("paper", PAPER), ("l2", L2), ("Taylor", TAYLOR))
        for solver in ("auto", "block_coordinate", "scip", "highs", "decomposition")
    },
    **{
        f"{name}, {solver}": Solved(objective, solver)
        for name, objective in OBJECTIVES.items()
        if objective not in (PAPER, L2, TAYLOR, CALIBRATED) and name != BY_LOSS
        for solver in ("auto", "block_coordinate")
    },
}
RIVALS: dict[str, Method] = {
    "uniform l1": Solved(PAPER, UNIFORM),
    "global l1": Solved(PAPER, AsSolver("global", greedy_filled)),
    "FPGM": Solved(MEDIAN, UNIFORM),
    "uniform l1, inner": Solved(PAPER, UNIFORM, inner=True),
    "FPGM, inner": Solved(MEDIAN, UNIFORM, inner=True),
    "TP magnitude": TorchPruning("MagnitudeImportance", {"p": 1}),
    "TP Taylor": TorchPruning("GroupTaylorImportance", gradients=True),
    "TP group norm": TorchPruning("GroupMagnitudeImportance", {"p": 2}, pruner="GroupNormPruner"),
    "TP isomorphic": TorchPruning("GroupTaylorImportance", gradients=True, options={"isomorphic": True}),
}
METHODS: dict[str, Method] = {**OURS, **RIVALS}
