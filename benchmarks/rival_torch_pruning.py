"""Torch-Pruning brought to the same budget: its pruning ratio is searched until our independent counter says so.

Options are those of its documentation and its scripts: the classifier is ignored, rankings are global, one step.
What it cannot prune is tried first: where a smaller network does not run, which zero-padded shortcuts cause, it gets
the layers only whose outputs no other layer's are added to, and the row says so. Its group norm is what
``GroupNormPruner`` removes in one step, without the sparse training that it offers beside.

References:
    Fang et al., "DepGraph: towards any structural pruning" (CVPR 2023); https://github.com/VainF/Torch-Pruning,
    README and reproduce/main.py; Fang et al., "Isomorphic pruning for vision models" (ECCV 2024), its prune.py for
    the importance (Taylor) that isomorphic groups are ranked by.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

import qcqp_prune as qp
from benchmarks.settings import Setting, shared, written

GRID, STEPS = 40, 14


class DoesNotRun(RuntimeError):
    """A network that was pruned cannot be run, or could not be pruned; the message says at which ratio."""


@dataclass(frozen=True)
class TorchPruning:
    """One of its methods, as ``benchmarks.accuracy_methods`` wants them.

    Attributes:
        importance: class in its module ``importance``.
        arguments: of that class.
        pruner: class in its module ``pruner``.
        gradients: whether the importance reads gradients; they are of the calibration images.
        options: of the pruner.
    """

    importance: str
    arguments: Mapping[str, Any] = field(default_factory=dict)
    pruner: str = "BasePruner"
    gradients: bool = False
    options: Mapping[str, Any] = field(default_factory=dict)

    def __call__(self, setting: Setting, budget: str) -> tuple[nn.Module, dict[str, Any]]:
        """The smaller network with the most multiply-adds that the budget holds, and what is to be said of it."""
        dense = copy.deepcopy(setting.model).eval()
        if self.gradients:
            _add_gradients(dense, setting)
        heads = _outputs(setting.graph)
        try:
            model, ratio = self._nearest(dense, setting, budget, heads)
            return model, {"ratio": ratio}
        except DoesNotRun as error:
            model, ratio = self._nearest(dense, setting, budget, heads | shared(setting.graph))
            note = f"inner layers only, for with all of them the smaller network does not run ({error})"
            return model, {"ratio": ratio, "note": note}

    def _nearest(
        self, dense: nn.Module, setting: Setting, budget: str, ignored: set[str]
    ) -> tuple[nn.Module, float]:
        def at(ratio: float) -> tuple[nn.Module, int]:
            try:
                small = self._pruned(dense, setting, ignored, ratio)
                return small, qp.Macs().measure(small, setting.example)
            except (RuntimeError, IndexError, ValueError) as error:
                raise DoesNotRun(f"ratio {ratio:.3f}: {type(error).__name__}: {error}") from error

        return nearest(at, setting.limit(budget))

    def _pruned(self, dense: nn.Module, setting: Setting, ignored: set[str], ratio: float) -> nn.Module:
        import torch_pruning as tp

        model = copy.deepcopy(dense)
        for new, old in zip(model.parameters(), dense.parameters(), strict=True):
            new.grad = None if old.grad is None else old.grad.clone()
        pruner = getattr(tp.pruner, self.pruner)(
            model,
            setting.example,
            importance=getattr(tp.importance, self.importance)(**self.arguments),
            global_pruning=True,
            pruning_ratio=ratio,
            ignored_layers=[m for name, m in model.named_modules() if name in ignored],
            **self.options,
        )
        pruner.step()
        model.zero_grad(set_to_none=True)
        return model


def nearest(at: Callable[[float], tuple[nn.Module, int]], limit: int) -> tuple[nn.Module, float]:
    """The largest network within a limit near the smallest ratio that meets it.

    The use does not always fall with the ratio: a layer of which all would go is left whole. So a grid is walked up to
    the first ratio that meets the limit, and the step before it is bisected.

    Args:
        at: gives for a ratio between 0 and 1 the network and its use.
        limit: of the use.
    """
    low, best = 0.0, None
    for k in range(1, GRID):
        model, used = at(k / GRID)
        if used <= limit:
            best, high = (model, used, k / GRID), k / GRID
            break
        low = k / GRID
    if best is None:
        raise RuntimeError(f"no ratio below 1 leaves at most {limit:,} MACs")
    for _ in range(STEPS):
        middle = (low + high) / 2
        model, used = at(middle)
        low, high = (low, middle) if used <= limit else (middle, high)
        if best[1] < used <= limit:
            best = (model, used, middle)
    return best[0], best[2]


def _add_gradients(model: nn.Module, setting: Setting) -> None:
    """Gradients of the loss, summed over the batches of the calibration, as its scripts do."""
    with torch.enable_grad():
        for inputs, targets in setting.calibration():
            torch.autograd.backward(nn.functional.cross_entropy(model(inputs), targets))


def _outputs(graph: qp.ChannelGraph) -> set[str]:
    """Layers whose outputs all stay."""
    frozen = [g.frozen_reason is not None for g in graph.groups]
    return {x.name for x in graph.layers if all(frozen[g] for g in written(graph, x))}
