"""Operators that act on each element by itself, joins of several tensors with broadcasting among them."""

from __future__ import annotations

from torch.fx import Node

from qcqp_prune.graph import copies
from qcqp_prune.graph.axes import Axes, Labels
from qcqp_prune.graph.walk import CONSTANTS, Handler, Walk, argument, is_pointwise, op_name


def pointwise(walk: Walk, node: Node) -> Axes:
    """Aligned from the right as in broadcasting, equal dimensions are tied position by position.

    A dimension of size 1 is repeated, so its one position stays; an input whose dimension is not tracked keeps the
    others' whole, unless it was itself repeated.
    """
    return broadcast(walk, node, walk.tensor_inputs(node), len(walk.shape(node)))


def broadcast(walk: Walk, node: Node, inputs: list[Node], rank: int) -> Axes:
    """Labels of the first ``rank`` dimensions of an output over which the inputs are broadcast."""
    return [joined(walk, sides) for sides in aligned(walk, node, inputs, rank)]


def aligned(walk: Walk, node: Node, inputs: list[Node], rank: int) -> list[list[Labels]]:
    """For each of the first ``rank`` dimensions of an output the labels of all inputs not repeated along it."""
    shape = walk.shape(node)
    out: list[list[Labels]] = []
    repeated: dict[int, Labels] = {}
    for back in range(-len(shape), rank - len(shape)):
        present = [n for n in inputs if len(walk.shape(n)) >= -back]
        for n in present:
            if walk.shape(n)[back] != shape[back]:
                walk.table.freeze(walk.axis(n, back), "a single channel is broadcast over many")
        full = [n for n in present if walk.shape(n)[back] == shape[back]]
        own = [n for n in full if back not in walk.repeated.get(n, ())]
        sets = [walk.repeated[n][back] for n in full if n not in own]
        if not own:
            repeated[back] = copies.together(walk, sets)
        for n in own:
            copies.tie(walk, walk.axis(n, back), sets)
        out.append([walk.axis(n, back) for n in own or full])
    if repeated:
        walk.repeated[node] = repeated
    return out


def joined(walk: Walk, sides: list[Labels]) -> Labels:
    """Labels of one dimension of several tensors, tied to each other position by position."""
    first = sides[0]
    for labels in sides[1:]:
        first = walk.table.merge(first, labels, "joined with a tensor that no handler could follow")
    return first


def same(walk: Walk, node: Node) -> Axes:
    """The output is laid out as the first input."""
    source = walk.tensor_inputs(node)[0]
    copies.keep(walk, source, node)
    return list(walk.axes(source))


def glu(walk: Walk, node: Node) -> Axes:
    """Gated linear unit: position ``i`` of the first half is gated by position ``i`` of the second."""
    source, dim = walk.tensor_inputs(node)[0], int(walk.arg(node, "dim", -1))
    axes = list(walk.axes(source))
    labels = axes[dim]
    if labels is not None:
        axes[dim] = walk.table.merge_columns(labels.reshape(2, -1))
    return axes


def factory(walk: Walk, node: Node) -> Axes:
    """A new tensor of a written size with contents that differ: nothing of it can go."""
    return [None] * len(walk.shape(node))


def is_zeros(node: Node) -> Node | None:
    """The operator that made a tensor of zeros, seen through copies; None where it is anything else."""
    while op_name(node).removeprefix("aten::") in _COPIES:
        node = node.all_input_nodes[0]
    return node if op_name(node) in ("aten::zeros", "aten::new_zeros", "aten::zeros_like") else None


def constant(walk: Walk, node: Node) -> Axes:
    """A new tensor of one value: any of its positions can go with what it is joined with."""
    if not _only_joined(node):
        return factory(walk, node)
    return [walk.table.fresh(size) for size in walk.shape(node)]


def _only_joined(node: Node) -> bool:
    """Whether all that becomes of a constant is that it is joined with other tensors, element by element."""
    return all(_joins(user, node) for user in node.users)


def _joins(user: Node, constant: Node) -> bool:
    name = op_name(user)
    if name == "aten::scaled_dot_product_attention":
        return argument(user, "attn_mask") is constant
    if name == "aten::index_add":
        return argument(user, "self") is constant and argument(user, "source") not in (None, constant)
    if name in ("aten::glu", "aten::copy") or not (is_pointwise(user) or name in HANDLERS):
        return False
    alone = all(n is constant or op_name(n) in CONSTANTS for n in user.all_input_nodes)
    return not alone or _only_joined(user)


UNTAGGED = [
    "hardtanh",
    "relu6",
    "hardswish",
    "silu",
    "mish",
    "where",
    "masked_fill",
    "fill",
    "zero",
    "clamp",
    "log_sigmoid",
    "rrelu",
    "celu",
    "selu",
    "threshold",
    "nan_to_num",
]
"""Pointwise, though PyTorch does not tag all their overloads so."""

_FACTORIES = [
    "empty",
    "arange",
    "linspace",
    "scalar_tensor",
    "new_empty",
    "eye",
    "rand",
    "randn",
]

_COPIES = {
    "clone",
    "contiguous",
    "detach",
    "alias",
    "lift_fresh_copy",
    "lift_fresh",
    "to",
    "_to_copy",
    "type_as",
}

_SAME = [
    "clone",
    "contiguous",
    "detach",
    "alias",
    "dropout",
    "feature_dropout",
    "alpha_dropout",
    "feature_alpha_dropout",
    "lift_fresh_copy",
    "lift_fresh",
    "to",
    "_to_copy",
    "type_as",
    "zeros_like",
    "ones_like",
    "full_like",
    "rand_like",
    "randn_like",
    "empty_like",
]

HANDLERS: dict[str, Handler] = {
    **{f"aten::{name}": same for name in _SAME},
    "aten::glu": glu,
    "aten::copy": pointwise,  # written into what it is joined with
    **{f"aten::{name}": pointwise for name in UNTAGGED},
    **{f"aten::{name}": factory for name in _FACTORIES},
    **dict.fromkeys(CONSTANTS, constant),
}
