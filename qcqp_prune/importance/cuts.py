"""What a trial of ``Calibrated`` takes out of a network, and how its readers are refitted."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from qcqp_prune.graph.channels import BoolArray, ChannelGraph, IntArray
from qcqp_prune.graph.observe import Observed
from qcqp_prune.graph.zeroed import zeroed
from qcqp_prune.importance.elimination import Elimination, eliminate
from qcqp_prune.importance.patches import write_matrix
from qcqp_prune.importance.producers import producing_costs
from qcqp_prune.importance.readers import Key, Reader
from qcqp_prune.program.coefficients import FloatArray


@dataclass(frozen=True, eq=False)
class Cut:
    """Units that go together in trials.

    Attributes:
        groups: indices; one, several that keep equally many, or the unit of a branch and all groups within it.
        counts: how many units of each group are removed in turn.
        eliminations: of each group; none for a branch.
        refitted: for each group its readers.
        block: index of the branch, or None.
    """

    groups: tuple[int, ...]
    counts: tuple[int, ...]
    eliminations: tuple[Elimination, ...] = ()
    refitted: tuple[tuple[Reader, ...], ...] = ()
    block: int | None = None

    @classmethod
    def of(
        cls,
        graph: ChannelGraph,
        observed: Observed,
        found: Mapping[Key, Reader],
        groups: tuple[int, ...],
        counts: tuple[int, ...],
        ridge: float,
    ) -> Cut:
        """Groups that keep equally many, each in its order of elimination."""
        eliminations, refitted = [], []
        parts = set(graph.links.parts.tolist())
        for g in groups:
            units = graph.units(g)
            span = range(units.start, units.stop)
            mine = [
                (r, r.columns_of(graph.axes[graph.layers[r.layer].in_axis], span)) for r in found.values()
            ]
            mine = [] if span.start in parts else [(r, columns) for r, columns in mine if columns.numel()]
            if mine:
                eliminations.append(eliminate(mine, len(span), counts, ridge=ridge))
            else:
                eliminations.append(_by_cost(producing_costs(graph, observed, found, span)))
            refitted.append(tuple(r for r, _ in mine))
        return cls(groups, counts, tuple(eliminations), tuple(refitted))

    @classmethod
    def of_block(cls, graph: ChannelGraph, block: int) -> Cut:
        """A branch as a whole."""
        own = int(graph.group_of_unit[graph.blocks[block].unit])
        return cls((own, *sorted(graph.emptied_with(block))), (1,), block=block)

    def flat(self, graph: ChannelGraph, count: int) -> BoolArray:
        """The mask of a trial of groups, ``(unit_count,)``."""
        flat = np.ones(graph.unit_count, np.bool_)
        for k, g in enumerate(self.groups):
            units = graph.units(g)
            flat[np.arange(units.start, units.stop)[self.eliminations[k].order[:count]]] = False
        return flat

    def touches(self, graph: ChannelGraph) -> set[str]:
        """Names of the parameters and buffers that trials change."""
        flat = self.flat(graph, self.counts[-1]) if self.counts else np.ones(graph.unit_count, np.bool_)
        gone = {k for k, axis in enumerate(graph.axes) if not flat[axis].all()}
        names = {t.name for t in graph.tensors if gone & {*t.axes, t.columns}}
        for reader in (r for mine in self.refitted for r in mine):
            names |= {graph.layers[reader.layer].weight, *([reader.shift[0]] if reader.shift else [])}
        return names

    def changes(self, observed: Observed, count: int) -> dict[str, Tensor]:
        """Parameters and buffers of a trial: readers refitted, and what goes at zero."""
        graph = observed.graph
        new: dict[str, Tensor] = {}
        for elimination, mine in zip(self.eliminations, self.refitted, strict=True):
            for reader, matrix in zip(mine, elimination.refits.get(count, []), strict=False):
                layer = graph.layers[reader.layer]
                whole = new.get(layer.weight, observed.tensor(layer.weight))
                # Of several groups that one weight reads, each changes what the others left.
                change = matrix - reader.weight
                new[layer.weight] = whole + write_matrix(layer, torch.zeros_like(whole), change)
                if reader.shift:
                    name, sign = reader.shift
                    moved = change @ (reader.first / reader.rows)
                    own = (
                        moved.to(whole) if layer.rows is None else moved.new_zeros(len(observed.tensor(name)))
                    )
                    if layer.rows is not None:
                        own[slice(*layer.rows)] = moved
                    new[name] = new.get(name, observed.tensor(name)) - sign * own.to(whole)
        return new | at_zero(observed, self.flat(graph, count), new)


def at_zero(observed: Observed, flat: BoolArray, new: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The parameters and buffers that a mask touches, or what is new of them, with what it removes at zero."""
    graph = observed.graph
    gone = {k for k, axis in enumerate(graph.axes) if not flat[axis].all()}
    return {
        spec.name: zeroed(
            new[spec.name] if spec.name in new else observed.tensor(spec.name), graph, spec, flat
        )
        for spec in graph.tensors
        if gone & {*spec.axes, spec.columns}
    }


def _by_cost(costs: FloatArray) -> Elimination:
    order: IntArray = np.argsort(costs, kind="stable").astype(np.int64)
    return Elimination(order, costs[order], {})
