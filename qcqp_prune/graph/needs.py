"""Groups that need others: what is kept of one is of no use where nothing is kept of the other.

A residual branch that can be removed as a whole has a unit of its own, which says whether the branch is there. Each
group inside the branch needs that unit, and the unit needs each of them: they become empty together. A branch inside
of another one needs the other's unit.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components


@dataclass(frozen=True)
class Block:
    """A residual branch ``f`` of ``x + f(x)`` that may be removed as a whole, so that ``x`` is left.

    Attributes:
        name: of the branch, readable: where its layers stand.
        unit: flat index of the unit that is kept exactly when the branch is; alone in its group.
        groups: groups inside the branch and in no block within it; all are empty where it is removed.
        outer: index of the block whose branch this one lies in, or None.
        addition: number of the addition among those of the exported graph.
        operand: which operand of the addition is the branch, 0 or 1.
        layers: indices of layers in the branch and in no block within it.
        tensors: names of parameters and buffers that only these layers, or norms beside them, read.
        module: path of a module that computes ``x + f(x)`` and nothing else but ``after``; empty where there is none.
        after: what that module does to the sum: ``relu`` or nothing.
    """

    name: str
    unit: int
    groups: tuple[int, ...]
    outer: int | None = None
    addition: int = 0
    operand: int = 1
    layers: tuple[int, ...] = ()
    tensors: tuple[str, ...] = ()
    module: str = ""
    after: str = ""

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Block:
        """The inverse of ``dataclasses.asdict``."""
        values: dict[str, Any] = {key: tuple(v) if isinstance(v, list) else v for key, v in data.items()}
        return cls(**values)


@dataclass(frozen=True)
class Needs:
    """Pairs ``(group, needed)`` of group indices: ``n_group > 0`` only where ``n_needed > 0``."""

    pairs: tuple[tuple[int, int], ...] = ()

    def __len__(self) -> int:
        return len(self.pairs)

    @cached_property
    def members(self) -> tuple[int, ...]:
        """Every group that needs or is needed, ascending."""
        return tuple(sorted({g for pair in self.pairs for g in pair}))

    def hold(self, counts: npt.ArrayLike) -> bool:
        """Whether no group is kept without one that it needs, at counts ``(group_count,)``."""
        n = np.asarray(counts)
        return all(n[g] == 0 or n[h] > 0 for g, h in self.pairs)

    def settled(self, allowed: Sequence[Sequence[int]], ties: Sequence[int]) -> list[list[int]]:
        """Allowed counts of each group without those that no selection has; empty ones where there is none.

        Args:
            allowed: of each group, ascending.
            ties: class of each group; groups of one class have equal counts.
        """
        left = [list(counts) for counts in allowed]
        changed = True
        while changed:
            changed = False
            for g, h in self.pairs:
                if left[g] and left[g][0] > 0 and 0 in left[h]:
                    changed |= _restrict(left, ties, h, positive=True)
                if left[h] and left[h][-1] == 0 and left[g] and left[g][-1] > 0:
                    changed |= _restrict(left, ties, g, positive=False)
        return left

    def completed(
        self, counts: Sequence[int], allowed: Sequence[Sequence[int]], ties: Sequence[int]
    ) -> list[int]:
        """Counts with each group that something kept needs at its least allowed count above zero, where it was empty.

        Args:
            counts: of each group.
            allowed: of each group, ascending, settled.
            ties: class of each group; groups of one class have equal counts.
        """
        out = list(counts)
        front = [g for g in range(len(out)) if out[g] > 0]
        while front:
            g = front.pop()
            for needed in [h for k, h in self.pairs if k == g and out[h] == 0]:
                least = next(n for n in allowed[needed] if n > 0)
                members = [k for k in range(len(out)) if ties[k] == ties[needed]]
                for k in members:
                    out[k] = least
                front += members
        return out

    def open_pairs(self, allowed: Sequence[Sequence[int]]) -> Needs:
        """The pairs of which both groups may still be empty or not, of settled counts; the others hold anyway."""
        free = [counts[0] == 0 and counts[-1] > 0 if counts else False for counts in allowed]
        return Needs(tuple((g, h) for g, h in self.pairs if free[g] and free[h]))

    def families(self, ties: Sequence[int]) -> tuple[tuple[int, ...], ...]:
        """Groups that are empty together, in sets; each set is listed after those that it needs."""
        if not self.pairs:
            return ()
        g, h = (np.asarray(side, np.int64) for side in zip(*self.pairs, strict=True))
        classes = np.asarray(ties, np.int64)
        graph = coo_array((np.ones(len(g)), (classes[g], classes[h])), shape=(classes.max() + 1,) * 2)
        component = connected_components(graph, directed=True, connection="strong")[1][classes]
        sets: dict[int, list[int]] = {}
        tied = {int(classes[k]) for k in self.members}
        for k in range(len(classes)):
            if int(classes[k]) in tied:
                sets.setdefault(int(component[k]), []).append(k)
        above: dict[int, set[int]] = {c: set() for c in sets}
        for a, b in zip(component[g].tolist(), component[h].tolist(), strict=True):
            if a != b:
                above[a].add(b)
        order: list[int] = []
        while len(order) < len(sets):
            order += [c for c in sets if c not in order and above[c] <= set(order)]
        return tuple(tuple(sets[c]) for c in order)


def _restrict(left: list[list[int]], ties: Sequence[int], group: int, *, positive: bool) -> bool:
    """Leave a group, and those tied to it, only counts that are positive, or only zero."""
    changed = False
    for k, counts in enumerate(left):
        if ties[k] == ties[group]:
            kept = [n for n in counts if (n > 0) == positive]
            changed |= len(kept) < len(counts)
            left[k] = kept
    return changed
