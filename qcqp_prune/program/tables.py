"""Exact integer tables over one or two sums of counts: staircases and measured latencies, stored by their levels."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from qcqp_prune.errors import InvalidBudgetError
from qcqp_prune.program.coefficients import IntArray

Shares = tuple[tuple[int, int], ...]
"""A sum of counts ``sum_g share n_g``: pairs ``(group, share)``, ascending; shares have no common factor."""


@dataclass(frozen=True, eq=False)
class CountTable:
    """A cost that is looked up: ``values[i, j]``, ``i`` the level of one sum of counts, ``j`` that of another.

    A sum is at the first level that is not below it: between two levels the larger one counts. Values are non-negative
    and never fall in either direction, so that keeping more never costs less.

    Attributes:
        first: the sum that chooses the row.
        second: the sum that chooses the column; empty for a table of one sum.
        first_levels: ``(p,) int64`` ascending; the last one is at least the largest sum.
        second_levels: ``(q,) int64``; ``[0]`` for a table of one sum.
        values: ``(p, q) int64``.
    """

    first: Shares
    second: Shares
    first_levels: IntArray
    second_levels: IntArray
    values: IntArray

    def __post_init__(self) -> None:
        shape = (len(self.first_levels), len(self.second_levels))
        if self.values.shape != shape or not self.values.size:
            raise InvalidBudgetError(
                f"a table has {shape[0]} x {shape[1]} levels and values of shape {self.values.shape}: give one value "
                "for each pair of levels"
            )
        for levels in (self.first_levels, self.second_levels):
            if (np.diff(levels) <= 0).any():
                raise InvalidBudgetError(f"the levels {levels.tolist()} of a table do not ascend: sort them")
        if (self.values < 0).any():
            raise InvalidBudgetError("a table has a negative value: a resource must be non-negative")
        if (np.diff(self.values, axis=0) < 0).any() or (np.diff(self.values, axis=1) < 0).any():
            raise InvalidBudgetError(
                "a table falls where more is kept: make it monotone, such as by a running maximum"
            )

    def at(self, first: npt.ArrayLike, second: npt.ArrayLike) -> IntArray:
        """Values at sums, broadcast against each other.

        Raises:
            InvalidBudgetError: a sum is beyond the last level.
        """
        return np.asarray(
            self.values[places(self.first_levels, first), places(self.second_levels, second)], np.int64
        )

    def evaluate(self, counts: IntArray) -> int:
        """The value at kept counts ``(group_count,)``."""
        return int(self.at(share_sum(self.first, counts), share_sum(self.second, counts)))

    def rises(self, counts: IntArray) -> tuple[float, float]:
        """For each sum what a unit more costs at kept counts, if the next stair is shared by the units up to it."""
        sums = (share_sum(self.first, counts), share_sum(self.second, counts))
        here = (int(places(self.first_levels, sums[0])), int(places(self.second_levels, sums[1])))
        found = []
        for side, levels in enumerate((self.first_levels, self.second_levels)):
            ahead = (here[0] + (side == 0), here[1] + (side == 1))
            if ahead[side] == len(levels):
                found.append(0.0)
                continue
            rise = int(self.values[ahead]) - int(self.values[here])
            found.append(rise / (int(levels[here[side]]) + 1 - sums[side]))
        return found[0], found[1]

    def to_json(self) -> dict[str, Any]:
        """Plain data for ``json.dump``."""
        return {
            "first": self.first,
            "second": self.second,
            "first_levels": self.first_levels.tolist(),
            "second_levels": self.second_levels.tolist(),
            "values": self.values.tolist(),
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> CountTable:
        """The inverse of ``to_json``."""
        return cls(
            as_shares(dict(data["first"])),
            as_shares(dict(data["second"])),
            *(np.asarray(data[key], np.int64) for key in ("first_levels", "second_levels", "values")),
        )


def places(levels: IntArray, sums: npt.ArrayLike) -> IntArray:
    """The place among levels of each sum: of the first level that is not below it.

    Raises:
        InvalidBudgetError: a sum is beyond the last level.
    """
    index = np.searchsorted(levels, sums, side="left")
    if (index >= len(levels)).any():
        raise InvalidBudgetError(
            f"a table ends at {int(levels[-1])} and {int(np.max(sums))} can be kept: extend the table"
        )
    return np.asarray(index, np.int64)


def share_sum(shares: Shares, counts: IntArray) -> int:
    """``sum_g share n_g``."""
    return sum(share * int(counts[g]) for g, share in shares)


def as_shares(axis: Mapping[int, int]) -> Shares:
    """The canonical order; what does not count is left out."""
    return tuple(sorted((int(g), int(n)) for g, n in axis.items() if n))


def steps_of(size: int, largest: int) -> IntArray:
    """Levels of ``ceil(n / size)`` for ``n`` from 0 to ``largest``: 0, size, 2 size, ..., largest."""
    return np.minimum(np.arange(math.ceil(largest / size) + 1, dtype=np.int64) * size, largest)


class TableCollector:
    """Tables in a canonical form; those over the same two sums become one."""

    def __init__(self) -> None:
        self._tables: dict[tuple[Shares, Shares], CountTable] = {}
        self.constant = 0

    def add(
        self,
        values: npt.ArrayLike,
        sides: Sequence[Mapping[int, int]],
        levels: Sequence[npt.ArrayLike],
    ) -> None:
        """Add a table.

        Args:
            values: ``(p, q)`` integers, or ``(p,)`` for one sum.
            sides: one or two sums, each group's share in it.
            levels: the levels of each sum.
        """
        table = np.asarray(values, np.int64)
        table = table.reshape(len(table), -1)
        wanted = [as_shares(side) for side in sides] + [()] * (2 - len(sides))
        found = [np.asarray(part, np.int64) for part in levels] + [np.zeros(1, np.int64)] * (2 - len(levels))
        # The checks are made on what was given, before anything is merged or dropped.
        CountTable(wanted[0], wanted[1], found[0], found[1], table)
        for axis in (0, 1):
            wanted[axis], found[axis], table = _reduced(wanted[axis], found[axis], table, axis)
        if not wanted[0] or (wanted[1] and wanted[1] < wanted[0]):
            wanted, found, table = wanted[::-1], found[::-1], np.ascontiguousarray(table.T)
        if not wanted[0] or table.size == 1:
            self.constant += int(table[0, 0])
            return
        new = CountTable(wanted[0], wanted[1], found[0], found[1], table)
        key = (new.first, new.second)
        self._tables[key] = _sum(self._tables[key], new) if key in self._tables else new

    def build(self) -> tuple[CountTable, ...]:
        """All tables, in the order of their sums."""
        return tuple(self._tables[key] for key in sorted(self._tables))


def _reduced(
    shares: Shares, levels: IntArray, values: IntArray, axis: int
) -> tuple[Shares, IntArray, IntArray]:
    """Without a common factor of the shares, levels that no sum is at, and levels that cost the same."""
    if not shares:
        # The empty sum is 0.
        place = int(places(levels, 0))
        return shares, np.zeros(1, np.int64), values.take([place], axis)
    common = math.gcd(*(n for _, n in shares))
    levels = levels // common
    kept = np.flatnonzero((levels >= 0) & (np.diff(levels, prepend=-1) > 0))
    levels, values = levels[kept], values.take(kept, axis)
    differs = (np.diff(values, axis=axis) != 0).any(axis=1 - axis)
    # Of equal neighbours the larger level stays: it covers both.
    kept = np.append(np.flatnonzero(differs), len(levels) - 1)
    return tuple((g, n // common) for g, n in shares), levels[kept], values.take(kept, axis)


def _sum(a: CountTable, b: CountTable) -> CountTable:
    first, second = _union(a.first_levels, b.first_levels), _union(a.second_levels, b.second_levels)
    values = a.at(first[:, None], second[None, :]) + b.at(first[:, None], second[None, :])
    return CountTable(a.first, a.second, first, second, values)


def _union(a: IntArray, b: IntArray) -> IntArray:
    both = np.union1d(a, b)
    return np.asarray(both[both <= min(a[-1], b[-1])], np.int64)
