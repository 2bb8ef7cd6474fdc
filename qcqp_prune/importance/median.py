"""Distance to the other filters of a layer: what can be replaced by them may go."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from qcqp_prune.graph.channels import ChannelGraph
from qcqp_prune.importance.layerwise import (
    Layerwise,
    ScoreOf,
    UnitScores,
    filters_of,
    of_units,
    weight_tensors,
)


@dataclass(frozen=True)
class GeometricMedian(Layerwise):
    """``S[o] = sum over the layer's filters j of ||W_o - W_j||_2``, for the unit that output o belongs to.

    A filter is all that one output is made with, without its bias. Filters of a grouped convolution are compared within
    their group, as those of another one read other channels; so a depthwise filter, alone in its group, scores zero,
    and its unit has what other layers give it. A layer's scores grow with the number of its filters and with the
    size of its weights, as printed: across layers use ``Normalised``.

    Raises:
        InvalidOptionError: kernel columns are units, of which this says nothing.

    References:
        He et al., "Filter pruning via geometric median" (CVPR 2019), the sum of distances to all
        other filters that stands for the distance to the median.
    """

    def scores(self, model: nn.Module, graph: ChannelGraph) -> ScoreOf:
        """Of units."""
        weights = weight_tensors(model, graph)
        found = {}
        for layer in graph.layers:
            if layer.weight:
                filters = filters_of(layer, weights[layer.weight].double())
                distances = torch.cdist(filters, filters, compute_mode="use_mm_for_euclid_dist")
                distances.diagonal(dim1=1, dim2=2).zero_()  # products leave rounding there
                total = distances.sum(-1).flatten().cpu().numpy()
                found[layer.name] = UnitScores(graph.axes[layer.out_axis], total)
        return of_units(graph, found, "GeometricMedian")
