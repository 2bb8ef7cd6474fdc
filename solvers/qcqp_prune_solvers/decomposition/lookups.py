"""Tables between the variables of a count program: their worth at any values, and where it changes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from qcqp_prune.program.coefficients import FloatArray, IntArray
from qcqp_prune_solvers.decomposition.couplings import Lookup

Weights = FloatArray
"""What one unit of each table is worth, ``(lookups,)``."""


class VariableTables:
    """Every table as one over one or two variables, by the level of each of their values."""

    def __init__(
        self,
        lookups: Sequence[Lookup],
        variables: Sequence[tuple[int, int | None]],
        values: Sequence[FloatArray],
        needs: Sequence[tuple[int, int]] = (),
    ) -> None:
        """Prepare.

        Args:
            lookups: the tables.
            variables: for each table the variables of its two sums; None for a table of one sum.
            values: of each variable, ascending.
            needs: pairs of variables of which the first is zero where the second is: a table of minus infinity.
        """
        self._values = [entry.table.values.astype(np.float64) for entry in lookups]
        self._places: list[tuple[IntArray, IntArray]] = []
        self.pairs: dict[tuple[int, int], list[tuple[int, bool]]] = {}
        self._own: list[tuple[int, int]] = []
        self._cuts: dict[tuple[int, frozenset[int]], IntArray] = {}
        for j, (entry, (a, b)) in enumerate(zip(lookups, variables, strict=True)):
            levels = (entry.table.first_levels, entry.table.second_levels)
            sums = [
                np.zeros(len(values[a])) if v is None else factor * values[v]
                for v, factor in zip((a, b), entry.factors, strict=True)
            ]
            first, second = (np.searchsorted(part, s) for part, s in zip(levels, sums, strict=True))
            self._places.append((first, second))
            if b is None or a == b:
                self._own.append((a, j))
            else:
                self.pairs.setdefault((a, b), []).append((j, False))
                self.pairs.setdefault((b, a), []).append((j, True))
        self._empty = [np.asarray(v == 0.0) for v in values]
        self._needs = {pair for pair in needs if pair[0] != pair[1]}
        for a, b in self._needs:
            self.pairs.setdefault((a, b), [])
            self.pairs.setdefault((b, a), [])

    def add_own(self, own: list[FloatArray], weights: Weights) -> None:
        """Add what tables of one variable are worth to its unary values."""
        for a, j in self._own:
            if weights[j]:
                first, second = self._places[j]
                own[a] = own[a] + weights[j] * self._values[j][first, second]

    def worth(
        self, pair: tuple[int, int], weights: Weights, rows: IntArray | slice, cols: IntArray | slice
    ) -> FloatArray | None:
        """What the tables between two variables are worth at chosen values of each, ``(rows, cols)``."""
        total: FloatArray | None = None
        for j, turned in self.pairs.get(pair, ()):
            if not weights[j]:
                continue
            first, second = self._places[j][::-1] if turned else self._places[j]
            values = self._values[j].T if turned else self._values[j]
            part = weights[j] * values[first[rows][:, None], second[cols][None, :]]
            total = part if total is None else total + part
        for one, other, turned in ((*pair, False), (*pair[::-1], True)):
            if (one, other) in self._needs:
                own, needed = (cols, rows) if turned else (rows, cols)
                barred = np.logical_and.outer(~self._empty[one][own], self._empty[other][needed])
                part = np.where(barred.T if turned else barred, -np.inf, 0.0)
                total = part if total is None else total + part
        return total

    def ends(self, variable: int, neighbours: Iterable[int]) -> IntArray | None:
        """Ends of the runs of a variable's values in which its tables with neighbours do not change.

        None where there are no such tables; a table may have a single run and still depend on the neighbour.
        """
        key = (variable, frozenset(neighbours))
        if key not in self._cuts:
            cuts, size = [np.zeros(0, np.int64)], 0
            for other in key[1]:
                for j, turned in self.pairs.get((variable, other), ()):
                    place = self._places[j][1 if turned else 0]
                    cuts.append(np.flatnonzero(np.diff(place)) + 1)
                    size = len(place)
                if {(variable, other), (other, variable)} & self._needs:
                    cuts.append(np.flatnonzero(np.diff(self._empty[variable])) + 1)
                    size = len(self._empty[variable])
            self._cuts[key] = np.append(np.unique(np.concatenate(cuts)), size) if size else cuts[0]
        ends = self._cuts[key]
        return ends if len(ends) else None

    def runs(self, variable: int, neighbours: Iterable[int]) -> int:
        """How many runs there are."""
        ends = self.ends(variable, neighbours)
        return 1 if ends is None else len(ends)
