"""Recurrent layers (LSTM, GRU, plain RNN): a hidden unit with its rows in every gate, its column, and its output.

A removed unit has rows and biases of zero in every gate, so its state stays at the zero that it starts from, and adds
nothing to any other. Each layer and each direction has units of its own.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
from torch import nn
from torch.fx import Node

from qcqp_prune.graph.axes import Axes, Labels, Layered
from qcqp_prune.graph.channels import IntArray
from qcqp_prune.graph.ops.convolution import (
    UNFOLLOWED_WEIGHT,
    bias,
    keep_others,
    per_sample,
    produced,
    readable,
    weight_name,
)
from qcqp_prune.graph.ops.joins import is_zeros
from qcqp_prune.graph.unknown import kept_whole
from qcqp_prune.graph.walk import FoundLayer, Handler, Walk, has_hooks, op_name

GATES = {"aten::lstm": 4, "aten::gru": 3, "aten::rnn_tanh": 1, "aten::rnn_relu": 1}
"""Operators, and how many rows of each weight belong to one hidden unit."""

STEPS = {"aten::lstm_cell": 4, "aten::gru_cell": 3, "aten::rnn_tanh_cell": 1, "aten::rnn_relu_cell": 1}
"""The same for operators that make one step, as ``nn.LSTMCell`` calls them in a loop."""

MODULES = (nn.LSTM, nn.GRU, nn.RNN)
"""Classes that may be replaced where layers come to have different widths."""

_STATE_WIDTHS = ("hidden_size", "hidden_dim", "hidden")
_STATE = "its initial state is a tensor that no handler could follow"
_TIME = "a recurrent layer runs along it"


@dataclass(frozen=True)
class Cell:
    """The parameters of one layer in one direction, as nodes or as whatever stands for them.

    Attributes:
        ih, hh: ``(gates * hidden, inputs)`` and ``(gates * hidden, outputs)``.
        biases: none or two of ``(gates * hidden,)``.
        projection: ``(outputs, hidden)``, or None where the hidden state is the output.
    """

    ih: Any
    hh: Any
    biases: tuple[Any, ...]
    projection: Any

    @classmethod
    def of(cls, params: Sequence[Any], has_biases: bool, count: int) -> list[Cell]:
        """The flat list of parameters, divided into ``count`` cells: layer after layer, forward before backward."""
        size = len(params) // count
        biases = 2 if has_biases else 0
        cells = []
        for k in range(count):
            ih, hh, *rest = params[k * size : (k + 1) * size]
            cells.append(cls(ih, hh, tuple(rest[:biases]), rest[biases] if size > 2 + biases else None))
        return cells


def recurrence(walk: Walk, node: Node) -> Axes | list[Axes]:
    """Any recurrent layer over padded sequences: output, last hidden states, and last cell states of an LSTM."""
    if cast(Any, node.target)._overloadname != "input":
        return kept_whole(walk, node)
    source, directions = walk.arg(node, "input"), 1 + bool(walk.arg(node, "bidirectional"))
    layers = int(walk.arg(node, "num_layers"))
    cells = Cell.of(walk.arg(node, "params"), bool(walk.arg(node, "has_biases")), layers * directions)
    labels = first = readable(walk, node, source, -1)
    keep_others(walk, source, -1, _TIME)
    hidden, outputs = [], []
    for k, cell in enumerate(cells):
        units, out = _cell(walk, node, cell, labels)
        hidden.append(units)
        outputs.append(out)
        if (k + 1) % directions == 0:
            labels = np.concatenate(outputs[-directions:])
    if not _may_differ(walk, node):
        for one in (hidden, outputs):
            walk.table.merge_columns(np.stack(one))
    _attributes(walk, node, first, (hidden[0], outputs[0]))
    is_lstm = op_name(node) == "aten::lstm"
    states = [outputs, hidden] if is_lstm else [outputs]
    given = walk.arg(node, "hx")
    for state, own in zip(given if is_lstm else [given], states, strict=True):
        _start(walk, state, own)
    return [[None, None, labels], *(Layered.of([[None, part] for part in own]) for own in states)]


def step(walk: Walk, node: Node) -> Axes | list[Axes]:
    """One step of one layer: its state, and the cell state of an LSTM."""
    source, given = walk.arg(node, "input"), walk.arg(node, "hx")
    inputs = readable(walk, node, source, -1)
    keep_others(walk, source, -1, _TIME)
    biases = tuple(b for b in (walk.arg(node, "b_ih"), walk.arg(node, "b_hh")) if isinstance(b, Node))
    units, _ = _cell(walk, node, Cell(walk.arg(node, "w_ih"), walk.arg(node, "w_hh"), biases, None), inputs)
    _attributes(walk, node, inputs, (units, units))
    is_lstm = op_name(node) == "aten::lstm_cell"
    for state in given if is_lstm else [given]:
        _start(walk, state, [units])
    return [[None, units], [None, units]] if is_lstm else [None, units]


def _cell(walk: Walk, node: Node, cell: Cell, inputs: IntArray) -> tuple[IntArray, IntArray]:
    """Tie the parameters of one cell, and count it; labels of its hidden units, and of its outputs."""
    rows = produced(walk, cell.ih, 0)
    units = walk.table.merge_columns(rows.reshape({**GATES, **STEPS}[op_name(node)], -1))
    out = units if cell.projection is None else produced(walk, cell.projection, 0)
    walk.table.merge(walk.axis(cell.ih, 1), inputs, UNFOLLOWED_WEIGHT)
    walk.table.merge(walk.axis(cell.hh, 0), rows, UNFOLLOWED_WEIGHT)
    walk.table.merge(walk.axis(cell.hh, 1), out, UNFOLLOWED_WEIGHT)
    for vector in cell.biases:
        bias(walk, vector, rows)
    _count(walk, node, "input", cell.ih, (inputs, rows))
    _count(walk, node, "recurrent", cell.hh, (out, rows))
    if cell.projection is not None:
        walk.table.merge(walk.axis(cell.projection, 1), units, UNFOLLOWED_WEIGHT)
        _count(walk, node, "projection", cell.projection, (units, out))
    return units, out


def _count(walk: Walk, node: Node, what: str, weight: Node, sides: tuple[IntArray, IntArray]) -> None:
    """Record one product of a cell, done once for each step of each sequence."""
    value = node.meta["val"]
    output = value[0] if isinstance(value, list | tuple) else value
    steps = per_sample(walk, node, math.prod(int(n) for n in output.shape[:-1]))
    walk.layers.append(
        FoundLayer(
            node,
            f"{op_name(node).removeprefix('aten::')}_{what}",
            weight_name(walk, weight, *sides),
            *sides,
            1,
            macs_per_pair=steps,
            out_elements=steps,
            itemsize=output.element_size(),
            by_weight=True,
        )
    )
    walk.table.make(sides[1])


def _may_differ(walk: Walk, node: Node) -> bool:
    """Whether layers may come to have different widths: the module must be one that can be replaced."""
    module = walk.module(node)
    is_part = walk.module_path(node) != ""
    return is_part and type(module) in MODULES and not has_hooks(cast(nn.Module, module))


def _attributes(walk: Walk, node: Node, inputs: IntArray, own: tuple[IntArray, IntArray]) -> None:
    """Sizes of an ``nn.LSTM`` and its like, right where all layers have one width; others are replaced."""
    values: dict[str, Labels] = {"input_size": inputs, "hidden_size": own[0]}
    if own[1] is not own[0]:
        values["proj_size"] = own[1]
    walk.attribute(node, cast("dict[str, IntArray]", values))


def _start(walk: Walk, state: Node, own: list[IntArray]) -> None:
    """Initial states: zeros follow, anything else has an entry for each unit of every layer."""
    zeros = is_zeros(state)
    if zeros is not None:
        for name in _STATE_WIDTHS:
            walk.attribute(zeros, {name: own[0]})
        return
    axes = walk.axes(state)
    for labels in axes[:-1]:
        walk.table.freeze(labels, _TIME)
    for units in own:
        walk.table.merge(axes[-1], units, _STATE)


HANDLERS: dict[str, Handler] = {**dict.fromkeys(GATES, recurrence), **dict.fromkeys(STEPS, step)}
