"""Additions: strict sharing ties the operands, free sharing gives the result channels of its own."""

from __future__ import annotations

from typing import cast

import numpy as np
from torch._ops import OpOverload
from torch.fx import Node

from qcqp_prune.graph.axes import Axes, Labels, Sum
from qcqp_prune.graph.channels import BoolArray, IntArray
from qcqp_prune.graph.ops.joins import aligned, joined
from qcqp_prune.graph.walk import ADDITIONS, Handler, Walk


def addition(walk: Walk, node: Node) -> Axes:
    """A sum or difference of two tensors.

    Under free sharing, along the one dimension in which both operands carry different channels, the result's units are
    wholes with the operands' units as parts. Where one operand is a parameter, padding or broadcast there is nothing to
    share: that operand follows the other.
    """
    sides = aligned(walk, node, walk.tensor_inputs(node), len(walk.shape(node)))
    differing = [d for d, pair in enumerate(sides) if _differ(walk, pair)]
    if not walk.free_sums or not differing:
        return [joined(walk, pair) for pair in sides]
    why = _why_strict(walk, node, sides, differing)
    if why:
        walk.note(node, f"shared strictly: {why}")
        return [joined(walk, pair) for pair in sides]
    return [
        _shared(walk, node, pair, d - len(sides)) if d in differing else joined(walk, pair)
        for d, pair in enumerate(sides)
    ]


def _differ(walk: Walk, sides: list[Labels]) -> bool:
    """Whether two operands carry channels of which some are not tied to each other."""
    return (
        len(sides) == 2
        and all(labels is not None for labels in sides)
        and bool(_apart(walk, cast("list[IntArray]", sides)).any())
    )


def _apart(walk: Walk, sides: list[IntArray]) -> BoolArray:
    """The positions at which something puts out both operands, and they are not tied to each other."""
    a, b = (walk.table.find(labels) for labels in sides)
    apart: BoolArray = (a != b) & walk.table.is_made(sides[0]) & walk.table.is_made(sides[1])
    return apart


def _why_strict(walk: Walk, node: Node, sides: list[list[Labels]], differing: list[int]) -> str:
    if len(differing) > 1:
        return "its operands differ along several dimensions, and what is left would be no rectangle"
    if any(_is_spread(walk, pair) for d, pair in enumerate(sides) if d not in differing):
        return "one operand is broadcast along channels of the other, and what is left would be no rectangle"
    if cast(OpOverload, node.target)._schema.is_mutable and _is_seen_later(node):
        return "it is done in place, and the old value is used again"
    return ""


def _is_spread(walk: Walk, sides: list[Labels]) -> bool:
    """Whether only one operand has something of its own along a dimension, and that is channels."""
    return len(sides) == 1 and sides[0] is not None and bool(walk.table.is_made(sides[0]).any())


def _is_seen_later(node: Node) -> bool:
    """Whether anything that shares memory with the tensor that an addition overwrites is read after it."""
    base = cast(Node, node.args[0])
    while _shares_memory(base):
        base = base.all_input_nodes[0]
    if base.op == "placeholder":
        return True
    front, seen = [base], {base, node}
    while front:
        for user in front.pop().users:
            if user is not node and user > node:
                return True
            if user not in seen and _shares_memory(user):
                seen.add(user)
                front.append(user)
    return False


def _shares_memory(node: Node) -> bool:
    """Whether an operator returns its first argument or a view of it."""
    schema = getattr(node.target, "_schema", None)
    return bool(schema and any(r.alias_info is not None for r in schema.returns) and node.all_input_nodes)


def _shared(walk: Walk, node: Node, sides: list[Labels], dim: int) -> IntArray:
    a, b = (cast(IntArray, labels) for labels in sides)
    both = _apart(walk, [a, b])
    whole = (a.copy(), b.copy())
    walk.table.merge(a[~both], b[~both], "")
    pairs = np.stack([walk.table.find(a), walk.table.find(b)], axis=1)
    # Positions of one channel (a flattened map has many) stay positions of one channel.
    unique, inverse = np.unique(pairs[both], axis=0, return_inverse=True)
    out = a.copy()
    out[both] = walk.table.fresh(len(unique))[inverse.reshape(-1)]
    walk.table.make(out[both])
    parts = (a[both], b[both])
    index = walk.addition_number(node)
    walk.table.sums.append(Sum(node.name, index, dim, np.flatnonzero(both), out[both], parts, whole))
    return out


HANDLERS: dict[str, Handler] = dict.fromkeys(ADDITIONS, addition)
