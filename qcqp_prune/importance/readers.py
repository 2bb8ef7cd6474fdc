"""The weights that read units, with the second moments of what they are multiplied with."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from qcqp_prune.graph.channels import IntArray
from qcqp_prune.graph.observe import Followed, Observed, norm_after, read_by
from qcqp_prune.graph.walk import argument, op_name
from qcqp_prune.importance.moments import moments, ridge_size
from qcqp_prune.importance.output_error import spread
from qcqp_prune.importance.patches import Patches, as_matrix

ROWS, PRODUCTS, PER_COLUMN = 65_536, 4e10, 10
"""Rows that second moments are taken over, as few as so many products take, and those for each column at least."""

LARGEST = 6_144
"""Columns of a weight up to which the products of any two are held; beyond it only the squares are."""

Key = tuple[str, tuple[int, int] | None]
"""A weight, and the rows of it that a layer uses."""


@dataclass(eq=False)
class Reader:
    """A weight and what it reads, summed over its calls.

    Attributes:
        layer: index in ``graph.layers`` of its first call.
        weight: the layer's own rows, ``(outputs, columns) float64``.
        second: sum of products of two columns of one segment, ``(columns, columns)``, or of squares, ``(columns,)``.
        first: sum of each column.
        rows: how many rows were summed.
        shift: where a change of the output's mean can be put: name of a bias, or of a batch norm's running mean, with
            the sign that it has there; None where there is no such place.
        segments: of a grouped convolution, whose outputs each read the columns of one segment only.
        curvature: mean over samples of the summed squared gradient of the network's output, ``(outputs,)``.
    """

    layer: int
    weight: Tensor
    second: Tensor
    first: Tensor
    shift: tuple[str, int] | None
    rows: int = 0
    segments: int = 1
    curvature: Tensor | None = None

    def covariance(self, ridge: float) -> Tensor:
        """Second moments with a ridge of ``ridge`` times their mean, about the mean where a shift can take it up."""
        second = self.second / self.rows
        mean = self.first / self.rows
        if second.ndim == 1:
            second = second - mean**2 if self.shift else second
            return second + ridge_size(ridge, float(second.mean()), float(self.second.mean() / self.rows))
        square = float(second.diagonal().mean())
        if self.shift:
            second = second - _within(torch.outer(mean, mean), self.segments)
        size = ridge_size(ridge, float(second.diagonal().mean()), square)
        return second + size * torch.eye(len(second)).to(second)

    def columns_of(self, axis: IntArray, units: range) -> Tensor:
        """The columns that each unit has, ``(units, columns of one)``, in the order of the units; empty if none."""
        each = self.weight.shape[1] // len(axis)
        places = torch.from_numpy(axis)
        mine = torch.nonzero((places >= units.start) & (places < units.stop)).flatten()
        order = torch.argsort(places[mine], stable=True)
        of_unit = mine[order].reshape(len(units), -1) if len(mine) else mine.reshape(len(units), 0)
        return (of_unit[:, :, None] * each + torch.arange(each)).flatten(1)


def readers(observed: Observed, batches: Sequence[Any], *, seed: int = 0) -> dict[Key, Reader]:
    """Second moments of all layers' inputs over batches of one shape, all of them computed side by side.

    Depthwise convolutions are none: what they read goes with what they make.

    Args:
        observed: the network.
        batches: inputs.
        seed: of the positions that are looked at in images and sequences.
    """
    generator = torch.Generator().manual_seed(seed)
    found: dict[Key, Reader] = {}
    graph = observed.graph
    with torch.no_grad():
        steps = observed.steps(batches)
        for node in steps:
            k = steps.followed.layer_of.get(node)
            if k is None or graph.is_depthwise(graph.layers[k]):
                continue
            layer = graph.layers[k]
            weight = observed.tensor(layer.weight)
            patches = Patches.of(layer, node, weight)
            if patches is None or not (layer.rows or _is_plain(steps.followed, node)):
                continue
            key = (layer.weight, layer.rows)
            if key not in found:
                found[key] = _empty(
                    k, as_matrix(layer, weight).cpu(), shift_of(steps.followed, node), layer.segments
                )
            for read, made in zip(steps[read_by(node)], steps.evaluate(node), strict=True):
                columns = found[key].weight.shape[1]
                wanted = -(-rows_for(columns) // len(batches))
                _add(found[key], patches.read(read, patches.draw(made, wanted, generator)))
    return found


def curvatures(
    observed: Observed,
    batches: Sequence[Any],
    found: Mapping[Key, Reader],
    *,
    seed: int = 0,
    relative: bool = False,
) -> None:
    """How much the network's output hangs on each output of each reader, written into the readers.

    With J the Jacobian of everything that the network returns in one output of a layer, the diagonal of ``J^T J``
    summed over positions, estimated by one random vector of signs for each batch (Hutchinson). It asks for no labels,
    and unlike gradients of the loss it does not vanish where a network knows its training data by heart.

    Args:
        observed: the network.
        batches: inputs.
        found: from ``readers``.
        seed: of the signs.
        relative: count each of several outputs in units of its standard deviation.
    """
    generator = torch.Generator().manual_seed(seed)
    graph = observed.graph
    for reader in found.values():
        reader.curvature = torch.zeros(len(reader.weight), dtype=torch.float64)
    samples = 0
    for batch in batches:
        made: list[tuple[int, Tensor]] = []

        def see(k: int, read: Tensor, out: Tensor) -> Tensor:
            layer = graph.layers[k]
            if (layer.weight, layer.rows) in found and not out.requires_grad:
                out = out.requires_grad_()
            made.append((k, out))  # noqa: B023 - called before the next batch
            return out.clone()  # what follows may work in place

        with torch.enable_grad():
            leaves = [x for x in observed.run(batch, see) if isinstance(x, Tensor) and x.requires_grad]
            signs = [torch.randint(2, x.shape, generator=generator).to(x) * 2 - 1 for x in leaves]
            # Of a single output the size says nothing: only ratios of curvatures matter then.
            scaled = relative and len(leaves) > 1
            sizes = [math.sqrt(spread([x.detach()]) / x.numel()) if scaled else 1.0 for x in leaves]
            total = sum(
                ((x * s).sum() / size for x, s, size in zip(leaves, signs, sizes, strict=True)),
                torch.zeros(()),
            )
            wanted = [(k, out) for k, out in made if out.requires_grad]
            if not leaves or not wanted:
                continue
            gradients = torch.autograd.grad(total, [out for _, out in wanted], allow_unused=True)
        for (k, out), gradient in zip(wanted, gradients, strict=True):
            layer = graph.layers[k]
            mine = found.get((layer.weight, layer.rows))
            if mine is not None and mine.curvature is not None and gradient is not None:
                channel = out.ndim - 1 if layer.op.startswith("linear") else 1
                others = [d for d in range(out.ndim) if d != channel]
                mine.curvature += gradient.double().square().sum(others).cpu()
        samples += int(made[0][1].shape[0]) if made else 0
    for reader in found.values():
        assert reader.curvature is not None
        reader.curvature /= max(samples, 1)


def rows_for(columns: int) -> int:
    """Over how many rows second moments of so many columns are taken, where the data has as many."""
    return max(PER_COLUMN * columns, min(ROWS, int(PRODUCTS / columns**2)))


def shift_of(followed: Followed, node: Node) -> tuple[str, int] | None:
    """Where a change of a layer's mean can be put; see ``Reader.shift``."""
    bias = argument(node, "bias", argument(node, "self") if op_name(node) == "aten::addmm" else None)
    sign = 1
    if not isinstance(bias, Node):
        norm, sign = norm_after(node), -1
        bias = None if norm is None else argument(norm, "running_mean")
    if not isinstance(bias, Node) or bias not in followed.state or len(bias.users) > 1:
        return None  # what several read is nobody's
    return followed.state[bias], sign


def weight_of(followed: Followed, node: Node) -> Node | None:
    """The parameter that a layer's operator multiplies with; None where that is computed from something."""
    named = (argument(node, name) for name in ("weight", "mat2", "other"))
    return next((n for n in named if isinstance(n, Node) and n in followed.state), None)


def _is_plain(followed: Followed, node: Node) -> bool:
    """Whether an operator multiplies with a parameter as it is, which only layers read: no embedding is tied to it."""
    weight = weight_of(followed, node)
    return weight is not None and all(user in followed.layer_of for user in weight.users)


def _empty(layer: int, weight: Tensor, shift: tuple[str, int] | None, segments: int) -> Reader:
    columns = weight.shape[1]
    size = (columns, columns) if columns <= LARGEST else (columns,)
    return Reader(layer, weight, weight.new_zeros(size), weight.new_zeros(columns), shift, segments=segments)


def _add(reader: Reader, rows: Tensor) -> None:
    if reader.second.ndim == 1:
        reader.second += rows.double().square().sum(0).cpu()
        reader.first += rows.double().sum(0).cpu()
    else:
        (products,), (first,) = moments(rows if rows.dtype == torch.float64 else rows.float())
        reader.second += _within(products.cpu(), reader.segments)
        reader.first += first.cpu()
    reader.rows += len(rows)


def _within(products: Tensor, segments: int) -> Tensor:
    """Products of two columns with those of different segments at zero."""
    if segments == 1:
        return products
    own = torch.arange(len(products), device=products.device) // (len(products) // segments)
    return products * (own[:, None] == own)
