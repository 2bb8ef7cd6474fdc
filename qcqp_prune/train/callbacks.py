"""The places where a training run calls back, and the progress bar, which is such a callback."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import TracebackType
from typing import Protocol, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from torch import nn
from torch.optim import Optimizer

from qcqp_prune.importance.losses import Loss
from qcqp_prune.train.average import WeightAverage
from qcqp_prune.train.history import EpochRecord
from qcqp_prune.train.regularizer import Regularizer


@dataclass
class TrainingState:
    """Where a run stands. Callbacks may read all of it, change the weights, and set `stop`.

    Attributes:
        model: the network, in train mode.
        optimizer: with the gradients of the batch just done still in place at `on_batch_end`.
        epochs: of the whole run.
        epoch: the present one, from 0.
        batch: the present batch of the epoch, from 0.
        batches: batches in an epoch, None where the loader has no length.
        loss: of the present batch, with distillation and without the penalty.
        records: the epochs done.
        stop: set by a callback to end the run after this epoch.
        regularizer: what is added to the loss, None for nothing.
        penalty: its value before the present batch's step.
        average: the average of the weights, where there is one; the model holds its own weights.
        teacher: what the network learns from beside the targets, in eval mode.
        criterion: the loss that was given, None for the cross-entropy.
    """

    model: nn.Module
    optimizer: Optimizer
    epochs: int
    epoch: int = 0
    batch: int = 0
    batches: int | None = None
    loss: float = 0.0
    records: list[EpochRecord] = field(default_factory=list)
    stop: bool = False
    regularizer: Regularizer | None = None
    penalty: float = 0.0
    average: WeightAverage | None = None
    teacher: nn.Module | None = None
    criterion: Loss | None = None


class Callback(Protocol):
    """Called by `finetune`. A class that derives from this one defines only what it needs."""

    def on_epoch_start(self, state: TrainingState, /) -> None:
        """Run before the first batch of an epoch."""
        return

    def on_batch_end(self, state: TrainingState, /) -> None:
        """Run after the optimiser's step."""
        return

    def on_epoch_end(self, state: TrainingState, /) -> None:
        """Run after validation, before the checkpoint is written; `state.records[-1]` is this epoch."""
        return


class ProgressBar(Callback):
    """A bar for each run, on the terminal, while the `with` block lasts."""

    def __init__(self) -> None:
        self._progress = Progress(
            TextColumn("epoch {task.fields[epoch]}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]:.4f}"),
            TimeRemainingColumn(),
            console=Console(stderr=True),  # stdout belongs to the results
        )
        self._task: TaskID | None = None

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def on_epoch_start(self, state: TrainingState, /) -> None:
        """Open the bar at the first epoch, whichever that is."""
        total = None if state.batches is None else state.batches * state.epochs
        name = f"{state.epoch + 1}/{state.epochs}"
        if self._task is None:
            self._task = self._progress.add_task("", total=total, epoch=name, loss=0.0)
        done = None if state.batches is None else state.batches * state.epoch
        self._progress.update(self._task, completed=done, epoch=name)

    def on_batch_end(self, state: TrainingState, /) -> None:
        """Move the bar on by one batch."""
        if self._task is not None:
            self._progress.update(self._task, advance=1, loss=state.loss)
