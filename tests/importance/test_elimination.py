"""Elimination against least squares from scratch."""

from __future__ import annotations

import pytest
import torch

from qcqp_prune.errors import InvalidScoreError
from qcqp_prune.importance.elimination import eliminate
from qcqp_prune.importance.readers import Reader


def reader(outputs: int, columns: int, *, shift: bool, seed: int) -> tuple[Reader, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(columns, columns, generator=generator).double()
    rows = torch.randn(200, columns, generator=generator).double() @ mix + 1.5
    weight = torch.randn(outputs, columns, generator=generator).double()
    made = Reader(0, weight, rows.T @ rows, rows.sum(0), ("bias", 1) if shift else None, len(rows))
    made.curvature = torch.rand(outputs, generator=generator).double()
    return made, rows


def error(one: Reader, rows: torch.Tensor, kept: torch.Tensor) -> tuple[float, torch.Tensor]:
    """Half the weighted mean squared error of the best weights on kept columns, by a solver of least squares."""
    wanted = rows @ one.weight.T
    read = rows[:, kept]
    if one.shift:
        wanted, read = wanted - wanted.mean(0), read - read.mean(0)
    best = torch.linalg.lstsq(read, wanted).solution
    residual = (wanted - read @ best).square().mean(0)
    full = torch.zeros_like(one.weight)
    full[:, kept] = best.T
    return float((residual * one.curvature).sum()) / 2, full


@pytest.mark.parametrize("shift", [True, False])
def test_every_step_is_the_cheapest_and_costs_what_least_squares_says(shift: bool) -> None:
    first, rows = reader(3, 12, shift=shift, seed=0)
    second, others = reader(5, 6, shift=not shift, seed=1)
    columns = torch.arange(12).reshape(6, 2), torch.arange(6)[:, None]
    found = eliminate([(first, columns[0]), (second, columns[1])], 6, [2, 4], ridge=0.0)
    gone: list[int] = []
    before = 0.0
    for step, unit in enumerate(found.order[:-1].tolist()):
        left = [u for u in range(6) if u not in gone]
        totals = {}
        for u in left:
            stay = torch.tensor([k for k in left if k != u])
            a, b = (
                error(one, data, cols[stay].flatten())[0]
                for one, data, cols in ((first, rows, columns[0]), (second, others, columns[1]))
            )
            totals[u] = a + b
        assert unit == min(totals, key=totals.__getitem__)
        gone.append(unit)
        assert found.costs[step] == pytest.approx(totals[unit] - before, rel=1e-6, abs=1e-9)
        before = totals[unit]
        if step + 1 in found.refits:
            stay = torch.tensor([k for k in range(6) if k not in gone])
            wanted = (
                error(first, rows, columns[0][stay].flatten())[1],
                error(second, others, columns[1][stay].flatten())[1],
            )
            for got, best in zip(found.refits[step + 1], wanted, strict=True):
                torch.testing.assert_close(got, best, rtol=1e-6, atol=1e-8)
    assert sorted(found.order.tolist()) == list(range(6))
    assert sorted(found.refits) == [2, 4]


def test_a_copy_of_another_unit_goes_first_and_for_nothing() -> None:
    one, rows = reader(4, 5, shift=True, seed=2)
    rows = torch.cat([rows, rows[:, :1]], 1)
    weight = torch.cat([one.weight, 3 * one.weight[:, :1]], 1)
    twin = Reader(0, weight, rows.T @ rows, rows.sum(0), ("bias", 1), len(rows), curvature=one.curvature)
    found = eliminate([(twin, torch.arange(6)[:, None])], 6, [1], ridge=1e-9)
    assert found.order[0] in (0, 5)
    assert found.costs[0] < 1e-4 * found.costs[1]
    stays = 5 - found.order[0]
    torch.testing.assert_close(
        found.refits[1][0][:, stays], weight[:, 0] + weight[:, 5], rtol=1e-4, atol=1e-6
    )


def test_where_only_squares_are_held_columns_go_by_themselves() -> None:
    one, rows = reader(3, 5, shift=False, seed=3)
    alone = Reader(0, one.weight, rows.square().sum(0), rows.sum(0), None, len(rows), curvature=one.curvature)
    found = eliminate([(alone, torch.arange(5)[:, None])], 5, [2], ridge=0.0)
    worth = (one.curvature[:, None] * one.weight**2 * rows.square().mean(0)).sum(0) / 2
    assert found.order.tolist() == torch.argsort(worth).tolist()
    kept = torch.ones(5).index_fill(0, torch.tensor(found.order[:2]), 0)
    torch.testing.assert_close(found.refits[2][0], one.weight * kept)


def test_a_covariance_without_an_inverse_gets_a_larger_ridge() -> None:
    """Of one row the second moments have rank one: no ridge at all would end in an error of linear algebra."""
    one, rows = reader(3, 6, shift=False, seed=4)
    single = Reader(0, one.weight, torch.outer(rows[0], rows[0]), rows[0], None, 1, curvature=one.curvature)
    found = eliminate([(single, torch.arange(6)[:, None])], 6, [3], ridge=0.0)
    assert sorted(found.order.tolist()) == list(range(6))
    # Three columns can say what six said of one row.
    torch.testing.assert_close(found.refits[3][0] @ rows[0], one.weight @ rows[0], rtol=1e-3, atol=1e-3)


def test_what_no_ridge_mends_is_refused() -> None:
    one, _ = reader(3, 4, shift=True, seed=5)
    one.second[1, 1] = torch.nan
    with pytest.raises(InvalidScoreError, match="check the data"):
        eliminate([(one, torch.arange(4)[:, None])], 4, [2], ridge=1e-2)
