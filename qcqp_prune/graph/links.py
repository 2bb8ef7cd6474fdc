"""Links between units: one that is kept exactly when at least one of its parts is.

Two things in networks are such a *whole*: a channel of a residual stream under free sharing, which is there as soon as
one of the layers that add to it writes it, and a filter whose kernel columns are units of their own.

References:
    Jeong et al., "Optimal channel selection with discrete QCQP" (AISTATS 2022), section 3: ``q <= r <= sum q`` and
    ``u <= v <= sum u``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.int64]
BoolArray = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class CountLink:
    """What the links between two groups say about their counts.

    ``n_whole >= ceil((n_part - loose) / fan)``, and ``n_whole <= free + sum over part groups of spread n_part``.

    Attributes:
        whole, part: groups.
        fan: most parts of one whole in this pair of groups.
        loose: units of the part group that belong to no whole of the other.
        spread: most wholes of one part in this pair of groups.
    """

    whole: int
    part: int
    fan: int
    loose: int
    spread: int

    def least_whole(self, parts: int) -> int:
        """Wholes that so many kept parts need at least."""
        return max(math.ceil((parts - self.loose) / self.fan), 0)


@dataclass(frozen=True, eq=False)
class Links:
    """Pairs ``(whole, part)`` of unit indices: ``x[whole] = max over its parts of x[part]``.

    A whole may be a part of another one; links have no cycles.

    Attributes:
        wholes, parts: ``(m,) int64``, each pair once.
    """

    wholes: IntArray
    parts: IntArray

    @classmethod
    def none(cls) -> Links:
        """No links."""
        return cls(np.zeros(0, np.int64), np.zeros(0, np.int64))

    @classmethod
    def of(cls, pairs: Sequence[tuple[int, int]] | IntArray) -> Links:
        """Links from rows ``(whole, part)``, sorted and without repetitions.

        Raises:
            ValueError: a unit is its own part, directly or through others.
        """
        array = np.unique(np.asarray(pairs, np.int64).reshape(-1, 2), axis=0)
        links = cls(np.ascontiguousarray(array[:, 0]), np.ascontiguousarray(array[:, 1]))
        if links.levels is None:
            raise ValueError("links between units make a cycle: a unit cannot be a part of itself")
        return links

    def __len__(self) -> int:
        return len(self.wholes)

    @cached_property
    def heads(self) -> IntArray:
        """Every whole once, ascending."""
        return np.unique(self.wholes)

    @cached_property
    def levels(self) -> tuple[IntArray, ...] | None:
        """Positions of links in an order in which every part is settled before its wholes; None for a cycle."""
        left, levels = np.arange(len(self)), []
        while len(left):
            waiting = np.isin(self.parts[left], self.wholes[left])
            blocked = np.isin(self.wholes[left], self.wholes[left][waiting])
            if blocked.all():
                return None
            levels.append(left[~blocked])
            left = left[blocked]
        return tuple(levels)

    def closed(self, mask: BoolArray) -> BoolArray:
        """A mask with every whole set to what its parts say, ``(n,) bool``."""
        out = mask.copy()
        out[self.heads] = False
        for level in self.levels or ():
            on = level[out[self.parts[level]]]
            out[self.wholes[on]] = True
        return out

    def hold(self, mask: BoolArray, exempt: BoolArray | None = None) -> bool:
        """Whether a mask obeys the links.

        Args:
            mask: ``(n,) bool``.
            exempt: ``(n,) bool``: wholes that may be kept without a part.
        """
        supported = np.zeros(len(mask), np.bool_)
        supported[self.wholes[mask[self.parts]]] = True
        bare = mask[self.heads] & ~supported[self.heads]
        if exempt is not None:
            bare &= ~exempt[self.heads]
        return not bare.any() and not (supported & ~mask).any()

    @cached_property
    def by_size(self) -> tuple[tuple[IntArray, IntArray], ...]:
        """Wholes with equally many parts together: the wholes ``(k,)`` and their parts ``(k, size)``."""
        order = np.argsort(self.wholes, kind="stable")
        sizes = np.unique(self.wholes, return_counts=True)[1]
        starts = np.concatenate([[0], np.cumsum(sizes)[:-1]]).astype(np.int64)
        found = []
        for size in np.unique(sizes).tolist():
            first = starts[sizes == size]
            found.append((self.heads[sizes == size], self.parts[order[first[:, None] + np.arange(size)]]))
        return tuple(found)

    def between(self, group_of: IntArray, group_count: int) -> tuple[CountLink, ...]:
        """What the links say about counts, for each pair of groups that they join.

        Args:
            group_of: group of each unit, ``(n,)``.
            group_count: number of groups.
        """
        if not len(self):
            return ()
        widths = np.bincount(group_of, minlength=group_count)
        key = group_of[self.wholes] * group_count + group_of[self.parts]
        found = []
        for k in np.unique(key).tolist():
            here = key == k
            wholes, parts = self.wholes[here], self.parts[here]
            members, spread = np.unique(parts, return_counts=True)
            fan = int(np.unique(wholes, return_counts=True)[1].max())
            whole, part = divmod(k, group_count)
            found.append(CountLink(whole, part, fan, int(widths[part]) - len(members), int(spread.max())))
        return tuple(found)

    def to_json(self) -> list[Any]:
        """Plain data for ``json.dump``."""
        return [self.wholes.tolist(), self.parts.tolist()]

    @classmethod
    def from_json(cls, data: Sequence[Any]) -> Links:
        """The inverse of ``to_json``."""
        return cls.of(np.stack([np.asarray(d, np.int64) for d in data], axis=1).reshape(-1, 2))
