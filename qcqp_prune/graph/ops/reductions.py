"""Sums, means and extrema over dimensions: of the kept entries, as in a smaller network."""

from __future__ import annotations

from torch.fx import Node

from qcqp_prune.graph.axes import Axes
from qcqp_prune.graph.walk import Handler, Walk


def reduced_dims(walk: Walk, node: Node) -> list[int]:
    """The dimensions that a reduction removes, all of them where it names none."""
    rank = len(walk.shape(walk.tensor_inputs(node)[0]))
    dims = walk.arg(node, "dim")
    if dims is None or dims == []:
        return list(range(rank))
    return [d % rank for d in (dims if isinstance(dims, list | tuple) else [dims])]


def reduction(walk: Walk, node: Node) -> Axes:
    """A tracked dimension may be reduced: what remains of it afterwards is not tracked any more."""
    axes = walk.axes(walk.tensor_inputs(node)[0])
    dims = reduced_dims(walk, node)
    if walk.arg(node, "keepdim", False):
        return [None if d in dims else labels for d, labels in enumerate(axes)]
    return [labels for d, labels in enumerate(axes) if d not in dims]


HANDLERS: dict[str, Handler] = {f"aten::{name}": reduction for name in ("mean", "sum", "amax", "amin")}
