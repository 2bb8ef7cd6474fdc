"""How well a network did on its way."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Accuracy:
    """Shares of validation samples classified right, in [0, 1].

    None where a step was not taken, there was no data, or its targets are no classes.

    Attributes:
        dense: before pruning.
        pruned: directly after it; in several rounds, after the last cut.
        repaired: after what followed the cut without training: reconstruction, or recalibrated batch norms.
        finetuned: after finetuning.
        samples: in the validation set.
        regularised: after training under a regulariser, before anything was cut.
        losses: where a loss was given, its mean over the samples, by the names of the steps above.
    """

    dense: float | None = None
    pruned: float | None = None
    repaired: float | None = None
    finetuned: float | None = None
    samples: int | None = None
    regularised: float | None = None
    losses: Mapping[str, float] = field(default_factory=dict)
