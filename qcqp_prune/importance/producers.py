"""What units put out, where no weight reads them one by one."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

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
        parts = reader.weight.reshape(
            len(reader.weight), -1, per_output
        ).mT  # (outputs, columns of the kernel, inputs)
        sizes = _sizes_made(parts, reader.second / reader.rows) * reader.curvature[:, None] / 2
        np.add.at(costs, axis[places] - units.start, sizes.flatten().numpy()[places])
    return costs if known else _sizes(graph, observed, units)


def _sizes_made(parts: Tensor, second: Tensor) -> Tensor:
    """Mean square of what each part of a filter makes, ``(outputs, parts)``."""
    columns = torch.arange(parts.shape[1] * parts.shape[2]).reshape(-1, parts.shape[1])
    found = []
    for part in range(parts.shape[1]):
        own, mine = columns[:, part], parts[:, part]
        found.append(
            (mine @ second[own][:, own] * mine).sum(1)
            if second.ndim == 2
            else (mine.square() * second[own]).sum(1)
        )
    return torch.stack(found, 1)


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
                squares = observed.tensor(spec.name).double().square()
                total = (squares.sum(others) if others else squares).cpu().numpy()
                np.add.at(sizes, axis[mine] - units.start, total[mine])
    return sizes
