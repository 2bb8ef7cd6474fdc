"""A valid bound for every limit of a resource, from the multipliers of one solve."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class BoundCurve:
    """``at(limit) = min over lines of bound + price (limit - solved)``: concave, rising, and nowhere below the optimum.

    A Lagrangian bound depends on the limit only by ``price * limit``, so that multipliers found at one limit prove a
    bound at all others. Near the limit that was solved for it is tight; far from it, it is valid and loose.

    Attributes:
        resource, unit: of the limit.
        solved: the limit that was solved for.
        dense: use of the whole network: a higher limit changes nothing.
        bound: proved at ``solved`` by whatever solver, None where nothing was; valid for all lower limits as well.
        lines: pairs of a bound at ``solved`` and a price.
    """

    resource: str
    unit: str
    solved: int
    dense: int
    bound: float | None
    lines: tuple[tuple[float, float], ...]

    def at(self, limit: float) -> float | None:
        """The bound at a limit; None where nothing is proved there."""
        change = min(limit, max(self.dense, self.solved)) - self.solved
        values = [bound + price * change for bound, price in self.lines]
        if self.bound is not None and limit <= self.solved:
            values.append(self.bound)
        return min(values, default=None)

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {"resource": self.resource, "unit": self.unit, "solved": self.solved, "lines": self.lines}
