"""Concatenation and its inverses: cat, stack, split, chunk, slice, select, pad, repeat."""

from __future__ import annotations

from typing import cast

import numpy as np
import torch
from torch.fx import Node

from qcqp_prune.graph import copies
from qcqp_prune.graph.axes import Axes, Labels, Layered
from qcqp_prune.graph.channels import IntArray
from qcqp_prune.graph.walk import Handler, Walk


def cat(walk: Walk, node: Node) -> Axes:
    """Positions follow one another along ``dim``; the other dimensions are joined."""
    inputs = cast("list[Node]", walk.arg(node, "tensors"))
    inputs = [n for n in inputs if walk.shape(n) != (0,)]
    rank = len(walk.shape(node))
    dim = int(walk.arg(node, "dim", 0)) % rank
    out: Axes = []
    for d in range(rank):
        sides = [walk.axis(n, d) for n in inputs]
        if d == dim:
            out.append(_concatenated(walk, inputs, sides, d))
        else:
            joined = sides[0]
            for labels in sides[1:]:
                joined = walk.table.merge(
                    joined, labels, "concatenated with a tensor that no handler could follow"
                )
            out.append(joined)
    return out


def _concatenated(walk: Walk, inputs: list[Node], sides: Axes, dim: int) -> Labels:
    if all(labels is None for labels in sides):
        return None
    parts = []
    for n, labels in zip(inputs, sides, strict=True):
        if labels is None:
            labels = walk.table.fresh(walk.shape(n)[dim])
            walk.table.freeze(labels, "concatenated from a tensor that carries no channels")
        parts.append(labels)
    return np.concatenate(parts)


def pieces(walk: Walk, node: Node) -> list[Axes]:
    """Split and chunk: consecutive runs of one dimension, sizes as the example shows them."""
    source = walk.tensor_inputs(node)[0]
    axes = walk.axes(source)
    dim = int(walk.arg(node, "dim", 0)) % len(axes)
    values = node.meta["val"]
    sizes = [int(v.shape[dim]) for v in values]
    labels = axes[dim]
    if labels is not None and len(set(sizes)) == 1:
        walk.table.add_runs(labels, len(sizes), "split into equal parts", required=False)
    starts = np.concatenate([[0], np.cumsum(sizes)])
    parts = [
        _part(walk, labels, np.arange(a, b))
        for a, b in zip(starts[:-1].tolist(), starts[1:].tolist(), strict=True)
    ]
    if parts[0] is not None and len(set(sizes)) == 1:
        walk.attribute(node, {"split_size": parts[0]})
    return [_with(axes, dim, part) for part in parts]


def unbind(walk: Walk, node: Node) -> list[Axes]:
    """One tensor for each position of a dimension, so all of its positions stay."""
    source = walk.tensor_inputs(node)[0]
    rank = len(walk.shape(source))
    dim, parts = int(walk.arg(node, "dim", 0)) % rank, walk.parts(source)
    if parts is not None and dim == 0:
        return parts
    axes = walk.axes(source)
    walk.table.freeze(axes[dim], "unbound position by position")
    return [axes[:dim] + axes[dim + 1 :] for _ in node.meta["val"]]


def slicing(walk: Walk, node: Node) -> Axes:
    """``x[..., start:end:step]``."""
    source = walk.tensor_inputs(node)[0]
    dim = int(walk.arg(node, "dim", 0)) % len(walk.shape(source))
    size, parts = walk.shape(source)[dim], walk.parts(source)
    start, end, step = walk.arg(node, "start"), walk.arg(node, "end"), int(walk.arg(node, "step", 1))
    if parts is not None and dim == 0:
        return Layered.of(parts[slice(start, end, step)])
    axes = walk.axes(source)
    whole = walk.shape(node)[dim] == size
    copies.move(walk, source, node, [d if d != dim or whole else None for d in range(len(axes))])
    if whole or axes[dim] is None:
        return list(axes)
    if step != 1:
        walk.table.freeze(axes[dim], "sliced with a step")
    return _with(axes, dim, _part(walk, axes[dim], np.arange(size)[slice(start, end, step)]))


def narrow(walk: Walk, node: Node) -> Axes:
    """``x.narrow(dim, start, length)``."""
    axes = walk.axes(walk.tensor_inputs(node)[0])
    dim = int(walk.arg(node, "dim")) % len(axes)
    start = walk.arg(node, "start")
    if not isinstance(start, int):
        walk.table.freeze(axes[dim], "sliced at a position that is computed")
        return _with(axes, dim, None)
    return _with(axes, dim, _part(walk, axes[dim], np.arange(start, start + walk.shape(node)[dim])))


def select(walk: Walk, node: Node) -> Axes:
    """One position of a dimension, by its number: the dimension stays whole so that the number keeps its meaning."""
    source = walk.tensor_inputs(node)[0]
    dim, parts = int(walk.arg(node, "dim")) % len(walk.shape(source)), walk.parts(source)
    if parts is not None and dim == 0:
        return parts[int(walk.arg(node, "index"))]
    axes = walk.axes(source)
    copies.move(walk, source, node, [d for d in range(len(axes)) if d != dim])
    walk.table.freeze(axes[dim], "indexed by position")
    return axes[:dim] + axes[dim + 1 :]


def index(walk: Walk, node: Node) -> Axes:
    """``x[:, table]``: the dimensions that are indexed stay whole, all others pass (a bias table of attention)."""
    source = walk.arg(node, "self")
    indices = list(walk.arg(node, "indices"))
    axes = list(walk.axes(source))
    if any(isinstance(i, Node) and i.meta["val"].dtype == torch.bool for i in indices):
        walk.freeze_inputs(node, "selected by a condition on values")
        return [None] * node.meta["val"].ndim
    chosen = [d for d, i in enumerate(indices) if i is not None]
    for d in chosen:
        walk.table.freeze(axes[d], "indexed by position")
    for i in indices:
        for labels in walk.axes(i) if isinstance(i, Node) else ():
            walk.table.freeze(labels, "it says which positions are taken")
    apart = chosen[-1] - chosen[0] >= len(chosen)  # then PyTorch puts what is indexed in front
    rest = [labels for d, labels in enumerate(axes) if d not in chosen]
    place = 0 if apart else chosen[0]
    new: Axes = [None] * (len(walk.shape(node)) - len(rest))
    return [*rest[:place], *new, *rest[place:]]


def pad(walk: Walk, node: Node) -> Axes:
    """Constant padding makes new positions; padding that copies its neighbours keeps them all."""
    source = walk.tensor_inputs(node)[0]
    axes, shape = list(walk.axes(source)), walk.shape(source)
    amounts = [int(a) for a in walk.arg(node, "pad", walk.arg(node, "padding"))]
    constant = walk.arg(node, "mode", "constant") == "constant" and "reflect" not in str(node.target)
    constant = constant and "replication" not in str(node.target) and "circular" not in str(node.target)
    for k in range(len(amounts) // 2):
        dim, (before, after) = len(shape) - 1 - k, amounts[2 * k : 2 * k + 2]
        if axes[dim] is None or (before, after) == (0, 0):
            continue
        if not constant:
            walk.table.freeze(axes[dim], "padded with copies of its neighbours")
            axes[dim] = None
            continue
        kept = np.arange(shape[dim])[max(-before, 0) : shape[dim] - max(-after, 0)]
        labels = np.concatenate(
            [walk.table.fresh(max(before, 0)), axes[dim][kept], walk.table.fresh(max(after, 0))]  # type: ignore[index]
        )
        axes[dim] = labels
        _pad_attribute(walk, node, amounts, (k, before, after), labels)
    return axes


def _pad_attribute(
    walk: Walk, node: Node, amounts: list[int], padded: tuple[int, int, int], labels: IntArray
) -> None:
    """``nn.ConstantPad*d.padding`` follows the kept padding positions."""
    k, before, after = padded
    parts: list[IntArray | int] = list(amounts)
    if before > 0:
        parts[2 * k] = labels[:before]
    if after > 0:
        parts[2 * k + 1] = labels[len(labels) - after :]
    walk.attribute(node, {"padding": parts})


def repeat(walk: Walk, node: Node) -> Axes:
    """Tiles: position ``i + k * size`` is a copy of position ``i``.

    What carries nothing that may go follows what it is joined with later, as after ``expand``.
    """
    source = walk.tensor_inputs(node)[0]
    counts = [int(c) for c in walk.arg(node, "repeats", walk.arg(node, "dims"))]
    axes = walk.axes(source)
    counts = [1] * (len(axes) - len(counts)) + counts  # tile names the last dimensions only
    lead = len(counts) - len(axes)
    out: Axes = [None] * lead
    repeated: dict[int, Labels] = {d - len(counts): None for d in range(lead)}
    before = walk.repeated.get(source, {})
    for d, (labels, size, count) in enumerate(
        zip(axes, walk.shape(source), counts[lead:], strict=True), start=-len(axes)
    ):
        if count == 1:
            repeated.update({d: before[d]} if d in before else {})
        elif size == 1:
            walk.table.freeze(labels, "a single position is broadcast over many")
            labels, repeated[d] = None, None
        elif labels is None:
            repeated[d] = np.repeat(np.arange(count), size)
        else:
            labels = np.tile(labels, count)
        out.append(labels)
    if repeated:
        walk.repeated[node] = repeated
    return out


def expand(walk: Walk, node: Node) -> Axes:
    """Broadcast dimensions of size 1 without a copy: they follow what they are joined with later."""
    source = walk.tensor_inputs(node)[0]
    shape, out_shape = walk.shape(source), walk.shape(node)
    lead = len(out_shape) - len(shape)
    out: Axes = [None] * lead
    repeated: dict[int, Labels] = {d - len(out_shape): None for d in range(lead)}
    repeated |= walk.repeated.get(source, {})
    for d, (labels, size, target) in enumerate(
        zip(walk.axes(source), shape, out_shape[lead:], strict=True), start=lead
    ):
        if size != target:
            walk.table.freeze(labels, "a single position is broadcast over many")
            labels = None
            repeated[d - len(out_shape)] = None
        out.append(labels)
    walk.repeated[node] = repeated
    return out


def expand_as(walk: Walk, node: Node) -> Axes:
    """As ``expand``, to the size that another tensor has then: what both carry stays of equal size."""
    out, shape = expand(walk, node), walk.shape(walk.tensor_inputs(node)[0])
    layout = walk.axes(walk.tensor_inputs(node)[-1])
    for d, (labels, other) in enumerate(zip(out, layout, strict=True)):
        written = d - len(out) >= -len(shape) and shape[d - len(out)] == walk.shape(node)[d]
        if labels is not None and other is not None and written:
            out[d] = walk.table.merge(labels, other, "")
    return out


def stack(walk: Walk, node: Node) -> Axes:
    """A new dimension; all others are joined."""
    tensors = cast("list[Node]", walk.arg(node, "tensors"))
    axes = _joined(walk, tensors)
    dim = int(walk.arg(node, "dim", 0)) % (len(axes) + 1)
    new = walk.table.fresh(len(tensors))
    walk.table.freeze(new, "stacked from tensors that are computed apart: all of them stay")
    return [*axes[:dim], new, *axes[dim:]]


def _joined(walk: Walk, inputs: list[Node]) -> Axes:
    out = list(walk.axes(inputs[0]))
    for other in inputs[1:]:
        out = [
            walk.table.merge(a, b, "stacked with a tensor that no handler could follow")
            for a, b in zip(out, walk.axes(other), strict=True)
        ]
    return out


def getitem(walk: Walk, node: Node) -> Axes:
    """One output of an operator that gives several."""
    return cast("list[Axes]", walk.raw_axes(cast(Node, node.args[0])))[cast(int, node.args[1])]


def _with(axes: Axes, dim: int, labels: Labels) -> Axes:
    return [labels if d == dim else other for d, other in enumerate(axes)]


def _part(walk: Walk, labels: Labels, positions: IntArray) -> Labels:
    """Some positions of a dimension, which must not all go."""
    if labels is None:
        return None
    part = labels[positions]
    walk.table.nonempty.append(part)
    return part


HANDLERS: dict[str, Handler] = {
    **{f"aten::{name}": cat for name in ("cat", "concat", "concatenate")},
    **{
        f"aten::{name}": pieces
        for name in ("chunk", "split", "split_with_sizes", "unsafe_chunk", "unsafe_split", "tensor_split")
    },
    "aten::unbind": unbind,
    "aten::slice": slicing,
    "aten::narrow": narrow,
    "aten::select": select,
    "aten::index": index,
    "aten::repeat": repeat,
    "aten::tile": repeat,
    "aten::expand": expand,
    "aten::expand_as": expand_as,
    "aten::stack": stack,
    **{
        f"aten::{name}": pad
        for name in (
            "pad",
            "constant_pad_nd",
            *(f"{kind}_pad{n}d" for kind in ("reflection", "replication") for n in (1, 2, 3)),
        )
    },
    "getitem": getitem,
}
