"""Sizes that are written into the operators of an exported graph, replaced by what is kept of them."""

from __future__ import annotations

import math
import operator
from typing import Any

import torch
from torch.fx import Node

from qcqp_prune.apply.rewrite_joins import Kept, Positions
from qcqp_prune.graph.walk import CONSTANTS, op_name


def with_kept_sizes(node: Node, positions: Positions) -> None:
    """Replace the sizes written into one call by the kept ones, in place.

    Args:
        node: a call of an operator in the exported graph; of the operators before it the sizes are replaced already.
        positions: which positions of each tensor are kept.
    """
    name = op_name(node).removeprefix("aten::")
    kept = positions.kept
    out: Any = kept.get(node)
    if name in ("view", "reshape", "_unsafe_view", "_reshape_alias"):
        if node.target is torch.ops.aten.view.default:  # a smaller tensor may lie in memory in another order
            node.target = torch.ops.aten.reshape.default
        joined = positions.joined[node]
        _set(node, 1, _computed(node, _sizes(node.args[1], joined), joined))
    elif name == "expand":
        _set(node, 1, _sizes(node.args[1], positions.joined[node]))
    elif name in ("repeat", "tile"):
        _patch_repeat(node, positions)
    elif op_name(node) in CONSTANTS:
        place = 1 if name.startswith("new_") else 0
        _set(node, place, _sizes(node.args[place], positions.joined[node]))
    elif name == "unflatten":
        dim = int(node.args[1]) % (len(out) - len(node.args[2]) + 1)  # type: ignore[arg-type]
        _set(node, 2, _sizes(node.args[2], positions.joined[node][dim:]))
    elif name in ("chunk", "split", "split_with_sizes", "unsafe_chunk", "unsafe_split", "tensor_split"):
        _patch_split(node, out)
    elif name in ("slice", "narrow"):
        _patch_slice(node, kept, name)
    elif name in ("pad", "constant_pad_nd"):
        _patch_pad(node, positions)
    elif name in ("layer_norm", "rms_norm"):
        shape = node.args[1]
        _set(node, 1, _sizes(shape, out[-len(shape) :]))  # type: ignore[arg-type]
    elif name == "scaled_dot_product_attention":
        _patch_scale(node, kept)
    elif name == "group_norm" and node.args[1] == len(out[1]):
        _set(node, 1, int(out[1].sum()))
    elif name.startswith("conv"):
        _patch_groups(node, kept)


def _patch_scale(node: Node, kept: dict[Node, Any]) -> None:
    """The scale of attention is the dense one's, also where it is worked out from the size of a head."""
    dims = kept[node.args[0]][-1]  # type: ignore[index]
    if node.kwargs.get("scale") is None and not dims.all():
        node.kwargs = {**node.kwargs, "scale": 1 / math.sqrt(len(dims))}


def _sizes(written: Any, kept: Kept) -> list[Any]:
    """Written sizes with those of pruned dimensions replaced; -1 and computed sizes stay."""
    return [
        int(k.sum()) if isinstance(size, int) and size != -1 and not k.all() else size
        for size, k in zip(written, kept, strict=False)
    ]


def _computed(node: Node, sizes: list[Any], kept: Kept) -> list[Any]:
    """Sizes that the graph computes, such as samples times heads, in the proportion that is kept."""
    out = []
    for size, k in zip(sizes, kept, strict=True):
        if isinstance(size, Node) and not k.all():
            share = math.gcd(int(k.sum()), len(k))
            with node.graph.inserting_before(node):
                size = node.graph.call_function(operator.mul, (size, int(k.sum()) // share))
                size = node.graph.call_function(operator.floordiv, (size, len(k) // share))
        out.append(size)
    return out


def _set(node: Node, position: int, value: Any) -> None:
    args = list(node.args)
    args[position] = value
    node.args = tuple(args)


def _dim(node: Node, rank: int, position: int) -> int:
    value = node.args[position] if len(node.args) > position else node.kwargs.get("dim", 0)
    return int(value) % rank  # type: ignore[arg-type]


def _patch_repeat(node: Node, positions: Positions) -> None:
    """Where whole copies are left out, fewer are made."""
    out = positions.joined[node]
    before = positions.joined[node.args[0]]  # type: ignore[index]
    counts: list[Any] = list(node.args[1])  # type: ignore[arg-type]
    for k in range(1, min(len(out), len(counts)) + 1):
        if not out[-k].all():
            counts[-k] = int(out[-k].sum()) // (int(before[-k].sum()) if k <= len(before) else 1)
    _set(node, 1, counts)


def _patch_split(node: Node, out: list[Kept]) -> None:
    dim = _dim(node, len(out[0]), 2)
    if all(piece[dim].all() for piece in out):
        return
    sizes = [int(piece[dim].sum()) for piece in out]
    node.target = torch.ops.aten.split_with_sizes.default
    node.args, node.kwargs = (node.args[0], sizes, dim), {}


def _patch_slice(node: Node, kept: dict[Node, Any], name: str) -> None:
    source = kept[node.args[0]]  # type: ignore[index]
    dim = _dim(node, len(source), 1)
    along = source[dim]
    if along.all():
        return
    start = node.args[2] if len(node.args) > 2 else None
    first = 0 if start is None else int(start)  # type: ignore[arg-type]
    if name == "narrow":
        stop = first + int(node.args[3])  # type: ignore[arg-type]
    else:
        stop = len(along) if len(node.args) < 4 or node.args[3] is None else int(node.args[3])  # type: ignore[arg-type]
    first, stop, _ = slice(first, stop).indices(len(along))
    begin, length = int(along[:first].sum()), int(along[first:stop].sum())
    node.args = (node.args[0], dim, begin, length if name == "narrow" else begin + length)


def _patch_pad(node: Node, positions: Positions) -> None:
    out, joined = positions.kept[node], positions.joined[node]
    amounts = list(node.args[1])  # type: ignore[arg-type]
    for k in range(len(amounts) // 2):
        dim = len(out) - 1 - k
        before, after = amounts[2 * k], amounts[2 * k + 1]
        along = joined[dim]
        if out[dim].all() and along.all():
            continue
        amounts[2 * k] = int(along[:before].sum()) if before > 0 else before
        amounts[2 * k + 1] = int(along[len(along) - after :].sum()) if after > 0 else after
    _set(node, 1, amounts)


def _patch_groups(node: Node, kept: dict[Node, Any]) -> None:
    """Groups of a depthwise convolution go with their channels; those of any other one stay."""
    arguments = [a.name for a in node.target._schema.arguments]  # type: ignore[union-attr]
    position = arguments.index("groups")
    if len(node.args) <= position:
        return
    if isinstance(node.args[position], Node):
        return  # a group for each sample
    groups = int(node.args[position])  # type: ignore[arg-type]
    rows = kept[node.args[1]][0].reshape(groups, -1)  # type: ignore[index]
    _set(node, position, int(rows.any(1).sum()))
