"""Units that nothing acts on: a score or a regulariser that reaches others only would let them go for nothing."""

from __future__ import annotations

import numpy as np

from qcqp_prune.graph.channels import BoolArray, ChannelGraph, IntArray


def idle(graph: ChannelGraph, touched: IntArray) -> BoolArray:
    """Units that may go and on which nothing acts, ``(units,)``: neither on them nor on all of their parts.

    Args:
        graph: the channel graph.
        touched: flat indices of the units that something acts on.
    """
    acted = graph.stays.copy()
    acted[touched] = True
    acted[[block.unit for block in graph.blocks]] = True
    for level in graph.links.levels or ():
        wholes, parts = graph.links.wholes[level], graph.links.parts[level]
        silent = np.unique(wholes[~acted[parts]])
        acted[np.setdiff1d(wholes, silent)] = True
    out: BoolArray = ~acted
    return out
