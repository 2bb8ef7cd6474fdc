"""Which part of a reshaped dimension stands for attention heads, and which for the dimensions of each.

A width of 768 that is reshaped to 12 x 64 may lose whole rows or whole columns. Which of them are heads shows further
on: a head is a dimension over which a product of matrices is repeated, its dimensions are rows or columns of these.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch.fx import Node

from qcqp_prune.graph.blocks import blocks
from qcqp_prune.graph.walk import argument, is_pointwise, op_name

Places = Mapping[int, frozenset[int]]
"""Where each dimension of the reshaped tensor stands in a later one; dimensions that left are missing."""

PRODUCTS = {
    "aten::matmul": slice(0, 2),
    "aten::bmm": slice(0, 2),
    "aten::baddbmm": slice(1, 3),
    "aten::scaled_dot_product_attention": slice(0, 3),
}
"""Batched products, and which of their arguments are multiplied."""

VIEWS = {
    "view",
    "reshape",
    "_unsafe_view",
    "flatten",
    "unflatten",
    "view_as",
    "reshape_as",
    "_reshape_alias",
}
_KEPT = {
    *("clone", "contiguous", "dropout", "to", "_to_copy", "alias", "detach", "expand", "expand_as"),
    *("type_as", "layer_norm", "rms_norm", "softmax", "_softmax", "linalg_vector_norm"),
    *("slice", "narrow", "roll", "flip", "cat", "concat", "getitem"),
    *("zeros_like", "empty_like"),
    *("split", "chunk", "split_with_sizes", "unsafe_split", "unsafe_chunk", "tensor_split"),
}
_FARTHEST = 256
"""Operators that are looked at behind one reshape."""


def head_dimension(node: Node, dims: list[int], *, size: bool = False) -> int | None:
    """The dimension of a reshaped tensor that is a batch dimension of the products that it goes into.

    Args:
        node: the reshape.
        dims: the dimensions in question.
        size: ask for the one that is a row or column of the matrices instead.

    Returns:
        One of ``dims``, or None where no product of matrices tells.
    """
    front: list[tuple[Node, Places]] = [(node, {d: frozenset([d]) for d in dims})]
    seen = {node}
    while front and len(seen) < _FARTHEST:
        source, places = front.pop(0)
        for user in source.users:
            if user in seen:
                continue
            if op_name(user) in PRODUCTS and source in user.args[PRODUCTS[op_name(user)]]:
                found = _in_product(source, places, size=size)
                if found is not None:
                    return found
                continue
            after = _carried(user, source, places)
            if after:
                seen.add(user)
                front.append((user, after))
    return None


def _in_product(source: Node, places: Places, *, size: bool) -> int | None:
    rank = len(source.meta["val"].shape)
    return next((d for d, now in places.items() if any((p >= rank - 2) == size for p in now)), None)


def _carried(user: Node, source: Node, places: Places) -> Places | None:
    """Where the dimensions stand after an operator; None where it cannot be told."""
    name = op_name(user).removeprefix("aten::")
    before, after = _shape(source), _shape(user)
    if before is None or after is None or (name == "type_as" and source is not user.args[0]):
        return None
    if name in VIEWS:
        return _through_view(before, after, places)
    if name == "permute":
        order = [int(d) % len(before) for d in argument(user, "dims")]
        return _moved(places, {old: new for new, old in enumerate(order)})
    if name in ("transpose", "swapaxes", "swapdims"):
        a, b = (int(argument(user, f"dim{k}", argument(user, f"axis{k}"))) % len(before) for k in (0, 1))
        return _moved(places, {d: {a: b, b: a}.get(d, d) for d in range(len(before))})
    if name in ("select", "unbind"):
        gone = int(argument(user, "dim", 0)) % len(before)
        return _moved(places, {d: d - (d > gone) for d in range(len(before)) if d != gone})
    if name in ("view_as_complex", "view_as_real"):  # the last dimension goes or comes
        return _moved(places, {d: d for d in range(min(len(before), len(after)))})
    if name in ("unsqueeze", "stack"):
        new = int(argument(user, "dim", 0)) % len(after)
        return _moved(places, {d: d + (d >= new) for d in range(len(before))})
    if name == "squeeze":
        dims = argument(user, "dim", list(range(len(before))))
        chosen = {int(d) % len(before) for d in (dims if isinstance(dims, list | tuple) else [dims])}
        kept = [d for d in range(len(before)) if not (d in chosen and before[d] == 1)]
        return _moved(places, {old: new for new, old in enumerate(kept)})
    if name in _KEPT or is_pointwise(user):
        lead = len(after) - len(before)  # broadcasting aligns from the right
        return _moved(places, {d: d + lead for d in range(len(before))}) if lead >= 0 else None
    return None


def _moved(places: Places, to: Mapping[int, int]) -> Places:
    moved = {d: frozenset(to[p] for p in now if p in to) for d, now in places.items()}
    return {d: now for d, now in moved.items() if now}


def _through_view(before: tuple[int, ...], after: tuple[int, ...], places: Places) -> Places | None:
    """A dimension that is merged or split again stands in all the new ones of its block."""
    out: dict[int, frozenset[int]] = {}
    for old, new in blocks(before, after):
        inside = [d for d, now in places.items() if now & set(old)]
        if len(inside) > 1:
            return None  # merged with each other: from here on they are one
        for d in inside:
            out[d] = out.get(d, frozenset()) | frozenset(new)
    return out


def _shape(node: Node) -> tuple[int, ...] | None:
    value: Any = node.meta.get("val")
    if isinstance(value, list | tuple) and value:
        value = value[0]
    return tuple(int(s) for s in value.shape) if isinstance(value, torch.Tensor) else None
