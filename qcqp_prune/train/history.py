"""What happened in a training run, epoch by epoch."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class EpochRecord:
    """One epoch.

    Attributes:
        epoch: its number, from 1.
        lr: learning rate of its last step.
        loss: mean training loss over the samples, with distillation and without the penalty of a regulariser.
        accuracy: share of training samples classified right, in train mode, in [0, 1]; None where the targets are no
            classes.
        validation_loss: mean loss on the validation loader, None without one; of the average of the weights where
            there is one.
        validation_accuracy: accuracy there, in [0, 1], None without one, or where the targets are no classes.
        seconds: wall time, validation included.
        penalty: mean of what the regulariser added to the loss, None without one.
    """

    epoch: int
    lr: float
    loss: float
    accuracy: float | None
    validation_loss: float | None
    validation_accuracy: float | None
    seconds: float
    penalty: float | None = None


@dataclass(frozen=True)
class TrainingHistory:
    """All epochs of a run, those before a resume included.

    Attributes:
        epochs: one record for each epoch, in order.
        resumed_at: epochs that were taken from a checkpoint; 0 for a run from the start.
    """

    epochs: tuple[EpochRecord, ...]
    resumed_at: int = 0

    @property
    def seconds(self) -> float:
        """Wall time of all epochs."""
        return sum(record.seconds for record in self.epochs)

    def to_dict(self) -> dict[str, Any]:
        """Return plain data that JSON gives back unchanged."""
        return {"epochs": [asdict(record) for record in self.epochs], "resumed_at": self.resumed_at}
