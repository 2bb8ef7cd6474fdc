"""Latency by a table for each layer: nanoseconds at a grid of kept input and output channels."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from qcqp_prune.errors import InvalidBudgetError, PlanError
from qcqp_prune.graph.channels import ChannelGraph, IntArray, Layer
from qcqp_prune.program.forms import CountForm, CountFormBuilder
from qcqp_prune.resources.inside import spent_in
from qcqp_prune.storage import StrPath, read_json, write_json

logger = logging.getLogger(__name__)

FORMAT, SCHEMA_VERSION = "qcqp-prune latency table", 1
SHOWN = 5


@dataclass(frozen=True, eq=False)
class LayerLatency:
    """What one layer takes at a grid of widths. Between two points the larger one counts.

    Attributes:
        ins: ``(p,) int64`` ascending, kept input channels; the last is the full width.
        outs: ``(q,) int64`` the same of the output; empty for a depthwise layer, whose two widths are one.
        nanoseconds: ``(p, q) int64``, or ``(p,)`` for a depthwise layer; it may dip where a wider layer runs faster.
    """

    ins: IntArray
    outs: IntArray
    nanoseconds: IntArray

    def __post_init__(self) -> None:
        shape = (len(self.ins), len(self.outs)) if len(self.outs) else (len(self.ins),)
        if self.nanoseconds.shape != shape or not len(self.ins):
            raise InvalidBudgetError(
                f"a latency table has a grid of {shape} and values of shape {self.nanoseconds.shape}: give one value "
                "for each point of the grid"
            )
        for grid in (self.ins, self.outs):
            if (np.diff(grid) <= 0).any() or (grid < 0).any():
                raise InvalidBudgetError(
                    f"the grid {grid.tolist()} of a latency table does not ascend: sort it"
                )
        if (self.nanoseconds < 0).any():
            raise InvalidBudgetError("a latency table has a negative time: measure again")

    def monotone(self) -> IntArray:
        """The running maximum in each direction: never below what was measured, and never falling."""
        values = self.nanoseconds
        for axis in range(values.ndim):
            values = np.maximum.accumulate(values, axis=axis)
        return values


@dataclass(eq=False)
class LatencyTable:
    """Nanoseconds of all convolutions and linear layers, one after another.

    A layer is found by its name, by the key that ``layers`` gives for its name, or by ``layer_signature``. What a table
    does not hold (norms, activations, joins) takes no time in it. Never less than the table is counted: between two
    points of the grid the larger one, and a running maximum where a measured time dips; ``notes`` says where.

    Attributes:
        tables: by layer name, signature or any key.
        layers: the key of each layer that has none of its own; equal layers share a table.
        machine: where it was measured, for readers.
    """

    tables: Mapping[str, LayerLatency]
    layers: Mapping[str, str] = field(default_factory=dict)
    machine: str = ""
    name: str = "latency"
    unit: str = "ns"

    def __post_init__(self) -> None:
        for note in self.notes:
            logger.info(note)

    @property
    def notes(self) -> tuple[str, ...]:
        """Tables that dip somewhere and were raised."""
        found = []
        for key, table in self.tables.items():
            raised = int((table.monotone() > table.nanoseconds).sum())
            if raised:
                found.append(
                    f"{key}: {raised} of {table.nanoseconds.size} times dip and were raised to a running maximum"
                )
        return tuple(found)

    def form(self, graph: ChannelGraph) -> CountForm:
        """``sum_l t_l(n_in(l), n_out(l))`` over all layers with a weight.

        Raises:
            InvalidBudgetError: a layer has no table, or one that ends before the layer's width.
        """
        builder = CountFormBuilder(len(graph.groups))
        missing = []
        for k, layer in enumerate(graph.layers):
            table = self._find(graph, layer)
            if table is None:
                missing += [layer.name] if layer.weight else []
                continue
            _require_width(graph, layer, table)
            sides = [graph.axis_counts(layer.in_axis), graph.axis_counts(layer.out_axis)]
            levels = [table.ins, table.outs] if len(table.outs) else [table.ins]
            with spent_in(builder, graph, graph.block_of_layer.get(k)) as part:
                part.add_table(table.monotone(), sides[: len(levels)], levels)
        if missing:
            shown = ", ".join(missing[:SHOWN]) + (", ..." if len(missing) > SHOWN else "")
            raise InvalidBudgetError(
                f"the latency table has nothing for {len(missing)} of {len(graph.layers)} layers ({shown}): measure it "
                "for this network, or add them"
            )
        return builder.build()

    def _find(self, graph: ChannelGraph, layer: Layer) -> LayerLatency | None:
        for key in (self.layers.get(layer.name, layer.name), layer_signature(graph, layer)):
            if key in self.tables:
                return self.tables[key]
        return None

    def save(self, path: StrPath) -> Path:
        """Write it as JSON; the file is complete or not there."""
        data = {
            "format": FORMAT,
            "schema": SCHEMA_VERSION,
            "name": self.name,
            "unit": self.unit,
            "machine": self.machine,
            "tables": {key: _table_to_json(t) for key, t in self.tables.items()},
            "layers": dict(self.layers),
        }
        return write_json(Path(path), data)

    @classmethod
    def load(cls, path: StrPath) -> LatencyTable:
        """The inverse of ``save``.

        Raises:
            PlanError: the file is missing, no latency table, or incomplete.
            InvalidBudgetError: a table in it makes no sense.
        """
        data = read_json(Path(path), "a latency table that `qcqp-prune latency` wrote")
        if data.get("format") != FORMAT or data.get("schema") != SCHEMA_VERSION:
            raise PlanError(
                f"{path} is no latency table of this version: measure it with `qcqp-prune latency`"
            )
        try:
            return cls(
                {str(key): _table_from_json(t) for key, t in data["tables"].items()},
                {str(a): str(b) for a, b in data["layers"].items()},
                str(data["machine"]),
                str(data["name"]),
                str(data["unit"]),
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            if isinstance(error, InvalidBudgetError):
                raise
            raise PlanError(f"{path} is incomplete ({error!r}): measure it again") from error


def layer_signature(graph: ChannelGraph, layer: Layer) -> str:
    """What decides how long a layer takes, as text: operator, weight shape, segments, and work for each pair."""
    weight = next((t for t in graph.tensors if layer.weight in (t.name, *t.aliases)), None)
    shape = "x".join(map(str, weight.shape)) if weight is not None else "none"
    work = layer.macs_per_pair * (len(graph.axes[layer.made_axis]) // len(graph.axes[layer.out_axis]))
    return f"{layer.op} {shape} /{layer.segments} {work} {layer.out_elements}"


def _require_width(graph: ChannelGraph, layer: Layer, table: LayerLatency) -> None:
    widths = [len(graph.axes[layer.in_axis]), len(graph.axes[layer.out_axis])]
    one = graph.is_depthwise(layer)
    if one != (not len(table.outs)):
        wanted = "one width, for its two are the same" if one else "two widths"
        raise InvalidBudgetError(f"the latency of {layer.name} must be a table of {wanted}: measure it again")
    for side, grid, width in zip(("input", "output"), (table.ins, table.outs), widths, strict=True):
        if len(grid) and grid[-1] < width:
            raise InvalidBudgetError(
                f"the latency of {layer.name} ends at {int(grid[-1])} {side} channels and the layer has {width}: "
                "measure it at the full width too"
            )


def _table_to_json(table: LayerLatency) -> dict[str, Any]:
    return {"in": table.ins.tolist(), "out": table.outs.tolist(), "nanoseconds": table.nanoseconds.tolist()}


def _table_from_json(data: Mapping[str, Any]) -> LayerLatency:
    return LayerLatency(*(np.asarray(data[key], np.int64) for key in ("in", "out", "nanoseconds")))
