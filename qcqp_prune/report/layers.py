"""What happened to each layer, counted from the graph and the masks."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from qcqp_prune.graph.channels import BoolArray, ChannelGraph, Layer, TensorSpec

KEPT_BY_CHOICE = "kept whole by choice: the solver removed others"


@dataclass(frozen=True)
class LayerRow:
    """One convolution or linear layer. Pairs are (before, after).

    Attributes:
        name, op: as in the channel graph.
        inputs, outputs: channels or features.
        macs: multiply-adds of one sample.
        params: elements of weight and bias; zero where another row has counted the same tensor.
        why_not: why no output was removed, None where some were, or some of its kernel columns.
        columns: kernel columns, or filters, that are units of their own; None where the layer has none.
    """

    name: str
    op: str
    inputs: tuple[int, int]
    outputs: tuple[int, int]
    macs: tuple[int, int]
    params: tuple[int, int]
    why_not: str | None
    columns: tuple[int, int] | None = None


@dataclass(frozen=True)
class OtherParameters:
    """Elements of parameters that belong to no layer's row, such as batch norms: before and after."""

    before: int
    after: int


def layer_rows(graph: ChannelGraph, flat: BoolArray) -> tuple[LayerRow, ...]:
    """One row for each layer, in execution order.

    Args:
        graph: the channel graph.
        flat: ``(unit_count,) bool``, True = kept.
    """
    owners = _owners(graph)
    gone = graph.removed_layers(flat)
    return tuple(
        _row(graph, layer, flat & (k not in gone), owners, gone=k in gone)
        for k, layer in enumerate(graph.layers)
    )


def other_parameters(graph: ChannelGraph, flat: BoolArray) -> OtherParameters:
    """What the rows of ``layer_rows`` leave out, so that rows and rest add up to the whole network."""
    owners = _owners(graph)
    gone = graph.removed_tensors(flat)
    rest = [t for t in graph.tensors if t.kind == "parameter" and t.name not in owners]
    return OtherParameters(
        sum(math.prod(t.shape) for t in rest),
        sum(kept_elements(graph, t, flat) for t in rest if t.name not in gone),
    )


def kept_elements(graph: ChannelGraph, tensor: TensorSpec, flat: BoolArray) -> int:
    """Elements of a tensor after cutting."""
    if tensor.columns is not None:
        inputs = tensor.shape[1] if tensor.axes[1] is None else int(flat[graph.axes[tensor.axes[1]]].sum())
        return inputs * int(graph.kernel_mask(tensor, flat).sum())
    kept = [
        np.ones(size, np.bool_) if axis is None else flat[graph.axes[axis]]
        for size, axis in zip(tensor.shape, tensor.axes, strict=True)
    ]
    if tensor.segments == 1:
        return math.prod(int(k.sum()) for k in kept)
    rows = kept[0].reshape(tensor.segments, -1).sum(1)
    whole = tensor.axes[1] is None
    cols = np.full(tensor.segments, tensor.shape[1]) if whole else kept[1].reshape(tensor.segments, -1).sum(1)
    return int((rows * cols).sum()) * math.prod(int(k.sum()) for k in kept[2:])


def _owners(graph: ChannelGraph) -> dict[str, str]:
    """Which layer's row counts a weight or bias: the first that uses it."""
    parameters = {t.name: t for t in graph.tensors if t.kind == "parameter"}
    owners: dict[str, str] = {}
    for layer in graph.layers:
        if layer.weight not in parameters:
            continue
        owners.setdefault(layer.weight, layer.name)
        for path in (layer.weight, *parameters[layer.weight].aliases):
            module = path.rpartition(".")[0]
            bias = f"{module}.bias" if module else "bias"
            if module in (layer.name.partition("@")[0], "") and bias in parameters:
                owners.setdefault(bias, layer.name)
    return owners


def _row(
    graph: ChannelGraph, layer: Layer, flat: BoolArray, owners: dict[str, str], *, gone: bool
) -> LayerRow:
    """A layer's row; of one that is gone with its residual branch nothing is kept, ``flat`` says so."""
    ins, outs = flat[graph.axes[layer.in_axis]], flat[graph.axes[layer.out_axis]]
    made = flat[graph.axes[layer.made_axis]]
    mine = [t for t in graph.tensors if owners.get(t.name) == layer.name]
    outputs = (len(outs), int(outs.sum()))
    return LayerRow(
        name=layer.name,
        op=layer.op,
        inputs=(len(ins), int(ins.sum())),
        outputs=outputs,
        macs=(_macs(layer, np.ones_like(ins), np.ones_like(made)), _macs(layer, ins, made)),
        params=(
            sum(math.prod(t.shape) for t in mine),
            sum(kept_elements(graph, t, flat) for t in mine) * (not gone),
        ),
        why_not=None
        if not made.all() or outputs[0] > outputs[1]
        else graph.why_not_pruned(layer) or KEPT_BY_CHOICE,
        columns=None if layer.columns is None else (len(made), int(made.sum())),
    )


def _macs(layer: Layer, ins: BoolArray, made: BoolArray) -> int:
    """Run ``k`` of a grouped layer's input meets run ``k`` of its output only."""
    pairs = ins.reshape(layer.segments, -1).sum(1) * made.reshape(layer.segments, -1).sum(1)
    return layer.macs_per_pair * int(pairs.sum())
