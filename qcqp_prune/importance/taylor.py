"""First-order Taylor importance: how much the loss is estimated to change when weights are removed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from qcqp_prune.errors import InvalidOptionError, InvalidScoreError
from qcqp_prune.graph.channels import ChannelGraph, Layer
from qcqp_prune.graph.state import eval_mode
from qcqp_prune.importance.layerwise import columns_of, pair_scores, pairwise_form, weight_tensors
from qcqp_prune.program.coefficients import FloatArray
from qcqp_prune.program.forms import PairwiseForm

Loss = Callable[[Any, Any], torch.Tensor]


@dataclass(frozen=True, eq=False)
class Taylor:
    """``S[o, i] = mean over batches of |sum_k W[o, i, k] dL/dW[o, i, k]|``, for each pair of units.

    Where kernel columns are units the sum is over the kernel positions of one column, usually a single one.

    Gradients are taken in eval mode, so batch norms use their running statistics; the model's own gradients and
    modes are left as they were.

    Attributes:
        batches: pairs of (inputs, targets); iterated once.
        loss: ``loss(model(inputs), targets)``; cross-entropy when None.

    References:
        Molchanov et al., "Importance estimation for neural network pruning" (CVPR 2019), eq. 8, here per pair of
        an input and an output channel.
    """

    batches: Iterable[tuple[torch.Tensor, torch.Tensor]]
    loss: Loss | None = None

    def __call__(self, model: nn.Module, graph: ChannelGraph) -> PairwiseForm:
        """The objective over the graph's units, in units of the loss.

        Raises:
            InvalidOptionError: there is no batch, one is no pair of tensors, or a layer's weight does not require a
                gradient.
            InvalidScoreError: a gradient is NaN or infinite.
        """
        weight_tensors(model, graph)
        parameters = dict(model.named_parameters(remove_duplicate=False))
        names = list(dict.fromkeys(layer.weight for layer in graph.layers if layer.weight))
        frozen = [n for n in names if n not in parameters or not parameters[n].requires_grad]
        if frozen:
            raise InvalidOptionError(
                f"{frozen[0]} and {len(frozen) - 1} more weights do not require gradients, which Taylor needs: "
                "call requires_grad_(True) on the model, or use Magnitude"
            )
        weights = [parameters[n] for n in names]
        loss = self.loss or nn.functional.cross_entropy
        parts = {x.weight: columns_of(graph, x) for x in graph.layers if x.weight}
        shapes = [(*p.shape[:2], parts[n]) for n, p in zip(names, weights, strict=True)]
        totals = [
            torch.zeros(s, dtype=torch.float64, device=p.device) for s, p in zip(shapes, weights, strict=True)
        ]
        count = 0
        with eval_mode(model), torch.enable_grad():
            for batch in self.batches:
                inputs, targets = _pair(batch)
                value = loss(model(inputs.to(weights[0].device)), targets.to(weights[0].device))
                gradients = torch.autograd.grad(value, weights, allow_unused=True)
                for total, weight, gradient in zip(totals, weights, gradients, strict=True):
                    if gradient is not None:
                        product = (weight.detach().double() * gradient.double()).reshape(*total.shape, -1)
                        total += product.sum(-1).abs()
                count += 1
        if count == 0:
            raise InvalidOptionError(
                "Taylor was given no batch: pass a loader with at least one (one-shot iterators run dry)"
            )
        mean = {name: total / count for name, total in zip(names, totals, strict=True)}
        broken = [name for name, total in mean.items() if not torch.isfinite(total).all()]
        if broken:
            raise InvalidScoreError(
                f"the gradient of {broken[0]} is NaN or infinite: check the loss and the data"
            )
        calls = Counter((layer.weight, layer.rows) for layer in graph.layers)

        # The gradient of a weight that is used several times is of all its uses together: each gets its share.
        def score_of(x: Layer) -> FloatArray | None:
            return (
                pair_scores(x, mean[x.weight], parts[x.weight]) / calls[x.weight, x.rows]
                if x.weight
                else None
            )

        return pairwise_form(graph, score_of, unit="loss")


def _pair(batch: object) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs and targets of a batch."""
    if (
        isinstance(batch, tuple | list)
        and len(batch) == 2
        and all(isinstance(part, torch.Tensor) for part in batch)
    ):
        return batch[0], batch[1]
    found = f"a {type(batch).__name__}"
    if isinstance(batch, tuple | list):
        found += f" of {', '.join(type(part).__name__ for part in batch) or 'nothing'}"
    raise InvalidOptionError(
        f"Taylor was given {found} as a batch: give a loader of pairs (inputs, targets), both tensors"
    )
