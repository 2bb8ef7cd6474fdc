"""What a training under a regulariser did, for the report."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from qcqp_prune.program.relaxed import ControlPoint


@dataclass(frozen=True)
class Regularised:
    """A training under a regulariser.

    Attributes:
        method: SPR or PSP, in words.
        history: its epochs, as ``TrainingHistory.to_dict``.
        trace: relaxed use, multipliers and violation of the budgets over time; empty where no budget was followed.
    """

    method: str
    history: Mapping[str, Any]
    trace: tuple[ControlPoint, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Plain data for ``json.dump``; violations are written for readers and recomputed on reading."""
        trace = [{**asdict(point), "violation": point.violation} for point in self.trace]
        return {"method": self.method, "history": dict(self.history), "trace": trace}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Regularised:
        """The inverse of ``to_json``."""
        trace = tuple(ControlPoint(p["step"], p["used"], p["multipliers"]) for p in data["trace"])
        return cls(data["method"], data["history"], trace)
