"""Accuracy of a classifier, and the loss of any network."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from qcqp_prune.errors import TrainingError
from qcqp_prune.graph.batches import outputs_of
from qcqp_prune.graph.outputs import logits_of
from qcqp_prune.importance.losses import Loss, loss_of
from qcqp_prune.train.batches import Loader, batches_of, require_labels, right_among
from qcqp_prune.train.modes import modes_kept, placed


@dataclass(frozen=True)
class Evaluation:
    """How a network does on a set.

    Attributes:
        accuracy: share of samples whose highest logit is the target, in [0, 1]; None where the targets are no classes.
        loss: mean over the samples of the loss that was given, or of the cross-entropy, in nats.
        samples: how many there were.
    """

    accuracy: float | None
    loss: float
    samples: int


def evaluate(
    model: nn.Module, loader: Loader, *, loss: Loss | None = None, device: str = "auto"
) -> Evaluation:
    """Run a network over a loader in eval mode; model and modes are left as they were.

    Args:
        model: maps inputs to logits (N, classes), alone or among other outputs (``logits_of``).
        loader: yields `(inputs, targets)`, targets (N,) int64.
        loss: `loss(model(inputs), targets)`, a mean over samples, of a network that may return anything; cross-entropy
            where None.
        device: where to run; "auto" takes an accelerator where there is one.

    Raises:
        TrainingError: the loader yields nothing, something else than pairs, what the network fails on, or a target that
            is no class.
        InvalidOptionError: nobody can tell which of several outputs are the logits; the loss does not take what the
            network returns, or gives no single number.
    """
    right: int | None = 0
    total, samples = 0.0, 0
    with modes_kept(model), placed(model, device) as where, torch.no_grad():
        model.eval()
        for call, targets in batches_of(loader, where):
            outputs = outputs_of(model, call, "evaluate", TrainingError)
            if loss is None:
                logits = logits_of(outputs).float()
                require_labels(targets, logits)
                found: int | None = int((logits.argmax(dim=1) == targets).sum())
                total += float(F.cross_entropy(logits, targets, reduction="sum"))
            else:
                found = right_among(outputs, targets)
                total += float(loss_of(loss, outputs, targets, "evaluate")) * len(targets)
            right = None if right is None or found is None else right + found
            samples += len(targets)
    if not samples:
        raise TrainingError(
            "The loader yields no batch, so there is nothing to evaluate. Give one with samples."
        )
    return Evaluation(None if right is None else right / samples, total / samples, samples)
