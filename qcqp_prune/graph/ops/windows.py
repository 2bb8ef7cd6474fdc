"""Windows cut out of a tensor (unfold, im2col), and put together again (col2im)."""

from __future__ import annotations

import math

import numpy as np
from torch.fx import Node

from qcqp_prune.graph.axes import Axes
from qcqp_prune.graph.walk import Handler, Walk

_SLID_OVER = "cut into windows along it"


def unfold(walk: Walk, node: Node) -> Axes:
    """``x.unfold(dim, size, step)``: the windows stand in ``dim``, what is in them in a new last dimension."""
    axes = list(walk.axes(walk.arg(node, "self")))
    dim = int(walk.arg(node, "dimension"))
    walk.table.freeze(axes[dim], _SLID_OVER)
    axes[dim] = None
    return [*axes, None]


def im2col(walk: Walk, node: Node) -> Axes:
    """``F.unfold``: channel ``c`` becomes the rows ``(c, k)`` for each position ``k`` of the window."""
    axes = walk.axes(walk.arg(node, "self"))
    for labels in axes[-2:]:
        walk.table.freeze(labels, _SLID_OVER)
    labels, size = axes[-3], math.prod(walk.arg(node, "kernel_size"))
    return [*axes[:-3], None if labels is None else np.repeat(labels, size), None]


def col2im(walk: Walk, node: Node) -> Axes:
    """``F.fold``: the rows ``(c, k)`` are added up to channel ``c``, so they go together."""
    axes = walk.axes(walk.arg(node, "self"))
    walk.table.freeze(axes[-1], _SLID_OVER)
    labels, size = axes[-2], math.prod(walk.arg(node, "kernel_size"))
    if labels is not None:
        labels = walk.table.merge_columns(np.ascontiguousarray(labels.reshape(-1, size).T))
    return [*axes[:-2], labels, None, None]


HANDLERS: dict[str, Handler] = {
    "aten::unfold": unfold,
    "aten::im2col": im2col,
    "aten::col2im": col2im,
}
