"""Which positions of each tensor a rewritten graph keeps, also where only what it is joined with decides."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch.fx import Graph, Node

from qcqp_prune.graph.blocks import blocks
from qcqp_prune.graph.channels import BoolArray
from qcqp_prune.graph.heads import PRODUCTS, VIEWS
from qcqp_prune.graph.ops import joins, norms, pooling
from qcqp_prune.graph.ops.lookups import where_filled
from qcqp_prune.graph.walk import is_pointwise, op_name

Kept = list[BoolArray]
"""For each dimension of a tensor which positions are kept, each ``(size,) bool``."""

_LAYOUT_KEPT = {*joins.HANDLERS, *norms.HANDLERS, *pooling.HANDLERS, "aten::index_add"} - {"aten::glu"}


@dataclass(frozen=True)
class Positions:
    """Kept positions of the tensors of a graph.

    Attributes:
        kept: by the masks: ``Kept`` of a tensor, a list of it for several, None of what is no tensor.
        joined: of single tensors, less what the tensors that they are joined with do not keep. Positions of padding
            and of an expansion are always kept by the masks: what they are joined with decides.
    """

    kept: dict[Node, Any]
    joined: dict[Node, Kept]

    @classmethod
    def of(cls, graph: Graph, kept: dict[Node, Any], copies: Collection[Node] = ()) -> Positions:
        """Follow joins through all operators that leave every position in its place along a dimension, from the end.

        Args:
            graph: the exported graph; ``copies`` that follow tensors of several sizes get a node for each.
            kept: by the masks.
            copies: tensors that hold copies along some dimension, such as a mask that is expanded over heads.
        """
        positions = cls(kept, {})
        for node in reversed(graph.nodes):
            own = kept.get(node)
            if own is None or not all(isinstance(along, np.ndarray) for along in own):
                continue
            for one in _apart(node, positions) if node in copies else [node]:
                positions.joined[one] = [
                    _joined(one, own, dim - len(own), positions) for dim in range(len(own))
                ]
        return positions

    def move(self, node: Node, to: Node) -> None:
        """What was known of one node is from now on known of another that takes its place."""
        for table in (self.kept, self.joined):
            if node in table:
                table[to] = table.pop(node)


def _apart(node: Node, positions: Positions) -> list[Node]:
    """The node, and a copy of it for each further choice of positions that its users join it with."""
    if node.op != "call_function" or node.target._schema.is_mutable:  # type: ignore[union-attr]
        return [node]
    own: Kept = positions.kept[node]
    users: dict[bytes, list[Node]] = {}
    for user in node.users:
        if user in positions.kept:
            wanted = [
                _joined_by(node, user, along, dim - len(own), positions) for dim, along in enumerate(own)
            ]
            users.setdefault(b"".join(along.tobytes() for along in wanted), []).append(user)
    out = [node]
    for others in list(users.values())[1:]:
        with node.graph.inserting_after(node):
            copy = node.graph.node_copy(node)
        positions.kept[copy] = own
        for user in others:
            user.replace_input_with(node, copy)
        out.append(copy)
    return out


def _joined(node: Node, own: Kept, back: int, positions: Positions) -> BoolArray:
    """Positions along one dimension, counted from the right as joins align, given all that comes later."""
    along = own[back]
    for user in node.users:
        along = _joined_by(node, user, along, back, positions)
    return along


def _joined_by(node: Node, user: Node, along: BoolArray, back: int, positions: Positions) -> BoolArray:
    after = _decides(node, user, back, positions)
    if after is None or len(after) < -back or after[back].shape != along.shape:
        return along
    return along & after[back]


def _decides(node: Node, user: Node, back: int, positions: Positions) -> Kept | None:
    """The tensor whose positions those of a user's operand go with; None where there is none."""
    if user.op != "call_function":
        return None
    name, kept, joined = op_name(user), positions.kept, positions.joined
    if name == "aten::index_put":
        return _filled(node, user, positions)
    if name == "aten::gather":  # there are as many results as numbers
        return joined.get(user) if node is user.args[2] else None
    if name == "aten::scaled_dot_product_attention":  # heads of a mask are those of the queries
        queries: Kept = kept[user.args[0]]  # type: ignore[index]
        return queries if back < -2 else None
    repeats = name in PRODUCTS and back < -2  # a product of matrices, once for each position
    if repeats or name in _LAYOUT_KEPT or is_pointwise(user):
        return joined.get(user)
    return _turned_back(user, name, joined[user], kept) if user in joined else None


def _filled(node: Node, user: Node, positions: Positions) -> Kept | None:
    """Of ``a[condition] = value`` what goes with the positions of ``a``, or with those that the condition covers."""
    found = where_filled(user)
    if found is None or node not in (user.args[0], found[0]):
        return None
    first = 0 if node is user.args[0] else found[1]
    return positions.joined[user][first : first + len(positions.kept[node])]


def _turned_back(user: Node, name: str, after: Kept, kept: dict[Node, Any]) -> Kept | None:
    """The dimensions of what an operator reads, of one that only moves positions or makes many of one."""
    numbers: list[Any] = list(user.args[1:])
    before: Kept = kept[user.all_input_nodes[0]]
    if name.removeprefix("aten::") in VIEWS:
        return _before_view(before, after)
    if name == "aten::unsqueeze":
        dim = numbers[0] % len(after)
        return after[:dim] + after[dim + 1 :]
    if name in ("aten::slice", "aten::select"):
        # Of a dimension that is cut all is needed, as far as can be told.
        dim = (numbers[0] if numbers else 0) % len(before)
        rest = after if name == "aten::select" else after[:dim] + after[dim + 1 :]
        whole = len(after) == len(before) and len(after[dim]) == len(before[dim])
        return after if whole else [*rest[:dim], np.ones(len(before[dim]), np.bool_), *rest[dim:]]
    if name == "aten::squeeze" and numbers and isinstance(numbers[0], int):
        if len(before) == len(after):
            return after  # the dimension was of another size
        dim = numbers[0] % (len(after) + 1)
        return [*after[:dim], np.ones(1, np.bool_), *after[dim:]]
    if name == "aten::transpose":
        a, b = (n % len(after) for n in numbers)
        order = list(range(len(after)))
        order[a], order[b] = b, a
        return [after[d] for d in order]
    if name == "aten::permute":
        return [after[d] for d in np.argsort([n % len(after) for n in numbers[0]])]
    return None


def _before_view(before: Kept, after: Kept) -> Kept:
    """Of a reshape: what a dimension keeps of itself, all in all, wherever its positions are then."""
    out = list(before)
    for old, new in blocks(tuple(map(len, before)), tuple(map(len, after))):
        flat = np.ones(1, np.bool_)
        for d in new:
            flat = np.logical_and.outer(flat, after[d]).reshape(-1)
        table = flat.reshape([len(before[d]) for d in old])
        for d in old:
            out[d] = np.any(
                table, axis=tuple(k for k in range(len(old)) if old[k] != d), keepdims=True
            ).reshape(-1)
    return out
