"""Look-ups, sums and writes by number: embeddings, gather, index_add. What is numbered stays, all else passes."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node

from qcqp_prune.graph import copies
from qcqp_prune.graph.axes import Axes
from qcqp_prune.graph.ops.joins import joined
from qcqp_prune.graph.walk import Handler, Walk, argument

NUMBERED = "indexed by position"


def embedding(walk: Walk, node: Node) -> Axes:
    """Rows of a table, ``(rows, width) -> (..., width)``: every row stays, the width is that of the result."""
    table, indices = walk.arg(node, "weight"), walk.arg(node, "indices")
    rows, width = walk.axes(table)
    walk.table.freeze(rows, NUMBERED)
    if width is not None:
        walk.attribute(node, {"embedding_dim": width})
    return [*walk.axes(indices), width]


def index_select(walk: Walk, node: Node) -> Axes:
    """Some positions of one dimension."""
    source, index = walk.arg(node, "self"), walk.arg(node, "index")
    axes = list(walk.axes(source))
    dim = int(walk.arg(node, "dim")) % len(axes)
    for labels in (axes[dim], *walk.axes(index)):
        walk.table.freeze(labels, NUMBERED)
    axes[dim] = None
    return axes


def gather(walk: Walk, node: Node) -> Axes:
    """``out[i, j] = x[i, index[i, j]]``: along all other dimensions the index has the first positions of ``x``."""
    source, index = walk.arg(node, "self"), walk.arg(node, "index")
    axes, shape = walk.axes(source), walk.shape(node)
    dim = int(walk.arg(node, "dim")) % max(len(axes), 1)
    repeated = walk.repeated.get(index, {})
    out: Axes = []
    for d, (labels, own) in enumerate(zip(axes, walk.axes(index), strict=True)):
        if d == dim:
            walk.table.freeze(labels, NUMBERED)
            walk.table.freeze(own, NUMBERED)
            out.append(None)
        else:
            part = None if labels is None else labels[: shape[d]]
            if d - len(axes) in repeated:
                copies.tie(walk, part, [repeated[d - len(axes)]])
                out.append(part)
                continue
            out.append(walk.table.merge(part, own, "looked up by numbers that no handler could follow"))
    return out


def index_add(walk: Walk, node: Node) -> Axes:
    """``out[index[i]] += alpha * source[i]`` along one dimension; along all others both have the same positions."""
    target, source = walk.axes(walk.arg(node, "self")), walk.axes(walk.arg(node, "source"))
    dim = int(walk.arg(node, "dim")) % max(len(target), 1)
    for labels in (*target[dim : dim + 1], *source[dim : dim + 1], *walk.axes(walk.arg(node, "index"))):
        walk.table.freeze(labels, NUMBERED)
    return [
        own if d == dim else joined(walk, [own, added])
        for d, (own, added) in enumerate(zip(target, source, strict=True))
    ]


def where_filled(node: Node) -> tuple[Node, int] | None:
    """The condition of ``a[condition] = value`` and the dimension of ``a`` that its first one is.

    None where an ``index_put`` is anything else: numbers of positions, several values, or a sum.
    """
    indices: list[Any] = list(argument(node, "indices"))
    chosen = [d for d, index in enumerate(indices) if index is not None]
    if len(chosen) != 1 or argument(node, "accumulate") or argument(node, "values").meta["val"].numel() != 1:
        return None
    condition: Node = indices[chosen[0]]
    return (condition, chosen[0]) if condition.meta["val"].dtype == torch.bool else None


def index_put(walk: Walk, node: Node) -> Axes:
    """``a[condition] = value`` is ``where``; whatever else is written by number keeps all that it reads."""
    out, found = list(walk.axes(walk.arg(node, "self"))), where_filled(node)
    if found is None:
        walk.freeze_inputs(node, "written at positions that are given by numbers")
        return [None] * len(out)
    condition, first = found
    axes = walk.axes(condition)
    repeated = walk.repeated.get(condition, {})
    for d, labels in enumerate(axes):
        if d - len(axes) in repeated:
            copies.tie(walk, out[first + d], [repeated[d - len(axes)]])
        else:
            out[first + d] = walk.table.merge(
                out[first + d], labels, "filled where a condition holds that no handler could follow"
            )
    return out


HANDLERS: dict[str, Handler] = {
    "aten::embedding": embedding,
    "aten::index_select": index_select,
    "aten::gather": gather,
    "aten::index_add": index_add,
    "aten::index_put": index_put,
}
