"""What layers put out without some of the units that they read, to second order: terms between units of one layer."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from qcqp_prune.errors import InvalidOptionError
from qcqp_prune.graph.channels import BoolArray, ChannelGraph, IntArray
from qcqp_prune.graph.observe import Observed
from qcqp_prune.importance.gradients import device_of
from qcqp_prune.importance.layerwise import require_scored, weight_tensors
from qcqp_prune.importance.readers import Reader, curvatures, readers
from qcqp_prune.importance.samples import samples_of
from qcqp_prune.program.forms import PairTerm, PairwiseForm


@dataclass(frozen=True, eq=False)
class OutputChange:
    """``1/2 1^T H 1 - 1/2 (1-s)^T H (1-s)``, with H what units do together to the outputs of the layers that read them.

    With C the second moments of what a layer reads, w_i the columns of its weight that multiply unit i, and f_o the
    curvature of the network in output o of the layer, ``H_ij = sum over layers and outputs of f_o w_oi^T C_ij w_oj``:
    the weights stay as they are, and ``(1-s)^T H (1-s)`` is the mean square of what the removed units R added to each
    output, weighed by f. Two units that say the same cost more together than the sum of both, two that cancel cost
    less. That is a linear term for each unit and a pair term for each two that one layer reads: of one group, and of
    several where a layer reads a concatenation.

    f_o is the mean square of the derivative of all that the network returns by output o, so that the unit is half a
    squared change of the network's output; behind the last layer of all it is exactly that. Layers are looked at one
    by one, each with all of the others whole, and their changes are added up.

    A weight with more than 6,144 columns has no products of two columns, only squares: its units get linear terms. A
    weight that is called several times counts once, over all that it reads. Depthwise convolutions are no readers:
    what they read goes with what they make, and the next layer reads that. A weight that an embedding shares is left
    out.

    Layers put out a mean without some units that can be put back where they have a bias of their own, or a batch norm
    behind them that is recalibrated. With ``centred`` C is the covariance for such layers: what is left then.

    Attributes:
        batches: pairs of (inputs, targets), of which the inputs are used; iterated once, as far as ``samples`` goes.
        samples: how many at most; fewer where more would take too much memory.
        centred: leave out what a shift of the mean repairs.
        seed: of the loader, of the positions that are looked at in large images, and of the random signs that f is
            estimated with.

    References:
        Peng et al., "Collaborative channel pruning for deep networks" (ICML 2019), for pairs of channels of one layer;
        Meng et al., "OSSCAR: one-shot structured pruning in vision and language models with combinatorial
        optimization" (ICML 2024), for the squared change of a layer's output as a quadratic form of what it reads.
    """

    batches: Iterable[Any] = field(repr=False)
    samples: int = 2_500
    centred: bool = False
    seed: int = 0

    def __call__(self, model: nn.Module, graph: ChannelGraph) -> PairwiseForm:
        """The objective over the graph's units.

        Raises:
            InvalidOptionError: there is no batch, one is no such pair, the graph has branches that may be removed
                as a whole, or a unit that may go is read by no layer with a weight of its own (by a recurrent layer, a
                sum that is shared freely, or as kernel columns).
            InvalidScoreError: a value is NaN or infinite.
        """
        if graph.blocks:
            raise InvalidOptionError(
                "OutputChange is quadratic in what a layer reads, and whether the layer is there would be a third "
                "factor: trace without blocks, or choose Calibrated or Taylor"
            )
        weight_tensors(model, graph)
        inputs, _ = samples_of(
            self.batches, graph, self.samples, device_of(model), seed=self.seed, who="OutputChange"
        )
        observed = Observed(model, graph)
        found = readers(observed, inputs, seed=self.seed)
        curvatures(observed, inputs, found, seed=self.seed)
        unary = np.zeros(graph.unit_count)
        pairs: list[PairTerm] = []
        read = [np.zeros(0, np.int64)]
        for reader in found.values():
            axis = graph.axes[graph.layers[reader.layer].in_axis]
            second = reader.covariance(0.0) if self.centred else reader.second / reader.rows
            units, products = _of_units(reader, second, axis, ~graph.stays[axis])
            unary[units] += (products if products.ndim == 2 else products[:, None] / 2).sum(1).numpy()
            if products.ndim == 2 and len(units):
                pairs.append(PairTerm(units, units, products.numpy() / -2))
            read.append(units)
        require_scored(graph, np.concatenate(read), "OutputChange")
        return PairwiseForm(unary, tuple(pairs), unit="squared output")


def _of_units(reader: Reader, second: Tensor, axis: IntArray, wanted: BoolArray) -> tuple[IntArray, Tensor]:
    """A reader's part of H, over the units that it has at wanted positions of what it reads.

    Args:
        reader: with its curvature.
        second: C, ``(columns, columns)``, or its diagonal ``(columns,)``.
        axis: ``(positions,)`` the unit that owns each.
        wanted: ``(positions,)``.

    Returns:
        The units, ascending, and the products ``(units, units)`` of any two, or only their squares ``(units,)``.
    """
    assert reader.curvature is not None
    positions = len(axis)
    weighed = reader.curvature[:, None] * reader.weight
    units, place = np.unique(axis[wanted], return_inverse=True)
    into = torch.from_numpy(place.ravel())
    kept = torch.from_numpy(np.flatnonzero(wanted))
    if second.ndim == 1:
        squares = (second * (reader.weight * weighed).sum(0)).reshape(positions, -1).sum(1)
        return units, squares.new_zeros(len(units)).index_add(0, into, squares[kept])
    products = (second * (reader.weight.T @ weighed)).reshape(
        positions, -1, positions, second.shape[0] // positions
    )
    by_position = products.sum((1, 3))[kept][:, kept]
    rows = by_position.new_zeros(len(units), len(kept)).index_add(0, into, by_position)
    return units, rows.new_zeros(len(units), len(units)).index_add(1, into, rows)
