"""Residual streams of transformers: the width that every block reads and adds to."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from qcqp_prune.graph.channels import BoolArray, IntArray

if TYPE_CHECKING:
    from qcqp_prune.graph.walk import Walk


def stream_labels(walk: Walk) -> list[IntArray]:
    """Positions of each stream: what linear maps make heads of and what linear maps from heads add to, at once.

    A stream that only convolutions read, as around attention in a convolutional network, is not one.
    """
    classes = walk.table.classes()
    linear = [layer for layer in walk.layers if layer.weight and layer.op.startswith("linear")]
    heads = marked(walk, walk.products)
    read = [x.in_labels for x in linear if heads[classes[x.out_labels]].any()]
    written = [x.out_labels for x in linear if heads[classes[x.in_labels]].any()]
    stream = marked(walk, read) & marked(walk, written) & ~heads
    return [labels[stream[classes[labels]]] for labels in read]


def marked(walk: Walk, dims: list[IntArray]) -> BoolArray:
    """Which classes occur in some of the dimensions, ``(classes,) bool``."""
    classes = walk.table.classes()
    out = np.zeros(int(classes.max(initial=-1)) + 1, np.bool_)
    for labels in dims:
        out[classes[labels]] = True
    return out
