"""Parts of a forward that stand under a context manager, written into the graph around them."""

from __future__ import annotations

import itertools
import operator
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.fx import Graph, GraphModule, Node
from torch.utils import _pytree as pytree

_GRAD, _AUTOCAST = "wrap_with_set_grad_enabled", "wrap_with_autocast"
_BODY = {_GRAD: 1, _AUTOCAST: 4}
"""Where each of these operators has its body among its arguments; what the body reads follows."""


def inlined(program: ExportedProgram) -> ExportedProgram:
    """Write out, in place, the bodies of regions whose context changes nothing: gradients are off in any case.

    ``torch.autocast(enabled=False)`` protects a region from an autocast around it. One that is enabled computes in
    another dtype: such a region stays closed, and what it reads is kept whole.

    Args:
        program: an exported program; its graph is changed.

    Returns:
        The same program.
    """
    module = program.graph_module
    while True:
        found = [node for node in module.graph.nodes if _is_plain(node)]
        if not found:
            break
        for node in found:
            _write_out(module, node)
    module.recompile()
    return program


def _is_plain(node: Node) -> bool:
    name = getattr(node.target, "__name__", "")
    if node.op != "call_function" or not isinstance(node.target, torch._ops.HigherOrderOperator):
        return False
    if name == _GRAD:
        return True
    return name == _AUTOCAST and (not node.args[2] or node.args[0] not in _devices(node))


def _devices(node: Node) -> set[str]:
    """The kinds of device that a region computes on."""
    values = [n.meta.get("val") for n in node.all_input_nodes]
    return {v.device.type for v in values if isinstance(v, torch.Tensor)}


def _write_out(module: GraphModule, node: Node) -> None:
    place = _BODY[node.target.__name__]  # type: ignore[union-attr]
    body = node.args[place]
    assert isinstance(body, Node)
    inner: Graph = getattr(module, str(body.target)).graph
    sources = iter(node.args[place + 1 :])
    copies: dict[Node, Any] = {}
    for part in inner.nodes:
        if part.op == "placeholder":
            copies[part] = next(sources)
        elif part.op == "output":
            results = pytree.tree_map_only(Node, copies.__getitem__, part.args[0])
        else:
            with module.graph.inserting_before(node):
                copies[part] = module.graph.node_copy(part, copies.__getitem__)
            if part.op == "get_attr":  # a region within the region
                copies[part].target = _lent(module, inner, str(part.target))
    for user in list(node.users):
        assert user.target is operator.getitem
        user.replace_all_uses_with(results[user.args[1]])
        module.graph.erase_node(user)
    module.graph.erase_node(node)
    if not body.users:
        module.graph.erase_node(body)


def _lent(module: GraphModule, inner: Graph, path: str) -> str:
    """A name in the outer module for something of an inner one, where names begin anew."""
    name = next(n for k in itertools.count() if not hasattr(module, n := f"region_{k}"))
    setattr(module, name, getattr(inner.owning_module, path))
    return name
