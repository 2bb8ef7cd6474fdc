"""What units put out, where no weight reads them one by one."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch

from qcqp_prune.graph.channels import ChannelGraph
from qcqp_prune.graph.observe import Observed
from qcqp_prune.importance.readers import Key, Reader
from qcqp_prune.program.coefficients import FloatArray


def producing_costs(
    graph: ChannelGraph, observed: Observed, found: Mapping[Key, Reader], units: range
) -> FloatArray:
    """Half the curvature of each output times the second moment of what a unit gives to it, ``(units,)``.

    A unit that is a filter gives all of its output, a kernel column its part of it. Where no layer is known that makes
    the units it is the squared size of everything that belongs to them.
    """
    costs = np.zeros(len(units))
    known = False
    for reader in found.values():
        layer = graph.layers[reader.layer]
        axis = graph.axes[layer.made_axis]
        places = np.flatnonzero((axis >= units.start) & (axis < units.stop))
        if not len(places) or reader.curvature is None:
            continue
        known = True
        per_output = len(axis) // len(reader.weight)
        for place in places.tolist():
            output, column = divmod(place, per_output)
            part = reader.weight[output].reshape(-1, per_output)[:, column]
            second = reader.second / reader.rows
            if second.ndim == 2:
                own = torch.arange(len(reader.weight[0])).reshape(-1, per_output)[:, column]
                size = part @ second[own][:, own] @ part
            else:
                size = (part.square() * second.reshape(-1, per_output)[:, column]).sum()
            costs[int(axis[place]) - units.start] += float(reader.curvature[output] * size) / 2
    return costs if known else _sizes(graph, observed, units)


def _sizes(graph: ChannelGraph, observed: Observed, units: range) -> FloatArray:
    sizes = np.zeros(len(units))
    for spec in graph.tensors:
        for dim, index in enumerate(spec.axes):
            if index is None or spec.kind != "parameter" or (dim == 1 and spec.segments > 1):
                continue
            axis = graph.axes[index]
            mine = (axis >= units.start) & (axis < units.stop)
            if mine.any():
                others = [d for d in range(len(spec.shape)) if d != dim]
                squares = observed.tensor(spec.name).double().square().sum(others).cpu().numpy()
                np.add.at(sizes, axis[mine] - units.start, squares[mine])
    return sizes
