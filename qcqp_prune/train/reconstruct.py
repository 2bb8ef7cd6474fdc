"""Least-squares reconstruction: weights with which each layer of a smaller network comes nearest to the dense one."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor, nn
from torch.fx import Node

from qcqp_prune.errors import InvalidOptionError, TrainingError, require_kind
from qcqp_prune.graph.channels import BoolArray, ChannelGraph, Layer
from qcqp_prune.graph.inputs import batch_size
from qcqp_prune.graph.masks import Masks
from qcqp_prune.graph.observe import Observed, norm_after, read_by
from qcqp_prune.graph.trace import trace
from qcqp_prune.graph.walk import argument, op_name
from qcqp_prune.importance.moments import require_ridge
from qcqp_prune.importance.patches import Patches, own_matrix, with_own_matrix
from qcqp_prune.importance.readers import LARGEST, rows_for, shift_of, weight_of
from qcqp_prune.importance.samples import samples_of
from qcqp_prune.train.batches import Loader
from qcqp_prune.train.columns import as_convolutions
from qcqp_prune.train.least_squares import Sums
from qcqp_prune.train.modes import placed

logger = logging.getLogger(__name__)

Method = Literal["least_squares", "means"]

_FAINT = 1e-3
"""A batch norm's scale below this share of its largest passes on nothing that a fit could use."""


@dataclass(frozen=True)
class Reconstruction:
    """What was fitted.

    Attributes:
        method: ``least_squares`` for weights and means, ``means`` for means only.
        layers: names of the layers that were fitted, in execution order.
        left: for each layer that was not the reason.
        samples: how many were looked at.
    """

    method: Method
    layers: tuple[str, ...]
    left: dict[str, str]
    samples: int

    def describe(self) -> str:
        """In words."""
        what = "least squares" if self.method == "least_squares" else "their means"
        rest = f"; {len(self.left)} left as they are: {_first(self.left)}" if self.left else ""
        return f"{what}: {len(self.layers)} layers on {self.samples:,} samples{rest}"


def reconstruct(
    small: nn.Module,
    dense: nn.Module,
    graph: ChannelGraph,
    masks: Masks,
    loader: Loader,
    *,
    method: Method = "least_squares",
    samples: int = 2_500,
    ridge: float = 1e-2,
    seed: int = 0,
    device: str = "auto",
) -> Reconstruction:
    """Fit each layer of a smaller network to the dense one, in execution order, without labels or gradients.

    With X what a layer reads in the smaller network, whose earlier layers are fitted already, and T what it is to make,
    its weights change by ``D = argmin ||T - (W + D) X||^2 + ridge m ||D||^2``, m the mean square of X. T is what the
    dense layer makes at the kept outputs. Where the result is added to something that is there already, maybe after a
    batch norm, T makes the *sum* the dense one instead, so that a residual branch takes up what the stream has lost.
    Means go where the layer has a bias, or into the running mean of the batch norm after it. Batch norms should not
    be recalibrated afterwards: fitted outputs vary less than they did, and recalibration would blow them up again.

    A convolution that lost kernel columns (``ShapeConv2d``) is fitted filter by filter over the columns that are left.
    Layers whose weight is used several times, or computed from others, transposed convolutions and recurrent layers are
    left as they are.

    Args:
        small: from ``shrink``; changed in place.
        dense: the network it was cut from.
        graph: the dense network's channel graph.
        masks: what was kept.
        loader: yields ``(inputs, targets)``; targets are not looked at. All samples that are used are held at once, so
            of a large network fewer are taken (``samples_of``).
        method: ``means`` leaves weights as they are and corrects means only (bias correction).
        samples: how many to use at most.
        ridge: towards the weights as they are, as a share of the mean second moment.
        seed: of what the loader draws, and of the positions that are looked at in images and sequences.
        device: where to run; "auto" takes an accelerator where there is one.

    Raises:
        InvalidOptionError: no such method, a ridge that is not positive, or the loader yields nothing.
        TrainingError: what a layer reads or is to make is NaN or infinite; the network is as it was then.

    References:
        He, Zhang, Sun: "Channel pruning for accelerating very deep neural networks" (ICCV 2017), section 3, for the fit
        to the dense sum of a residual branch.
    """
    if method not in get_args(Method):
        raise InvalidOptionError(f"method={method!r}: choose from {', '.join(get_args(Method))}")
    require_kind("masks", masks, Masks, "the Masks that the network was cut by")
    require_ridge(ridge)
    with placed(small, device) as where, placed(dense, device), torch.no_grad():
        batches, _ = samples_of(loader, graph, samples, where, seed=seed, who="reconstruct")
        with as_convolutions(small) as columns:
            fit = _Fit(
                small, dense, graph, masks.flat(graph), batches, _Options(method, ridge, seed, columns)
            )
            fit.run()
    return Reconstruction(method, tuple(fit.done), fit.left, len(batches) * batch_size(batches[0]))


@dataclass(frozen=True)
class _Options:
    method: Method
    ridge: float
    seed: int
    columns: Mapping[str, Tensor]


class _Fit:
    """Both networks side by side, the dense one as far as the next layer of the smaller one needs it."""

    def __init__(
        self,
        small: nn.Module,
        dense: nn.Module,
        graph: ChannelGraph,
        flat: BoolArray,
        batches: list[object],
        options: _Options,
    ) -> None:
        self.done: list[str] = []
        self.left: dict[str, str] = {}
        self._written: list[tuple[Tensor, Tensor]] = []
        self._graph, self._flat, self._options = graph, flat, options
        self._generator = torch.Generator().manual_seed(options.seed)
        self._own_graph = trace(small, batches[0])
        self._own = Observed(small, self._own_graph)
        self._small = self._own.steps(batches)
        self._dense = Observed(dense, graph).steps(batches)
        self._ahead = iter(self._dense)
        self._calls = Counter(layer.weight for layer in graph.layers if layer.rows is None)
        self._there = {
            (graph.layers[k].name, graph.layers[k].weight): (k, node)
            for node, k in self._dense.followed.layer_of.items()
        }
        self._place = {node: i for i, node in enumerate(self._small.followed.program.graph.nodes)}
        self._layer_places = sorted(self._place[node] for node in self._small.followed.layer_of)

    def run(self) -> None:
        """Fit every layer that can be; where an error ends it, none is fitted."""
        try:
            self._all()
        except BaseException:  # an interrupt, too, leaves nothing half fitted
            for tensor, before in reversed(self._written):
                tensor.copy_(before)
            raise

    def _all(self) -> None:
        for node in self._small:
            k = self._small.followed.layer_of.get(node)
            if k is None:
                continue
            layer = self._own_graph.layers[k]
            reason = self._one(node, layer)
            if reason:
                self.left[layer.name] = reason
            else:
                self.done.append(layer.name)
        for layer in self._own_graph.layers:
            if layer.weight and layer.name not in self.done:
                self.left.setdefault(layer.name, "its operator hides what it multiplies")
        for layer in self._graph.layers:
            if layer.weight and layer.name not in self.done:
                self.left.setdefault(
                    layer.name, "the smaller network has no such layer, or computes it otherwise"
                )

    def _one(self, node: Node, layer: Layer) -> str:
        """Fit one layer; the reason where it is left alone."""
        weight = self._own.tensor(layer.weight)
        patches = Patches.of(layer, node, weight)
        there = self._there.get((layer.name, layer.weight))
        if patches is None or there is None:
            return "a transposed convolution, an image without a batch, or a layer that the dense network has not"
        if layer.rows is None and (self._calls[layer.weight] > 1 or not self._reads_alone(node)):
            return "its weight is used several times, or computed from others"
        matrix = own_matrix(layer, weight)
        if matrix.shape[1] > LARGEST:
            return f"it reads more than {LARGEST:,} numbers at once"
        kept = np.flatnonzero(self._flat[self._graph.axes[self._graph.layers[there[0]].out_axis]])
        if len(kept) != len(matrix):
            return "the masks keep another number of its outputs: give the network that was cut with them"
        shift = shift_of(self._small.followed, node)
        if self._options.method == "means" and shift is None:
            return "no bias or batch norm of its own takes up a mean"
        goals = self._goals(node, there[1], torch.from_numpy(kept), layer)
        if goals is None or goals[0].shape != self._small.evaluate(node)[0].shape:
            return "the dense network computes it in another order or layout"
        sums = Sums(layer.segments)
        wanted = -(-rows_for(matrix.shape[1]) // len(goals))
        for read, made, goal in zip(
            self._small[read_by(node)], self._small.evaluate(node), goals, strict=True
        ):
            positions = patches.draw(made, wanted, self._generator)
            sums.add(patches.read(read, positions), patches.made(goal - made, positions))
        if not sums.finite():
            raise TrainingError(
                f"what {layer.name} reads or is to make on these samples is NaN or infinite: check the data, and the "
                "weights of both networks; nothing was changed"
            )
        if self._options.method == "least_squares":
            free = self._options.columns.get(layer.weight)
            change = sums.change(self._options.ridge, centred=shift is not None, free=free)
            self._write(weight, with_own_matrix(layer, weight, matrix + change))
        else:
            change = torch.zeros_like(matrix)
        if shift is not None:
            name, sign = shift
            moved = sums.mean_left(change)
            own = self._own.tensor(name)
            part = own if layer.rows is None or sign < 0 else own[slice(*layer.rows)]
            self._write(part, part + (sign * moved).to(part))
        self._small.evaluate(node)
        return ""

    def _write(self, tensor: Tensor, new: Tensor) -> None:
        """Change a parameter or buffer; ``run`` can take it back."""
        self._written.append((tensor, tensor.clone()))
        tensor.copy_(new)

    def _reads_alone(self, node: Node) -> bool:
        """Whether a layer's operator, and nothing else, reads its weight."""
        weight = weight_of(self._small.followed, node)
        return weight is not None and len(weight.users) == 1

    def _goals(self, node: Node, dense: Node, kept: Tensor, layer: Layer) -> list[Tensor] | None:
        """What the layer is to make for each batch, in full size."""
        channel = -1 if layer.op.startswith("linear") else 1
        sums = _sum_after(node), _sum_after(dense)
        norm = norm_after(node)
        known = norm is None or isinstance(argument(norm, "running_mean"), Node)
        if known and sums[0] is not None and sums[1] is not None and self._comes_next(node, sums[0][0]):
            others, dense_sum = sums[0][1], sums[1][0]
            there = self._small[others]
            made = self._small.evaluate(node)
            if all(
                isinstance(x, Tensor) and x.shape == y.shape for x, y in zip(there, made, strict=True)
            ) and self._reach(dense_sum):
                wanted = [t.index_select(channel, kept.to(t.device)) for t in self._dense[dense_sum]]
                rest = [t - x for t, x in zip(wanted, there, strict=True)]
                return [self._before_norm(node, t, y) for t, y in zip(rest, made, strict=True)]
        if not self._reach(dense):
            return None
        return [t.index_select(channel, kept.to(t.device)) for t in self._dense[dense]]

    def _comes_next(self, node: Node, addition: Node) -> bool:
        """Whether the other operand of a sum is there, and no layer comes before the sum."""
        others = [x for x in addition.all_input_nodes if x not in (node, norm_after(node))]
        start, end = self._place[node], self._place[addition]
        return (
            len(others) == 1
            and others[0] in self._small
            and not any(start < place < end for place in self._layer_places)
        )

    def _before_norm(self, node: Node, wanted: Tensor, made: Tensor) -> Tensor:
        """What a batch norm has to read to give something; what it reads now where its scale is next to nothing."""
        norm = norm_after(node)
        if norm is None:
            return wanted
        shape = [1, -1, *[1] * (wanted.ndim - 2)]
        names = ("weight", "bias", "running_mean", "running_var")
        found = [argument(norm, name) for name in names]
        scale, offset, mean, var = (self._small[x][0] if isinstance(x, Node) else None for x in found)
        assert mean is not None
        assert var is not None
        factor = (1.0 if scale is None else scale) / torch.sqrt(var + float(argument(norm, "eps")))
        faint = factor.abs() < _FAINT * factor.abs().max()
        factor = torch.where(faint, torch.ones_like(factor), factor)
        start = torch.zeros_like(mean) if offset is None else offset
        read = (wanted - start.reshape(shape)) / factor.reshape(shape) + mean.reshape(shape)
        return torch.where(faint.reshape(shape), made, read)

    def _reach(self, target: Node) -> bool:
        """Run the dense network until it has computed something; False where that is past."""
        while target not in self._dense:
            node = next(self._ahead, None)
            if node is None:
                return False
            if node is target:
                self._dense.evaluate(node)
        return True


def _sum_after(node: Node) -> tuple[Node, Node] | None:
    """The sum that alone reads a layer's result, maybe through a batch norm, and its other operand."""
    last = norm_after(node) or node
    users = list(last.users)
    if len(users) != 1 or op_name(users[0]) != "aten::add" or argument(users[0], "alpha") != 1:
        return None
    others = [x for x in (argument(users[0], "self"), argument(users[0], "other")) if x is not last]
    return (users[0], others[0]) if len(others) == 1 and isinstance(others[0], Node) else None


def _first(left: dict[str, str]) -> str:
    """A few of the reasons."""
    reasons: dict[str, list[str]] = {}
    for name, reason in left.items():
        reasons.setdefault(reason, []).append(name)
    return "; ".join(
        f"{names[0]}{f' and {len(names) - 1} more' if len(names) > 1 else ''} ({reason})"
        for reason, names in reasons.items()
    )
