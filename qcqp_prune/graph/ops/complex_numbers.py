"""Complex numbers as pairs of real ones, as rotary positions are often written: the pair stays, all else passes."""

from __future__ import annotations

from torch.fx import Node

from qcqp_prune.graph import copies
from qcqp_prune.graph.axes import Axes
from qcqp_prune.graph.walk import Handler, Walk


def as_complex(walk: Walk, node: Node) -> Axes:
    """The last dimension, of size 2, becomes one number."""
    source = walk.tensor_inputs(node)[0]
    axes = walk.axes(source)
    walk.table.freeze(axes[-1], "the real and the imaginary part of a number")
    copies.move(walk, source, node, range(len(axes) - 1))
    return axes[:-1]


def as_real(walk: Walk, node: Node) -> Axes:
    """A new last dimension of size 2."""
    source = walk.tensor_inputs(node)[0]
    axes = walk.axes(source)
    copies.move(walk, source, node, [*range(len(axes)), None])
    return [*axes, None]


HANDLERS: dict[str, Handler] = {"aten::view_as_complex": as_complex, "aten::view_as_real": as_real}
"""Of what they read all passes but the pair of numbers that is one."""
