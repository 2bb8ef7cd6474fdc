"""Entities: the sets of weights that a regulariser pushes to zero together, as rows of matrices."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt
from torch import Tensor, nn

from qcqp_prune.errors import InvalidOptionError, MaskMismatchError, UnknownLayerError
from qcqp_prune.graph.channels import ChannelGraph, IntArray, Layer
from qcqp_prune.graph.grouping import matches
from qcqp_prune.program.coefficients import FloatArray

Structure = Literal["filters", "units", "columns"]
"""What an entity is: a filter (the weights of one output channel of one layer); a unit of the graph (the filters of
all layers that write it, or its kernel columns' weights where the unit is one, with their biases, and its scales and
shifts in norms); or a kernel column of a layer that was traced with columns."""


@dataclass(frozen=True)
class Block:
    """A weight seen as a matrix, each row of which belongs to one entity.

    Attributes:
        weight: state-dict name.
        layer: the layer that first uses it; of a bias or a norm, its own name.
        first: number of its first row among the rows of all blocks.
        rows: how many it has.
        view: gives the matrix ``(rows, k)`` of the weight, a view where that is possible.
        unview: brings such a matrix back into the weight's shape, with zeros elsewhere where the layer uses part of it.
        part: first and last-but-one row of the weight where the layer uses part of it.
    """

    weight: str
    layer: str
    first: int
    rows: int
    view: Callable[[Tensor], Tensor]
    unview: Callable[[Tensor], Tensor]
    part: tuple[int, int] | None = None


@dataclass(frozen=True, eq=False)
class Entities:
    """A partition of the weights that may go into entities.

    Attributes:
        blocks: the weights.
        owner: ``(rows,) int64``, the entity of each row; -1 where the row stays whatever is chosen.
        units: ``(rows,) int64``, the flat unit index of each row: of its output channel, or of its column.
        count: number of entities.
    """

    blocks: tuple[Block, ...]
    owner: IntArray
    units: IntArray
    count: int

    @classmethod
    def of(
        cls,
        graph: ChannelGraph,
        structure: Structure = "filters",
        layers: Iterable[str] | None = None,
        *,
        frozen: Collection[str] = (),
    ) -> Entities:
        """The entities of a graph.

        Args:
            graph: the channel graph.
            structure: what an entity is.
            layers: names or globs of layers; all where None. Rows whose unit cannot go are in no entity.
            frozen: names of parameters that are not trained, and in no entity either.

        Raises:
            InvalidOptionError: there is no such structure, or the graph has none of it.
            UnknownLayerError: a glob matches no layer that has weights.
        """
        if structure not in get_args(Structure):
            raise InvalidOptionError(f"structure={structure!r}: choose from {', '.join(get_args(Structure))}")
        chosen = _chosen(graph, structure, layers)
        blocks, units, first = [], [], 0
        for layer in chosen:
            block, axis = _block(graph, layer, first)
            if graph.stays[axis].all() or block.weight in frozen:
                continue
            blocks.append(block)
            units.append(axis)
            first += block.rows
        if structure == "units" and layers is None:
            for block, axis in _vectors(graph, first, frozen):
                blocks.append(block)
                units.append(axis)
        unit = np.concatenate([np.zeros(0, np.int64), *units])
        free = ~graph.stays[unit]
        if not free.any():
            raise InvalidOptionError(
                f"no {structure} of these layers may go: choose another structure, or layers that the graph can prune"
            )
        owner = np.full(len(unit), -1, np.int64)
        kinds = unit[free] if structure == "units" else np.flatnonzero(free)
        owner[free] = np.unique(kinds, return_inverse=True)[1].ravel()
        return cls(tuple(blocks), owner, unit, int(owner.max()) + 1)

    @cached_property
    def unit_of(self) -> IntArray:
        """The unit that each entity belongs to, ``(count,)``."""
        out = np.empty(self.count, np.int64)
        out[self.owner[self.owner >= 0]] = self.units[self.owner >= 0]
        return out


def by_unit(graph: ChannelGraph, unit_of: IntArray, values: npt.ArrayLike) -> FloatArray:
    """The largest of the entities' values for each unit, ``(units,)``; 1 for units that stay.

    A unit without entities has what its links say: a part the largest of its wholes, a whole the largest of its parts;
    1 where they say nothing.
    """
    out = np.full(graph.unit_count, -np.inf)
    np.maximum.at(out, unit_of, np.asarray(values, np.float64))
    links, bare = graph.links, np.isneginf(out)
    levels = links.levels or ()
    for told, teller, order in (
        (links.parts, links.wholes, levels[::-1]),
        (links.wholes, links.parts, levels),
    ):
        for level in order:
            pairs = level[bare[told[level]]]
            known = out[teller[pairs]]
            np.maximum.at(out, told[pairs], np.where(np.isneginf(known), 1.0, known))
    return np.where(np.isneginf(out) | graph.stays, 1.0, out)


def of_entities(graph: ChannelGraph, unit_of: IntArray, costs: FloatArray) -> FloatArray:
    """What units cost, charged to entities, ``(entities,)``: the entities of one unit share it.

    A whole without entities is paid for by its parts in equal shares.

    Args:
        graph: the channel graph.
        unit_of: ``(entities,)`` the unit of each.
        costs: ``(units,)``.
    """
    due, links = costs.copy(), graph.links
    number = np.bincount(unit_of, minlength=graph.unit_count)
    parts = np.bincount(links.wholes, minlength=graph.unit_count)
    for level in reversed(links.levels or ()):
        pairs = level[number[links.wholes[level]] == 0]
        np.add.at(due, links.parts[pairs], due[links.wholes[pairs]] / parts[links.wholes[pairs]])
    return due[unit_of] / number[unit_of]


def weights_of(model: nn.Module, entities: Entities) -> dict[str, nn.Parameter]:
    """The parameters that the entities are made of.

    Raises:
        MaskMismatchError: the model lacks one of them: it is not the one that was traced.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    missing = [b.weight for b in entities.blocks if b.weight not in parameters]
    if missing:
        raise MaskMismatchError(f"{missing[0]} is no parameter of this model: give the model that was traced")
    return {b.weight: parameters[b.weight] for b in entities.blocks}


def _chosen(graph: ChannelGraph, structure: Structure, layers: Iterable[str] | None) -> list[Layer]:
    """Layers with a weight of their own, each weight once."""
    globs = None if layers is None else [layers] if isinstance(layers, str) else list(layers)
    found: dict[tuple[str, tuple[int, int] | None], Layer] = {}
    for layer in graph.layers:
        has = structure == "units" or (layer.columns is not None) == (structure == "columns")
        if layer.weight and has and (globs is None or any(matches(layer.name, g) for g in globs)):
            found.setdefault((layer.weight, layer.rows), layer)
    for glob in globs or ():
        if not any(matches(layer.name, glob) for layer in graph.layers if layer.weight):
            raise UnknownLayerError(
                f"{glob!r} matches no layer with weights: see qcqp-prune trace for the names"
            )
    return list(found.values())


def _block(graph: ChannelGraph, layer: Layer, first: int) -> tuple[Block, IntArray]:
    shape = next(t.shape for t in graph.tensors if t.name == layer.weight)
    axis = graph.axes[layer.made_axis if layer.columns is not None else layer.out_axis]
    view, unview = _views(layer, shape, len(axis))
    return Block(layer.weight, layer.name, first, len(axis), view, unview, layer.rows), axis


def _vectors(graph: ChannelGraph, first: int, frozen: Collection[str]) -> Iterator[tuple[Block, IntArray]]:
    """Parameters with one number for each unit: a norm undoes what weights lose, unless its scale goes with them."""
    for spec in graph.tensors:
        if spec.kind != "parameter" or len(spec.shape) != 1 or spec.axes[0] is None or spec.name in frozen:
            continue
        axis = graph.axes[spec.axes[0]]
        if not graph.stays[axis].all():
            yield Block(spec.name, spec.name, first, len(axis), _as_rows, Tensor.flatten), axis
            first += len(axis)


def _as_rows(w: Tensor) -> Tensor:
    return w[:, None]


def _views(
    layer: Layer, shape: tuple[int, ...], rows: int
) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
    """How a weight becomes a matrix with one row for each output or column, and back."""
    if layer.columns is not None:
        outs, inputs, per_filter = shape[0], shape[1], rows // shape[0]

        def columns(w: Tensor) -> Tensor:
            return w.reshape(outs, inputs, per_filter, -1).transpose(1, 2).reshape(rows, -1)

        def from_columns(m: Tensor) -> Tensor:
            return m.reshape(outs, per_filter, inputs, -1).transpose(1, 2).reshape(shape)

        return columns, from_columns
    if "transpose" in layer.op:  # stored (inputs, outputs of a segment, ...)
        runs, kernel = layer.segments, shape[2:]

        def transposed(w: Tensor) -> Tensor:
            return w.reshape(runs, -1, *w.shape[1:]).transpose(1, 2).reshape(rows, -1)

        def from_transposed(m: Tensor) -> Tensor:
            return m.reshape(runs, shape[1], -1, *kernel).transpose(1, 2).reshape(shape)

        return transposed, from_transposed
    if layer.rows is not None:
        low, high = layer.rows

        def part(w: Tensor) -> Tensor:
            return w[low:high].flatten(1)

        def from_part(m: Tensor) -> Tensor:
            whole = m.new_zeros(shape)
            whole[low:high] = m.reshape(-1, *shape[1:])
            return whole

        return part, from_part
    return lambda w: w.flatten(1), lambda m: m.reshape(shape)
