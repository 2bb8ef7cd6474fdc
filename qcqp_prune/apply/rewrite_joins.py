"""Which positions of each tensor a rewritten graph keeps, also where only what it is joined with decides."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from torch.fx import Graph, Node

from qcqp_prune.graph.channels import BoolArray
from qcqp_prune.graph.heads import PRODUCTS
from qcqp_prune.graph.ops import joins, norms, pooling
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
    def of(cls, graph: Graph, kept: dict[Node, Any]) -> Positions:
        """Follow joins through all operators that leave every position in its place along a dimension, from the end."""
        joined: dict[Node, Kept] = {}
        for node in reversed(graph.nodes):
            own = kept.get(node)
            if own is not None and all(isinstance(along, np.ndarray) for along in own):
                joined[node] = [_joined(node, own, dim - len(own), kept, joined) for dim in range(len(own))]
        return cls(kept, joined)

    def move(self, node: Node, to: Node) -> None:
        """What was known of one node is from now on known of another that takes its place."""
        for table in (self.kept, self.joined):
            if node in table:
                table[to] = table.pop(node)


def _joined(node: Node, own: Kept, back: int, kept: dict[Node, Any], joined: dict[Node, Kept]) -> BoolArray:
    """Positions along one dimension, counted from the right as joins align, given all that comes later."""
    along = own[back]
    for user in node.users:
        after = _decides(user, back, kept, joined)
        if after is not None and len(after) >= -back and after[back].shape == along.shape:
            along = along & after[back]
    return along


def _decides(user: Node, back: int, kept: dict[Node, Any], joined: dict[Node, Kept]) -> Kept | None:
    """The tensor whose positions those of a user's operand go with; None where there is none."""
    if user.op != "call_function":
        return None
    name = op_name(user)
    if name == "aten::scaled_dot_product_attention":  # heads of a mask are those of the queries
        queries: Kept = kept[user.args[0]]  # type: ignore[index]
        return queries if back < -2 else None
    repeats = name in PRODUCTS and back < -2  # a product of matrices, once for each position
    if repeats or name in _LAYOUT_KEPT or is_pointwise(user):
        return joined.get(user)
    return _turned_back(user, name, joined[user], kept) if user in joined else None


def _turned_back(user: Node, name: str, after: Kept, kept: dict[Node, Any]) -> Kept | None:
    """The dimensions of what an operator reads, of one that only orders them anew or adds or drops one of size 1."""
    numbers: list[Any] = list(user.args[1:])
    if name == "aten::unsqueeze":
        dim = numbers[0] % len(after)
        return after[:dim] + after[dim + 1 :]
    if name == "aten::squeeze" and numbers and isinstance(numbers[0], int):
        if len(kept[user.all_input_nodes[0]]) == len(after):
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
