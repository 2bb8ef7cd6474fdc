"""Residual branches in an exported graph: the nodes of ``f`` in ``x + f(x)``, and what they read."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch.fx import Graph, Node

from qcqp_prune.graph.walk import ADDITIONS, additions, argument, op_name

_FAR = 64
"""Additions through which the identity is followed back."""


@dataclass(frozen=True)
class Branch:
    """One operand of an addition, computed by nodes of which nothing else uses any result.

    Attributes:
        addition: the node.
        index: its number among the additions of the graph.
        operand: which of its operands the branch is.
        kept: the other operand.
        nodes: all that exists for the branch only, parameters included.
    """

    addition: Node
    index: int
    operand: int
    kept: Node
    nodes: frozenset[Node]


def branch_nodes(addition: Node, operand: int) -> frozenset[Node]:
    """The nodes that only serve one operand of an addition; empty where something else reads it."""
    top = addition.args[operand]
    if not isinstance(top, Node) or set(top.users) != {addition} or addition.args[1 - operand] is top:
        return frozenset()
    found, front = {top}, list(top.all_input_nodes)
    while front:
        node = front.pop()
        if node in found or not all(user in found or _is_idle(user) for user in node.users):
            continue
        found |= {node, *(u for u in node.users if _is_idle(u))}
        front += node.all_input_nodes
    return frozenset(found)


def find_branches(graph: Graph) -> tuple[list[Branch], list[tuple[Node, str]]]:
    """Every residual branch, and the additions of two branches of one tensor of which neither leaves it.

    A branch starts from what it is added to, or from an earlier state of that along additions.
    """
    found, others = [], []
    for node, index in additions(graph).items():
        operands = [a for a in node.args[:2] if isinstance(a, Node)]
        if len(operands) != 2 or len({_shape(n) for n in (node, *operands)}) > 1 or _shape(node) is None:
            continue
        sides = [branch_nodes(node, k) for k in (0, 1)]
        reads = [_read(side) for side in sides]
        for k in (1, 0):
            if sides[k] and reads[k] & _identity(operands[1 - k]):
                found.append(Branch(node, index, k, operands[1 - k], sides[k]))
                break
        else:
            if reads[0] & reads[1]:
                others.append((node, "both of its sides compute something of what they read"))
    return found, others


def why_not(branch: Branch, inputs: Collection[str]) -> str | None:
    """Why the addition does not leave its other operand where the branch goes; None where it does.

    Args:
        branch: to be removed.
        inputs: names of the nodes that are inputs of the network.
    """
    node = branch.addition
    name, scale = op_name(node), argument(node, "alpha", 1)
    if name == "aten::rsub" or (name == "aten::sub" and branch.operand == 0):
        return "the rest is subtracted from it"
    if branch.operand == 0 and scale != 1:
        return "what it is added to is scaled"
    if any(n.name in inputs for n in branch.nodes):
        return "it reads an input of the network that nothing else reads"
    for inner in branch.nodes:
        if isinstance(inner.target, torch._ops.OpOverload) and inner.target._schema.is_mutable:
            changed = inner.all_input_nodes[:1]
            if changed and _memory(changed[0]) not in branch.nodes:
                return "it changes in place what it reads"
    return None


_VIEWS = (
    "aten::reshape",
    "aten::contiguous",
    "aten::flatten",
    "aten::unflatten",
    "aten::to",
    "aten::dropout",
)
"""Operators that may return their argument's memory without saying so."""


def _memory(node: Node) -> Node:
    """The node whose memory a tensor may be a view of; a parameter or another node's result."""
    while isinstance(node.target, torch._ops.OpOverload) and node.all_input_nodes:
        shares = any(r.alias_info is not None for r in node.target._schema.returns)
        if not (shares or op_name(node) in _VIEWS):
            break
        node = node.all_input_nodes[0]
    return node


def _identity(node: Node) -> set[Node]:
    """A tensor, and what it is a sum of."""
    found, front = {node}, [node]
    while front and len(found) < _FAR:
        current = front.pop()
        if current.op == "call_function" and op_name(current) in ADDITIONS:
            more = [n for n in current.all_input_nodes if _shape(n) == _shape(node) and n not in found]
            found |= set(more)
            front += more
    return found


def _read(nodes: frozenset[Node]) -> set[Node]:
    """What nodes read of others."""
    return {source for node in nodes for source in node.all_input_nodes} - nodes


def _shape(node: Node) -> tuple[int, ...] | None:
    value = node.meta.get("val")
    return tuple(value.shape) if isinstance(value, torch.Tensor) else None


def _is_idle(node: Node) -> bool:
    """Whether nobody reads a node and it changes nothing: an assertion, or a result that is not asked for."""
    if node.users or node.op != "call_function":
        return False
    return not (isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable)
