"""Labels for tensor dimensions: which positions live and die together.

While a graph is walked, every position of every tracked dimension carries an integer *label*. Operators that tie two
positions together merge their labels; the classes of merged labels become the units of the channel graph. Nothing is
resolved during the walk but where an operator has to look, and then only what it looks at, so the work is linear in the
number of positions.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from qcqp_prune.graph.channels import IntArray
from qcqp_prune.graph.forest import Forest

Labels = IntArray | None
"""Labels of one dimension, ``(size,) int64``; None where the dimension is not tracked and so never shrinks."""

Axes = list[Labels]
"""Labels of each dimension of a tensor."""


class Layered(list[Labels]):
    """Axes of a tensor that stacks others along its first dimension, each with channels of its own.

    A list of axes as any other once ``tie`` has made one of the parts; until then ``parts`` tells them apart.

    Attributes:
        parts: axes of each of the stacked tensors.
    """

    parts: list[Axes]

    @classmethod
    def of(cls, parts: list[Axes]) -> Layered:
        """Axes of the stack: as the first part has them."""
        layered = cls([None, *parts[0]])
        layered.parts = parts
        return layered

    def tie(self, table: LabelTable) -> Axes:
        """Tie all parts to each other, for an operator that does not keep them apart."""
        for part in self.parts[1:]:
            for first, other in zip(self.parts[0], part, strict=True):
                if first is not None or other is not None:
                    table.merge(first, other, "stacked with a tensor that no handler could follow")
        return list(self)


@dataclass(frozen=True)
class Runs:
    """A dimension that an operator divides into ``count`` equal runs.

    Attributes:
        labels: the dimension.
        count: number of runs.
        required: whether runs must keep equally many positions (grouped convolution, group norm), or had better
            do so (chunk: then the code that was written for halves still works).
    """

    labels: IntArray
    count: int
    required: bool
    reason: str


@dataclass
class Sum:
    """An addition whose result has labels of its own, at the positions where both operands carry channels.

    Attributes:
        where: the operator's node name.
        index: its number among the additions of the graph.
        dim: the dimension, counted from the end.
        positions: the positions that are shared freely, ``(n,)``.
        out: labels of the result at these positions, ``(n,)``.
        parts: labels of each operand there.
        sides: labels of each operand at all positions.
        strict: why it is merged after all; empty while it is not.
    """

    where: str
    index: int
    dim: int
    positions: IntArray
    out: IntArray
    parts: tuple[IntArray, IntArray]
    sides: tuple[IntArray, IntArray]
    strict: str = ""


class LabelTable:
    """All labels of one walk: merges, freezes, runs, sums, and dimensions that must not become empty."""

    def __init__(self) -> None:
        self._size = 0
        self._forest = Forest(("frozen", "made"))
        self._edges: list[tuple[IntArray, IntArray]] = []
        self._joined = self._marked = 0
        self._made: list[IntArray] = []
        self._frozen: list[tuple[IntArray, str]] = []
        self._classes: tuple[tuple[int, int], IntArray] | None = None
        self.runs: list[Runs] = []
        self.nonempty: list[IntArray] = []
        self.sums: list[Sum] = []

    def fresh(self, size: int) -> IntArray:
        """New labels, merged with nothing."""
        self._size += size
        return np.arange(self._size - size, self._size, dtype=np.int64)

    def merge(self, a: Labels, b: Labels, reason: str) -> Labels:
        """Tie two dimensions position by position; a tracked one that meets an untracked one is frozen.

        Args:
            a: one dimension.
            b: another of equal size.
            reason: why the tracked one is frozen where the other is not tracked.

        Returns:
            Labels of the joined dimension.
        """
        if a is None or b is None:
            self.freeze(a, reason)
            self.freeze(b, reason)
            return a if a is not None else b
        if a is not b:
            self._edges.append((a, b))
        return a

    def merge_columns(self, table: IntArray) -> IntArray:
        """Tie all labels of each column of a ``(rows, columns)`` table; returns the first row."""
        first: IntArray = table[0]
        for row in table[1:]:
            self.merge(first, row, "")
        return first

    def freeze(self, labels: Labels, reason: str) -> None:
        """Keep these positions for good."""
        if labels is not None and len(labels):
            self._frozen.append((labels, reason))

    def add_runs(self, labels: IntArray, count: int, reason: str, *, required: bool = True) -> None:
        """Ask that the ``count`` equal runs of a dimension keep equally many positions; see ``Runs``."""
        self.runs.append(Runs(labels, count, required, reason))

    def make(self, labels: IntArray) -> None:
        """Note that a layer, a sum or the network's input puts out these positions: they are no mere filling."""
        self._made.append(labels)

    def is_made(self, labels: IntArray) -> NDArray[np.bool_]:
        """For each position whether something puts it out so far, ``(size,) bool``."""
        forest = self._resolved()
        for made in self._made:
            forest.mark("made", made)
        self._made.clear()
        return forest.is_marked("made", labels)

    def find(self, labels: IntArray) -> IntArray:
        """For each position a label that stands for its class so far; for looking at some dimensions during a walk."""
        return self._resolved().find(labels)

    def same(self, a: IntArray, b: IntArray) -> bool:
        """Whether two dimensions are tied position by position so far."""
        return a is b or np.array_equal(self.find(a), self.find(b))

    def classes(self) -> IntArray:
        """Class of each label, ``(size,)``, numbered from 0. This runs over all labels: it is for after a walk."""
        state = self._size, len(self._edges)
        if self._classes is None or self._classes[0] != state:
            self._classes = state, self._resolved().numbered(self._size)
        return self._classes[1]

    def _resolved(self) -> Forest:
        """The sets of merged labels, with the merges since the last look."""
        new = self._edges[self._joined :]
        if new:
            self._forest.join(*(np.concatenate([edge[k].reshape(-1) for edge in new]) for k in (0, 1)))
            self._joined = len(self._edges)
        return self._forest

    def frozen_reasons(self) -> dict[int, str]:
        """For each class that is frozen the first reason given."""
        classes = self.classes()
        reasons: dict[int, str] = {}
        for labels, reason in self._frozen:
            for c in np.unique(classes[labels]).tolist():
                reasons.setdefault(c, reason)
        return reasons

    def is_frozen(self, labels: IntArray) -> bool:
        """Whether every position is frozen so far."""
        forest = self._resolved()
        for some, _ in self._frozen[self._marked :]:
            forest.mark("frozen", some)
        self._marked = len(self._frozen)
        return bool(forest.is_marked("frozen", labels).all())
