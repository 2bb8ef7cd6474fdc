"""Which tensors a forward pass holds at each of its steps, from the exported graph."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.fx import Node
from torch.utils import _pytree as pytree

from qcqp_prune.graph.axes import Axes, Labels, Layered
from qcqp_prune.graph.channels import Activation
from qcqp_prune.graph.walk import Walk, example_call, op_name

logger = logging.getLogger(__name__)

Tracked = Callable[[Labels], "int | None"]
"""The axis of a dimension, None where it never shrinks."""


def find_activations(program: ExportedProgram, walk: Walk, tracked: Tracked) -> tuple[Activation, ...]:
    """Every tensor that takes memory of its own, with the steps from its making to its last use.

    A view takes none, and keeps what it looks into. Parameters and buffers are left out.

    Args:
        program: the exported graph; its nodes are the steps.
        walk: over that graph, with the labels of every tensor.
        tracked: numbers the axes.
    """
    book = _Book(program, walk)
    for step, node in enumerate(program.graph.nodes):
        book.visit(step, node)
    return tuple(_activation(walk, tracked, made) for made in book.made)


class _Made:
    """One piece of memory: the node and the output that first had it."""

    def __init__(self, node: Node, value: torch.Tensor, axes: Axes, step: int) -> None:
        self.node, self.value, self.axes = node, value, axes
        self.first = self.last = step


class _Book:
    """What each node's value lies in."""

    def __init__(self, program: ExportedProgram, walk: Walk) -> None:
        self.made: list[_Made] = []
        self._walk = walk
        self._inputs = set(program.graph_signature.user_inputs)
        self._held: dict[Node, list[_Made]] = {}

    def visit(self, step: int, node: Node) -> None:
        for source in node.all_input_nodes:
            for made in self._held.get(source, ()):
                made.last = step
        if node.op == "placeholder":
            self._held[node] = self._fresh(node, step) if node.name in self._inputs else []
        elif node.op == "call_function":
            self._held[node] = self._called(node, step)

    def _called(self, node: Node, step: int) -> list[_Made]:
        if op_name(node) == "getitem":
            source, index = node.args
            held = self._held.get(source, [])  # type: ignore[arg-type]
            whole = source.meta.get("val") if isinstance(source, Node) else None
            complete = isinstance(whole, list | tuple) and len(held) == len(whole)
            return [held[int(index)]] if complete else held  # type: ignore[arg-type]
        lent = self._lent_by(node)
        if lent is not None:
            return list(self._held.get(lent, ()))
        return self._fresh(node, step)

    def _fresh(self, node: Node, step: int) -> list[_Made]:
        value, axes = node.meta.get("val"), self._walk.raw_axes(node)
        values = list(value) if isinstance(value, list | tuple) else [value]
        every: Any = axes if isinstance(value, list | tuple) else [axes]
        # A stack of states whose widths differ counts at its full size: never too little.
        new = [
            _Made(node, v, [] if isinstance(a, Layered) and len(a.parts) > 1 else a, step)
            for v, a in zip(values, every, strict=True)
            if isinstance(v, torch.Tensor)
        ]
        self.made += new
        return new

    def _lent_by(self, node: Node) -> Node | None:
        """The input in whose memory an operator's output lies, found by running it on shapes alone."""
        sources = self._walk.tensor_inputs(node)
        leaves = [n.meta["val"] for n in sources]
        modes = [v.fake_mode for v in leaves if hasattr(v, "fake_mode")]
        if not modes:
            return None
        args, kwargs = example_call(node)
        try:
            with torch.no_grad(), modes[0]:
                out = node.target(*args, **kwargs)  # type: ignore[operator]
        except Exception as error:  # noqa: BLE001 - of many kinds; it then counts as new memory
            logger.debug("%s does not run on shapes alone: %s", node, error)
            return None
        first = next((x for x in pytree.tree_leaves(out) if isinstance(x, torch.Tensor)), None)
        if first is None:
            return None
        place = first.untyped_storage()._cdata
        return next(
            (n for n, v in zip(sources, leaves, strict=True) if v.untyped_storage()._cdata == place), None
        )


def _activation(walk: Walk, tracked: Tracked, made: _Made) -> Activation:
    axes = [tracked(labels) for labels in made.axes] or [None] * made.value.ndim
    fixed = math.prod(int(n) for n, axis in zip(made.value.shape, axes, strict=True) if axis is None)
    if made.node.op == "placeholder" or walk.is_fed(made.node):
        fixed = fixed // walk.batch if fixed % walk.batch == 0 else fixed
    return Activation(
        made.node.name,
        fixed * made.value.element_size(),
        tuple(a for a in axes if a is not None),
        made.first,
        made.last,
    )
