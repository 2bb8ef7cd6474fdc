"""First-order Taylor importance: how much the loss is estimated to change when weights are removed."""

from __future__ import annotations

import itertools
from collections import Counter
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.fx import Node

from qcqp_prune.errors import InvalidOptionError
from qcqp_prune.graph.batches import Call, require_loader
from qcqp_prune.graph.channels import ChannelGraph, Layer
from qcqp_prune.graph.observe import Observed, norm_after
from qcqp_prune.graph.walk import argument
from qcqp_prune.importance.gradients import (
    Batches,
    batch_gradients,
    device_of,
    read_batches,
    require_finite,
    share,
    trainable,
    uses,
    weight_names,
)
from qcqp_prune.importance.layerwise import (
    Layerwise,
    ScoreOf,
    UnitScores,
    by_unit,
    columns_of,
    filters_of,
    of_units,
    own_rows,
    pair_scores,
    weight_tensors,
)
from qcqp_prune.importance.losses import Loss
from qcqp_prune.program.coefficients import FloatArray


@dataclass(frozen=True, eq=False)
class Taylor(Layerwise):
    """First order of what the loss changes by when weights, or what a unit sends on, become zero.

    * ``weight``: ``S[o, i] = mean over batches of |sum_k W[o, i, k] dL/dW[o, i, k]|``, for each pair of units. Where
      kernel columns are units the sum is over the kernel positions of one column, usually a single one.
    * ``gate``: for each layer and unit ``mean over batches of |dL/dz|``, ``z`` a gate of 1 on all that the layer sends
      on for the unit, ``dL/dz = sum over positions of y dL/dy``. No activation is kept for it: by Euler's theorem that
      is ``sum W dL/dW + b dL/db`` of the filter, or ``gamma dL/dgamma + beta dL/dbeta`` where the layer's output goes
      straight into a batch norm with a scale. A bias is the parameter whose name has ``bias`` for ``weight``. Signs
      are kept within a unit: what its weights do to the loss may cancel, in pairs it cannot.

    Gradients are taken in eval mode, so batch norms use their running statistics; the model's own gradients and
    modes are left as they were. A weight that is used several times has one gradient: each use gets its share.

    Attributes:
        batches: pairs of (inputs, targets); iterated once.
        loss: ``loss(model(inputs), targets)``; cross-entropy of the logits among the outputs when None.
        form: ``weight`` or ``gate``.

    Raises:
        InvalidOptionError: there is no batch, one is no such pair, a layer's weight does not require a gradient,
            the loss does not take what the network returns or gives no single number, or gates are asked for where
            kernel columns are units.
        InvalidScoreError: a gradient is NaN or infinite.

    References:
        Molchanov et al., "Importance estimation for neural network pruning" (CVPR 2019), the contribution of a group of
        weights and of gates (eq. 9 and after), in absolute value; ``weight`` takes a kernel for a group.
    """

    batches: Batches = field(repr=False)
    loss: Loss | None = None
    form: Literal["weight", "gate"] = "weight"

    unit: ClassVar[str] = "loss"

    def __post_init__(self) -> None:
        if self.form not in ("weight", "gate"):
            raise InvalidOptionError(f"form={self.form!r}: choose weight or gate")

    def scores(self, model: nn.Module, graph: ChannelGraph) -> ScoreOf:
        """Of pairs, or of units."""
        weight_tensors(model, graph)
        return self._pairs(model, graph) if self.form == "weight" else self._gates(model, graph)

    def _pairs(self, model: nn.Module, graph: ChannelGraph) -> ScoreOf:
        weights = trainable(model, weight_names(graph), "Taylor")
        parts = {x.weight: columns_of(graph, x) for x in graph.layers if x.weight}
        totals = {
            n: torch.zeros((*w.shape[:2], parts[n]), dtype=torch.float64, device=w.device)
            for n, w in weights.items()
        }
        count = 0
        for gradients in batch_gradients(model, weights, self.batches, self.loss, "Taylor"):
            for name, gradient in gradients.items():
                product = weights[name].detach().double() * gradient.double()
                totals[name] += product.reshape(*totals[name].shape, -1).sum(-1).abs()
            count += 1
        require_finite(totals)
        counted = uses(graph)

        def score_of(layer: Layer) -> FloatArray | None:
            if not layer.weight:
                return None
            scale = share(layer, counted) / count
            return pair_scores(layer, totals[layer.weight], parts[layer.weight]) * scale

        return score_of

    def _gates(self, model: nn.Module, graph: ChannelGraph) -> ScoreOf:
        require_loader(self.batches, "Taylor")
        rest = iter(self.batches)
        first = list(itertools.islice(rest, 1))
        ((call, _),) = read_batches(first, device_of(model), "Taylor")
        scales = _scales(model, graph, call)
        made_with = {x.name: scales.get(x.name) or _affine(model, x) for x in graph.layers if x.weight}
        needed = trainable(model, dict.fromkeys(n for names in made_with.values() for n in names), "Taylor")
        counted = uses(graph)
        of_scale = Counter(names[0] for names in scales.values())
        totals: dict[str, FloatArray] = {}
        count = 0
        for gradients in batch_gradients(model, needed, itertools.chain(first, rest), self.loss, "Taylor"):
            products = {n: needed[n].detach().double() * g.double() for n, g in gradients.items()}
            for layer in graph.layers:
                names = [n for n in made_with.get(layer.name, ()) if n in products]
                if names:
                    units = graph.axes[layer.out_axis]
                    summed = np.sum([_by_output(layer, products[n], len(units)) for n in names], axis=0)
                    own = np.abs(by_unit(units, summed).values)
                    totals[layer.name] = totals.get(layer.name, 0.0) + own
            count += 1
        found = {}
        for layer in graph.layers:
            if layer.weight:
                units = np.unique(graph.axes[layer.out_axis])
                scale = 1 / of_scale[scales[layer.name][0]] if layer.name in scales else share(layer, counted)
                values = totals.get(layer.name, np.zeros(len(units))) * (scale / count)
                found[layer.name] = UnitScores(units, values)
        return of_units(graph, found, "Taylor(form='gate')")


def _scales(model: nn.Module, graph: ChannelGraph, call: Call) -> dict[str, tuple[str, ...]]:
    """Scale and shift of the batch norm that reads a layer's output, and nothing else does, by the layer's name."""
    if not any(isinstance(m, nn.modules.batchnorm._BatchNorm) and m.affine for m in model.modules()):
        return {}
    followed = Observed(model, graph).steps([call]).followed
    names = followed.program.graph_signature.inputs_to_parameters
    found = {}
    for node, k in followed.layer_of.items():
        norm = norm_after(node)
        if norm is not None:
            both = [argument(norm, part) for part in ("weight", "bias")]
            known = [names[x.name] for x in both if isinstance(x, Node) and x.name in names]
            if known:
                found[graph.layers[k].name] = tuple(known)
    return found


def _affine(model: nn.Module, layer: Layer) -> tuple[str, ...]:
    """Names of the parameters of which a layer's output is a linear function."""
    path, dot, last = layer.weight.rpartition(".")
    bias = path + dot + last.replace("weight", "bias")
    parameters = dict(model.named_parameters(remove_duplicate=False))
    there = bias != layer.weight and bias in parameters
    if (
        there and layer.op == "linear_transposed"
    ):  # of a weight that is read both ways the bias is the other layer's
        there = len(parameters[bias]) == parameters[layer.weight].shape[1]
    return (layer.weight, bias) if there else (layer.weight,)


def _by_output(layer: Layer, product: Tensor, outputs: int) -> FloatArray:
    """Entries summed for each output of a layer, ``(outputs,)``; of a weight, a bias or a scale."""
    if product.ndim > 1:
        product = filters_of(layer, product).sum(-1).flatten()
    elif len(product) != outputs:
        product = own_rows(layer, product)
    return product.cpu().numpy()
