"""Costs inside of blocks: what is spent there is spent only while the block is."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager

import numpy as np

from qcqp_prune.errors import InvalidBudgetError
from qcqp_prune.graph.channels import ChannelGraph
from qcqp_prune.program.forms import CountForm, CountFormBuilder
from qcqp_prune.program.tables import CountTable, Shares


@contextmanager
def spent_in(builder: CountFormBuilder, graph: ChannelGraph, block: int | None) -> Iterator[CountFormBuilder]:
    """A builder for the terms of one layer or tensor; what is added there is spent in a block.

    Args:
        builder: of the whole form.
        graph: the channel graph.
        block: index of the innermost block around the layer or tensor; None where it lies in none.

    Raises:
        InvalidBudgetError: a term would be a product of three counts.
    """
    if block is None:
        yield builder
        return
    part = CountFormBuilder(len(graph.groups))
    yield part
    unit = int(graph.group_of_unit[graph.blocks[block].unit])
    fixed = {g: group.width for g, group in enumerate(graph.groups) if group.frozen_reason is not None}
    try:
        builder.add_form(gated(part.build(), unit, graph.emptied_with(block), fixed))
    except ValueError as error:
        raise InvalidBudgetError(
            f"what is spent in the block {graph.blocks[block].name} {error}: trace without this block"
        ) from error


def gated(form: CountForm, unit: int, gone: Collection[int], fixed: Mapping[int, int]) -> CountForm:
    """A form that is zero where a group of one unit is empty, and as before where it is not.

    Args:
        form: over all groups.
        unit: the group of one unit.
        gone: groups that are empty where it is.
        fixed: widths of groups that are never anything else than whole.

    Raises:
        ValueError: a term has two sums of counts that stay where the unit goes.
    """
    size = len(form.linear)
    counts = {g: {g: 1} for g in range(size) if g not in fixed}
    form = form.substituted(counts, size, [fixed.get(g, 0) for g in range(size)])
    builder = CountFormBuilder(size)
    builder.add_counts(form.constant, {unit: 1})
    for g in np.flatnonzero(form.linear).tolist():
        if g in gone:
            builder.add_counts(int(form.linear[g]), {g: 1})
        else:
            builder.add_product(int(form.linear[g]), {g: 1}, {unit: 1})
    for coefficient, first, second in form.products:
        if not (_goes(first, gone) or _goes(second, gone)):
            raise ValueError("depends on two counts that stay without it")
        builder.add_product(coefficient, dict(first), dict(second))
    for table in form.tables:
        _add_table(builder, table, unit, gone)
    return builder.build()


def _goes(side: Shares, gone: Collection[int]) -> bool:
    return bool(side) and all(g in gone for g, _ in side)


def _add_table(builder: CountFormBuilder, table: CountTable, unit: int, gone: Collection[int]) -> None:
    sides = [dict(table.first), dict(table.second)]
    levels = [table.first_levels, table.second_levels]
    values = table.values
    if not table.second and not _goes(table.first, gone):
        # A table of one sum that stays: nothing without the unit.
        builder.add_table(
            np.concatenate([np.zeros_like(values), values], axis=1),
            [sides[0], {unit: 1}],
            [levels[0], np.arange(2)],
        )
        return
    empties = [_goes(side, gone) for side in (table.first, table.second)]
    if not any(empties):
        raise ValueError("is looked up by two counts that stay without it")
    axis = empties.index(True)
    if levels[axis][0] > 0:
        levels[axis] = np.concatenate([[0], levels[axis]])
        values = np.concatenate([np.zeros_like(values.take([0], axis)), values], axis=axis)
    else:
        values = values.copy()
        values[(0, slice(None)) if axis == 0 else (slice(None), 0)] = 0
    builder.add_table(values, sides, levels)
