"""A latency table without a machine: a roofline with tiles, so that the benchmark is the same everywhere.

A layer takes the larger of its arithmetic and its memory traffic, plus a launch. Arithmetic is done in tiles of
channels, so that it is a staircase in both widths.
"""

from __future__ import annotations

import math

import numpy as np

from qcqp_prune.graph.channels import ChannelGraph, Layer
from qcqp_prune.resources.latency import LatencyTable, LayerLatency

TILE_IN, TILE_OUT = 16, 32
MACS_PER_NS, BYTES_PER_NS, LAUNCH_NS = 2000.0, 100.0, 3000.0
POINTS = 64
"""Most points of a grid."""


def roofline(graph: ChannelGraph) -> LatencyTable:
    """The table of every layer of a network, by name."""
    return LatencyTable({layer.name: _layer(graph, layer) for layer in graph.layers if layer.weight})


def _layer(graph: ChannelGraph, layer: Layer) -> LayerLatency:
    ins, outs = (len(graph.axes[axis]) for axis in (layer.in_axis, layer.out_axis))
    if graph.is_depthwise(layer):
        grid = _grid(ins, TILE_IN)
        return LayerLatency(grid, np.zeros(0, np.int64), _nanoseconds(layer, grid, np.ones(1))[:, 0])
    first, second = _grid(ins, TILE_IN), _grid(outs, TILE_OUT)
    return LayerLatency(first, second, _nanoseconds(layer, first / layer.segments, second))


def _grid(width: int, tile: int) -> np.ndarray:
    step = tile * math.ceil(width / tile / POINTS)
    return np.unique(np.append(np.arange(step, width, step), width)).astype(np.int64)


def _nanoseconds(layer: Layer, ins: np.ndarray, outs: np.ndarray) -> np.ndarray:
    a, b = ins[:, None], outs[None, :]
    tiled = TILE_IN * np.ceil(a / TILE_IN) * TILE_OUT * np.ceil(b / TILE_OUT)
    arithmetic = layer.macs_per_pair * tiled / MACS_PER_NS
    weights = layer.macs_per_pair // layer.out_elements * a * b
    traffic = layer.itemsize * (layer.out_elements * (a + b) + weights) / BYTES_PER_NS
    return np.ceil(LAUNCH_NS + np.maximum(arithmetic, traffic)).astype(np.int64)
