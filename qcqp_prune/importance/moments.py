"""Second moments of what layers read: summed so that nothing cancels, and made regular by a ridge."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from qcqp_prune.errors import InvalidOptionError

_ROWS = 8_192
"""Rows that are multiplied at a time; of so many a copy about their mean takes little memory."""

_LEAST_VARIANCE, _LEAST_RIDGE = 1e-6, 1e-12
"""Shares of the mean square. Data in single precision that do not vary at all seem to vary by 1e-14 of it."""


def products(x: Tensor, y: Tensor) -> Tensor:
    """Sums over rows of the products of each column of x with each of y, ``x^T y``, in double precision.

    In single precision only what is left about the mean is multiplied, because what takes means out of the sums later
    would leave nothing but rounding of columns whose mean is much larger than their spread.

    Args:
        x: ``(..., rows, columns of x)``, float32 or float64.
        y: ``(..., rows, columns of y)``, of the same type.
    """
    total = x.new_zeros(*x.shape[:-2], x.shape[-1], y.shape[-1], dtype=torch.float64)
    for a, b in zip(x.split(_ROWS, -2), y.split(_ROWS, -2), strict=True):
        (mean_a, left_a), (mean_b, left_b) = _about_mean(a), _about_mean(b)
        total += (left_a.mT @ left_b).double()
        sum_a, sum_b = (t.sum(-2, dtype=torch.float64) for t in (left_a, left_b))
        total += torch.stack([sum_a + a.shape[-2] * mean_a, mean_a], -1) @ torch.stack([mean_b, sum_b], -2)
    return total


def require_ridge(ridge: float) -> None:
    """Refuse what is no ridge.

    Raises:
        InvalidOptionError: it is not positive, or not finite.
    """
    if not (math.isfinite(ridge) and ridge > 0):
        raise InvalidOptionError(f"ridge is {ridge}: give a positive number such as 0.01")


def ridge_size(ridge: float, variance: float, square: float) -> float:
    """What a ridge adds to the diagonal of second moments.

    Args:
        ridge: as a share of their mean.
        variance: that mean, about the mean of each column where that is taken out.
        square: the mean square of the columns. Where they vary by next to nothing of it, a share of it counts for the
            variance; where nothing but zeros is read, 1.
    """
    size = max(variance, _LEAST_VARIANCE * square) or 1.0
    return max(ridge * size, _LEAST_RIDGE * square) if ridge else 0.0


def _about_mean(rows: Tensor) -> tuple[Tensor, Tensor]:
    """About the mean of each column, and what is left of the rows without it."""
    mean = rows.mean(-2, keepdim=True, dtype=torch.float64).to(rows.dtype)
    return mean.squeeze(-2).double(), rows - mean
