"""From scores of each layer, of its (output, input) pairs or of its units, to an objective over units."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import nn

from qcqp_prune.errors import InvalidOptionError, InvalidScoreError, MaskMismatchError
from qcqp_prune.graph.channels import ChannelGraph, IntArray, Layer
from qcqp_prune.graph.idle import idle
from qcqp_prune.program.coefficients import FloatArray
from qcqp_prune.program.forms import PairTerm, PairwiseForm

Importance = Callable[[nn.Module, ChannelGraph], PairwiseForm]
"""What units are worth: anything that makes an objective of a model and its graph."""


@dataclass(frozen=True, eq=False)
class UnitScores:
    """Scores that a layer gives to units, not to pairs.

    Attributes:
        units: ``(n,)`` flat unit indices; a unit may occur more than once, and its scores add up.
        values: ``(n,) float64``.
    """

    units: IntArray
    values: FloatArray


ScoreOf = Callable[[Layer], FloatArray | UnitScores | None]
"""Gives of a layer ``(segments, outputs, inputs)`` as from ``pair_scores``, scores of units, or None: left out."""


def require_importance(importance: object) -> None:
    """Refuse what cannot score: a name, or a class where an object is meant.

    Raises:
        InvalidOptionError: it is no such thing.
    """
    if not callable(importance) or isinstance(importance, type):
        raise InvalidOptionError(
            f"importance is {importance!r}: give an object such as Magnitude(), or a function of model and graph"
        )


class Layerwise(ABC):
    """An importance that is a sum over layers, each of which can be scaled by itself."""

    unit: ClassVar[str] = "dimensionless"

    @abstractmethod
    def scores(self, model: nn.Module, graph: ChannelGraph) -> ScoreOf:
        """What gives the scores of a layer; called once for each.

        Raises:
            MaskMismatchError: the model is not the one that was traced.
            InvalidScoreError: a parameter, or what follows from it, is NaN or infinite.
            InvalidOptionError: calibration data are missing or of the wrong kind, or a unit would have no score.
        """

    def __call__(self, model: nn.Module, graph: ChannelGraph) -> PairwiseForm:
        """The objective over the graph's units; raises what ``scores`` does."""
        return pairwise_form(graph, self.scores(model, graph), self.unit)


def of_units(graph: ChannelGraph, found: Mapping[str, UnitScores], who: str) -> ScoreOf:
    """Scores of units by the names of layers.

    Raises:
        InvalidScoreError: a score is NaN or infinite.
        InvalidOptionError: a unit that may go has no score, and would go for nothing.
    """
    broken = [name for name, scores in found.items() if not np.isfinite(scores.values).all()]
    if broken:
        raise InvalidScoreError(
            f"{who} of {broken[0]} is NaN or infinite: check the weights, the loss and the data"
        )
    require_scored(
        graph, np.concatenate([np.zeros(0, np.int64), *(scores.units for scores in found.values())]), who
    )
    return lambda layer: found.get(layer.name)


def require_scored(graph: ChannelGraph, scored: IntArray, who: str) -> None:
    """Refuse to let units go for nothing.

    Args:
        graph: the channel graph.
        scored: flat indices of the units that have a score.
        who: scores, for errors.

    Raises:
        InvalidOptionError: a unit that may go has no score.
    """
    if (left := idle(graph, scored)).any():
        groups = [graph.groups[g].id for g in np.unique(graph.group_of_unit[left])]
        more = f" and {len(groups) - 1} more groups" if len(groups) > 1 else ""
        raise InvalidOptionError(
            f"{who} says nothing of {groups[0]}{more} that may go: keep what it says nothing of by "
            "ignored_layers (kernel columns by columns=False), or choose Magnitude or Taylor"
        )


def by_unit(units: IntArray, values: FloatArray) -> UnitScores:
    """The sum over all positions of each unit.

    Args:
        units: ``(positions,)`` the unit that owns each.
        values: ``(positions,)``.

    Raises:
        MaskMismatchError: there is another number of values than of positions.
    """
    _require_as_many(units, values)
    own, place = np.unique(units, return_inverse=True)
    summed = np.bincount(place.ravel(), weights=values, minlength=len(own)).astype(np.float64)
    return UnitScores(own, summed)


def weight_tensors(model: nn.Module, graph: ChannelGraph) -> dict[str, torch.Tensor]:
    """The weight of each layer by name, detached.

    Raises:
        MaskMismatchError: the model is not the one that was traced.
        InvalidScoreError: a parameter or a running statistic holds NaN or infinity.
    """
    tensors = dict(model.named_parameters(remove_duplicate=False)) | dict(
        model.named_buffers(remove_duplicate=False)
    )
    for spec in graph.tensors:
        tensor = tensors.get(spec.name)
        if tensor is None or tuple(tensor.shape) != spec.shape:
            found = "is missing" if tensor is None else f"has shape {tuple(tensor.shape)}, not {spec.shape}"
            raise MaskMismatchError(f"{spec.name} {found}: trace this model, then compute its importance")
        # Other buffers may hold infinity with good reason: an attention mask does.
        learned = spec.kind == "parameter" or spec.name.rpartition(".")[2].startswith("running_")
        if learned and not torch.isfinite(tensor).all():
            raise InvalidScoreError(
                f"{spec.name} holds NaN or infinity: repair or retrain the model before pruning it"
            )
    return {layer.weight: tensors[layer.weight].detach() for layer in graph.layers if layer.weight}


def columns_of(graph: ChannelGraph, layer: Layer) -> int:
    """How many columns a filter of the layer has; 1 where it has none of its own."""
    return len(graph.axes[layer.made_axis]) // len(graph.axes[layer.out_axis])


def pair_scores(layer: Layer, entries: torch.Tensor, columns: int = 1) -> FloatArray:
    """Scores of kernel entries summed over the kernel, or over the part of it that each column has.

    Args:
        layer: the layer whose weight the entries belong to.
        entries: in the shape of the whole weight, of which only the layer's own rows count, or summed over parts of the
            kernel already.
        columns: of each filter, from ``columns_of``.

    Returns:
        ``(segments, outputs of a segment, inputs of a segment) float64``; for a layer with columns these are its
        outputs, filter after filter.
    """
    entries = own_rows(layer, entries)
    if columns > 1:
        parts = entries.double().reshape(*entries.shape[:2], columns, -1).sum(-1)
        by_column = parts.transpose(1, 2).reshape(1, -1, entries.shape[1])
        return np.ascontiguousarray(by_column.cpu().numpy())
    matrix = entries.double().reshape(entries.shape[0], entries.shape[1], -1).sum(-1)
    if "transpose" in layer.op:
        rows = matrix.reshape(layer.segments, -1, matrix.shape[1]).transpose(1, 2)
    else:
        rows = matrix.reshape(layer.segments, -1, matrix.shape[1])
    return np.ascontiguousarray(rows.cpu().numpy())


def filters_of(layer: Layer, weight: torch.Tensor) -> torch.Tensor:
    """A weight with all that one output is made with in a row: ``(segments, outputs of a segment, entries)``."""
    weight = own_rows(layer, weight)
    if "transpose" in layer.op:
        return weight.reshape(layer.segments, -1, *weight.shape[1:]).transpose(1, 2).flatten(2)
    return weight.reshape(layer.segments, -1, weight[0].numel())


def own_rows(layer: Layer, weight: torch.Tensor) -> torch.Tensor:
    """The rows of a weight that a layer uses: all but for packed projections."""
    return weight if layer.rows is None else weight[slice(*layer.rows)]


def pairwise_form(graph: ChannelGraph, score_of: ScoreOf, unit: str = "dimensionless") -> PairwiseForm:
    """The objective ``sum_l <I_l, A_l>`` of per-layer scores.

    A pair of one unit with itself (depthwise) gives a linear term, and so does a pair with a unit that always stays:
    of a large network's weights only those between two units that may go are held. Where a layer has columns, they
    stand for its outputs: ``A_l = r_{l-1} (x) q_l``. Work on a residual stream inside of a block counts while the block
    is there.

    Args:
        graph: the channel graph.
        score_of: called once for each layer.
        unit: unit of the scores, for reports.

    References:
        Jeong et al., "Optimal channel selection with discrete QCQP" (AISTATS 2022), eq. 2 and 3.
    """
    unary = np.zeros(graph.unit_count)
    terms: list[PairTerm] = []
    for k, layer in enumerate(graph.layers):
        score, block = score_of(layer), graph.block_of_layer.get(k)
        if score is None:
            continue
        if isinstance(score, UnitScores):
            terms += add_units(unary, graph, block, score.units, score.values)
            continue
        outs = graph.axes[layer.made_axis].reshape(layer.segments, -1)
        ins = graph.axes[layer.in_axis].reshape(layer.segments, -1)
        if graph.is_depthwise(layer):
            terms += add_units(unary, graph, block, outs[:, 0], score.sum((1, 2)))
            continue
        for rows, cols, coef in zip(outs, ins, score, strict=True):
            inside = block is None or goes_with(graph, block, rows) or goes_with(graph, block, cols)
            if _stay(graph, cols):
                terms += add_units(unary, graph, block, rows, coef.sum(1))
            elif not inside or _stay(graph, rows):  # one side stays, or the branch would be no block
                terms += add_units(unary, graph, block, cols, coef.sum(0))
            else:
                terms.append(PairTerm(rows, cols, coef))
    return PairwiseForm(unary=unary, pairs=tuple(terms), unit=unit)


def goes_with(graph: ChannelGraph, block: int, units: IntArray) -> bool:
    """Whether all of some units are gone where a block is."""
    return set(np.unique(graph.group_of_unit[units]).tolist()) <= graph.emptied_with(block)


def _stay(graph: ChannelGraph, units: IntArray) -> bool:
    groups = np.unique(graph.group_of_unit[units]).tolist()
    return all(graph.groups[g].frozen_reason is not None for g in groups)


def add_units(
    unary: FloatArray, graph: ChannelGraph, block: int | None, units: IntArray, values: FloatArray
) -> list[PairTerm]:
    """Add one value for each position of an axis to the units that own them, in place.

    Args:
        unary: ``(unit_count,)``, changed.
        graph: the channel graph.
        block: index of the block around what the values are of, or None.
        units: ``(positions,)``.
        values: ``(positions,)``.

    Returns:
        What counts only while the block is there, as pairs with its unit.

    Raises:
        MaskMismatchError: there is another number of values than of positions.
    """
    _require_as_many(units, values)
    if block is None or goes_with(graph, block, units):
        np.add.at(unary, units, values)
        return []
    return [PairTerm(units, np.asarray([graph.blocks[block].unit]), values[:, None])]


def _require_as_many(units: IntArray, values: FloatArray) -> None:
    if values.shape != units.shape:
        raise MaskMismatchError(
            f"a layer has {tuple(values.shape)} values where the graph knows {units.shape}: "
            "trace this model, then compute its importance"
        )
