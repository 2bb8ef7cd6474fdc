"""Operators without a handler, written in simpler ones where PyTorch knows how."""

from __future__ import annotations

import logging
import operator
from collections.abc import Callable
from typing import Any, cast

import torch
from torch._decomp import get_decompositions
from torch._ops import OpOverload
from torch.export import ExportedProgram
from torch.fx import Graph, GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree as pytree

from qcqp_prune.graph.walk import op_name

logger = logging.getLogger(__name__)

_WHOLE = {"aten::lstm", "aten::gru", "aten::rnn_tanh", "aten::rnn_relu", "aten::scaled_dot_product_attention"}
"""Never decomposed: they would unroll over time, or come apart into products of matrices that no handler knows."""

_ROUNDS = 4


def decomposed(program: ExportedProgram, is_known: Callable[[Node], bool]) -> ExportedProgram:
    """Replace unknown operators, in place, by what they are made of.

    PyTorch's own ``run_decompositions`` traces the whole program anew and takes known operators such as batch norm
    apart; here each unknown operator is traced by itself and put in its own place.

    Args:
        program: an exported program; its graph is changed.
        is_known: whether a call needs no decomposition.

    Returns:
        The same program.
    """
    graph = program.graph
    left: set[Node] = set()
    for _ in range(_ROUNDS):
        unknown = [n for n in graph.nodes if n not in left and not is_known(n) and _may_come_apart(n)]
        if not unknown:
            break
        for node in unknown:
            if not _replace(graph, node):
                left.add(node)
    graph.lint()
    program.graph_module.recompile()
    return program


def _may_come_apart(node: Node) -> bool:
    op = node.target
    if node.op != "call_function" or not isinstance(op, OpOverload) or op_name(node) in _WHOLE:
        return False
    return not op._schema.is_mutable and isinstance(node.meta.get("val"), torch.Tensor | list | tuple)


def _replace(graph: Graph, node: Node) -> bool:
    """Whether the operator came apart; its parts then stand in its place."""
    try:
        parts = _traced(node)
    except Exception as error:  # noqa: BLE001 - of many kinds; the operator is then kept whole and reported
        logger.debug("%s does not come apart: %s", node, error)
        return False
    calls = [n for n in parts.graph.nodes if n.op == "call_function"]
    if any(n.target is node.target for n in calls) or any(n.op == "get_attr" for n in parts.graph.nodes):
        return False
    sources = iter(_dynamic_leaves(node))
    places: dict[Node, Any] = {n: next(sources) for n in parts.graph.nodes if n.op == "placeholder"}
    with graph.inserting_before(node):
        for part in calls:
            copy = graph.node_copy(part, places.__getitem__)
            copy.meta = {**node.meta, "val": part.meta.get("val")}
            places[part] = copy
    (result,) = next(n for n in parts.graph.nodes if n.op == "output").args
    _substitute(graph, node, pytree.tree_map_only(Node, places.__getitem__, result))
    return True


def _traced(node: Node) -> GraphModule:
    """The operator on its own, traced below composite operators and by PyTorch's rule for it where there is one."""
    op: Any = node.target
    leaves, tree = pytree.tree_flatten((node.args, dict(node.kwargs)))
    fixed = [None if isinstance(x, Node) else x for x in leaves]
    values = [n.meta["val"] for n in _dynamic_leaves(node)]

    def call(*given: Any) -> Any:
        rest = iter(given)
        args, kwargs = pytree.tree_unflatten(
            [next(rest) if isinstance(x, Node) else y for x, y in zip(leaves, fixed, strict=True)], tree
        )
        return op(*args, **kwargs)

    symbolic = any(not isinstance(s, int) for v in values if isinstance(v, torch.Tensor) for s in v.shape)
    with torch.no_grad():
        traced = make_fx(
            call,
            decomposition_table=cast(Any, get_decompositions([op])),
            tracing_mode="symbolic" if symbolic else "fake",
            _allow_non_fake_inputs=True,
        )(*values)
    traced.graph.eliminate_dead_code()
    return traced


def _dynamic_leaves(node: Node) -> list[Node]:
    return [x for x in pytree.tree_leaves((node.args, dict(node.kwargs))) if isinstance(x, Node)]


def _substitute(graph: Graph, node: Node, result: Any) -> None:
    """Put the result in the operator's place, under its name where the program's signature may know it."""
    if isinstance(result, list | tuple):
        for user in list(node.users):
            if user.target is operator.getitem:
                _rename(graph, user, result[user.args[1]])  # type: ignore[index]
        graph.erase_node(node)
    else:
        _rename(graph, node, result)


def _rename(graph: Graph, old: Node, new: Node) -> None:
    name = old.name
    is_fresh = (new.op == "call_function" and new.next is old) or len(new.users) == 0
    old.replace_all_uses_with(new)
    graph.erase_node(old)
    if is_fresh:
        new._rename(name)
