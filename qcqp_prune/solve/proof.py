"""What proves a bound, as a backend hands it over: multipliers that anyone can check, and prices of the budgets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from qcqp_prune.program.coefficients import FloatArray
from qcqp_prune.program.tables import Shares

MOST_TANGENTS = 64


@dataclass(frozen=True)
class Tangent:
    """A bound as a function of the limits: ``bound + sum_r prices[r] (limit_r - limit solved for)``.

    It holds for any limits, because the limits enter a Lagrangian bound in this way only.

    Attributes:
        bound: at the limits that were solved for.
        prices: by resource, worth per unit of the resource, at least 0.
    """

    bound: float
    prices: Mapping[str, float]

    def at(self, change: Mapping[str, float]) -> float:
        """The bound where limits differ by ``change``; resources that it does not name keep theirs."""
        return self.bound + sum(self.prices.get(name, 0.0) * by for name, by in change.items())


@dataclass(frozen=True, eq=False)
class Proof:
    """Multipliers of a count-lifted bound, over the program's groups; see ``qcqp_prune.certify`` for what they prove.

    Attributes:
        bound: that they prove.
        lift: ``(value, first, second)``: what each product of two sums of counts is worth.
        diagonal, centre: ``(n,)``.
        prices: ``(constraints,)``, worth per unit of each budget's resource.
        link_prices: of the rows of links, parts first and then wholes in ascending order; None without links.
        hints: orders that make the check fast: ``groups`` (factorisation), ``sums`` (definitions of sums of counts,
            ``[]`` for zero or ``[part, single, share]``), ``counts`` (elimination of classes and sums).
    """

    bound: float
    lift: tuple[tuple[float, Shares, Shares], ...]
    diagonal: FloatArray
    centre: FloatArray
    prices: FloatArray
    link_prices: FloatArray | None = None
    hints: Mapping[str, Sequence[object]] = field(default_factory=dict)


def useful_tangents(tangents: Sequence[Tangent], limits: Mapping[str, int]) -> tuple[Tangent, ...]:
    """The few tangents that are lowest somewhere, when one limit moves between 0 and twice its size.

    Args:
        tangents: all that were evaluated.
        limits: by resource, those that were solved for.
    """
    if not tangents:
        return ()
    bounds = np.asarray([t.bound for t in tangents])
    kept = {int(bounds.argmin())}
    for name, limit in limits.items():
        slopes = np.asarray([t.prices.get(name, 0.0) for t in tangents])
        for share in np.linspace(-1.0, 1.0, MOST_TANGENTS // max(len(limits), 1) + 1):
            kept.add(int((bounds + slopes * share * limit).argmin()))
    return tuple(tangents[k] for k in sorted(kept))


@dataclass(frozen=True, eq=False)
class Branching:
    """A proof by cases: the counts of one group of the program (and of those tied to it) are split in two.

    Attributes:
        group: index of the group.
        at_most: largest count of the low case.
        low, high: what proves each case; the bound is the larger of the two.
    """

    group: int
    at_most: int
    low: Proof | Branching
    high: Proof | Branching

    @property
    def bound(self) -> float:
        """That both cases prove."""
        return max(self.low.bound, self.high.bound)

    @property
    def hints(self) -> Mapping[str, Sequence[object]]:
        """Those of the first leaf: orders of elimination do not depend on which counts are allowed."""
        return self.low.hints


AnyProof = Proof | Branching
