"""Sums, means, norms and extrema over dimensions, and softmax: of the kept entries, as in a smaller network."""

from __future__ import annotations

import operator

from torch.fx import Node

from qcqp_prune.graph.axes import Axes
from qcqp_prune.graph.ops.joins import pointwise
from qcqp_prune.graph.walk import Handler, Walk, op_name


def reduced_dims(walk: Walk, node: Node) -> list[int]:
    """The dimensions that a reduction removes, all of them where it names none."""
    rank = len(walk.shape(walk.tensor_inputs(node)[0]))
    dims = walk.arg(node, "dim")
    if dims is None or dims == []:
        return list(range(rank))
    return [d % rank for d in (dims if isinstance(dims, list | tuple) else [dims])]


def reduction(walk: Walk, node: Node) -> Axes | list[Axes]:
    """A tracked dimension may be reduced: what remains of it afterwards is not tracked any more."""
    axes = walk.axes(walk.tensor_inputs(node)[0])
    dims = reduced_dims(walk, node)
    if op_name(node) == "aten::sum":
        walk.summed += [labels for d in dims if (labels := axes[d]) is not None]
    if walk.arg(node, "keepdim", False):
        out: Axes = [None if d in dims else labels for d, labels in enumerate(axes)]
    else:
        out = [labels for d, labels in enumerate(axes) if d not in dims]
    value = node.meta["val"]
    return [list(out) for _ in value] if isinstance(value, list | tuple) else out


def extremum(walk: Walk, node: Node) -> Axes | list[Axes]:
    """``max`` and ``min``: of two tensors, of a whole one, or along a dimension with the places where they stand."""
    if len(walk.tensor_inputs(node)) > 1:
        return pointwise(walk, node)
    places = [u for u in node.users if u.target is operator.getitem and u.args[1] == 1 and u.users]
    if places:
        return by_position(walk, node)
    return reduction(walk, node)


def by_position(walk: Walk, node: Node) -> Axes | list[Axes]:
    """A reduction that tells positions: they keep their meaning only where all are kept."""
    axes = walk.axes(walk.tensor_inputs(node)[0])
    for d in reduced_dims(walk, node):
        walk.table.freeze(axes[d], "its channels are told apart by number (argmax)")
    return reduction(walk, node)


def softmax(walk: Walk, node: Node) -> Axes:
    """Over the kept entries; the layout stays."""
    return list(walk.axes(walk.tensor_inputs(node)[0]))


def ordered(walk: Walk, node: Node) -> Axes | list[Axes]:
    """Cumulative sums, sorting, flips: the order along a dimension matters, so it stays whole."""
    source = walk.tensor_inputs(node)[0]
    axes = list(walk.axes(source))
    dims = walk.arg(node, "dim", walk.arg(node, "dims", -1))
    for d in dims if isinstance(dims, list | tuple) else [dims]:
        walk.table.freeze(axes[int(d)], "its order along channels matters to an operator")
        axes[int(d)] = None
    value = node.meta["val"]
    return [list(axes) for _ in value] if isinstance(value, list | tuple) else axes


_REDUCTIONS = [
    "mean",
    "sum",
    "amax",
    "amin",
    "prod",
    "logsumexp",
    "var",
    "std",
    "var_mean",
    "linalg_vector_norm",
]
ORDERED = ["cumsum", "cumprod", "logcumsumexp", "cummax", "cummin", "flip", "sort", "topk"]

HANDLERS: dict[str, Handler] = {
    **{f"aten::{name}": reduction for name in _REDUCTIONS},
    **{f"aten::{name}": extremum for name in ("max", "min")},
    **{f"aten::{name}": by_position for name in ("argmax", "argmin")},
    **{f"aten::{name}": softmax for name in ("softmax", "log_softmax", "_softmax", "_log_softmax")},
    **{f"aten::{name}": ordered for name in ORDERED},
}
