"""How much the network's outputs change with what a neuron makes, before its nonlinearity."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor, nn

from qcqp_prune.errors import InvalidOptionError
from qcqp_prune.graph.batches import Call
from qcqp_prune.graph.channels import ChannelGraph
from qcqp_prune.graph.observe import Observed
from qcqp_prune.importance.activation import by_channel
from qcqp_prune.importance.gradients import Batches, device_of, read_batches
from qcqp_prune.importance.layerwise import Layerwise, ScoreOf, by_unit, of_units, weight_tensors

Bound = Literal["exact", "lower"]


@dataclass(frozen=True, eq=False)
class NeuronSensitivity(Layerwise):
    """SeReNe's neuron sensitivity of each output p of each layer, summed over the positions of a unit.

    * ``exact``: ``S = 1/C sum_k |dy_k / dp|``, one backward pass for each of the C outputs of a sample;
    * ``lower``: ``S = 1/C |d(sum_k y_k) / dp|``, one backward pass, never more than the exact one.

    Both are means over samples and space. p is what the layer itself makes, before norms and nonlinearities; y is all
    of the network's first output. A sensitivity says what a small change of p does: not how large p is. The network
    runs in eval mode, interpreted from its exported graph, which is made anew for each shape of a batch.

    Attributes:
        batches: pairs of (inputs, targets), of which the inputs are used; iterated once.
        bound: ``exact`` or ``lower``.

    Raises:
        InvalidOptionError: there is no batch, one is no such pair, or a unit that may go is made by no layer that
            can be looked at (a recurrent one, or as kernel columns).
        InvalidScoreError: a derivative, or what a layer makes, is NaN or infinite.

    References:
        Tartaglione et al., "SeReNe: sensitivity-based regularization of neurons for structured sparsity in neural
        networks" (IEEE TNNLS 2022), the definition of S and its lower bound; eq. 5.2 and 5.8 of the thesis.
    """

    batches: Batches = field(repr=False)
    bound: Bound = "exact"

    unit: ClassVar[str] = "output per activation"

    def __post_init__(self) -> None:
        if self.bound not in get_args(Bound):
            raise InvalidOptionError(f"bound={self.bound!r}: choose from {', '.join(get_args(Bound))}")

    def scores(self, model: nn.Module, graph: ChannelGraph) -> ScoreOf:
        """Of units."""
        weight_tensors(model, graph)
        observed = Observed(model, graph)
        sums: dict[int, Tensor] = {}
        counts: dict[int, int] = {}
        with torch.enable_grad():
            for call, _ in read_batches(self.batches, device_of(model), "NeuronSensitivity"):
                for k, slopes in self._slopes(observed, call).items():
                    rows = by_channel(graph.layers[k], slopes)
                    sums[k] = sums.get(k, 0) + rows.double().sum(1)
                    counts[k] = counts.get(k, 0) + rows.shape[1]
        found = {
            graph.layers[k].name: by_unit(
                graph.axes[graph.layers[k].out_axis], (sums[k] / counts[k]).cpu().numpy()
            )
            for k in sums
        }
        return of_units(graph, found, "NeuronSensitivity")

    def _slopes(self, observed: Observed, call: Call) -> dict[int, Tensor]:
        """For each layer ``1/C sum_k |dy_k/dp|`` at each entry of what it makes."""
        made: dict[int, Tensor] = {}

        def see(k: int, read: Tensor, potential: Tensor) -> Tensor:
            made[k] = potential if potential.requires_grad else potential.detach().requires_grad_()
            return made[k].clone()  # what follows may write into it

        outputs = [x for x in observed.run(call, see) if isinstance(x, Tensor) and x.requires_grad]
        if not made or not outputs:
            raise InvalidOptionError(
                "NeuronSensitivity finds no output that is a differentiable function of a layer: choose Magnitude"
            )
        y = outputs[0].flatten(1)
        directions = [y.sum()] if self.bound == "lower" else [y[:, k].sum() for k in range(y.shape[1])]
        total = {k: torch.zeros_like(p) for k, p in made.items()}
        for direction in directions:
            found = torch.autograd.grad(direction, list(made.values()), retain_graph=True, allow_unused=True)
            for k, slope in zip(made, found, strict=True):
                total[k] += 0 if slope is None else slope.abs() / y.shape[1]
        # Nonlinearities have finite derivatives where a potential is not finite.
        return {k: torch.where(made[k].isfinite(), slopes, torch.nan) for k, slopes in total.items()}
