"""Accuracy of a classifier."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from qcqp_prune.errors import TrainingError
from qcqp_prune.graph.outputs import logits_of
from qcqp_prune.train.batches import Loader, batches_of, require_labels
from qcqp_prune.train.modes import modes_kept, placed


@dataclass(frozen=True)
class Evaluation:
    """How a classifier does on a set.

    Attributes:
        accuracy: share of samples whose highest logit is the target, in [0, 1].
        loss: mean cross-entropy over the samples, in nats.
        samples: how many there were.
    """

    accuracy: float
    loss: float
    samples: int


def evaluate(model: nn.Module, loader: Loader, *, device: str = "auto") -> Evaluation:
    """Run a classifier over a loader in eval mode; model and modes are left as they were.

    Args:
        model: maps inputs to logits (N, classes), alone or among other outputs (``logits_of``).
        loader: yields `(inputs, targets)`, targets (N,) int64.
        device: where to run; "auto" takes an accelerator where there is one.

    Raises:
        TrainingError: the loader yields nothing, something else than pairs, or a target that is no class.
        InvalidOptionError: nobody can tell which of several outputs are the logits.
    """
    right, loss, samples = 0, 0.0, 0
    with modes_kept(model), placed(model, device) as where, torch.no_grad():
        model.eval()
        for inputs, targets in batches_of(loader, where):
            logits = logits_of(model(*inputs)).float()
            require_labels(targets, logits)
            right += int((logits.argmax(dim=1) == targets).sum())
            loss += float(F.cross_entropy(logits, targets, reduction="sum"))
            samples += len(targets)
    if not samples:
        raise TrainingError(
            "The loader yields no batch, so there is nothing to evaluate. Give one with samples."
        )
    return Evaluation(right / samples, loss / samples, samples)
