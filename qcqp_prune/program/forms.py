"""Quadratic forms: real ones over units (what is kept is worth), integer ones over counts (what is kept costs)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from qcqp_prune.errors import InvalidScoreError
from qcqp_prune.program.coefficients import BoolArray, Coefficient, FloatArray, IntArray, LowRank, dense


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


Shares = tuple[tuple[int, int], ...]
"""A sum of counts ``sum_g share n_g``: pairs ``(group, share)``, ascending; shares have no common factor."""


@dataclass(frozen=True, eq=False)
class CountForm:
    """An exact integer resource: ``constant + linear . n + sum of products of two sums of counts``.

    ``n`` holds the kept count of each group. All coefficients are non-negative, so a use never falls when more is
    kept; the feasibility range depends on it.

    Attributes:
        constant: cost of what cannot be removed.
        linear: ``(group_count,) int64``.
        products: ``(coefficient, first, second)``, each pair of sums once. A layer that reads a concatenation has one
            product of its outputs with the sum of its inputs' groups: solvers use that structure.
    """

    constant: int
    linear: IntArray
    products: tuple[tuple[int, Shares, Shares], ...] = ()

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
        return int(self.constant) + int(self.linear @ n) + int(self.coefs @ (n[self.rows] * n[self.cols]))

    @property
    def is_linear(self) -> bool:
        """Whether it has no product of two counts."""
        return not self.products

    def to_json(self) -> dict[str, Any]:
        """Plain data for ``json.dump``."""
        return {"constant": int(self.constant), "linear": self.linear.tolist(), "products": self.products}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> CountForm:
        """The inverse of ``to_json``."""
        products = tuple((int(c), _shares(dict(a)), _shares(dict(b))) for c, a, b in data["products"])
        return cls(int(data["constant"]), np.asarray(data["linear"], np.int64), products)


class CountFormBuilder:
    """Collects the terms of a ``CountForm``; equal products are added up."""

    def __init__(self, group_count: int) -> None:
        self._linear = np.zeros(group_count, np.int64)
        self._products: dict[tuple[Shares, Shares], int] = {}
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
            _shares({g: n // k for g, n in axis.items()})
            for axis, k in zip((first, second), scales, strict=True)
        ]
        key = (min(sums), max(sums))
        self._products[key] = self._products.get(key, 0) + coefficient * scales[0] * scales[1]

    def build(self) -> CountForm:
        """The form of all terms added so far."""
        products = tuple((c, first, second) for (first, second), c in sorted(self._products.items()) if c)
        return CountForm(self._constant, self._linear, products)


def _shares(axis: Mapping[int, int]) -> Shares:
    return tuple(sorted((int(g), int(n)) for g, n in axis.items() if n))


def sum_forms(forms: Iterable[PairwiseForm]) -> PairwiseForm:
    """The sum of several objectives over the same units."""
    forms = list(forms)
    return PairwiseForm(
        unary=np.sum([f.unary for f in forms], axis=0),
        pairs=tuple(t for f in forms for t in f.pairs),
        constant=float(sum(f.constant for f in forms)),
        unit=forms[0].unit,
    )
