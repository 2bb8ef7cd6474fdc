"""What units send on, seen on calibration data: how large it is, how often it is there, how much it varies."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal, get_args

import numpy as np
import torch
from torch import Tensor, nn

from qcqp_prune.errors import InvalidOptionError
from qcqp_prune.graph.channels import ChannelGraph, IntArray, Layer
from qcqp_prune.graph.observe import Observed
from qcqp_prune.importance.gradients import Batches, device_of, read_batches
from qcqp_prune.importance.layerwise import Layerwise, ScoreOf, UnitScores, by_unit, of_units, weight_tensors
from qcqp_prune.program.coefficients import FloatArray

Statistic = Literal["mean", "apoz", "std"]


@dataclass(frozen=True, eq=False)
class Activation(Layerwise):
    """A statistic of what a layer reads from each unit, summed over the layers that read the unit.

    With x running over the samples, the space and all positions that a unit has in the layer's input (in a feature map
    that is flattened it has several):

    * ``mean``: ``E|x|``;
    * ``apoz``: the share of x that is not zero, ``1 - APoZ``;
    * ``std``: ``sqrt(E[x^2] - (E x)^2)``: a unit that is constant can be put into the next bias.

    So nonlinearities and norms behind the layer that makes a unit count. The network runs in eval mode, interpreted
    from its exported graph, which is made anew for each shape of a batch.

    Attributes:
        batches: pairs of (inputs, targets), of which the inputs are used; iterated once.
        statistic: ``mean``, ``apoz`` or ``std``.

    Raises:
        InvalidOptionError: there is no batch, one is no such pair, or a unit that may go is read by no layer with
            a weight of its own (by a recurrent layer, a sum that is shared freely, or as kernel columns).
        InvalidScoreError: a value is NaN or infinite.

    References:
        Hu et al., "Network trimming" (arXiv:1607.03250), for APoZ; Molchanov et al., "Pruning convolutional
        neural networks for resource efficient inference" (ICLR 2017), for mean and standard deviation.
    """

    batches: Batches = field(repr=False)
    statistic: Statistic = "mean"

    unit: ClassVar[str] = "activation"

    def __post_init__(self) -> None:
        if self.statistic not in get_args(Statistic):
            raise InvalidOptionError(
                f"statistic={self.statistic!r}: choose from {', '.join(get_args(Statistic))}"
            )

    def scores(self, model: nn.Module, graph: ChannelGraph) -> ScoreOf:
        """Of units."""
        weight_tensors(model, graph)
        sums: dict[int, Tensor] = {}
        counts: dict[int, int] = {}

        def see(k: int, read: Tensor, made: Tensor) -> None:
            rows = by_channel(graph.layers[k], read).double()
            # Not finite is not zero either, and would count as there: 0 times it is NaN.
            moments = [(rows != 0) + 0 * rows] if self.statistic == "apoz" else [rows.abs()]
            moments = [rows, rows.square()] if self.statistic == "std" else moments
            found = torch.stack([moment.sum(1) for moment in moments])
            sums[k] = sums[k] + found if k in sums else found
            counts[k] = counts.get(k, 0) + rows.shape[1]

        observed = Observed(model, graph)
        with torch.no_grad():
            for call, _ in read_batches(self.batches, device_of(model), "Activation"):
                observed.run(call, see)
        found = {}
        for k, sum_ in sums.items():
            layer = graph.layers[k]
            means = _per_unit(graph.axes[layer.in_axis], sum_.cpu().numpy() / counts[k])
            values = [scores.values for scores in means]
            if self.statistic == "std":
                with np.errstate(invalid="ignore"):  # infinity less infinity; of_units refuses it
                    values = [np.sqrt(np.maximum(values[1] - values[0] ** 2, 0.0))]
            found[layer.name] = UnitScores(means[0].units, values[0])
        return of_units(graph, found, "Activation")


def by_channel(layer: Layer, values: Tensor) -> Tensor:
    """What a layer reads or makes with one row for each channel or feature: ``(channels, samples and space)``."""
    space = int(layer.op[-2]) if layer.op.startswith("conv") else 0
    return values.detach().movedim(-1 - space, 0).flatten(1)


def _per_unit(units: IntArray, means: FloatArray) -> list[UnitScores]:
    """Means over all positions of each unit, for each row of means of positions."""
    number = by_unit(units, np.ones(len(units))).values
    summed = [by_unit(units, row) for row in means]
    return [UnitScores(scores.units, scores.values / number) for scores in summed]
