"""Convolutions (1d to 3d, grouped, depthwise, transposed) and linear maps: where units are made and read."""

from __future__ import annotations

import math

import numpy as np
from torch.fx import Node

from qcqp_prune.graph.axes import Axes
from qcqp_prune.graph.channels import IntArray
from qcqp_prune.graph.walk import FoundLayer, Handler, Walk, argument, op_name

UNFOLLOWED_WEIGHT = "its weight is computed in a way that no handler could follow"


def convolution(walk: Walk, node: Node) -> Axes:
    """Any convolution: output channels are new units, input channels are those that it reads."""
    source, weight = walk.arg(node, "input"), walk.arg(node, "weight")
    groups = int(walk.arg(node, "groups", 1))
    op = node.target._schema.name.removeprefix("aten::").split(".")[0]  # type: ignore[union-attr]
    transposed = "transpose" in op
    out_shape, weight_shape = walk.shape(node), walk.shape(weight)
    channel = len(out_shape) - (len(weight_shape) - 2) - 1
    in_labels = readable(walk, node, source, channel)
    keep_others(walk, source, channel, "a convolution slides along it")
    kernel = math.prod(weight_shape[2:])
    if groups == 1:
        out_dim, in_dim = (1, 0) if transposed else (0, 1)
        out_labels = produced(walk, weight, out_dim)
        walk.table.merge(walk.axis(weight, in_dim), in_labels, UNFOLLOWED_WEIGHT)
    else:
        out_labels = _grouped(walk, node, weight, in_labels, groups)
    positions = math.prod(out_shape) // out_shape[channel]
    read = math.prod(walk.shape(source)) // walk.shape(source)[channel]
    layer = FoundLayer(
        node,
        op,
        weight_name(walk, weight, in_labels, out_labels),
        in_labels,
        out_labels,
        groups,
        macs_per_pair=per_sample(walk, node, (read if transposed else positions) * kernel),
        out_elements=per_sample(walk, node, positions),
        itemsize=node.meta["val"].element_size(),
    )
    walk.layers.append(layer)
    walk.table.make(out_labels)
    walk.attribute(node, _channels(in_labels, out_labels, groups))
    bias(walk, walk.arg(node, "bias"), out_labels)
    return [out_labels if d == channel else None for d in range(len(out_shape))]


def linear(walk: Walk, node: Node) -> Axes:
    """``x @ W.T + b`` over the last dimension."""
    source, weight = walk.arg(node, "input"), walk.arg(node, "weight")
    out_shape = walk.shape(node)
    in_labels = readable(walk, node, source, -1)
    if len(walk.shape(weight)) != 2:
        walk.freeze_inputs(node, "read by a linear map with a weight that is not a matrix")
        return [None] * len(out_shape)
    keep_others(walk, source, -1, "a linear map over another dimension is applied at each of its positions")
    out_labels = produced(walk, weight, 0)
    walk.table.merge(walk.axis(weight, 1), in_labels, UNFOLLOWED_WEIGHT)
    positions = math.prod(out_shape) // out_shape[-1]
    turned = _untransposed(weight)
    part = walk.part_of_parameter(weight) if turned is None else None
    walk.layers.append(
        FoundLayer(
            node,
            "linear" if turned is None else "linear_transposed",
            part[0] if part else weight_name(walk, turned or weight, in_labels, out_labels),
            in_labels,
            out_labels,
            1,
            macs_per_pair=per_sample(walk, node, positions),
            out_elements=per_sample(walk, node, positions),
            itemsize=node.meta["val"].element_size(),
            rows=part[1] if part else None,
        )
    )
    walk.table.make(out_labels)
    walk.attribute(node, {"in_features": in_labels, "out_features": out_labels})
    bias(walk, walk.arg(node, "bias"), out_labels)
    return [*walk.axes(source)[:-1], out_labels]


def _untransposed(weight: Node) -> Node | None:
    """The matrix that a weight is the transpose of; None where it is not one, or turned back again."""
    matrix, odd = weight, False
    while _is_transpose(matrix):
        matrix, odd = matrix.all_input_nodes[0], not odd
    return matrix if odd else None


def _is_transpose(matrix: Node) -> bool:
    name = op_name(matrix).removeprefix("aten::") if matrix.op == "call_function" else ""
    if name == "permute":
        return [int(d) % 2 for d in argument(matrix, "dims")] == [1, 0]
    if name in ("transpose", "swapaxes", "swapdims"):
        a, b = (int(argument(matrix, f"dim{k}", argument(matrix, f"axis{k}"))) % 2 for k in (0, 1))
        return a != b
    return name in ("t", "numpy_T")


def bias(walk: Walk, node: Node | None, labels: IntArray) -> None:
    """A vector with one entry for each position of a dimension."""
    if isinstance(node, Node):
        walk.table.merge(walk.axis(node, 0), labels, "its bias or scale is not a parameter")


def per_sample(walk: Walk, node: Node, total: int) -> int:
    """A count for one sample; what does not grow with the batch is counted whole, and said so."""
    if walk.is_fed(node) and total % walk.batch == 0:
        return total // walk.batch
    walk.note(node, "does not scale with the batch: its cost is counted whole for each sample")
    return total


def readable(walk: Walk, node: Node, source: Node, dim: int) -> IntArray:
    """Labels of the dimension that a layer reads; frozen new ones where it is not tracked."""
    labels = walk.axis(source, dim)
    if labels is None:
        labels = walk.table.fresh(walk.shape(source)[dim])
        walk.table.freeze(
            labels, "reads a dimension that carries no channels, or that no handler could follow"
        )
    return labels


def keep_others(walk: Walk, source: Node, dim: int, reason: str) -> None:
    """Keep every dimension but one: the cost of a layer is a product of its two sides only."""
    axes = walk.axes(source)
    for d, labels in enumerate(axes):
        if d != dim % len(axes):
            walk.table.freeze(labels, reason)


def produced(walk: Walk, weight: Node, dim: int) -> IntArray:
    """Labels of the dimension of a weight that makes channels; frozen new ones where it is not tracked."""
    labels = walk.axis(weight, dim)
    if labels is None:
        labels = walk.table.fresh(walk.shape(weight)[dim])
        walk.table.freeze(labels, UNFOLLOWED_WEIGHT)
    return labels


def _grouped(walk: Walk, node: Node, weight: Node, in_labels: IntArray, groups: int) -> IntArray:
    """Output labels of a grouped convolution.

    Where a group has one input or one output the group goes as a whole (depthwise, with any multiplier). Otherwise
    units are free within each group, but every group keeps equally many, so that the result is again a grouped
    convolution.
    """
    transposed = "transpose" in node.target._schema.name  # type: ignore[union-attr]
    local = walk.shape(weight)[1]
    name = walk.parameter(weight)
    if transposed:
        walk.table.merge(walk.axis(weight, 0), in_labels, UNFOLLOWED_WEIGHT)
        known = walk.segmented.get(name or "")
        out_labels = known[1] if known is not None else walk.table.fresh(groups * local)
        listed = out_labels
    else:
        out_labels = produced(walk, weight, 0)
        listed = in_labels
    if name is None or walk.axis(weight, 0) is None:
        walk.table.freeze(in_labels, "read by a grouped convolution whose weight is computed")
        walk.table.freeze(out_labels, "made by a grouped convolution whose weight is computed")
    else:
        _, first = walk.segmented.setdefault(name, (groups, listed))
        walk.table.merge(first, listed, UNFOLLOWED_WEIGHT)
    walk.table.freeze(
        walk.axis(weight, 1) if local > 1 else None, "local to the groups of a grouped convolution"
    )
    ins, outs = in_labels.reshape(groups, -1), out_labels.reshape(groups, -1)
    if ins.shape[1] == 1 or outs.shape[1] == 1:
        walk.table.merge_columns(np.concatenate([ins, outs], axis=1).T)
    else:
        for labels in (in_labels, out_labels):
            walk.table.add_runs(
                labels, groups, "a grouped convolution keeps equally many channels in each group"
            )
    return out_labels


def _channels(in_labels: IntArray, out_labels: IntArray, groups: int) -> dict[str, IntArray]:
    values = {"in_channels": in_labels, "out_channels": out_labels}
    if groups > 1 and len(in_labels) == groups:
        values["groups"] = in_labels
    elif groups > 1 and len(out_labels) == groups:
        values["groups"] = out_labels
    return values


def weight_name(walk: Walk, weight: Node, in_labels: IntArray, out_labels: IntArray) -> str:
    """State-dict name of a layer's weight; empty, and the layer kept whole, where it is no parameter."""
    name = walk.parameter(weight)
    if name is None:
        for labels in (in_labels, out_labels):
            walk.table.freeze(labels, "belongs to a layer whose weight is no parameter of the model")
    return name or ""


HANDLERS: dict[str, Handler] = {
    **{f"aten::conv{n}d": convolution for n in (1, 2, 3)},
    **{f"aten::conv_transpose{n}d": convolution for n in (1, 2, 3)},
    "aten::linear": linear,
}
