"""What a finetuning run does, as one immutable value."""

from __future__ import annotations

import math
from dataclasses import dataclass
from numbers import Real
from typing import Literal

from torch import nn

from qcqp_prune.errors import InvalidOptionError, require_kind
from qcqp_prune.models import ResNetCifar

_NUMBERS = (
    "lr",
    "momentum",
    "weight_decay",
    "decay",
    "warmup",
    "label_smoothing",
    "distillation",
    "temperature",
    "ema",
)


@dataclass(frozen=True)
class FinetuneConfig:
    """The recipe of a finetuning run. The defaults are those of the discrete-QCQP paper.

    Attributes:
        optimizer: "sgd" or "adamw".
        lr: learning rate at its highest.
        momentum: of SGD.
        nesterov: Nesterov's momentum, for SGD.
        weight_decay: l2 penalty on every trained parameter; decoupled in AdamW.
        schedule: "multistep" multiplies by `decay` at each of `milestones`, "cosine" falls to 0, "constant" stays.
        milestones: shares of all epochs, rounded to whole epochs.
        decay: factor at each milestone.
        warmup: epochs over which the learning rate rises linearly to `lr`, the whole run at most; may be a fraction. A
            step has the rate that the rise has reached when it is done, so that none is one of 0; of a loader without a
            length each epoch counts as one step.
        label_smoothing: of the cross-entropy, in [0, 1).
        distillation: weight w of a teacher in the loss ``(1 - w) CE + w T^2 KL(teacher || network)``, in [0, 1]; with
            0 there is no teacher.
        temperature: T, by which both logits are divided in the KL term.
        ema: the network ends with the exponential moving average of its weights with this decay, in [0, 1); with 0 it
            ends with the weights themselves. See ``WeightAverage``.
        grad_clip: largest l2 norm of the gradient, None for no limit.
        device: "auto" takes an accelerator where there is one; the model comes back to where it was.
        bfloat16: run the forward pass under bfloat16 autocast.
        seed: of all that draws from torch's generators: dropout, the order of a `DataLoader`. A `BatchLoader` has a
            seed of its own.
        progress: show a progress bar.

    Raises:
        InvalidOptionError: a value is outside its domain.

    References:
        Jeong et al.: Optimal channel selection with discrete QCQP, AISTATS 2022, arXiv 2202.12417 (finetuning recipe).
        Hinton, Vinyals, Dean: Distilling the knowledge in a neural network, 2015, arXiv 1503.02531 (section 2).
    """

    optimizer: Literal["sgd", "adamw"] = "sgd"
    lr: float = 0.01
    momentum: float = 0.9
    nesterov: bool = True
    weight_decay: float = 5e-4
    schedule: Literal["multistep", "cosine", "constant"] = "multistep"
    milestones: tuple[float, ...] = (0.3, 0.6, 0.8)
    decay: float = 0.2
    warmup: float = 0.0
    label_smoothing: float = 0.0
    distillation: float = 0.0
    temperature: float = 4.0
    ema: float = 0.0
    grad_clip: float | None = None
    device: str = "auto"
    bfloat16: bool = False
    seed: int = 0
    progress: bool = False

    def __post_init__(self) -> None:
        for name in _NUMBERS:
            require_kind(f"FinetuneConfig: {name}", getattr(self, name), Real, "a number")
        finite = math.isfinite
        checks = {
            "optimizer": (self.optimizer in ("sgd", "adamw"), "sgd or adamw"),
            "lr": (finite(self.lr) and self.lr > 0, "a positive number"),
            "momentum": (0 <= self.momentum < 1, "a number in [0, 1)"),
            "nesterov": (
                not self.nesterov or self.momentum > 0 or self.optimizer != "sgd",
                "False where momentum is 0",
            ),
            "weight_decay": (finite(self.weight_decay) and self.weight_decay >= 0, "a number from 0 up"),
            "schedule": (
                self.schedule in ("multistep", "cosine", "constant"),
                "multistep, cosine or constant",
            ),
            "milestones": (all(0 <= m <= 1 for m in self.milestones), "shares of the epochs in [0, 1]"),
            "decay": (finite(self.decay) and self.decay > 0, "a positive number"),
            "warmup": (finite(self.warmup) and self.warmup >= 0, "a number of epochs from 0 up"),
            "label_smoothing": (0 <= self.label_smoothing < 1, "a number in [0, 1)"),
            "distillation": (0 <= self.distillation <= 1, "a number in [0, 1]"),
            "temperature": (finite(self.temperature) and self.temperature > 0, "a positive number"),
            "ema": (0 <= self.ema < 1, "a number in [0, 1)"),
            "grad_clip": (self.grad_clip is None or self.grad_clip > 0, "None or a positive number"),
        }
        for name, (valid, wanted) in checks.items():
            if not valid:
                raise InvalidOptionError(f"FinetuneConfig: {name} is {getattr(self, name)!r}; give {wanted}.")

    @classmethod
    def from_scratch(cls) -> FinetuneConfig:
        """Return a recipe for a small network without weights yet: high learning rate and weight decay, cosine.

        Chosen on `DigitsNet`, which a larger weight decay than usual keeps from learning its 1,442 images by heart.
        """
        return cls(lr=0.1, schedule="cosine", warmup=1.0, weight_decay=5e-3)

    @classmethod
    def recommended(cls, model: nn.Module) -> FinetuneConfig:
        """Return the recipe for a network that nobody gave one for.

        That of the discrete-QCQP paper, which is the default of this class, for its own networks, the CIFAR ResNets of
        ``qcqp_prune.models``. For any other one a rise over half an epoch and a cosine: its steps down are placed for
        200 epochs, and the rise keeps the first steps after a cut, whose gradients are the largest, from undoing more.
        """
        return cls() if isinstance(model, ResNetCifar) else cls(schedule="cosine", warmup=0.5)

    def describe(self) -> str:
        """Return the recipe in words, of options that do nothing none."""
        words = [f"{self.optimizer}, lr {self.lr:g}", f"weight decay {self.weight_decay:g}"]
        if self.optimizer == "sgd":
            words.insert(1, f"{'Nesterov ' if self.nesterov else ''}momentum {self.momentum:g}")
        steps = f" (times {self.decay:g} at {', '.join(f'{m:.0%}' for m in self.milestones)} of the epochs)"
        words.append(f"{self.schedule} schedule" + steps * (self.schedule == "multistep"))
        if self.warmup:
            words.append(f"warm-up of {self.warmup:g} epochs")
        if self.label_smoothing:
            words.append(f"label smoothing {self.label_smoothing:g}")
        if self.distillation:
            words.append(f"distillation {self.distillation:g} at temperature {self.temperature:g}")
        if self.ema:
            words.append(f"average of weights with decay {self.ema:g}")
        if self.grad_clip is not None:
            words.append(f"gradients clipped to {self.grad_clip:g}")
        return ", ".join(words)

    def learning_rate(self, epoch: float, epochs: int, step: float = 0.0) -> float:
        """Return the learning rate at a point of the run.

        Args:
            epoch: epochs done so far, with the fraction of the present one.
            epochs: of the whole run.
            step: the fraction of an epoch that the step takes which begins there; it counts during the warm-up only.
        """
        rise = min(self.warmup, epochs)
        if epoch < rise:
            return self.lr * min((epoch + step) / rise, 1.0)
        if self.schedule == "cosine":
            share = (epoch - rise) / max(epochs - rise, 1e-9)
            return self.lr * (1 + math.cos(math.pi * min(share, 1.0))) / 2
        if self.schedule == "multistep":
            return self.lr * self.decay ** sum(epoch >= round(m * epochs) for m in self.milestones)
        return self.lr
