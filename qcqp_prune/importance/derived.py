"""Importances made from others: layers or groups brought to one scale, and gains that fall the more is kept."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from numbers import Real
from typing import Literal, get_args

import numpy as np
from torch import nn

from qcqp_prune.errors import InvalidOptionError, InvalidScoreError, require_kind
from qcqp_prune.graph.channels import ChannelGraph, Layer
from qcqp_prune.importance.layerwise import (
    Importance,
    Layerwise,
    ScoreOf,
    UnitScores,
    columns_of,
    own_rows,
    pair_scores,
    pairwise_form,
    require_importance,
    weight_tensors,
)
from qcqp_prune.program.coefficients import FloatArray
from qcqp_prune.program.forms import PairwiseForm
from qcqp_prune.program.ranks import by_ranks, worth_alone

Scale = Literal["layer", "group", "macs"]


@dataclass(frozen=True, eq=False)
class Normalised:
    """Another importance with every layer, or every group, on one scale.

    * ``layer``: the scores of each layer are divided by the sum of their sizes.
    * ``macs``: the same, times the layer's share of the dense network's multiply-adds, so that a multiply-add is worth
      the same in every layer, and what decides is which weights it is spent on.
    * ``group``: first each unit gets what it is worth with all others kept (``worth_alone``), so that pairs become
      sums; then the units of each group are divided by the sum of their sizes. For any importance.

    What is all zero stays so. The first two keep pairs, and so does the program.

    Attributes:
        importance: for ``layer`` and ``macs`` one that scores layer by layer: of this package all but
            ``BatchNormScale``, ``Lamp``, ``Random``, ``Concave`` and this one.
        by: what is brought to one scale.

    Raises:
        InvalidOptionError: ``by`` is none of these, or the importance does not score layer by layer.
    """

    importance: Importance
    by: Scale = "layer"

    def __post_init__(self) -> None:
        require_importance(self.importance)
        if self.by not in get_args(Scale):
            raise InvalidOptionError(f"by={self.by!r}: choose from {', '.join(get_args(Scale))}")
        if self.by != "group" and not isinstance(self.importance, Layerwise):
            raise InvalidOptionError(
                f"{type(self.importance).__name__} does not score layer by layer: choose by='group'"
            )

    def __call__(self, model: nn.Module, graph: ChannelGraph) -> PairwiseForm:
        """The objective over the graph's units, dimensionless; raises what the importance does."""
        if isinstance(self.importance, Layerwise) and self.by != "group":
            return pairwise_form(graph, self._of_layers(graph, self.importance.scores(model, graph)))
        worth = worth_alone(self.importance(model, graph))
        sums = np.bincount(graph.group_of_unit, weights=np.abs(worth), minlength=len(graph.groups))
        return PairwiseForm(worth / np.where(sums > 0, sums, 1.0)[graph.group_of_unit])

    def _of_layers(self, graph: ChannelGraph, score_of: ScoreOf) -> ScoreOf:
        total = sum(_macs(graph, layer) for layer in graph.layers if layer.weight)

        def scaled(layer: Layer) -> FloatArray | UnitScores | None:
            score = score_of(layer)
            if score is None:
                return None
            values = score.values if isinstance(score, UnitScores) else score
            size = float(np.abs(values).sum())
            share = _macs(graph, layer) / total if self.by == "macs" else 1.0
            values = values * (share / size) if size > 0 else values
            return replace(score, values=values) if isinstance(score, UnitScores) else values

        return scaled


@dataclass(frozen=True, eq=False)
class Concave:
    """Another importance with gains that fall the more of a group is kept.

    Each unit gets what it is worth with all others kept (``worth_alone``; of a pair both units have it). With ``Y`` the
    sum of that over a group and ``y`` over what is kept of it, the group is worth ``Y f(y / Y)``, where ``f(s) =
    s^p / p`` for a power ``0 < p <= 1`` and ``f(s) = log s`` for ``p = 0``. The slope of f is 1 where all is kept: the
    first unit to go costs what the importance says, the later ones more. With ``p = 1`` it is the sum over units.

    That is no approximation: units of a group cost the same, so those of the largest worth stay, and a concave
    function of their sum is linear in which of them do (``by_ranks``). The logarithm of nothing is bounded: the first
    unit of a group is worth as much as if it doubled what there was.

    Attributes:
        importance: any, without negative worth.
        power: p, in [0, 1].

    Raises:
        InvalidOptionError: the power is outside [0, 1].
        InvalidScoreError: a unit that may go is worth less than nothing.
    """

    importance: Importance
    power: float = 0.5

    def __post_init__(self) -> None:
        require_importance(self.importance)
        require_kind("power", self.power, Real, "a number from 0 to 1")
        if not 0 <= self.power <= 1:
            raise InvalidOptionError(f"power={self.power!r}: give a number from 0 (logarithm) to 1 (a sum)")

    def __call__(self, model: nn.Module, graph: ChannelGraph) -> PairwiseForm:
        """The objective over the graph's units, in the units of the importance; raises what that does."""
        form = self.importance(model, graph)
        worth = np.where(graph.stays, 0.0, worth_alone(form))
        if (worth < 0).any():
            g = int(graph.group_of_unit[np.argmin(worth)])
            raise InvalidScoreError(
                f"a unit of {graph.groups[g].id} is worth {worth.min():.3g} with all others kept, and a concave "
                "function needs worth of at least 0: choose an importance without negative scores"
            )
        return PairwiseForm(by_ranks(graph, worth, self._gains), unit=form.unit)

    def _gains(self, group: int, sums: FloatArray) -> FloatArray:
        total = float(sums[-1])
        if total <= 0:
            return np.zeros(len(sums))
        shares = sums / total
        if self.power == 0:
            return np.asarray(total * np.diff(np.log(shares), prepend=math.log(shares[0] / 2)))
        return np.asarray(total / self.power * np.diff(shares**self.power, prepend=0.0))


@dataclass(frozen=True)
class Lamp:
    """``S[u] = e_u / (sum of e_v over the units v of u's group with e_v >= e_u)``: layer-adaptive magnitude.

    The published score is of single weights, ``w_u^2`` beside the weights of its layer that are no smaller. Here
    units stand for weights and groups for layers: ``e_u`` is the sum over layers of ``||W_u||^2 / ||W||^2``, the share
    of a layer's squared weights that goes with unit u, whether it makes u or reads it. The largest unit of each
    group scores 1; of equal ones the first counts as the larger.

    References:
        Lee et al., "Layer-adaptive sparsity for the magnitude-based pruning" (ICLR 2021), the LAMP
        score.
    """

    def __call__(self, model: nn.Module, graph: ChannelGraph) -> PairwiseForm:
        """The objective over the graph's units, dimensionless.

        Raises:
            MaskMismatchError: the model is not the one that was traced.
            InvalidScoreError: a weight holds NaN or infinity.
        """
        weights = weight_tensors(model, graph)

        def score_of(layer: Layer) -> FloatArray | None:
            if not layer.weight:
                return None
            squares = weights[layer.weight].double().square()
            total = float(own_rows(layer, squares).sum())
            return pair_scores(layer, squares, columns_of(graph, layer)) / (total if total > 0 else 1.0)

        energy = worth_alone(pairwise_form(graph, score_of))

        def gains(group: int, sums: FloatArray) -> FloatArray:
            return np.asarray(np.diff(sums, prepend=0.0) / np.where(sums > 0, sums, 1.0))

        return PairwiseForm(by_ranks(graph, energy, gains))


def _macs(graph: ChannelGraph, layer: Layer) -> int:
    """Multiply-adds of one sample in the dense layer."""
    pairs = len(graph.axes[layer.in_axis]) * len(graph.axes[layer.made_axis]) // layer.segments
    return layer.macs_per_pair * pairs
