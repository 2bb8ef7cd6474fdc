"""What is left of a channel graph once some of its units are gone: the graph of the smaller network."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from qcqp_prune.errors import InvalidOptionError
from qcqp_prune.graph.channels import BoolArray, ChannelGraph, IntArray, Layer, TensorSpec
from qcqp_prune.graph.links import Links
from qcqp_prune.graph.needs import Block


@dataclass(frozen=True, eq=False)
class Narrowed:
    """A graph without some units, and where its units and groups were.

    Attributes:
        graph: of the smaller network, to score it and to choose among its units. Floors, multiples, ties and reasons to
            stay are those of the whole graph. It is not for cutting: cut the dense network by masks of its own graph.
            Nor does it say which sums keep more than their operands tell (``KeptSum``), for the smaller network may
            have other additions: where an operand of a freely shared sum repeats channels, masks of it are read as if
            they followed the other operand.
        units: ``(unit_count,) int64``, the unit of the whole graph that each unit was.
        groups: ``(group_count,) int64``, the same of groups.
    """

    graph: ChannelGraph
    units: IntArray
    groups: IntArray

    def widened(self, flat: BoolArray, unit_count: int) -> BoolArray:
        """A mask of the smaller network as one of the whole, ``(unit_count,) bool``."""
        whole = np.zeros(unit_count, np.bool_)
        whole[self.units[flat]] = True
        return whole


def narrowed(graph: ChannelGraph, flat: BoolArray) -> Narrowed:
    """The channel graph of the network that is left, from the graph and the mask alone.

    Args:
        graph: of the whole network, without kernel columns.
        flat: ``(unit_count,) bool``, True = kept; from a solve.

    Raises:
        InvalidOptionError: kernel columns are units of the graph.
    """
    if any(tensor.columns is not None for tensor in graph.tensors):
        raise InvalidOptionError(
            "what is left of kernel columns is no graph of columns: trace without columns, or prune at once"
        )
    place = np.cumsum(flat) - 1
    counts = np.bincount(graph.group_of_unit[flat], minlength=len(graph.groups))
    groups = np.flatnonzero(counts)
    gone_layers, gone_tensors = graph.removed_layers(flat), graph.removed_tensors(flat)
    linked = flat[graph.links.wholes] & flat[graph.links.parts]
    left = replace(
        graph,
        groups=tuple(replace(graph.groups[g], width=int(counts[g])) for g in groups),
        axes=tuple(place[axis[flat[axis]]] for axis in graph.axes),
        layers=tuple(_layer(graph, x, flat) for k, x in enumerate(graph.layers) if k not in gone_layers),
        tensors=tuple(_tensor(graph, t, flat) for t in graph.tensors if t.name not in gone_tensors),
        links=Links(place[graph.links.wholes[linked]], place[graph.links.parts[linked]]),
        blocks=_blocks(graph, flat, place, groups),
        attributes=(),
        activations=(),
        kept_sums=(),
    )
    return Narrowed(left, np.flatnonzero(flat), groups)


def _layer(graph: ChannelGraph, layer: Layer, flat: BoolArray) -> Layer:
    weight = next((t for t in graph.tensors if layer.weight in (t.name, *t.aliases)), None)
    rows = layer.rows
    if rows is not None and weight is not None and weight.axes[0] is not None:
        kept = flat[graph.axes[weight.axes[0]]]
        rows = (int(kept[: rows[0]].sum()), int(kept[: rows[1]].sum()))
    return replace(layer, segments=_runs(graph, layer.out_axis, layer.segments, flat), rows=rows)


def _tensor(graph: ChannelGraph, tensor: TensorSpec, flat: BoolArray) -> TensorSpec:
    segments = tensor.segments
    if segments > 1 and tensor.axes[0] is not None:
        segments = _runs(graph, tensor.axes[0], segments, flat)
    shape = [
        size if axis is None else int(flat[graph.axes[axis]].sum())
        for size, axis in zip(tensor.shape, tensor.axes, strict=True)
    ]
    if tensor.segments > 1 and tensor.axes[1] is not None:
        shape[1] //= segments
    return replace(tensor, shape=tuple(shape), segments=segments)


def _runs(graph: ChannelGraph, axis: int, segments: int, flat: BoolArray) -> int:
    """How many of the equal runs of an axis are not empty."""
    return int(flat[graph.axes[axis]].reshape(segments, -1).any(1).sum())


def _blocks(graph: ChannelGraph, flat: BoolArray, place: IntArray, groups: IntArray) -> tuple[Block, ...]:
    left = [b for b, block in enumerate(graph.blocks) if flat[block.unit]]
    gone = graph.removed_layers(flat)
    layer_at = np.cumsum([k not in gone for k in range(len(graph.layers))]) - 1
    return tuple(
        replace(
            block,
            unit=int(place[block.unit]),
            groups=tuple(int(g) for g in np.searchsorted(groups, np.intersect1d(block.groups, groups))),
            outer=None if block.outer is None else left.index(block.outer),
            layers=tuple(int(layer_at[k]) for k in block.layers),
        )
        for block in (graph.blocks[b] for b in left)
    )
