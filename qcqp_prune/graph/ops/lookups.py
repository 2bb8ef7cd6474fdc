"""Look-ups and sums by number: embeddings, gather, index_select, index_add. What is numbered stays, all else passes."""

from __future__ import annotations

from torch.fx import Node

from qcqp_prune.graph.axes import Axes
from qcqp_prune.graph.ops.joins import joined
from qcqp_prune.graph.walk import Handler, Walk

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
    out: Axes = []
    for d, (labels, own) in enumerate(zip(axes, walk.axes(index), strict=True)):
        if d == dim:
            walk.table.freeze(labels, NUMBERED)
            walk.table.freeze(own, NUMBERED)
            out.append(None)
        else:
            part = None if labels is None else labels[: shape[d]]
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


HANDLERS: dict[str, Handler] = {
    "aten::embedding": embedding,
    "aten::index_select": index_select,
    "aten::gather": gather,
    "aten::index_add": index_add,
}
