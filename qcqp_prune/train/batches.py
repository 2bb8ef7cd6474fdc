"""What a loader yields, brought to one form."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Sized
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from qcqp_prune.errors import InvalidOptionError, TrainingError
from qcqp_prune.graph.batches import PAIRS, Call, arguments, is_pair, require_loader, shown
from qcqp_prune.graph.outputs import logits_of
from qcqp_prune.train.modes import random_state_kept

Loader = Iterable[Any]
"""Anything that yields `(inputs, targets)`: inputs a tensor, a tuple of the model's arguments or a dict of its keyword
arguments; targets (N,) int64, or whatever tensor a loss of one's own takes."""


def batches_of(loader: Loader, device: torch.device) -> Iterator[tuple[Call, Tensor]]:
    """Yield `(arguments, targets)` on `device`.

    Raises:
        TrainingError: a batch is not a pair of inputs and targets.
        InvalidOptionError: what was given is no loader.
    """
    require_loader(loader, "the network")
    for batch in loader:
        if not is_pair(batch):
            raise TrainingError(f"The loader yields {shown(batch)}. Give one that yields {PAIRS}.")
        yield arguments(batch[0], device, non_blocking=True), batch[1].to(device, non_blocking=True)


def first_batch(loader: Loader) -> list[Any]:
    """The first batch, or nothing where there is none; what is drawn later is drawn as if nobody had looked.

    A copy of the loader is asked, so that one that counts its epochs counts none, and generators get their state back.
    """
    try:
        seen = copy.copy(loader)
    except TypeError:  # what is no Python all the way down may not be copied
        seen = loader
    owners = (loader, getattr(loader, "sampler", None), getattr(loader, "batch_sampler", None))
    generators = [getattr(owner, "generator", None) for owner in owners]
    before = [(g, g.get_state()) for g in generators if isinstance(g, torch.Generator)]
    try:
        with random_state_kept(torch.device("cpu")):
            return list(islice(seen, 1))
    finally:
        for generator, state in before:
            generator.set_state(state)


def require_labels(targets: Tensor, logits: Tensor) -> None:
    """Refuse targets that name no class of the network.

    Raises:
        TrainingError: a target is no whole number from 0 to classes - 1, or there is not one for each sample.
    """
    hindrance = _no_labels(targets, logits)
    if hindrance:
        raise TrainingError(hindrance)


def right_among(outputs: Any, targets: Tensor) -> int | None:
    """How many targets are the class with the highest logit; None where outputs and targets are of no classes."""
    try:
        logits = logits_of(outputs)
    except InvalidOptionError:
        return None
    if _no_labels(targets, logits) or logits.shape[1] < 2:
        return None
    return int((logits.argmax(dim=1) == targets).sum())


def _no_labels(targets: Tensor, logits: Tensor) -> str:
    """Why targets name no class of the network; empty where they do."""
    if logits.ndim < 2 or targets.shape != (*logits.shape[:1], *logits.shape[2:]):
        return (
            f"The network gives outputs of shape {tuple(logits.shape)} for targets of shape {tuple(targets.shape)}. "
            "Give logits (N, classes) and targets (N,), or a loss of your own: loss=torch.nn.functional.mse_loss."
        )
    if targets.dtype not in (torch.int64, torch.uint8):
        return (
            f"The targets are {targets.dtype}. Give class numbers as int64: targets.long(); or a loss of your own: "
            "loss=torch.nn.functional.mse_loss."
        )
    if targets.numel() and not (int(targets.min()) >= 0 and int(targets.max()) < logits.shape[1]):
        wrong = targets[(targets < 0) | (targets >= logits.shape[1])][0]
        return (
            f"The loader yields the target {int(wrong)}, and the network has {logits.shape[1]} classes. "
            "Number the classes from 0, or give the network as many outputs as there are."
        )
    return ""


def length_of(loader: Loader) -> int | None:
    """Return the number of batches, None where the loader cannot say."""
    if not isinstance(loader, Sized):
        return None
    try:
        return len(loader)
    except TypeError:  # a DataLoader over an iterable dataset has __len__ and no length
        return None
