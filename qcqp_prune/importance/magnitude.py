"""Importances that are read off the weights alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import nn

from qcqp_prune.errors import InvalidOptionError, InvalidScoreError
from qcqp_prune.graph.channels import ChannelGraph, Layer
from qcqp_prune.importance.layerwise import (
    Layerwise,
    ScoreOf,
    add_units,
    columns_of,
    own_rows,
    pair_scores,
    weight_tensors,
)
from qcqp_prune.program.coefficients import FloatArray
from qcqp_prune.program.forms import PairTerm, PairwiseForm

Variant = Literal["paper", "authors", "l2"]


@dataclass(frozen=True)
class Magnitude(Layerwise):
    """Size of the weights between two units, each layer scaled by its norm.

    With ``S[o, i]`` the score of the kernel from input i to output o of a layer:

    * ``paper``: ``S = sum_k |W[o, i, k]| / ||W||_2``;
    * ``authors``: ``S = K / ||K||_2`` with ``K[o, i] = sum_k |W[o, i, k]|``, as their published code does;
    * ``l2``: ``S = N / ||N||_2`` with ``N[o, i] = sqrt(sum_k W[o, i, k]^2)``, so ``||N||_2 = ||W||_2``.

    Where kernel columns are units, S has an entry for each input i and column (o, a, b), summed over the kernel
    positions of that column only (usually one) and scaled by the same norm. A filter with all of its columns is then
    worth what it is without them, but for ``l2``: roots of squares do not add up.

    A layer whose weight is wholly zero scores zero.

    References:
        Jeong et al., "Optimal channel selection with discrete QCQP" (AISTATS 2022), section 3.1.
    """

    variant: Variant = "paper"

    def __post_init__(self) -> None:
        if self.variant not in ("paper", "authors", "l2"):
            raise InvalidOptionError(f"variant={self.variant!r}: choose paper, authors or l2")

    def scores(self, model: nn.Module, graph: ChannelGraph) -> ScoreOf:
        """Of pairs."""
        weights = weight_tensors(model, graph)

        def score_of(layer: Layer) -> FloatArray | None:
            if not layer.weight:
                return None
            weight = weights[layer.weight].double()
            columns = columns_of(graph, layer)
            if self.variant == "l2":
                score = np.sqrt(pair_scores(layer, weight.square(), columns))
            else:
                score = pair_scores(layer, weight.abs(), columns)
            norm = (
                float(np.linalg.norm(pair_scores(layer, weight.abs())))
                if self.variant == "authors"
                else float(torch.linalg.vector_norm(own_rows(layer, weight)))
            )
            return score / norm if norm > 0 else score

        return score_of


@dataclass(frozen=True)
class BatchNormScale:
    """``|gamma|`` of the batch norms on a unit: linear, no coupling.

    References:
        Liu et al., "Learning efficient convolutional networks through network slimming" (ICCV 2017).
    """

    def __call__(self, model: nn.Module, graph: ChannelGraph) -> PairwiseForm:
        """The objective over the graph's units.

        Raises:
            MaskMismatchError: the model is not the one that was traced.
            InvalidScoreError: the model has no batch norm with a scale, or a parameter is NaN or infinite.
        """
        weight_tensors(model, graph)
        axis_of = {spec.name: spec.axes for spec in graph.tensors}
        unary = np.zeros(graph.unit_count)
        terms: list[PairTerm] = []
        found = False
        for path, module in model.named_modules():
            name = f"{path}.weight" if path else "weight"
            if not isinstance(module, nn.modules.batchnorm._BatchNorm) or module.weight is None:
                continue
            axes = axis_of.get(name, (None,))
            if axes[0] is not None:
                found = True
                scale = module.weight.detach().abs().double().cpu().numpy()
                terms += add_units(unary, graph, graph.block_of_tensor.get(name), graph.axes[axes[0]], scale)
        if not found:
            raise InvalidScoreError(
                "the model has no batch norm with a scale on a prunable axis: use Magnitude or Taylor"
            )
        return PairwiseForm(unary=unary, pairs=tuple(terms))
