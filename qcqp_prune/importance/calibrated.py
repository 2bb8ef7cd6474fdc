"""What a network suffers when units go, measured on data group by group: an objective that predicts it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from scipy.optimize import isotonic_regression
from torch import nn

from qcqp_prune.errors import InvalidOptionError, InvalidScoreError, require_kind
from qcqp_prune.graph.channels import ChannelGraph
from qcqp_prune.graph.observe import Observed
from qcqp_prune.importance.cuts import Cut
from qcqp_prune.importance.gradients import device_of
from qcqp_prune.importance.layerwise import weight_tensors
from qcqp_prune.importance.losses import Loss
from qcqp_prune.importance.moments import require_ridge
from qcqp_prune.importance.output_error import output_error
from qcqp_prune.importance.readers import Key, Reader, curvatures, readers
from qcqp_prune.importance.samples import first, samples_of
from qcqp_prune.importance.trials import Trials, added_loss
from qcqp_prune.program.coefficients import FloatArray
from qcqp_prune.program.forms import PairwiseForm

_WORK, _FEWEST, _MOST = 1.5e12, 64, 1_000
"""Multiply-adds of all trials together, and limits of the samples that they are made on."""

_LEAST = 1e-6
"""A share of the largest worth that every unit has at least: what costs nothing measurable stays where it may. By so
much more, at most, is worth what goes later, so that units of equal worth go in their order."""


@dataclass(frozen=True, eq=False)
class Calibrated:
    """How much a selection is predicted to harm, after the layers that read it were refitted. The default with data.

    For each group of units:

    1. They are ordered by elimination: each time the unit goes whose removal costs the least when the weights that read
       the group are refitted by least squares (``eliminate``).
    2. At a few counts the harm is measured with only this group cut so far and its readers refitted: the squared
       change of the network's outputs, as a share of their variance.
    3. Between these counts the harm follows the costs of elimination, and the curve is made convex: what the r-th unit
       to go adds to it is its worth.

    The objective is linear in the units, and because the worths rise along the order its best selection keeps the
    last ones: so it is the exact sum of the groups' curves, a concave utility of how much each group keeps, which
    every solver takes. ``form.unary.sum() - form.evaluate(mask)`` is the predicted harm.

    Changes of outputs add up over cuts, and need no labels. A loss may be measured instead; but where a network knows
    its training images by heart, the loss hardly moves while one group is cut, whatever that does once all are.

    Where no weight reads units one by one (kernel columns, writers of freely shared sums, recurrent layers) they are
    ordered by what they put out, or by their size, and measured without a refit. A branch that can be removed as a
    whole is measured as a whole.

    Attributes:
        batches: pairs of (inputs, targets), the targets only for a loss; iterated once, as far as ``samples`` goes.
        loss: ``loss(model(inputs), targets)``, a mean over samples, where what is added to it is to be the harm; the
            change of all floating outputs when None.
        samples: how many the second moments are taken over.
        trials: on how many of them harm is measured; None for as many as 1.5e12 multiply-adds take in all trials
            together (about a minute of one core, more where masks are needed), but 64 at least and 1,000 at most.
        ratios: shares of each group that are removed in turn, ascending.
        ridge: of the least squares, as a share of the mean second moment.
        seed: of what is drawn.

    References:
        He, Zhang, Sun: "Channel pruning for accelerating very deep neural networks" (ICCV 2017), for the refit.
        Luo, Wu, Lin: "ThiNet" (ICCV 2017), for greedy elimination by the readers' error.
    """

    batches: Iterable[Any] = field(repr=False)
    loss: Loss | None = None
    samples: int = field(default=2_500, repr=False)
    trials: int | None = field(default=None, repr=False)
    ratios: tuple[float, ...] = (0.25, 0.5, 0.75, 0.9)
    ridge: float = field(default=1e-2, repr=False)
    seed: int = field(default=0, repr=False)

    def __post_init__(self) -> None:
        require_kind("ratios", self.ratios, Sequence, "shares between 0 and 1, ascending")
        if (
            not self.ratios
            or not all(0 < r < 1 for r in self.ratios)
            or list(self.ratios) != sorted(self.ratios)
        ):
            raise InvalidOptionError(f"ratios is {self.ratios}: give shares between 0 and 1, ascending")
        if self.samples < 1 or (self.trials is not None and self.trials < 1):
            raise InvalidOptionError(
                f"samples is {self.samples} and trials {self.trials}: give positive numbers"
            )
        require_ridge(self.ridge)

    def __call__(self, model: nn.Module, graph: ChannelGraph) -> PairwiseForm:
        """The objective over the graph's units, in units of the loss or a share of the outputs' variance.

        Raises:
            InvalidOptionError: there is no batch, or one is no pair of inputs and targets; the loss does not take what
                the network returns, or gives no single number; without one, no output is a tensor of floating numbers.
            InvalidScoreError: what a layer reads, an output or the harm is NaN or infinite.
        """
        weight_tensors(model, graph)
        device = device_of(model)
        inputs, targets = samples_of(
            self.batches, graph, self.samples, device, seed=self.seed, who="Calibrated"
        )
        observed = Observed(model, graph)
        if self.loss is not None:  # one that cannot be computed is said before anything else is
            with torch.no_grad():
                added_loss(self.loss, targets[:1], observed.steps(inputs[:1]).results())
        found = readers(observed, inputs, seed=self.seed)
        _require_finite(graph, found)
        curvatures(observed, inputs, found, seed=self.seed, relative=True)
        cuts = list(self._cuts(graph, observed, found))
        del found
        inputs, targets = first(inputs, targets, self.trials or _affordable(graph, cuts))
        judge = output_error if self.loss is None else partial(added_loss, self.loss, targets)
        worth = _worths(graph, cuts, Trials(observed, inputs, judge).run(cuts))
        return PairwiseForm(worth, unit="output error" if self.loss is None else "loss")

    def _cuts(self, graph: ChannelGraph, observed: Observed, found: Mapping[Key, Reader]) -> Iterator[Cut]:
        """What is tried: groups that keep equally many together, then branches."""
        tied: dict[str, list[int]] = defaultdict(list)
        for g, group in enumerate(graph.groups):
            if not group.stays and graph.units(g).start not in {b.unit for b in graph.blocks}:
                tied[group.tie or f"group {g}"].append(g)
        for groups in tied.values():
            width = graph.groups[groups[0]].width
            most = width - max(1, min(n for n in graph.groups[groups[0]].counts() if n > 0))
            counts = sorted({min(max(1, round(r * width)), most) for r in self.ratios} - {0})
            yield Cut.of(graph, observed, found, tuple(groups), tuple(counts), self.ridge)
        for b in range(len(graph.blocks)):
            yield Cut.of_block(graph, b)


def _require_finite(graph: ChannelGraph, found: Mapping[Key, Reader]) -> None:
    for reader in found.values():
        if not bool(reader.second.isfinite().all()):
            raise InvalidScoreError(
                f"what {graph.layers[reader.layer].name} reads on the calibration data is not finite: check the data "
                "and the weights"
            )


def _affordable(graph: ChannelGraph, cuts: Sequence[Cut]) -> int:
    """Samples for all trials; a trial takes half a forward pass on average, as it branches off on the way."""
    axes = graph.axes
    macs = sum(
        x.macs_per_pair * len(axes[x.made_axis]) * len(axes[x.in_axis]) // x.segments for x in graph.layers
    )
    passes = 1 + sum(len(cut.counts) for cut in cuts) / 2
    return min(max(int(_WORK / (passes * max(macs, 1))), _FEWEST), _MOST)


def _worths(graph: ChannelGraph, cuts: Sequence[Cut], harms: Sequence[Mapping[int, float]]) -> FloatArray:
    worth = np.zeros(graph.unit_count)
    for cut, harm in zip(cuts, harms, strict=True):
        if cut.block is None:
            for g, elimination in zip(cut.groups, cut.eliminations, strict=True):
                share = {count: value / len(cut.groups) for count, value in harm.items()}
                worth[graph.units(g)][elimination.order] = increments(elimination.costs, share)
    floor = _LEAST * float(worth.max(initial=0.0))
    for cut in cuts:
        for g, elimination in zip(cut.groups, cut.eliminations, strict=False):
            mine, order = worth[graph.units(g)], elimination.order
            mine[order] = np.maximum(mine[order], floor) * np.linspace(1, 1 + _LEAST, len(order))
    for cut, harm in zip(cuts, harms, strict=True):
        if cut.block is not None and harm:
            inside = sum(float(worth[graph.units(g)].sum()) for g in cut.groups[1:])
            worth[graph.blocks[cut.block].unit] = harm[1] - inside
    return worth


def increments(costs: FloatArray, measured: Mapping[int, float]) -> FloatArray:
    """What each removal adds to the harm, never less than the one before it.

    Args:
        costs: ``(units,)`` of elimination, first to go first; they say how the harm runs between what was measured.
        measured: for some numbers of removed units the harm, not falling.

    Returns:
        ``(units,)``, not falling, with the least squared distance to the curve through what was measured.
    """
    out = np.zeros(len(costs))
    done, total, scale = 0, 0.0, 0.0
    for count in sorted(measured):
        part = costs[done:count]
        weights = part / part.sum() if part.sum() > 0 else np.full(len(part), 1 / len(part))
        out[done:count] = (measured[count] - total) * weights
        scale = (measured[count] - total) / float(part.sum()) if part.sum() > 0 else scale
        done, total = count, measured[count]
    # Nothing was measured there; no less than just before, or pooling would lower what was.
    out[done:] = np.maximum(costs[done:] * scale, out[done - 1] if done else 0.0)
    return np.asarray(isotonic_regression(out).x, np.float64)
