"""Sums of products against double precision, also of columns whose mean is much larger than their spread."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from qcqp_prune.importance.moments import moments, ridge_size


def rows(number: int, columns: int, mean: float, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(columns, columns, generator=generator)
    return torch.randn(2, number, columns, generator=generator) @ mix + mean * torch.arange(1, columns + 1)


@pytest.mark.parametrize("number", [1, 300, 8_200, 20_000])
@pytest.mark.parametrize("mean", [0.0, 1.0, 3_000.0])
def test_products_and_covariances_are_those_of_double_precision(number: int, mean: float) -> None:
    x, y = rows(number, 5, mean, 0), rows(number, 3, -2 * mean, 1)
    products, sums = moments(x, y)
    for other, found, total in zip((x, y), products, sums, strict=True):
        wanted, sum_ = x.double().mT @ other.double(), other.double().sum(1)
        assert found.dtype == total.dtype == torch.float64
        torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-3)
        torch.testing.assert_close(total, sum_, rtol=1e-10, atol=1e-7 * number)
        spreads = [t.double().std(1, correction=0) for t in (x, other)]
        scale = number * spreads[0][:, :, None] * spreads[1][:, None]
        covariance = wanted - x.double().sum(1)[:, :, None] * sum_[:, None] / number
        own = found - sums[0][:, :, None] * total[:, None] / number
        assert (own - covariance).abs().le(1e-5 * scale + 1e-12 * wanted.abs()).all()


def test_rows_that_are_all_alike_do_not_vary() -> None:
    x = (torch.randn(7, generator=torch.Generator().manual_seed(0)) * 100).repeat(10_000, 1)
    (square,), (total,) = moments(x)
    mean = total / len(x)
    assert (square / len(x) - torch.outer(mean, mean)).abs().max() < 1e-14 * square.max()


@pytest.mark.parametrize(
    ("ridge", "variance", "square", "wanted"),
    [
        (0.01, 2.0, 3.0, 0.02),
        (0.01, 0.0, 3.0, 3e-8),  # a share of the mean square where nothing varies
        (0.01, -1e-9, 3.0, 3e-8),
        (0.01, 0.0, 0.0, 0.01),  # nothing but zeros
        (1e-15, 1.0, 3.0, 3e-12),  # no less than what rounding leaves
        (0.0, 2.0, 3.0, 0.0),
    ],
)
def test_ridges_by_hand(ridge: float, variance: float, square: float, wanted: float) -> None:
    assert ridge_size(ridge, variance, square) == pytest.approx(wanted)
