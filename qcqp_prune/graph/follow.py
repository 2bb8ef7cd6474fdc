"""A walk over an exported program: every operator in execution order, by its handler."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch.export import ExportedProgram
from torch.fx import Node

from qcqp_prune.graph.axes import Axes
from qcqp_prune.graph.ops.joins import pointwise
from qcqp_prune.graph.unknown import kept_whole
from qcqp_prune.graph.walk import Handler, Walk, is_pointwise, op_name

Progress = Callable[[str, int, int], None]
"""Told what is being done, how much of it is done, and of how much; 0 of 0 where that cannot be known."""


def silent(what: str, done: int, total: int) -> None:
    """Nobody wants to know."""


def follow(
    walk: Walk,
    program: ExportedProgram,
    placeholders: Mapping[str, str],
    table: Mapping[str, Handler],
    tell: Progress = silent,
) -> None:
    """Let each operator's handler say how axes flow through it; an operator without one freezes what it reads.

    Args:
        walk: a new walk, filled here.
        program: what to follow.
        placeholders: from ``state_placeholders``.
        table: the handlers by schema name.
        tell: told how far it is.
    """
    total = len(program.graph.nodes)
    for done, node in enumerate(program.graph.nodes):
        tell("following its operators", done, total)
        if node.op == "placeholder":
            is_input = node.name in program.graph_signature.user_inputs
            walk.set_axes(node, _placeholder(walk, node, placeholders, is_input=is_input), is_input=is_input)
        elif node.op == "output":
            walk.freeze_inputs(node, "network output")
        elif node.op == "call_function":
            walk.set_axes(node, _call(walk, node, table))
        else:
            walk.set_axes(node, [])


def _placeholder(walk: Walk, node: Node, placeholders: Mapping[str, str], *, is_input: bool) -> Axes:
    value = node.meta.get("val")
    if not isinstance(value, torch.Tensor):
        return []
    name = placeholders.get(node.name)
    if name is not None:
        return walk.new_tensor(name, value.shape)
    reason = "network input" if is_input else "a constant written into forward"
    axes: Axes = [walk.table.fresh(int(size)) for size in value.shape]
    for labels in axes:
        walk.table.freeze(labels, reason)
        if is_input and labels is not None:
            walk.table.make(labels)
    return [None, *axes[1:]] if is_input and axes else axes


def _call(walk: Walk, node: Node, table: Mapping[str, Handler]) -> Axes | list[Axes]:
    value = node.meta.get("val")
    many = isinstance(value, list | tuple)
    if not isinstance(value, torch.Tensor) and not many:
        return []
    name = op_name(node)
    handler = table.get(name)
    if handler is None and is_pointwise(node) and not many:
        handler = pointwise
    if handler is not None:
        return handler(walk, node)
    return kept_whole(walk, node)
