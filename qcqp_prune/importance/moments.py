"""Second moments of what layers read: summed so that nothing cancels, and made regular by a ridge."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from qcqp_prune.errors import InvalidOptionError

_ROWS, _FEW = 8_192, 16
"""Rows that are multiplied at a time, as a copy about their mean takes memory; of few, double precision is cheap."""

_LEAST_VARIANCE, _LEAST_RIDGE = 1e-6, 1e-12
"""Shares of the mean square. Data in single precision that do not vary at all seem to vary by 1e-14 of it."""


def moments(x: Tensor, *others: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """Sums over rows of products of columns, ``x^T x`` and ``x^T y`` for each other y, and of columns.

    In single precision only what is left about the mean is multiplied, because what takes means out of the sums later
    would leave nothing but rounding of columns whose mean is much larger than their spread. All is summed in double.

    Args:
        x: ``(..., rows, columns)``, float32 or float64.
        others: with as many rows, and of the same type.

    Returns:
        The products, ``(..., columns of x, columns of the other)``, and the sums, ``(..., columns)``, of x first.
    """
    products = [
        x.new_zeros(*x.shape[:-2], x.shape[-1], y.shape[-1], dtype=torch.float64) for y in (x, *others)
    ]
    sums = [y.new_zeros(*y.shape[:-2], y.shape[-1], dtype=torch.float64) for y in (x, *others)]
    for parts in zip(*(torch.split(y, _ROWS, -2) for y in (x, *others)), strict=True):
        wide = x.dtype == torch.float64 or parts[0].shape[-2] < _FEW
        means, left, rest = zip(*(_about_mean(part, wide=wide) for part in parts), strict=True)
        for k, part in enumerate(parts):
            sums[k] += rest[k] + part.shape[-2] * means[k]
            products[k] += left[0].mT @ left[k]
            if not wide:
                first = torch.stack([rest[0] + part.shape[-2] * means[0], means[0]], -1)
                products[k] += first @ torch.stack([means[k], rest[k]], -2)
    return products, sums


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


def _about_mean(rows: Tensor, *, wide: bool) -> tuple[Tensor, Tensor, Tensor]:
    """About the mean of each column, what is left of the rows without that, and the sums of what is left.

    In double precision nothing has to be taken out, and the mean counts as zero.
    """
    if wide:
        rows = rows.double()
        return torch.zeros_like(rows[..., 0, :]), rows, rows.sum(-2)
    mean = rows.mean(-2, keepdim=True)
    left = rows - mean
    return mean.squeeze(-2).double(), left, left.sum(-2, dtype=torch.float64)
