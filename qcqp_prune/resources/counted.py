"""MACs, parameters and memory as exact integer forms in the kept counts.

What is counted is the same for all three; the table in ``docs/counting.md`` lists it. Every convolution and linear
layer counts, projection shortcuts and classifier included. Biases and normalisations cost parameters, no MACs.

References:
    Jeong et al., "Optimal channel selection with discrete QCQP" (AISTATS 2022), Table 1: coefficients a and b.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from qcqp_prune.graph.channels import ChannelGraph, TensorSpec
from qcqp_prune.program.forms import CountForm, CountFormBuilder
from qcqp_prune.resources.inside import spent_in


class Macs:
    """Multiply-adds of one sample in convolutions and linear layers. FLOPs are twice that."""

    name = "macs"
    unit = "MACs"

    def form(self, graph: ChannelGraph) -> CountForm:
        """``sum_l HW_l K_l^2 sum_k n_in(l, k) n_out(l, k)`` over layers l and their segments k.

        A layer whose kernel columns are units costs ``HW_l n_in(l) n_columns(l)``.
        """
        builder = CountFormBuilder(len(graph.groups))
        for k, layer in enumerate(graph.layers):
            with spent_in(builder, graph, graph.block_of_layer.get(k)) as part:
                add_pairs(part, graph, layer.macs_per_pair, (layer.in_axis, layer.made_axis), layer.segments)
        return builder.build()

    def measure(self, module: Any, example_inputs: Any) -> int:
        """Multiply-adds that ``torch.utils.flop_counter`` sees in one forward pass, for one sample."""
        from qcqp_prune.resources.measure import measured_macs

        return measured_macs(module, example_inputs)


class Params:
    """Elements of all parameters, biases and affine norms included; a tied parameter counts once."""

    name = "params"
    unit = "parameters"

    def form(self, graph: ChannelGraph) -> CountForm:
        """``sum_p prod_d size_d(p)``, where a tracked dimension has the kept count."""
        builder = CountFormBuilder(len(graph.groups))
        add_parameters(builder, graph)
        return builder.build()

    def measure(self, module: Any, example_inputs: Any) -> int:
        """``sum(p.numel())`` over distinct parameters."""
        from qcqp_prune.resources.measure import measured_params

        return measured_params(module)


class Memory:
    """The paper's memory: every layer's output for one sample, and all parameters, in bytes."""

    name = "memory"
    unit = "bytes"

    def form(self, graph: ChannelGraph) -> CountForm:
        """``sum_l HW_l n_out(l) b + sum_p prod_d size_d(p) b`` with b bytes for each element."""
        builder = CountFormBuilder(len(graph.groups))
        for k, layer in enumerate(graph.layers):
            with spent_in(builder, graph, graph.block_of_layer.get(k)) as part:
                part.add_counts(layer.out_elements * layer.itemsize, graph.axis_counts(layer.out_axis))
        add_parameters(builder, graph, in_bytes=True)
        return builder.build()

    def measure(self, module: Any, example_inputs: Any) -> int:
        """Bytes of parameters, and of what each convolution and linear call returns for one sample."""
        from qcqp_prune.resources.measure import measured_memory

        return measured_memory(module, example_inputs)


def add_parameters(builder: CountFormBuilder, graph: ChannelGraph, *, in_bytes: bool = False) -> None:
    """Add the number of elements of all parameters, or their bytes."""
    for tensor in graph.tensors:
        if tensor.kind == "parameter":
            with spent_in(builder, graph, graph.block_of_tensor.get(tensor.name)) as part:
                add_elements(part, graph, tensor, tensor.itemsize if in_bytes else 1)


def add_elements(builder: CountFormBuilder, graph: ChannelGraph, tensor: TensorSpec, scale: int) -> None:
    """Add ``scale`` times the number of elements of a tensor."""
    if tensor.columns is not None:
        _add_columns(builder, graph, tensor, scale)
        return
    tracked = [d for d, axis in enumerate(tensor.axes) if axis is not None]
    scale *= math.prod(size for d, size in enumerate(tensor.shape) if d not in tracked)
    axes = [axis for axis in tensor.axes if axis is not None]
    if not axes:
        builder.add_constant(scale)
    elif len(axes) == 1 and tensor.segments == 1:
        builder.add_counts(scale, graph.axis_counts(axes[0]))
    elif len(axes) == 1:
        builder.add_counts(scale, _one_run(graph, axes[0], tensor.segments))
    else:
        add_pairs(builder, graph, scale, (axes[0], axes[1]), tensor.segments)


def _add_columns(builder: CountFormBuilder, graph: ChannelGraph, tensor: TensorSpec, scale: int) -> None:
    """A weight of which kernel columns are kept: inputs times columns."""
    assert tensor.columns is not None
    filters, inputs = tensor.shape[:2]
    scale *= math.prod(tensor.shape[2:]) * filters // len(graph.axes[tensor.columns])
    if tensor.axes[1] is None:
        builder.add_counts(scale * inputs, graph.axis_counts(tensor.columns))
    else:
        add_pairs(builder, graph, scale, (tensor.axes[1], tensor.columns), 1)


def add_pairs(
    builder: CountFormBuilder, graph: ChannelGraph, scale: int, axes: tuple[int, int], segments: int
) -> None:
    """Add ``scale * sum_k n_first(k) n_second(k)`` over the equal runs k of two axes.

    A run that belongs to one unit on both sides (depthwise) is kept or removed as a whole: its product is linear.
    """
    first, second = axes
    runs = zip(graph.segments(first, segments), graph.segments(second, segments), strict=True)
    if segments > 1 and _whole_runs(graph, first, second, segments):
        size = len(graph.axes[second]) // segments * (len(graph.axes[first]) // segments)
        units = graph.axes[first].reshape(segments, -1)[:, 0]
        shares: dict[int, int] = {}
        for g in graph.group_of_unit[units].tolist():
            shares[g] = shares.get(g, 0) + 1
        builder.add_counts(scale * size, {g: n // graph.groups[g].width for g, n in shares.items()})
        return
    for a, b in runs:
        builder.add_product(scale, graph.axis_counts(first, a), graph.axis_counts(second, b))


def _whole_runs(graph: ChannelGraph, first: int, second: int, segments: int) -> bool:
    a = graph.axes[first].reshape(segments, -1)
    b = graph.axes[second].reshape(segments, -1)
    return bool((a == a[:, :1]).all() and (b == a[:, :1]).all())


def _one_run(graph: ChannelGraph, axis: int, segments: int) -> Mapping[int, int]:
    return graph.axis_counts(axis, graph.segments(axis, segments)[0])
