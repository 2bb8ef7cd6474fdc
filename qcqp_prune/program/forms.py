"""Quadratic forms: real ones over units (what is kept is worth), integer ones over counts (what is kept costs)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
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


@dataclass(frozen=True, eq=False)
class CountForm:
    """An exact integer resource: ``constant + linear . n + sum_q coefs[q] n[rows[q]] n[cols[q]]``.

    ``n`` holds the kept count of each group. All coefficients are non-negative, so a use never falls when more is
    kept; the feasibility range depends on it.

    Attributes:
        constant: cost of what cannot be removed.
        linear: ``(group_count,) int64``.
        rows, cols, coefs: ``(q,) int64`` each, ``rows <= cols``, each pair once.
    """

    constant: int
    linear: IntArray
    rows: IntArray = field(default_factory=lambda: np.zeros(0, np.int64))
    cols: IntArray = field(default_factory=lambda: np.zeros(0, np.int64))
    coefs: IntArray = field(default_factory=lambda: np.zeros(0, np.int64))

    def evaluate(self, counts: npt.ArrayLike) -> int:
        """The use at kept counts ``(group_count,)``, an exact Python integer."""
        n = np.asarray(counts, dtype=np.int64)
        return int(self.constant) + int(self.linear @ n) + int(self.coefs @ (n[self.rows] * n[self.cols]))

    @cached_property
    def is_linear(self) -> bool:
        """Whether it has no product of two counts."""
        return len(self.coefs) == 0

    def to_json(self) -> dict[str, Any]:
        """Plain data for ``json.dump``."""
        arrays = {key: getattr(self, key).tolist() for key in ("linear", "rows", "cols", "coefs")}
        return {"constant": int(self.constant), **arrays}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> CountForm:
        """The inverse of ``to_json``."""
        arrays = {key: np.asarray(data[key], np.int64) for key in ("linear", "rows", "cols", "coefs")}
        return cls(constant=int(data["constant"]), **arrays)


class CountFormBuilder:
    """Collects the terms of a ``CountForm``; equal pairs are added up."""

    def __init__(self, group_count: int) -> None:
        self._linear = np.zeros(group_count, np.int64)
        self._pairs: dict[tuple[int, int], int] = {}
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
        for g, a in first.items():
            for h, b in second.items():
                key = (min(g, h), max(g, h))
                self._pairs[key] = self._pairs.get(key, 0) + coefficient * a * b

    def build(self) -> CountForm:
        """The form of all terms added so far."""
        keys = sorted(key for key, value in self._pairs.items() if value)
        index = np.asarray(keys, np.int64).reshape(-1, 2)
        coefs = np.asarray([self._pairs[key] for key in keys], np.int64)
        return CountForm(self._constant, self._linear, index[:, 0], index[:, 1], coefs)


def sum_forms(forms: Iterable[PairwiseForm]) -> PairwiseForm:
    """The sum of several objectives over the same units."""
    forms = list(forms)
    return PairwiseForm(
        unary=np.sum([f.unary for f in forms], axis=0),
        pairs=tuple(t for f in forms for t in f.pairs),
        constant=float(sum(f.constant for f in forms)),
        unit=forms[0].unit,
    )
