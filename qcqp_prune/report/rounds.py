"""What one of several rounds of gradual pruning did, for the report."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from qcqp_prune.apply.verification import Verification
from qcqp_prune.report.accuracy import Accuracy
from qcqp_prune.solve.result import relative_gap


@dataclass(frozen=True)
class Round:
    """One round; every count is of the network that was traced, not of the one that the round before left.

    Attributes:
        limits: by resource, what this round was allowed to use.
        used: by resource, what the network uses after it, resources without a limit too.
        kept: units that are left.
        solver: that chose them.
        objective: what they are worth, by the scores of this round.
        bound: on what any choice among the units that were left before could be worth, None without.
        verification: what was checked on the network after the cut.
        accuracy: after the cut, and after each step that followed it.
        repair: what followed the cut without training, in words; empty without.
        training: epochs of the finetuning, as ``TrainingHistory.to_dict``; None without.
    """

    limits: Mapping[str, int]
    used: Mapping[str, int]
    kept: int
    solver: str
    objective: float
    bound: float | None
    verification: Verification
    accuracy: Accuracy = field(default_factory=Accuracy)
    repair: str = ""
    training: Mapping[str, Any] | None = None

    @property
    def gap(self) -> float | None:
        """``(bound - objective) / |objective|``, None where there is no bound."""
        return relative_gap(self.objective, self.bound)

    def to_json(self) -> dict[str, Any]:
        """Plain data for ``json.dump``; the gap is written for readers and recomputed on reading."""
        return {**asdict(self), "verification": self.verification.to_json(), "gap": self.gap}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Round:
        """The inverse of ``to_json``."""
        checked, accuracy = Verification.from_json(data["verification"]), Accuracy(**data["accuracy"])
        plain = {key: value for key, value in data.items() if key != "gap"}
        return cls(**{**plain, "verification": checked, "accuracy": accuracy})
