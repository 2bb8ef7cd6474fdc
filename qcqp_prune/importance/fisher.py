"""Second-order importance by the empirical Fisher information: optimal brain damage without a second derivative."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from qcqp_prune.errors import InvalidOptionError
from qcqp_prune.graph.batches import Call, outputs_of
from qcqp_prune.graph.channels import ChannelGraph, Layer
from qcqp_prune.graph.state import eval_mode, tensors_replaced
from qcqp_prune.importance.gradients import (
    Batches,
    device_of,
    read_batches,
    require_finite,
    share,
    trainable,
    uses,
    weight_names,
)
from qcqp_prune.importance.layerwise import Layerwise, ScoreOf, columns_of, pair_scores, weight_tensors
from qcqp_prune.importance.losses import Loss, cross_entropy, loss_of
from qcqp_prune.program.coefficients import FloatArray

logger = logging.getLogger(__name__)

AT_ONCE = 2**26
"""Numbers that the gradients of the samples of one chunk may hold together."""


@dataclass(frozen=True, eq=False)
class Fisher(Layerwise):
    """``S[o, i] = 1/2 sum_k W[o, i, k]^2 E[g[o, i, k]^2]``, with g the gradient of one sample's loss.

    That is what the loss grows by, to second order, when the weights between two units become zero, with the diagonal
    of the empirical Fisher information (gradients at the given targets, not at drawn ones) for the Hessian.

    Gradients of single samples come from ``torch.func.vmap`` over ``torch.func.grad``, as many at once as fit into a
    fixed amount of memory. Where ``vmap`` does not take an operator of the network, or a loss that looks at values,
    they are taken one sample after another: the same numbers, more slowly. Gradients are taken in eval mode. A weight
    that is used several times has one gradient: each use gets its share.

    Attributes:
        batches: pairs of (inputs, targets), samples along the first dimension of both; iterated once.
        loss: ``loss(model(inputs), targets)``, called with one sample at a time; cross-entropy of the logits
            among the outputs when None.

    Raises:
        InvalidOptionError: there is no batch, one is no such pair, a layer's weight does not require a gradient,
            the loss does not take what the network returns or gives no single number, or a batch norm has no running
            statistics, so that samples depend on each other.
        InvalidScoreError: a gradient is NaN or infinite.

    References:
        LeCun et al., "Optimal brain damage" (NeurIPS 1989), the saliency ``h_kk u_k^2 / 2``; Theis et al., "Faster
        gaze prediction with dense networks and Fisher pruning" (arXiv:1801.05787), for the Fisher information.
    """

    batches: Batches = field(repr=False)
    loss: Loss | None = None

    unit: ClassVar[str] = "loss"

    def scores(self, model: nn.Module, graph: ChannelGraph) -> ScoreOf:
        """Of pairs."""
        weight_tensors(model, graph)
        weights = trainable(model, weight_names(graph), "Fisher")
        _require_apart(model)
        parts = {x.weight: columns_of(graph, x) for x in graph.layers if x.weight}
        totals = {
            n: torch.zeros((*w.shape[:2], parts[n]), dtype=torch.float64, device=w.device)
            for n, w in weights.items()
        }
        count = 0
        gradients = _Gradients(model, weights, self.loss or cross_entropy)
        with eval_mode(model), torch.enable_grad():
            for call, targets in read_batches(self.batches, device_of(model), "Fisher"):
                for squares in gradients.squares(call, targets):
                    for name, square in squares.items():
                        product = weights[name].detach().double().square() * square
                        totals[name] += product.reshape(*totals[name].shape, -1).sum(-1)
                count += len(targets)
        require_finite(totals)
        counted = uses(graph)

        def score_of(layer: Layer) -> FloatArray | None:
            if not layer.weight:
                return None
            scale = 0.5 * share(layer, counted) / count
            return pair_scores(layer, totals[layer.weight], parts[layer.weight]) * scale

        return score_of


class _Gradients:
    """Squares of the gradients of single samples' losses."""

    def __init__(self, model: nn.Module, weights: dict[str, nn.Parameter], loss: Loss) -> None:
        self._model, self._weights, self._loss = model, weights, loss
        self._chunk = max(1, AT_ONCE // sum(w.numel() for w in weights.values()))
        self._together = True

    def squares(self, call: Call, targets: Tensor) -> Iterator[dict[str, Tensor]]:
        """Sums over some samples at a time, by name, in double precision."""
        batch = _Samples(call, targets)
        # Once outside of vmap, whose own errors look like those of a loss.
        with torch.no_grad():
            self._value(batch, batch.some(0, 1), targets[:1])
        start = 0
        while start < len(targets):
            stop = min(start + (self._chunk if self._together else 1), len(targets))
            some = batch.some(start, stop), targets[start:stop]
            try:
                yield self._at_once(batch, *some) if self._together else self._one(batch, *some)
            except RuntimeError as error:  # whatever an operator without a rule for vmap raises
                if not self._together:
                    raise
                logger.info("gradients are taken one sample after another: %s", error)
                self._together = False
                continue
            start = stop

    def _at_once(self, batch: _Samples, some: list[Tensor], targets: Tensor) -> dict[str, Tensor]:
        own = {id(w): name for name, w in self._weights.items()}

        def value(weights: dict[str, Tensor], parts: list[Tensor], y: Tensor) -> Tensor:
            args, kwargs = batch.call([x[None] for x in parts])
            with tensors_replaced(self._model, lambda t: weights[own[id(t)]] if id(t) in own else t.detach()):
                return self._loss(self._model(*args, **kwargs), y[None]).reshape(())

        weights = {name: w.detach() for name, w in self._weights.items()}
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="There is a performance drop")
            found: dict[str, Any] = torch.func.vmap(torch.func.grad(value), in_dims=(None, 0, 0))(
                weights, some, targets
            )
        return {name: g.double().square().sum(0) for name, g in found.items()}

    def _one(self, batch: _Samples, some: list[Tensor], targets: Tensor) -> dict[str, Tensor]:
        value = self._value(batch, some, targets)
        found = torch.autograd.grad(value, list(self._weights.values()), allow_unused=True)
        return {n: g.double().square() for n, g in zip(self._weights, found, strict=True) if g is not None}

    def _value(self, batch: _Samples, some: list[Tensor], targets: Tensor) -> Tensor:
        outputs = outputs_of(self._model, batch.call(some), "Fisher")
        return loss_of(self._loss, outputs, targets, "Fisher")


class _Samples:
    """A batch whose samples are taken apart: the tensors among its arguments that have one entry for each.

    Others, such as a mask that all samples share, are left as they are.
    """

    def __init__(self, call: Call, targets: Tensor) -> None:
        self._leaves, self._tree = pytree.tree_flatten(call)
        sizes = [len(x) for x in self._leaves if isinstance(x, Tensor) and x.ndim]
        if sizes[:1] != [len(targets)]:
            raise InvalidOptionError(
                f"Fisher was given a batch of {sizes[0] if sizes else 'no'} inputs and {len(targets)} targets: give "
                "one of each for every sample"
            )
        self._own = [
            k for k, x in enumerate(self._leaves) if isinstance(x, Tensor) and x.ndim and len(x) == sizes[0]
        ]

    def some(self, start: int, stop: int) -> list[Tensor]:
        """What a range of samples have of their own."""
        return [self._leaves[k][start:stop] for k in self._own]

    def call(self, parts: list[Tensor]) -> Call:
        """The arguments with these in their places."""
        leaves = list(self._leaves)
        for k, part in zip(self._own, parts, strict=True):
            leaves[k] = part
        args, kwargs = pytree.tree_unflatten(leaves, self._tree)
        return args, kwargs


def _require_apart(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is None:
            raise InvalidOptionError(
                f"{name} has no running statistics, so that no sample has a gradient of its own: choose Taylor"
            )
