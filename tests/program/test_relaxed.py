"""Forms at fractional counts: exact at whole ones, slopes are derivatives, tables are interpolated."""

from __future__ import annotations

import numpy as np
import pytest

from qcqp_prune.program.forms import CountFormBuilder, PeakForm
from qcqp_prune.program.relaxed import relaxed_use
from qcqp_prune.testing import STRUCTURES, random_problem


@pytest.mark.parametrize("structure", STRUCTURES)
def test_whole_counts_and_slopes(structure: str) -> None:
    rng = np.random.default_rng(0)
    for seed in range(3):
        for row in random_problem(seed, structure).rows:
            form = row.form.parts[0]
            if form.tables:
                continue
            widths = np.asarray([9] * len(form.linear))
            whole = rng.integers(0, widths + 1)
            assert relaxed_use(form, whole)[0] == form.evaluate(whole)
            n = rng.random(len(widths)) * widths
            _, slopes = relaxed_use(form, n)
            for g in range(len(n)):
                ends = [relaxed_use(form, n + s * 1e-5 * (np.arange(len(n)) == g))[0] for s in (1, -1)]
                assert slopes[g] == pytest.approx((ends[0] - ends[1]) / 2e-5, rel=1e-6, abs=1e-4)


def test_tables_are_interpolated_between_their_levels() -> None:
    """A staircase of 10 at 4, 30 at 8 and a table of two sums; by hand half way between levels."""
    builder = CountFormBuilder(2)
    builder.add_table(np.asarray([10, 30]), [{0: 1}], [np.asarray([4, 8])])
    builder.add_table(
        np.asarray([[1, 3], [5, 11]]), [{0: 2}, {1: 1}], [np.asarray([8, 16]), np.asarray([2, 4])]
    )
    form = builder.build()
    assert relaxed_use(form, [4, 2])[0] == form.evaluate([4, 2]) == 11
    assert relaxed_use(form, [8, 4])[0] == form.evaluate([8, 4]) == 41
    value, slopes = relaxed_use(form, [6.0, 3.0])
    assert value == pytest.approx(20 + (1 + 3 + 5 + 11) / 4)
    assert slopes.tolist() == pytest.approx([20 / 4 + 2 * (8 - 2) / 8, ((3 - 1) + (11 - 5)) / 2 / 2])
    assert relaxed_use(form, [1.0, 0.5])[0] == 11  # below the first level the first value counts


def test_of_a_maximum_the_largest_step_counts() -> None:
    steps = []
    for g, cost in ((0, 3), (1, 5)):
        builder = CountFormBuilder(2)
        builder.add_counts(cost, {g: 1})
        steps.append(builder.build())
    peak = PeakForm.of(steps)
    assert relaxed_use(peak, [2.5, 1.0])[0] == 7.5
    assert relaxed_use(peak, [2.5, 1.0])[1].tolist() == [3, 0]
    assert relaxed_use(peak, [1.0, 1.0])[1].tolist() == [0, 5]
