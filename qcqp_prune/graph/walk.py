"""The walk over an exported graph: what an operator handler sees and may do."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from torch.fx import Graph, Node
from torch.utils import _pytree as pytree

from qcqp_prune.graph.axes import Axes, Labels, LabelTable, Layered
from qcqp_prune.graph.channels import IntArray, Note
from qcqp_prune.graph.units import UnitBook

_ANCESTORS = 64

ADDITIONS = ("aten::add", "aten::sub", "aten::rsub")
"""Operators of which a removed operand leaves the other as it is."""

CONSTANTS = {f"aten::{name}" for name in ("zeros", "ones", "full", "new_zeros", "new_ones", "new_full")}
"""Operators that make a tensor of one value in a written size."""

REPEATING = {
    f"aten::{name}" for name in ("expand", "expand_as", "repeat", "tile", "repeat_interleave")
} | CONSTANTS

Handler = Callable[["Walk", Node], "Axes | list[Axes]"]
"""Says how labels flow through one operator: labels of its output, or of each output where it gives a sequence."""


@dataclass(frozen=True)
class FoundLayer:
    """A call with a weight matrix, before units are numbered.

    ``rows`` are the first and last-but-one of the weight's rows where the call uses part of them; see ``Layer``.
    ``by_weight`` is for modules with several layers, which are told apart by the names of their weights.
    """

    node: Node
    op: str
    weight: str
    in_labels: IntArray
    out_labels: IntArray
    segments: int
    macs_per_pair: int
    out_elements: int
    itemsize: int
    rows: tuple[int, int] | None = None
    by_weight: bool = False


@dataclass(frozen=True)
class FoundAttribute:
    """A module attribute that follows the kept counts, before units are numbered.

    Attributes:
        module: module path.
        name: attribute name.
        parts: for each entry of the value the labels that it counts, or the integer that it stays.
        scalar: whether the value is one integer, not a tuple.
    """

    module: str
    name: str
    parts: tuple[IntArray | int, ...]
    scalar: bool


class Walk:
    """State of one walk in execution order. Handlers read arguments and labels here, and record what they find.

    ``products`` holds what products of two tensors run over, heads of attention among it; ``summed`` what they, or
    sums, sum over; ``repeated`` the dimensions (from the end) along which a tensor holds copies, and for each of their
    positions the number of the set that it goes with, None where each may go by itself, see ``copies``; ``units`` what
    kinds of units there are.
    """

    def __init__(
        self, model: torch.nn.Module, tensors: Mapping[str, str], batch: int, *, free_sums: bool = False
    ) -> None:
        """Start a walk.

        Args:
            model: the traced module.
            tensors: for each graph placeholder of a parameter or buffer its state-dict name (aliases resolved).
            batch: samples in the example input.
            free_sums: whether a sum of channels gets channels of its own.
        """
        self.free_sums = free_sums
        self.units = UnitBook()
        self.table = LabelTable()
        self.layers: list[FoundLayer] = []
        self.products: list[IntArray] = []
        self.summed: list[IntArray] = []
        self.attributes: dict[tuple[str, str], FoundAttribute] = {}
        self.segmented: dict[str, tuple[int, IntArray]] = {}
        self.tensor_axes: dict[str, Axes] = {}
        self.notes: list[Note] = []
        self.repeated: dict[Node, dict[int, Labels]] = {}
        self.batch = batch
        self._modules = dict(model.named_modules(remove_duplicate=False))
        self._tensors = tensors
        self._axes: dict[Node, Axes | list[Axes]] = {}
        self._single: IntArray | None = None
        self._fed: set[Node] = set()
        self._additions: dict[Node, int] = {}
        self._leading: set[int] = set()

    # -- reading ------------------------------------------------------------------------------------------------

    def shape(self, node: Node) -> tuple[int, ...]:
        """Shape of a node's tensor."""
        return tuple(int(s) for s in node.meta["val"].shape)

    def arg(self, node: Node, name: str, default: Any = None) -> Any:
        """An operator's argument by its schema name, or the schema's default, or ``default``."""
        return argument(node, name, default)

    def axes(self, node: Node) -> Axes:
        """Labels of each dimension of a tensor; parts of a stack are tied to each other by that, see ``parts``."""
        stored = self._axes[node]
        if isinstance(stored, Layered):
            stored = self._axes[node] = stored.tie(self.table)
        return cast(Axes, stored)

    def parts(self, node: Node) -> list[Axes] | None:
        """Axes of each tensor along the first dimension of a stack of unlike ones; None where it is none."""
        stored = self._axes[node]
        return stored.parts if isinstance(stored, Layered) else None

    def axis(self, node: Node, dim: int) -> Labels:
        """Labels of one dimension; fresh ones are not made."""
        return self.axes(node)[dim]

    def tensor_inputs(self, node: Node) -> list[Node]:
        """The nodes among the arguments that are tensors."""
        return [n for n in node.all_input_nodes if isinstance(n.meta.get("val"), torch.Tensor)]

    def parameter(self, node: Any) -> str | None:
        """State-dict name of the parameter or buffer that a tensor is, or is computed from position by position.

        Seen through anything that gives the same shape with every position where it was: a transposed square matrix
        is not its parameter.
        """
        front, seen = [node], 0
        while front and seen < _ANCESTORS:
            current, seen = front.pop(0), seen + 1
            if current.name in self._tensors and self._same_layout(current, node):
                return self._tensors[current.name]
            front += self.tensor_inputs(current)
        return None

    def part_of_parameter(self, node: Node) -> tuple[str, tuple[int, int]] | None:
        """The parameter of which a matrix is some consecutive rows, and which; None where it is anything else."""
        rows, columns = self.axes(node)
        if rows is None or columns is None:
            return None
        front, seen = [node], 0
        while front and seen < _ANCESTORS:
            current, seen = front.pop(0), seen + 1
            name = self._tensors.get(current.name)
            if name is not None:
                whole = self.tensor_axes[name]
                is_matrix = len(whole) == 2 and whole[0] is not None and len(rows)
                first = int(rows[0] - cast(IntArray, whole[0])[0]) if is_matrix else -1
                if first >= 0 and self.shape(node) != self.shape(current):
                    part = cast(IntArray, whole[0])[first : first + len(rows)]
                    if np.array_equal(part, rows) and np.array_equal(whole[1], columns):  # type: ignore[arg-type]
                        return name, (first, first + len(rows))
            front += current.all_input_nodes
        return None

    def _same_layout(self, a: Node, b: Node) -> bool:
        if a is b:
            return True
        if self.shape(a) != self.shape(b):
            return False
        pairs = zip(self.axes(a), self.axes(b), self.shape(a), strict=True)
        return all(
            size == 1 or (x is not None and y is not None and self.table.same(x, y))
            for d, (x, y, size) in enumerate(pairs)
            if d < 2
        )

    def is_fed(self, node: Node) -> bool:
        """Whether a node depends on an input of the network, and so grows with the batch."""
        return node in self._fed or any(n in self._fed for n in node.all_input_nodes)

    def leads(self, labels: Labels) -> bool:
        """Whether a dimension is the first of three or more of a parameter, where experts stand."""
        return labels is not None and int(labels[0]) in self._leading

    def _is_repeated_for_samples(self, node: Node) -> bool:
        """Whether a tensor that depends on no input is made once for each sample (queries, position embeddings)."""
        if self.batch == 1 or node.op != "call_function" or op_name(node) not in REPEATING:
            return False
        before = [self.shape(n)[:1] for n in self.tensor_inputs(node)]
        return self.shape(node)[:1] == (self.batch,) and (self.batch,) not in before

    def module_path(self, node: Node) -> str:
        """Path of the module in whose ``forward`` the operator stands."""
        stack = node.meta.get("nn_module_stack") or {"": ("", None)}
        return str(list(stack.values())[-1][0]).split("@")[0]

    def addition_number(self, node: Node) -> int:
        """Number of an addition among those of its graph, see ``additions``."""
        if node not in self._additions:
            self._additions = additions(node.graph)
        return self._additions[node]

    def module(self, node: Node) -> torch.nn.Module | None:
        """The module in whose ``forward`` the operator stands."""
        return self._modules.get(self.module_path(node))

    # -- recording ----------------------------------------------------------------------------------------------

    def set_axes(self, node: Node, axes: Axes | list[Axes], *, is_input: bool = False) -> None:
        """Store what a handler said of a node."""
        self._axes[node] = axes
        if is_input or self.is_fed(node) or self._is_repeated_for_samples(node):
            self._fed.add(node)

    def new_tensor(self, name: str, shape: Sequence[int]) -> Axes:
        """Labels of a parameter or buffer, the same each time."""
        if name not in self.tensor_axes:
            axes: Axes = [self.table.fresh(int(size)) for size in shape]
            self.tensor_axes[name] = axes
            if len(axes) > 2 and shape[0]:
                self._leading.add(int(cast(IntArray, axes[0])[0]))
        return list(self.tensor_axes[name])

    def raw_axes(self, node: Node) -> Axes | list[Axes]:
        """Labels as stored: of one tensor, or of each of a sequence."""
        return self._axes[node]

    def note(self, node: Node, text: str) -> None:
        """Tell the user about a decision."""
        self.notes.append(Note(self.module_path(node) or node.name, text))

    def freeze_inputs(self, node: Node, reason: str) -> None:
        """Freeze every tracked dimension that an operator reads."""
        for source in node.all_input_nodes:
            stored = self._axes.get(source, [])
            for axes in stored if stored and isinstance(stored[0], list) else [stored]:
                for one in axes.parts if isinstance(axes, Layered) else [axes]:
                    for labels in cast(Axes, one):
                        self.table.freeze(labels, reason)

    def single(self) -> IntArray:
        """One position that is always kept: the side of a product on which nothing can go. The same at each call."""
        if self._single is None:
            self._single = self.table.fresh(1)
            self.table.freeze(self._single, "a product of matrices that keeps its size")
        return self._single

    def attribute(self, node: Node, values: Mapping[str, Sequence[IntArray | int] | IntArray]) -> None:
        """Record module attributes that must follow the kept counts.

        They are recorded together or not at all: a module whose present values differ is not the operator's own.

        Args:
            node: the operator.
            values: for each attribute name its labels (an integer attribute), or a sequence of labels and constants.
        """
        path, module = self.module_path(node), self.module(node)
        found = []
        for name, value in values.items():
            scalar = not isinstance(value, list | tuple)
            parts = cast(
                "tuple[IntArray | int, ...]", (value,) if scalar else tuple(cast(Sequence[Any], value))
            )
            now = tuple(p if isinstance(p, int) else len(p) for p in parts)
            present = getattr(module, name, None)
            if present != (now[0] if scalar else now) and not (not scalar and _as_tuple(present) == now):
                return
            found.append(FoundAttribute(path, name, parts, scalar))
        for attribute in found:
            self.attributes.setdefault((path, attribute.name), attribute)


def _as_tuple(value: Any) -> tuple[Any, ...] | None:
    return tuple(value) if isinstance(value, Iterable) and not isinstance(value, str) else None


def argument(node: Node, name: str, default: Any = None) -> Any:
    """An operator's argument by its schema name, or the schema's default, or ``default``."""
    schema = cast(torch._ops.OpOverload, node.target)._schema
    for position, found in enumerate(schema.arguments):
        if found.name == name:
            if name in node.kwargs:
                return node.kwargs[name]
            if position < len(node.args):
                return node.args[position]
            return found.default_value if found.has_default_value() else default
    return default


def example_call(node: Node) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """An operator's arguments as the export saw them: fake tensors, and graph modules where it has a body."""

    def example(source: Node) -> Any:
        if source.op == "get_attr" and "val" not in source.meta:
            return getattr(source.graph.owning_module, str(source.target))
        return source.meta["val"]

    args, kwargs = pytree.tree_map_only(Node, example, (node.args, dict(node.kwargs)))
    return args, kwargs


def has_hooks(module: torch.nn.Module) -> bool:
    """Whether anything is attached that a module put in its place would lose."""
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return any(getattr(module, kind, None) for kind in kinds)


def op_name(node: Node) -> str:
    """``aten::relu`` for ``relu``, ``relu_`` and any overload; ``getitem`` for Python's."""
    if node.target is operator.getitem:
        return "getitem"
    if isinstance(node.target, torch._ops.OpOverload):
        return node.target._schema.name.removesuffix("_")
    return str(node.target)


def additions(graph: Graph) -> dict[Node, int]:
    """The additions of an exported graph, numbered in order: the same numbers in every export of a model."""
    found = (n for n in graph.nodes if n.op == "call_function" and op_name(n) in ADDITIONS)
    return {node: k for k, node in enumerate(found)}


def is_pointwise(node: Node) -> bool:
    """Whether PyTorch itself tags the operator as pointwise."""
    return isinstance(node.target, torch._ops.OpOverload) and torch.Tag.pointwise in node.target.tags
