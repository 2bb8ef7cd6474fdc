"""The loss of a batch: what a user gave, or the cross-entropy, as one number."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from qcqp_prune.errors import InvalidOptionError, QcqpPruneError
from qcqp_prune.graph.outputs import logits_of, said

Loss = Callable[[Any, Any], Tensor]
"""``loss(model(inputs), targets)``, the mean over samples."""


def cross_entropy(outputs: Any, targets: Tensor) -> Tensor:
    """The loss where none is given: of the logits among what the network returns."""
    return nn.functional.cross_entropy(logits_of(outputs), targets)


def name_of(thing: Any) -> str:
    """By which a loss, another function or an object's class is known again, with its module; empty for None."""
    if thing is None:
        return ""
    named: Any = thing if hasattr(thing, "__qualname__") else type(thing)
    return f"{getattr(named, '__module__', None)}.{named.__qualname__}"


def loss_of(loss: Loss, outputs: Any, targets: Tensor, who: str) -> Tensor:
    """One number that a loss gives, as a scalar tensor.

    Raises:
        InvalidOptionError: the loss does not take what the network returns and the targets, or gives no single number.
    """
    name = getattr(loss, "__name__", type(loss).__name__)
    try:
        value: Any = loss(outputs, targets)
    except (QcqpPruneError, torch.OutOfMemoryError):
        raise
    except (TypeError, AttributeError, LookupError, ValueError, RuntimeError) as error:
        raise InvalidOptionError(
            f"{who}: the loss {name} does not take {said(outputs)} and targets of shape {tuple(targets.shape)} "
            f"({type(error).__name__}: {error}): give loss=f, f(outputs, targets) the mean over samples"
        ) from error
    value = torch.tensor(float(value)) if isinstance(value, int | float) else value
    if not isinstance(value, Tensor) or value.numel() != 1:
        raise InvalidOptionError(
            f"{who}: the loss {name} returns {said(value)}: give one that returns a single number, a mean over samples"
        )
    return value.reshape(())
