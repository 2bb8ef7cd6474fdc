"""Dimensions along which a tensor holds copies of what it has once: where operators leave them, and what they tie.

A mask that is repeated for each head has nothing of its own along heads: it follows whatever it is joined with, each
time anew, so that two layers that share a mask do not share their heads. Where a reshape merges heads with samples,
positions still go in sets only: all samples of a head at once.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from torch.fx import Node

from qcqp_prune.graph.axes import Labels
from qcqp_prune.graph.channels import IntArray
from qcqp_prune.graph.walk import Walk


def move(walk: Walk, source: Node, node: Node, places: Sequence[int | None]) -> None:
    """Note where copies stand after an operator that moves whole dimensions.

    Args:
        walk: the walk.
        source: what it reads.
        node: the operator.
        places: for each dimension of its result the one of the source that it is; None where it is none of them.
    """
    copies = walk.repeated.get(source, {})
    rank = len(walk.shape(source))
    after = {
        d - len(places): copies[p - rank]
        for d, p in enumerate(places)
        if p is not None and p - rank in copies
    }
    if after:
        walk.repeated[node] = after


def keep(walk: Walk, source: Node, node: Node) -> None:
    """Note that an operator leaves all dimensions where they are."""
    move(walk, source, node, range(len(walk.shape(source))))


def merged(walk: Walk, source: Node, dims: list[int]) -> IntArray | None:
    """Which positions of some dimensions, merged into one, go together.

    Args:
        walk: the walk.
        source: a tensor.
        dims: consecutive dimensions of it.

    Returns:
        For each position the number of its set, row-major, ``(prod(sizes),)``; None where there are no copies along
        any of the dimensions, or where another of them is tracked.
    """
    shape, axes = walk.shape(source), walk.axes(source)
    copies = walk.repeated.get(source, {})
    along = [d for d in dims if d - len(shape) in copies]
    others = [d for d in dims if d not in along]
    if not along or any(axes[d] is not None and shape[d] > 1 for d in others):
        return None
    for d in others:
        walk.table.freeze(axes[d], "a single position is broadcast over many")
    # Of several the last: samples come first, and their number is not ours to change.
    chosen = max(along, key=lambda d: (shape[d] > 1, d))
    sets = copies[chosen - len(shape)]
    sets = np.arange(shape[chosen]) if sets is None else sets
    spread = sets.reshape([-1 if d == chosen else 1 for d in dims])
    return np.broadcast_to(spread, [shape[d] for d in dims]).reshape(-1)


def divided(sets: IntArray, sizes: list[int]) -> dict[int, Labels]:
    """What ``merged`` gave, for the dimensions of given sizes that it is split into: those along which copies stand."""
    if _are_single(sets):
        return dict.fromkeys(range(len(sizes)))
    table = sets.reshape(sizes)
    for d in range(len(sizes)):
        rows = np.moveaxis(table, d, 0).reshape(sizes[d], -1)
        if sizes[d] > 1 and (rows == rows[:, :1]).all():
            return {d: None if _are_single(rows[:, 0]) else rows[:, 0]}
    return {}


def tie(walk: Walk, labels: Labels, copies: Iterable[Labels]) -> None:
    """Tie the positions of a dimension that copies can follow only together."""
    for sets in copies:
        if sets is not None and labels is not None:
            _, first, inverse = np.unique(sets, return_index=True, return_inverse=True)
            walk.table.merge(labels, labels[first[inverse]], "")


def together(walk: Walk, copies: Sequence[Labels]) -> Labels:
    """The sets of a dimension along which several tensors hold copies."""
    own = [sets for sets in copies if sets is not None]
    if len(own) < 2:
        return own[0] if own else None
    labels = walk.table.fresh(len(own[0]))
    tie(walk, labels, own)
    return walk.table.find(labels)


def _are_single(sets: IntArray) -> bool:
    return len(np.unique(sets)) == len(sets)
