"""How far a network's outputs are from what they were, whatever it returns."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from qcqp_prune.errors import InvalidOptionError, InvalidScoreError
from qcqp_prune.graph.outputs import floats

Harm = Callable[[Sequence[Any]], float]
"""How much worse a network is than the dense one, given what it returns for each batch."""


def output_error(dense: Sequence[Any]) -> Harm:
    """By what the dense network returns: the squared change of its outputs as a share of their variance.

    The variance is that of each entry over samples, so that neither the scale of an output nor a constant in it counts;
    of several outputs the mean. Where the dense network gives infinity, as for what it masks out, nothing is compared.

    Args:
        dense: what it returns for each batch.

    Raises:
        InvalidOptionError: no output is a tensor of floating numbers.
        InvalidScoreError: one holds NaN, or nothing finite.
    """
    wanted = [floats(x) for x in dense]
    if not wanted[0]:
        raise InvalidOptionError(
            "the network returns no tensor of floating numbers: give importance=Calibrated(batches, loss=...) with a "
            "loss of your own, or importance=Magnitude()"
        )
    leaves = list(zip(*wanted, strict=True))
    for batches in leaves:
        if any(bool(x.isnan().any()) for x in batches) or not any(bool(x.isfinite().any()) for x in batches):
            raise InvalidScoreError(
                "the network's outputs on the calibration data are not finite: check the data and the weights"
            )
    scales = [spread(batches) for batches in leaves]

    def error(outputs: Sequence[Any]) -> float:
        found = zip(*(floats(x) for x in outputs), strict=True)
        squares = (
            sum(_square(a, b) for a, b in zip(mine, theirs, strict=True))
            for mine, theirs in zip(found, leaves, strict=True)
        )
        return sum(s / scale for s, scale in zip(squares, scales, strict=True)) / len(scales)

    return error


def spread(batches: Sequence[Tensor]) -> float:
    """Squared distances of an output's entries from their means over samples, summed; never zero.

    Where nothing varies over samples, from the mean of all entries, and where nothing varies at all, from zero.

    Args:
        batches: of one output, samples first.
    """
    finite = [torch.where(x.isfinite(), x, 0) for x in batches]
    zero = finite[0].new_zeros((), dtype=torch.float64)
    centres = [sum((x.double().sum() for x in finite), zero) / sum(x.numel() for x in finite), zero]
    if zero.ndim < finite[0].ndim and len({x.shape[1:] for x in finite}) == 1:
        centres.insert(0, sum((x.double().sum(0) for x in finite), zero) / sum(len(x) for x in finite))
    sums = (sum(float((x.double() - centre).square().sum()) for x in finite) for centre in centres)
    return next((total for total in sums if total > 0), 1.0)


def _square(a: Tensor, b: Tensor) -> float:
    return float(torch.where(b.isfinite(), (a - b).double(), 0.0).square().sum())
