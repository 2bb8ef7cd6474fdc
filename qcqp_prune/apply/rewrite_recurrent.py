"""Recurrent layers in a rewritten graph: their modules are called, whatever widths these came to have."""

from __future__ import annotations

import operator
from typing import Any, cast

import torch
from torch import nn
from torch.fx import Graph, GraphModule, Node

from qcqp_prune.apply.uneven_rnn import UnevenRNN, widths
from qcqp_prune.graph.ops.joins import is_zeros
from qcqp_prune.graph.ops.recurrent import GATES, MODULES, STEPS
from qcqp_prune.graph.walk import argument, op_name


def call_recurrent_modules(module: GraphModule, modules: dict[str, nn.Module], kept: dict[Node, Any]) -> None:
    """Put calls of the smaller recurrent modules in the place of the operators, so that training mode works too.

    An operator that belongs to no such module stays; zeros that it starts from get the kept size.

    Args:
        module: the exported module, changed in place.
        modules: of the smaller network, by path.
        kept: for each node which positions are kept; extended by the new nodes.
    """
    for node in list(module.graph.nodes):
        if node.op != "call_function" or op_name(node) not in {**GATES, **STEPS}:
            continue
        stack = node.meta.get("nn_module_stack") or {"": ("", None)}
        path = str(list(stack.values())[-1][0]).split("@")[0]
        small = modules.get(path)
        if (
            op_name(node) in GATES
            and path
            and isinstance(small, (*MODULES, UnevenRNN))
            and type(small) in (*MODULES, UnevenRNN)
        ):
            module.add_submodule(path, small)
            _call(module, node, path, small, kept)
        else:
            _resize_zeros(module.graph, node, kept)


def _call(module: GraphModule, node: Node, path: str, small: nn.Module, kept: dict[Node, Any]) -> None:
    given = argument(node, "hx")
    is_lstm = op_name(node) == "aten::lstm"
    states = given if is_lstm else [given]
    start = None if all(is_zeros(s) for s in states) else (tuple(given) if is_lstm else given)
    graph = module.graph
    with graph.inserting_before(node):
        call = graph.call_module(path, (node.args[0], start))
        last = graph.call_function(operator.getitem, (call, 1))
    call.meta, kept[call] = dict(node.meta), kept[node]
    own = widths(cast(nn.RNNBase, small)) if not isinstance(small, UnevenRNN) else _own_widths(small)
    for user in list(node.users):
        which = cast(int, user.args[1])
        with graph.inserting_before(user):
            new = (
                graph.call_function(operator.getitem, (call, 0))
                if which == 0
                else graph.call_function(operator.getitem, (last, which - 1))
                if is_lstm
                else last
            )
        if new is not last:
            new.meta, kept[new] = dict(user.meta), kept[user]
        elif last not in kept:
            last.meta, kept[last] = dict(user.meta), kept[user]
        sizes = own[1] if which < 2 else own[0]
        if which and len(set(sizes)) > 1:
            _take_apart(graph, user, new, kept)
        user.replace_all_uses_with(new)
        graph.erase_node(user)
    graph.erase_node(node)
    if not last.users:
        graph.erase_node(last)


def _own_widths(small: UnevenRNN) -> tuple[tuple[int, ...], tuple[int, ...]]:
    return small.hidden_sizes, small.output_sizes


def _take_apart(graph: Graph, stack: Node, new: Node, kept: dict[Node, Any]) -> None:
    """What takes single states out of a stack takes them out of a tuple."""
    for user in list(stack.users):
        name = op_name(user)
        if name == "aten::unbind":
            user.replace_all_uses_with(new)
            graph.erase_node(user)
            continue
        if name == "aten::select":
            index: Any = argument(user, "index")
        else:  # of all other operators the extractor ties the layers that are stacked
            index = slice(argument(user, "start"), argument(user, "end"), argument(user, "step"))
        with graph.inserting_before(user):
            part = graph.call_function(operator.getitem, (new, index))
        part.meta, kept[part] = dict(user.meta), kept[user]
        if name != "aten::select":
            _take_apart(graph, user, part, kept)
        user.replace_all_uses_with(part)
        graph.erase_node(user)


def _resize_zeros(graph: Graph, node: Node, kept: dict[Node, Any]) -> None:
    """Zeros that a recurrent operator starts from, in the kept width of all its layers and the dtype of its input."""
    given = argument(node, "hx")
    states = list(given) if isinstance(given, list | tuple) else [given]
    value = kept[node]
    outputs = value[-len(states) :] if isinstance(node.meta["val"], list | tuple) else [value]
    for k, (state, own) in enumerate(zip(states, outputs, strict=True)):
        zeros = is_zeros(state)
        if zeros is None or op_name(zeros) == "aten::zeros_like":
            continue
        sizes = cast("list[Any]", zeros.args[op_name(zeros) == "aten::new_zeros"])
        with graph.inserting_before(node):
            sizes = [*sizes[:-1], int(own[-1].sum())]
            states[k] = graph.call_function(torch.ops.aten.new_zeros.default, (node.args[0], sizes))
        states[k].meta, kept[states[k]] = dict(state.meta), kept[state]
    place = [a.name for a in node.target._schema.arguments].index("hx")  # type: ignore[union-attr]
    args = list(node.args)
    args[place] = states if isinstance(given, list | tuple) else states[0]
    node.args = tuple(args)
