"""Products of two tensors (matmul, bmm, baddbmm) and scaled dot-product attention.

A product costs ``batch * m * k * n`` multiply-adds. What it is repeated over (heads), what it sums over and what
remains can each carry units. A resource is a sum of products of two counts, so one dimension of the result and the one
that is summed over may be prunable; all others are kept.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from torch.fx import Node

from qcqp_prune.graph import copies
from qcqp_prune.graph.axes import Axes, Labels
from qcqp_prune.graph.channels import IntArray
from qcqp_prune.graph.ops.convolution import per_sample
from qcqp_prune.graph.ops.joins import broadcast
from qcqp_prune.graph.units import REASONS
from qcqp_prune.graph.walk import FoundLayer, Handler, Walk

HEAD_SIZE = "the size of a head sets the scale of attention: whole heads may go, or head_dim among the units"
ONE_PLACE = "multiplied in a product in which another dimension is pruned"
_NOT_FOLLOWED = "multiplied with a tensor that no handler could follow"


def matmul(walk: Walk, node: Node) -> Axes:
    """``matmul``, ``bmm`` and ``mm``: batch dimensions are joined, the inner one is summed over."""
    return _product(walk, node, walk.arg(node, "self"), walk.arg(node, "other", walk.arg(node, "mat2")))


def added_product(walk: Walk, node: Node) -> Axes:
    """``addmm`` and ``baddbmm``: a product with a bias or a mask added to it."""
    added = walk.arg(node, "self")
    a, b = (walk.arg(node, f"batch{k}", walk.arg(node, f"mat{k}")) for k in (1, 2))
    out = _product(walk, node, a, b)
    for back in range(-len(walk.shape(added)), 0):
        if walk.shape(added)[back] != walk.shape(node)[back]:
            walk.table.freeze(walk.axis(added, back), "a single channel is broadcast over many")
        elif back in walk.repeated.get(added, ()):
            copies.tie(walk, out[back], [walk.repeated[added][back]])
        elif walk.arg(node, "beta", 1) != 0:
            out[back] = walk.table.merge(walk.axis(added, back), out[back], _NOT_FOLLOWED)
    return out


def _product(walk: Walk, node: Node, a: Node, b: Node) -> Axes:
    left, right = walk.axes(a), walk.axes(b)
    inner = walk.table.merge(left[-1], right[-2] if len(right) > 1 else right[-1], _NOT_FOLLOWED)
    ends: Axes = [left[-2]] if len(left) > 1 else []
    ends += [right[-1]] if len(right) > 1 else []
    many = [n for n in (a, b) if len(walk.shape(n)) > 2]
    out = [*broadcast(walk, node, many, len(walk.shape(node)) - len(ends)), *ends]
    if min(len(left), len(right)) == 1:
        return out  # a product with a vector: PyTorch counts none of these
    elements = math.prod(walk.shape(node))
    totals = elements * walk.shape(a)[-1], elements
    weight = walk.parameter(b) if len(right) == 2 else None
    if weight is None:
        _experts(walk, node, (a, b))
        _count(walk, node, str(node.target).split(".")[1], (inner, _the_free_one(walk, out)), totals)
        return out
    for labels in out[:-1]:
        walk.table.freeze(labels, "a linear map over another dimension is applied at each of its positions")
    _count(walk, node, "linear_transposed", (inner, out[-1]), totals, weight=weight)
    if isinstance(out[-1], np.ndarray):
        walk.attribute(node, {"nf": out[-1]})
    return out


def _experts(walk: Walk, node: Node, operands: tuple[Node, Node]) -> None:
    """A product that is repeated over a dimension of a parameter has a matrix for each expert there."""
    for n in operands:
        for labels in [] if walk.is_fed(n) else walk.axes(n)[:-2]:
            others = [x for m in operands for x in walk.axes(m)[:-2] if x is not None]
            if labels is None or any(walk.units.is_marked(x) for x in others):
                continue  # heads of queries that are parameters
            if "experts" not in walk.units.asked(walk, labels, walk.module_path(node)):
                walk.table.freeze(labels, REASONS["experts"])


def attention(walk: Walk, node: Node) -> Axes:
    """``softmax(q k^T) v``: whole heads may go, with the same heads of queries, keys and values.

    It is counted as its two products, as PyTorch's plain implementation computes it.
    """
    q, k, v = (walk.arg(node, name) for name in ("query", "key", "value"))
    mask, shape = walk.arg(node, "attn_mask"), walk.shape(node)
    for n, d in ((q, -2), (k, -2), (v, -2)):
        walk.table.freeze(walk.axis(n, d), "a position that is attended to")
    size = walk.table.merge(walk.axis(q, -1), walk.axis(k, -1), _NOT_FOLLOWED)
    if walk.arg(node, "scale") is None and not _may_shrink(walk, node, size):
        walk.table.freeze(size, HEAD_SIZE)
    batch = _heads(walk, node, (q, k, v), grouped=bool(walk.arg(node, "enable_gqa", False)))
    if isinstance(mask, Node):
        batch = _masked(walk, node, mask, batch)
    values = walk.axis(v, -1)
    free = _the_free_one(walk, [*batch, values])
    positions = math.prod(shape[:-1])
    scores = positions * walk.shape(k)[-2]
    head = free if free is not None and free is not values else None
    _count(walk, node, "attention_scores", (size, head), (scores * walk.shape(q)[-1], scores))
    _count(walk, node, "attention_values", (None, free), (scores * shape[-1], positions * shape[-1]))
    return [*batch, walk.axis(q, -2), values]


def _may_shrink(walk: Walk, node: Node, size: Labels) -> bool:
    """Whether dimensions of heads are asked for: the graph is then rewritten, with the dense scale written down."""
    return size is not None and "head_dim" in walk.units.asked(walk, size, walk.module_path(node))


def _heads(walk: Walk, node: Node, inputs: tuple[Node, Node, Node], *, grouped: bool) -> Axes:
    """Batch dimensions of queries, keys and values, joined; each key may serve several queries."""
    rank = len(walk.shape(node)) - 2
    if not grouped:
        return broadcast(walk, node, list(inputs), rank)
    q, k, v = inputs
    out = list(walk.axes(q)[:rank])
    for n in (k, v):
        labels = walk.axis(n, -3)
        if labels is not None:
            labels = np.repeat(labels, walk.shape(q)[-3] // walk.shape(n)[-3])
        out[-1] = walk.table.merge(out[-1], labels, _NOT_FOLLOWED)
    return out


def _masked(walk: Walk, node: Node, mask: Node, batch: Axes) -> Axes:
    """Heads may have masks or biases of their own."""
    out = list(batch)
    shape, rank = walk.shape(mask), len(walk.shape(node))
    for back in range(-len(shape), 0):
        labels, place = walk.axis(mask, back), rank + back
        if back >= -2 or shape[back] != walk.shape(node)[back]:
            walk.table.freeze(labels, "a position that is attended to")
        elif back in walk.repeated.get(mask, ()):
            copies.tie(walk, out[place], [walk.repeated[mask][back]])
        else:
            out[place] = walk.table.merge(out[place], labels, _NOT_FOLLOWED)
    return out


def _the_free_one(walk: Walk, axes: Axes) -> Labels:
    """The first dimension that is not kept so far; the others are from now on."""
    free = [labels for labels in axes if labels is not None and not walk.table.is_frozen(labels)]
    for labels in free[1:]:
        walk.table.freeze(labels, ONE_PLACE)
    return free[0] if free else None


def _count(
    walk: Walk,
    node: Node,
    op: str,
    sides: tuple[Labels, Labels],
    totals: tuple[int, int],
    *,
    weight: str = "",
) -> None:
    """Record the cost of a product as a layer.

    Args:
        walk: the walk.
        node: the operator.
        op: what to call it.
        sides: labels that are summed over, and labels of the result; None for what is kept.
        totals: multiply-adds, and elements of the result.
        weight: the parameter that is multiplied with, ``(inputs, outputs)``.
    """
    macs, elements = (per_sample(walk, node, total) for total in totals)
    if weight:
        inner, outer = (_tracked(walk, labels) for labels in sides)
    else:
        inner, outer = (_without_batch(walk, node, labels) for labels in sides)
        if walk.is_fed(node):  # else it is a table that is looked up, such as position embeddings
            walk.products += [labels for labels in sides if labels is not None]
            walk.summed += [labels for labels in sides[:1] if labels is not None]
    if macs % (len(inner) * len(outer)) or elements % len(outer):
        for labels in sides:
            walk.table.freeze(labels, "a dimension that holds samples and channels in an order of its own")
        inner = outer = walk.single()
    walk.layers.append(
        FoundLayer(
            node,
            op,
            weight,
            inner,
            outer,
            1,
            macs_per_pair=macs // (len(inner) * len(outer)),
            out_elements=elements // len(outer),
            itemsize=_itemsize(node, op),
        )
    )


def _tracked(walk: Walk, labels: Labels) -> IntArray:
    return walk.single() if labels is None else labels


def _without_batch(walk: Walk, node: Node, labels: Labels) -> IntArray:
    """Labels of one sample where samples and heads share a dimension; one kept position where nothing can go."""
    if labels is None or walk.table.is_frozen(labels):
        return walk.single()
    if walk.is_fed(node) and len(labels) % walk.batch == 0:
        rows = labels.reshape(walk.batch, -1)
        if (rows == rows[0]).all():
            one_sample: IntArray = rows[0]
            return one_sample
    return labels


def _itemsize(node: Node, op: str) -> int:
    """Bytes of an element; PyTorch's plain attention holds half precision in single precision."""
    value: Any = node.meta["val"]
    size = int(value.element_size())
    return max(size, 4) if op.startswith("attention") else size


HANDLERS: dict[str, Handler] = {
    "aten::matmul": matmul,
    "aten::bmm": matmul,
    "aten::mm": matmul,
    "aten::addmm": added_product,
    "aten::baddbmm": added_product,
    "aten::scaled_dot_product_attention": attention,
}
