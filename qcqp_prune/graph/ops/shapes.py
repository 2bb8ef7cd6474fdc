"""Views, permutations and shuffles: positions move, none is mixed with another."""

from __future__ import annotations

import numpy as np
from torch.fx import Node

from qcqp_prune.graph import copies
from qcqp_prune.graph.axes import Axes, Labels
from qcqp_prune.graph.blocks import blocks
from qcqp_prune.graph.channels import IntArray
from qcqp_prune.graph.heads import head_dimension
from qcqp_prune.graph.units import Unit
from qcqp_prune.graph.walk import Handler, Walk


def view(walk: Walk, node: Node) -> Axes:
    """Any reshape: dimensions are merged and split in blocks of equal size.

    Merged, each position carries the label of the tracked dimension. Split again, the labels go to the one dimension
    along which they vary; where they vary along several, whole rows or whole columns are tied, so that what remains
    is a rectangle, which is all that a reshape of the smaller network can express.
    """
    source = walk.tensor_inputs(node)[0]
    axes, shape, target = walk.axes(source), walk.shape(source), walk.shape(node)
    out: Axes = [None] * len(target)
    # Of a convolution's weight the channels come first, however large the kernel.
    in_order = len(shape) > 2 and walk.parameter(source) is not None
    repeated: dict[int, Labels] = {}
    for old, new in blocks(shape, target):
        sets = copies.merged(walk, source, old)
        if sets is not None:
            found = copies.divided(sets, [target[d] for d in new])
            repeated |= {new[d] - len(target): again for d, again in found.items()}
            continue
        if all(axes[d] is None for d in old):
            continue
        flat = _merged(walk, [axes[d] for d in old], [shape[d] for d in old], in_order=in_order)
        divided, kind = _divided(walk, node, flat, new)
        for d, labels in zip(new, divided, strict=True):
            out[d] = labels
        _head_attributes(walk, node, flat, divided, kind)
    if repeated:
        walk.repeated[node] = repeated
    _unflatten_attribute(walk, node, out)
    return out


def _merged(walk: Walk, axes: Axes, sizes: list[int], *, in_order: bool) -> IntArray:
    """Labels of the product of some dimensions, row-major, ``(prod(sizes),)``.

    Of several that could be pruned one is chosen: the first where ``in_order``, else that of experts, else the largest.
    """
    tracked = [d for d, labels in enumerate(axes) if labels is not None and sizes[d] > 1]
    if len(tracked) > 1:
        free = [d for d in tracked if not walk.table.is_frozen(axes[d])]  # type: ignore[arg-type]
        experts = [d for d in free if walk.leads(axes[d]) and not in_order]
        tracked = experts[:1] or [max(free or tracked, key=lambda d: -d if in_order else sizes[d])]
    tracked = tracked or [d for d, labels in enumerate(axes) if labels is not None][:1]
    for d, labels in enumerate(axes):
        if d not in tracked:
            walk.table.freeze(labels, "merged by a reshape with a dimension that is pruned")
    d = tracked[0]
    spread = np.asarray(axes[d]).reshape([-1 if k == d else 1 for k in range(len(sizes))])
    return np.broadcast_to(spread, sizes).reshape(-1)


def _divided(walk: Walk, node: Node, flat: IntArray, dims: list[int]) -> tuple[Axes, Unit | None]:
    """The inverse: which of the new dimensions ``dims`` carries the labels; labels of each, and of what kind."""
    sizes = [walk.shape(node)[d] for d in dims]
    big = [d for d, size in enumerate(sizes) if size > 1]
    if len(big) <= 1:
        d = big[0] if big else 0
        return [flat if k == d else None for k in range(len(sizes))], None
    table = flat.reshape(sizes)
    classes = walk.table.find(flat).reshape(sizes)
    for d in big:
        rows = np.moveaxis(classes, d, 0).reshape(sizes[d], -1)
        if (rows == rows[:, :1]).all():
            return _only(d, np.moveaxis(table, d, 0).reshape(sizes[d], -1)[:, 0], len(sizes)), None
    found, kind = _heads_or_dims(walk, node, flat, [dims[d] for d in big])
    d = max(big, key=lambda k: sizes[k]) if found is None else dims.index(found)
    rows = np.moveaxis(table, d, 0).reshape(sizes[d], -1)
    labels = walk.table.merge_columns(np.ascontiguousarray(rows.T))
    if kind is not None:
        walk.units.mark(kind, labels)
    return _only(d, labels, len(sizes)), kind


def _heads_or_dims(walk: Walk, node: Node, flat: IntArray, dims: list[int]) -> tuple[int | None, Unit | None]:
    """Where a dimension is split into heads, the one of them that is asked for, and which that is."""
    head = head_dimension(node, dims)
    if head is None:
        return None, None
    if "head_dim" in walk.units.asked(walk, flat, walk.module_path(node)):
        size = head_dimension(node, dims, size=True)
        if size is not None:
            return size, "head_dim"
    return head, "heads"


def _only(d: int, labels: IntArray, rank: int) -> Axes:
    return [labels if k == d else None for k in range(rank)]


def _unflatten_attribute(walk: Walk, node: Node, out: Axes) -> None:
    """``nn.Unflatten.unflattened_size`` follows the kept counts."""
    shape = walk.shape(node)
    for first in range(len(shape)):
        for last in range(first + 1, len(shape) + 1):
            if any(out[d] is not None for d in range(first, last)):
                parts = [shape[d] if (labels := out[d]) is None else labels for d in range(first, last)]
                walk.attribute(node, {"unflattened_size": parts})


def _head_attributes(walk: Walk, node: Node, flat: IntArray, divided: Axes, kind: Unit | None) -> None:
    """Numbers of heads, their sizes and widths of all together follow what is kept where a module holds them."""
    if len(divided) == 1:
        for name in _WIDTHS:
            walk.attribute(node, {name: flat})
        return
    for labels in divided:
        if labels is None:
            continue
        for name in _HEAD_COUNTS if kind != "head_dim" else ():
            walk.attribute(node, {name: labels})
        for name in _HEAD_SIZES if kind == "head_dim" else ():
            walk.attribute(node, {name: labels})
            held = walk.attributes.get((walk.module_path(node), name))
            if held is not None and held.parts[0] is not labels:
                walk.units.one_size.append((np.asarray(held.parts[0]), labels))


def permute(walk: Walk, node: Node) -> Axes:
    """Dimensions in another order."""
    rank = len(walk.shape(node))
    return _reordered(walk, node, [int(d) % rank for d in walk.arg(node, "dims")])


def transpose(walk: Walk, node: Node) -> Axes:
    """Two dimensions exchanged (``t`` exchanges the first two)."""
    order = list(range(len(walk.shape(node))))
    a, b = (int(walk.arg(node, f"dim{k}", walk.arg(node, f"axis{k}", k))) for k in (0, 1))
    if len(order) > 1:
        order[a], order[b] = order[b], order[a]
    return _reordered(walk, node, order)


def reverse(walk: Walk, node: Node) -> Axes:
    """All dimensions in reverse (``x.T``)."""
    return _reordered(walk, node, list(range(len(walk.shape(node))))[::-1])


def _reordered(walk: Walk, node: Node, order: list[int]) -> Axes:
    source = walk.tensor_inputs(node)[0]
    copies.move(walk, source, node, order)
    axes = walk.axes(source)
    return [axes[d] for d in order]


def movedim(walk: Walk, node: Node) -> Axes:
    """``movedim``: some dimensions move, the others close ranks."""
    rank = len(walk.shape(node))
    sources, targets = (
        [int(d) % rank for d in (value if isinstance(value, list | tuple) else [value])]
        for value in (walk.arg(node, "source"), walk.arg(node, "destination"))
    )
    rest = iter([d for d in range(rank) if d not in sources])
    place = dict(zip(targets, sources, strict=True))
    return _reordered(walk, node, [place[d] if d in place else next(rest) for d in range(rank)])


def squeeze(walk: Walk, node: Node) -> Axes:
    """Dimensions of size 1 go."""
    source = walk.tensor_inputs(node)[0]
    axes, shape = walk.axes(source), walk.shape(source)
    dims = walk.arg(node, "dim", list(range(len(shape))))
    chosen = {int(d) % len(shape) for d in (dims if isinstance(dims, list | tuple) else [dims])}
    gone = {d for d in chosen if shape[d] == 1}
    for d in gone:
        walk.table.freeze(axes[d], "squeezed away, so it must stay a single position")
    copies.move(walk, source, node, [d for d in range(len(axes)) if d not in gone])
    return [labels for d, labels in enumerate(axes) if d not in gone]


def unsqueeze(walk: Walk, node: Node) -> Axes:
    """A new dimension of size 1."""
    source = walk.tensor_inputs(node)[0]
    axes = walk.axes(source)
    dim = int(walk.arg(node, "dim")) % (len(axes) + 1)
    copies.move(walk, source, node, [*range(dim), None, *range(dim, len(axes))])
    return [*axes[:dim], None, *axes[dim:]]


def pixel_shuffle(walk: Walk, node: Node) -> Axes:
    """``(C r^2, H, W) -> (C, H r, W r)``: the r^2 channels of one output channel go together."""
    source = walk.tensor_inputs(node)[0]
    axes, scale = list(walk.axes(source)), int(walk.arg(node, "upscale_factor")) ** 2
    _freeze_plane(walk, axes)
    labels = axes[-3]
    if labels is not None:
        labels = walk.table.merge_columns(np.ascontiguousarray(labels.reshape(-1, scale).T))
    return [*axes[:-3], labels, None, None]


def pixel_unshuffle(walk: Walk, node: Node) -> Axes:
    """``(C, H r, W r) -> (C r^2, H, W)``: each channel becomes r^2 that go together."""
    source = walk.tensor_inputs(node)[0]
    axes, scale = list(walk.axes(source)), int(walk.arg(node, "downscale_factor")) ** 2
    _freeze_plane(walk, axes)
    labels = axes[-3]
    return [*axes[:-3], None if labels is None else np.repeat(labels, scale), None, None]


def channel_shuffle(walk: Walk, node: Node) -> Axes:
    """Channel ``(i, j)`` of g runs goes to ``(j, i)``: a reshape, a transpose and a reshape, so columns are tied."""
    source, groups = walk.tensor_inputs(node)[0], int(walk.arg(node, "groups"))
    axes = list(walk.axes(source))
    labels: Labels = axes[1]
    if labels is not None:
        axes[1] = np.repeat(walk.table.merge_columns(labels.reshape(groups, -1)), groups)
    return axes


def roll(walk: Walk, node: Node) -> Axes:
    """A cyclic shift: tracked dimensions that are shifted stay whole."""
    axes = list(walk.axes(walk.tensor_inputs(node)[0]))
    dims = [int(d) % len(axes) for d in walk.arg(node, "dims")] or list(range(len(axes)))
    for d in dims:
        walk.table.freeze(axes[d], "shifted cyclically")
        axes[d] = None
    return axes


def _freeze_plane(walk: Walk, axes: Axes) -> None:
    for labels in axes[-2:]:
        walk.table.freeze(labels, "rearranged in the plane")


_HEAD_COUNTS = (
    *("num_heads", "n_heads", "num_attention_heads", "heads", "n_head", "nhead"),
    *("num_kv_heads", "n_kv_heads", "num_key_value_heads"),
)
_HEAD_SIZES = (
    *("head_dim", "head_size", "attention_head_size", "size_per_head", "dim_head", "d_head"),
    *("key_value_proj_dim", "d_kv"),
)
_WIDTHS = ("attn_dim", "all_head_size", "inner_dim", "hidden_dim")

HANDLERS: dict[str, Handler] = {
    **{
        f"aten::{name}": view
        for name in (
            "view",
            "reshape",
            "_unsafe_view",
            "flatten",
            "unflatten",
            "view_as",
            "reshape_as",
            "_reshape_alias",
        )
    },
    "aten::permute": permute,
    "aten::transpose": transpose,
    "aten::swapaxes": transpose,
    "aten::t": transpose,
    "aten::swapdims": transpose,
    "aten::numpy_T": reverse,
    "aten::movedim": movedim,
    "aten::moveaxis": movedim,
    "aten::squeeze": squeeze,
    "aten::unsqueeze": unsqueeze,
    "aten::pixel_shuffle": pixel_shuffle,
    "aten::pixel_unshuffle": pixel_unshuffle,
    "aten::channel_shuffle": channel_shuffle,
    "aten::roll": roll,
}
