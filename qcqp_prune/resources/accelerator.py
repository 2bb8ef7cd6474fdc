"""Cycles of a convolution engine that takes channels in blocks."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np

from qcqp_prune.errors import InvalidOptionError
from qcqp_prune.graph.channels import ChannelGraph, Layer
from qcqp_prune.program.forms import CountForm, CountFormBuilder
from qcqp_prune.program.tables import steps_of
from qcqp_prune.resources.inside import spent_in


@dataclass
class AcceleratorCycles:
    """Cycles of an engine that reads ``cpi`` channels and writes ``cpo`` channels of one position at a time.

    A layer takes ``ceil(n_in / CPI) H W ceil(n_out / CPO)`` cycles for each of its segments, with ``H W`` output
    positions: a kernel's taps run side by side. Channels beyond a full block cost as much as a block.

    Attributes:
        cpi: channels that are read at a time.
        cpo: channels that are written at a time.

    References:
        Bragagnolo, "Exploring the Design and Implementation of Pruning Techniques for Deep Neural Networks" (Torino,
        2023), chapter 7, for the HLSinf engine; the printed ratio is meant as a ceiling.
    """

    cpi: int = 4
    cpo: int = 4
    name: str = field(default="cycles", init=False)
    unit: str = field(default="cycles", init=False)
    on_request: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if min(self.cpi, self.cpo) < 1:
            raise InvalidOptionError(f"an engine of {self.cpi} x {self.cpo} channels: give positive numbers")

    def form(self, graph: ChannelGraph) -> CountForm:
        """``sum_l H_l W_l sum_k ceil(n_in(l, k) / CPI) ceil(n_out(l, k) / CPO)`` over layers l and segments k."""
        builder = CountFormBuilder(len(graph.groups))
        for k, layer in enumerate(graph.layers):
            if layer.weight:
                with spent_in(builder, graph, graph.block_of_layer.get(k)) as part:
                    self._add_layer(part, graph, layer)
        return builder.build()

    def _add_layer(self, builder: CountFormBuilder, graph: ChannelGraph, layer: Layer) -> None:
        if graph.is_depthwise(layer):
            self._add_depthwise(builder, graph, layer)
            return
        runs = (graph.segments(axis, layer.segments) for axis in (layer.in_axis, layer.out_axis))
        for first, second in zip(*runs, strict=True):
            sizes = (first.stop - first.start, second.stop - second.start)
            levels = [steps_of(k, n) for k, n in zip((self.cpi, self.cpo), sizes, strict=True)]
            values = layer.out_elements * np.multiply.outer(*(np.arange(len(part)) for part in levels))
            sides = (graph.axis_counts(layer.in_axis, first), graph.axis_counts(layer.out_axis, second))
            builder.add_table(values, sides, levels)

    def _add_depthwise(self, builder: CountFormBuilder, graph: ChannelGraph, layer: Layer) -> None:
        """Each segment is one unit, so that the cost is linear in the number of segments kept."""
        ins, outs = (len(graph.axes[axis]) // layer.segments for axis in (layer.in_axis, layer.out_axis))
        cycles = layer.out_elements * math.ceil(ins / self.cpi) * math.ceil(outs / self.cpo)
        units = graph.axes[layer.in_axis].reshape(layer.segments, -1)[:, 0]
        shares = np.bincount(graph.group_of_unit[units], minlength=len(graph.groups))
        for g in np.flatnonzero(shares).tolist():
            builder.add_counts(cycles, {g: int(shares[g]) // graph.groups[g].width})
