"""Recalibration of batch norms, whose running statistics belong to the network before it was pruned."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from qcqp_prune.errors import InvalidOptionError, TrainingError
from qcqp_prune.graph.batches import outputs_of
from qcqp_prune.train.batches import Loader, batches_of
from qcqp_prune.train.modes import modes_kept, placed

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Recalibration:
    """What was recalibrated.

    Attributes:
        layers: names of the batch norms, empty where the model has none and nothing was done.
        batches: how many were run.
        samples: how many samples they held.
    """

    layers: tuple[str, ...]
    batches: int
    samples: int


def recalibrate_batch_norm(
    model: nn.Module, loader: Loader, *, batches: int | None = None, device: str = "auto"
) -> Recalibration:
    """Estimate the running mean and variance of every batch norm anew: plain averages over batches.

    Each batch counts alike, `mean = sum_b mean_b / B`, `var = sum_b var_b / B`. Only the batch norms run in train mode,
    so dropout stays off. Modes and momenta come back as they were; where an error ends it, so do the statistics.

    Args:
        model: changed in place; no weight changes.
        loader: yields `(inputs, targets)`; targets are not looked at.
        batches: how many to use at most, None for all.
        device: where to run; "auto" takes an accelerator where there is one.

    Raises:
        TrainingError: the loader yields nothing or what the network fails on, or statistics come out NaN or infinite.
        InvalidOptionError: `batches` is not positive.
    """
    if batches is not None and batches < 1:
        raise InvalidOptionError(f"batches is {batches}; give a positive number, or None for all.")
    norms = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, _BatchNorm) and module.track_running_stats and module.running_mean is not None
    }
    if not norms:
        logger.info("The model has no batch norm with running statistics: nothing to recalibrate.")
        return Recalibration((), 0, 0)
    done, samples = 0, 0
    with modes_kept(model), placed(model, device) as where, _averaging(list(norms.values())), torch.no_grad():
        model.eval()
        for norm in norms.values():
            norm.train()
        for call, targets in islice(batches_of(loader, where), batches):
            outputs_of(model, call, "recalibrate_batch_norm", TrainingError)
            done += 1
            samples += len(targets)
        if not done:
            raise TrainingError(
                "The loader yields no batch to recalibrate batch norms on. Give one with samples."
            )
        broken = [
            name for name, norm in norms.items() if not all(bool(b.isfinite().all()) for b in norm.buffers())
        ]
        if broken:
            raise TrainingError(
                f"The statistics of {broken[0]} on this data are NaN or infinite. Check the data and the weights; "
                "the statistics are what they were."
            )
    return Recalibration(tuple(norms), done, samples)


@contextmanager
def _averaging(norms: list[_BatchNorm]) -> Iterator[None]:
    """Start cumulative averages in `norms`; put momenta back at the end, and statistics too after an error."""
    before = [
        (norm, norm.momentum, {name: buffer.clone() for name, buffer in norm.named_buffers()})
        for norm in norms
    ]
    try:
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None  # torch's way to ask for a cumulative average
        yield
    except BaseException:
        for norm, _, buffers in before:
            for name, buffer in norm.named_buffers():
                buffer.copy_(buffers[name])
        raise
    finally:
        for norm, momentum, _ in before:
            norm.momentum = momentum
