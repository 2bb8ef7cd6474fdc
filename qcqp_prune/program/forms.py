"""Quadratic forms: real ones over units (what is kept is worth), integer ones over counts (what is kept costs)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from qcqp_prune.errors import InvalidBudgetError, InvalidScoreError
from qcqp_prune.program.coefficients import BoolArray, Coefficient, FloatArray, IntArray, LowRank, dense
from qcqp_prune.program.tables import CountTable, Shares, TableCollector, as_shares

# Bounds multiply scores with each other: their squares must neither overflow nor vanish.
SMALLEST, LARGEST = 1e-100, 1e100


@dataclass(frozen=True, eq=False)
class PairTerm:
    """``sum_ij coef[i, j] x[rows[i]] x[cols[j]]``.

    Attributes:
        rows: ``(p,)`` flat unit indices; a unit may occur more than once.
        cols: ``(q,)`` flat unit indices.
        coef: a scalar c, meaning ``c * ones((p, q))``, a dense ``(p, q)`` matrix, or low-rank factors.
    """

    rows: IntArray
    cols: IntArray
    coef: Coefficient

    def evaluate(self, mask: BoolArray) -> float:
        """The term's value at a 0/1 mask over all units."""
        rows, cols = mask[self.rows], mask[self.cols]
        if isinstance(self.coef, LowRank):
            return float(self.coef.left[rows].sum(0) @ self.coef.right[cols].sum(0))
        if isinstance(self.coef, np.ndarray):
            return float(self.coef[np.ix_(rows, cols)].sum())
        return float(self.coef) * int(rows.sum()) * int(cols.sum())

    def dense(self) -> FloatArray:
        """The coefficient as a matrix, ``(p, q)``."""
        return dense(self.coef, (len(self.rows), len(self.cols)))

    def arrays(self) -> tuple[FloatArray, ...]:
        """Every array of numbers in the coefficient, for validation."""
        if isinstance(self.coef, LowRank):
            return self.coef.left, self.coef.right
        return (np.asarray(self.coef, dtype=np.float64),)


@dataclass(frozen=True, eq=False)
class PairwiseForm:
    """What a set of kept units is worth: ``constant + unary . x + sum of pair terms``. Higher = keep.

    Attributes:
        unary: ``(unit_count,) float64``.
        pairs: coupling between units, usually of neighbouring layers.
        constant: worth of what is always kept.
        unit: unit of the value, for reports.
    """

    unary: FloatArray
    pairs: tuple[PairTerm, ...] = ()
    constant: float = 0.0
    unit: str = "dimensionless"

    def __post_init__(self) -> None:
        numbers = [self.unary, np.asarray(self.constant), *(a for t in self.pairs for a in t.arrays())]
        if not all(np.isfinite(a).all() for a in numbers):
            raise InvalidScoreError(
                "importance scores hold NaN or infinity: check the weights and the calibration data for them"
            )
        size = max([float(np.abs(self.unary).max(initial=0.0)), abs(self.constant), *map(_size, self.pairs)])
        if size and not SMALLEST <= size <= LARGEST:
            raise InvalidScoreError(
                f"the largest importance score is {size:.3g} in size, and {SMALLEST:g} to {LARGEST:g} can be added and "
                "multiplied safely: multiply all scores by one factor, which changes no selection"
            )
        for term in self.pairs:
            shape = () if isinstance(term.coef, float | int) else term.coef.shape
            if shape not in ((), (len(term.rows), len(term.cols))):
                raise InvalidScoreError(
                    f"a pair term has {len(term.rows)} x {len(term.cols)} units and a coefficient of shape {shape}: "
                    "give one coefficient for each pair, a scalar, or factors"
                )

    def evaluate(self, mask: BoolArray) -> float:
        """Value at a 0/1 mask, ``(unit_count,)``."""
        return self.constant + float(self.unary[mask].sum()) + sum(t.evaluate(mask) for t in self.pairs)


def _size(term: PairTerm) -> float:
    """An upper estimate of a term's largest coefficient in size."""
    sizes = [float(np.abs(a).max(initial=0.0)) for a in term.arrays()]
    rank = term.coef.left.shape[1] if isinstance(term.coef, LowRank) else 1
    return rank * math.prod(sizes)


@dataclass(frozen=True, eq=False)
class CountForm:
    """An exact integer resource: ``constant + linear . n + sum of products of two sums of counts + sum of tables``.

    ``n`` holds the kept count of each group. All coefficients are non-negative, so a use never falls when more is
    kept; the feasibility range depends on it.

    Attributes:
        constant: cost of what cannot be removed.
        linear: ``(group_count,) int64``.
        products: ``(coefficient, first, second)``, each pair of sums once. A layer that reads a concatenation has one
            product of its outputs with the sum of its inputs' groups: solvers use that structure.
        tables: costs that are looked up, such as latencies and staircases; each pair of sums once.
    """

    constant: int
    linear: IntArray
    products: tuple[tuple[int, Shares, Shares], ...] = ()
    tables: tuple[CountTable, ...] = ()

    @cached_property
    def _expanded(self) -> tuple[IntArray, IntArray, IntArray]:
        pairs: dict[tuple[int, int], int] = {}
        for coefficient, first, second in self.products:
            for g, a in first:
                for h, b in second:
                    key = (min(g, h), max(g, h))
                    pairs[key] = pairs.get(key, 0) + coefficient * a * b
        index = np.asarray(sorted(pairs), np.int64).reshape(-1, 2)
        return index[:, 0], index[:, 1], np.asarray([pairs[key] for key in sorted(pairs)], np.int64)

    @property
    def rows(self) -> IntArray:
        """First group of each product of two counts, all sums multiplied out; ``rows <= cols``, each pair once."""
        return self._expanded[0]

    @property
    def cols(self) -> IntArray:
        """Second group of each product of two counts."""
        return self._expanded[1]

    @property
    def coefs(self) -> IntArray:
        """Coefficient of each product of two counts."""
        return self._expanded[2]

    def evaluate(self, counts: npt.ArrayLike) -> int:
        """The use at kept counts ``(group_count,)``, an exact Python integer."""
        n = np.asarray(counts, dtype=np.int64)
        products = int(self.coefs @ (n[self.rows] * n[self.cols]))
        return int(self.constant) + int(self.linear @ n) + products + sum(t.evaluate(n) for t in self.tables)

    @property
    def parts(self) -> tuple[CountForm, ...]:
        """The forms whose maximum is the use: this one."""
        return (self,)

    @property
    def is_linear(self) -> bool:
        """Whether it has no product of two counts, and no table."""
        return not self.products and not self.tables

    def slopes(self, counts: IntArray) -> FloatArray:
        """What one more unit of each group costs at kept counts, ``(group_count,)``; its share of the next stair."""
        out = self.linear.astype(np.float64)
        np.add.at(out, self.rows, self.coefs * counts[self.cols])
        np.add.at(out, self.cols, self.coefs * counts[self.rows])
        np.add.at(out, self.rows[self.rows == self.cols], self.coefs[self.rows == self.cols])
        for table in self.tables:
            for shares, rise in zip((table.first, table.second), table.rises(counts), strict=True):
                for g, share in shares:
                    out[g] += share * rise
        return out

    def substituted(
        self,
        counts: Mapping[int, Mapping[int, int]],
        group_count: int,
        fixed: Mapping[int, int] | Sequence[int] | IntArray | None = None,
    ) -> CountForm:
        """The form in other counts.

        Args:
            counts: for each group its count as a sum of new counts, ``{new group: share}``; a group without an entry is
                no part of the new form.
            group_count: number of new groups.
            fixed: what each group has beside that sum; nothing when None.
        """
        base = {g: int(fixed[g]) for g in range(len(self.linear))} if fixed is not None else {}
        builder = CountFormBuilder(group_count)
        builder.add_constant(self.constant)
        for g, coefficient in enumerate(self.linear.tolist()):
            builder.add_constant(coefficient * base.get(g, 0))
            builder.add_counts(coefficient, counts.get(g, {}))
        for coefficient, *sums in self.products:
            first, second = (_in_terms_of(shares, counts) for shares in sums)
            a, b = (sum(share * base.get(g, 0) for g, share in shares) for shares in sums)
            builder.add_product(coefficient, first, second)
            builder.add_counts(coefficient * b, first)
            builder.add_counts(coefficient * a, second)
            builder.add_constant(coefficient * a * b)
        for table in self.tables:
            sides = [_in_terms_of(shares, counts) for shares in (table.first, table.second)]
            a, b = (sum(share * base.get(g, 0) for g, share in side) for side in (table.first, table.second))
            rows, cols = table.first_levels - a, table.second_levels - b
            # No sum is below what is fixed.
            builder.add_table(
                table.values[np.ix_(rows >= 0, cols >= 0)], sides, (rows[rows >= 0], cols[cols >= 0])
            )
        return builder.build()

    def to_json(self) -> dict[str, Any]:
        """Plain data for ``json.dump``."""
        return {
            "constant": int(self.constant),
            "linear": self.linear.tolist(),
            "products": self.products,
            "tables": [t.to_json() for t in self.tables],
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> CountForm:
        """The inverse of ``to_json``; a form without tables may leave them out."""
        products = tuple((int(c), as_shares(dict(a)), as_shares(dict(b))) for c, a, b in data["products"])
        tables = tuple(CountTable.from_json(t) for t in data.get("tables", ()))
        return cls(int(data["constant"]), np.asarray(data["linear"], np.int64), products, tables)


def _in_terms_of(shares: Shares, counts: Mapping[int, Mapping[int, int]]) -> dict[int, int]:
    """A sum of counts in other counts."""
    out: dict[int, int] = {}
    for g, share in shares:
        for new, times in counts.get(g, {}).items():
            out[new] = out.get(new, 0) + share * times
    return out


@dataclass(frozen=True, eq=False)
class PeakForm:
    """A use that is a maximum: of what each step of an execution takes. Make it with ``PeakForm.of``.

    Attributes:
        parts: the use of each step.
    """

    parts: tuple[CountForm, ...]

    @classmethod
    def of(cls, steps: Iterable[CountForm]) -> PeakForm:
        """The maximum of some forms; one that is nowhere above another is dropped.

        Raises:
            InvalidBudgetError: there is no form.
        """
        kept: list[CountForm] = []
        for step in steps:
            if not any(_is_below(step, other) for other in kept):
                kept = [other for other in kept if not _is_below(other, step)]
                kept.append(step)
        if not kept:
            raise InvalidBudgetError("a maximum over no steps has no value: give at least one form")
        return cls(tuple(kept))

    def evaluate(self, counts: npt.ArrayLike) -> int:
        """The use at kept counts ``(group_count,)``, an exact Python integer."""
        return max(part.evaluate(counts) for part in self.parts)

    @property
    def is_linear(self) -> bool:
        """Whether every step is linear, so that a budget is a set of linear constraints."""
        return all(part.is_linear for part in self.parts)

    def to_json(self) -> dict[str, Any]:
        """Plain data for ``json.dump``."""
        return {"steps": [part.to_json() for part in self.parts]}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> PeakForm:
        """The inverse of ``to_json``."""
        return cls(tuple(CountForm.from_json(step) for step in data["steps"]))


UseForm = CountForm | PeakForm
"""What a resource may be: one form of the counts, or the maximum of several."""


def use_form_from_json(data: Mapping[str, Any]) -> UseForm:
    """The inverse of ``to_json`` of either kind of form."""
    return PeakForm.from_json(data) if "steps" in data else CountForm.from_json(data)


def _is_below(a: CountForm, b: CountForm) -> bool:
    """Whether ``a`` is at most ``b`` term by term, and so at all counts."""
    ours, theirs = ({(f, s): c for c, f, s in form.products} for form in (a, b))
    return (
        not a.tables
        and a.constant <= b.constant
        and bool((a.linear <= b.linear).all())
        and all(c <= theirs.get(key, 0) for key, c in ours.items())
    )


class CountFormBuilder:
    """Collects the terms of a ``CountForm``; equal products are added up."""

    def __init__(self, group_count: int) -> None:
        self._linear = np.zeros(group_count, np.int64)
        self._products: dict[tuple[Shares, Shares], int] = {}
        self._tables = TableCollector()
        self._constant = 0

    def add_constant(self, value: int) -> None:
        """Add a cost that does not depend on counts."""
        self._constant += int(value)

    def add_counts(self, coefficient: int, axis: Mapping[int, int]) -> None:
        """Add ``coefficient * sum_g axis[g] n_g``."""
        for group, share in axis.items():
            self._linear[group] += coefficient * share

    def add_product(self, coefficient: int, first: Mapping[int, int], second: Mapping[int, int]) -> None:
        """Add ``coefficient * (sum_g first[g] n_g) * (sum_h second[h] n_h)``."""
        if not first or not second or not coefficient:
            return
        scales = [math.gcd(*axis.values()) for axis in (first, second)]
        sums = [
            as_shares({g: n // k for g, n in axis.items()})
            for axis, k in zip((first, second), scales, strict=True)
        ]
        key = (min(sums), max(sums))
        self._products[key] = self._products.get(key, 0) + coefficient * scales[0] * scales[1]

    def add_table(
        self, values: npt.ArrayLike, sides: Sequence[Mapping[int, int]], levels: Sequence[npt.ArrayLike]
    ) -> None:
        """Add a cost that is looked up.

        Args:
            values: ``(p, q)`` integers, or ``(p,)`` for a table of one sum; see ``CountTable``.
            sides: one or two sums of counts, each group's share in it.
            levels: the levels of each sum, ascending; the last is at least the largest sum.

        Raises:
            InvalidBudgetError: the table has the wrong shape, a negative value, or falls somewhere.
        """
        self._tables.add(values, sides, levels)

    def add_form(self, form: CountForm) -> None:
        """Add all terms of a form over the same groups."""
        self._constant += form.constant
        self._linear += form.linear
        for coefficient, first, second in form.products:
            self.add_product(coefficient, dict(first), dict(second))
        for table in form.tables:
            self.add_table(
                table.values,
                (dict(table.first), dict(table.second)),
                (table.first_levels, table.second_levels),
            )

    def build(self) -> CountForm:
        """The form of all terms added so far."""
        products = tuple((c, first, second) for (first, second), c in sorted(self._products.items()) if c)
        return CountForm(self._constant + self._tables.constant, self._linear, products, self._tables.build())


def sum_forms(forms: Iterable[PairwiseForm]) -> PairwiseForm:
    """The sum of several objectives over the same units."""
    forms = list(forms)
    return PairwiseForm(
        unary=np.sum([f.unary for f in forms], axis=0),
        pairs=tuple(t for f in forms for t in f.pairs),
        constant=float(sum(f.constant for f in forms)),
        unit=forms[0].unit,
    )
