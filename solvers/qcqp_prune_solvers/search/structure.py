"""What of a program stays the same during a search: classes of tied groups, couplings from both sides, and costs."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from qcqp_prune.program.coefficients import (
    BoolArray,
    Coefficient,
    FloatArray,
    IntArray,
    LowRank,
    dense,
    transposed,
)
from qcqp_prune.program.program import CountConstraint, Program
from qcqp_prune_solvers.search.tables import TableCosts, table_costs


@dataclass(frozen=True, eq=False)
class Structure:
    """A program prepared for moves.

    A *class* is a set of tied groups; its groups always have one common count, so a class moves as a whole.

    Attributes:
        program: the program.
        members: groups of each class.
        allowed: allowed counts of each class, ascending.
        neighbours: for each group its couplings ``(other group, coefficients with own units in the rows)``; a group
            coupled with itself has its symmetric matrix there.
        limits: ``(k,)`` limit of each budget, without the constant.
        least: ``(k,)`` lower end of each band, without the constant; below any use where there is none.
        linear: ``(k, classes)`` cost of one unit of each class.
        curvature: ``(k, classes, classes)`` symmetric ``H`` of ``cost = linear . N + N^T H N / 2``.
        colours: sets of classes without coupling among themselves, in the objective or in a budget.
        curved: ``(classes,) bool``: classes coupled with themselves.
        tables: costs that are looked up, None where there are none.
        fine: for each class the next level up and the next one down from each level, ``(2, levels)``.
        coarse: the same in strides: up to where a level of a table ends. Between two such counts nothing is saved.
    """

    program: Program
    members: tuple[tuple[int, ...], ...]
    allowed: tuple[IntArray, ...]
    neighbours: tuple[tuple[tuple[int, Coefficient], ...], ...]
    limits: IntArray
    least: IntArray
    linear: IntArray
    curvature: IntArray
    colours: tuple[IntArray, ...]
    curved: BoolArray
    tables: TableCosts | None
    fine: tuple[IntArray, ...]
    coarse: tuple[IntArray, ...]

    @classmethod
    def of(cls, program: Program) -> Structure:
        """Prepare a program."""
        class_of = np.asarray([g.tie for g in program.groups], dtype=np.int64)
        count = int(class_of.max()) + 1
        members = tuple(tuple(np.flatnonzero(class_of == t).tolist()) for t in range(count))
        allowed = tuple(np.asarray(program.groups[m[0]].counts, dtype=np.int64) for m in members)
        costs = [_class_costs(c, class_of, count) for c in program.constraints]
        limits = np.asarray([c.limit - c.form.constant for c in program.constraints], dtype=np.int64)
        least = np.asarray(
            [-1 if c.at_least is None else c.at_least - c.form.constant for c in program.constraints],
            dtype=np.int64,
        )
        linear = np.asarray([a for a, _ in costs], dtype=np.int64).reshape(-1, count)
        curvature = np.asarray([h for _, h in costs], dtype=np.int64).reshape(-1, count, count)
        coupled = _coupled(program, class_of, count) | (curvature != 0).any(axis=0)
        tables = table_costs(program, class_of, allowed)
        fine, coarse = _moves(allowed, tables)
        if tables is not None:
            coupled |= tables.coupled
        return cls(
            program,
            members,
            allowed,
            _neighbours(program),
            limits,
            least,
            linear,
            curvature,
            _colours(coupled),
            np.diag(coupled).copy(),
            tables,
            fine,
            coarse,
        )

    def narrowed(self, allowed: tuple[IntArray, ...]) -> Structure:
        """The same with fewer allowed counts."""
        fine, coarse = _moves(allowed, self.tables)
        return replace(self, allowed=allowed, fine=fine, coarse=coarse)

    def table_use(self, counts: IntArray) -> IntArray:
        """What the tables of each budget cost at counts of classes, ``(k,)``."""
        return np.zeros(len(self.limits), np.int64) if self.tables is None else self.tables.total(counts)


def _moves(
    allowed: tuple[IntArray, ...], tables: TableCosts | None
) -> tuple[tuple[IntArray, ...], tuple[IntArray, ...]]:
    """Steps of each class, to the next count and in strides."""
    fine = tuple(_neighbouring(np.arange(len(a))) for a in allowed)
    if tables is None:
        return fine, fine
    coarse = tuple(
        _strides(a, tops) if len(tops) > 1 else f
        for a, tops, f in zip(allowed, tables.tops, fine, strict=True)
    )
    return fine, coarse


def _neighbouring(stops: IntArray, levels: int | None = None) -> IntArray:
    """For each level the nearest stop above and below it; the last and the first where there is none."""
    every = np.arange(len(stops) if levels is None else levels)
    up = stops[np.searchsorted(stops, every, side="right").clip(max=len(stops) - 1)]
    down = stops[(np.searchsorted(stops, every, side="left") - 1).clip(min=0)]
    return np.stack([np.maximum(up, every), np.minimum(down, every)])


def _strides(allowed: IntArray, tops: IntArray) -> IntArray:
    """Levels of the largest allowed counts that are not above a top, and the ends."""
    stops = np.searchsorted(allowed, tops, side="right") - 1
    return _neighbouring(np.unique([0, *stops[stops >= 0].tolist(), len(allowed) - 1]), len(allowed))


def _class_costs(constraint: CountConstraint, class_of: IntArray, count: int) -> tuple[IntArray, IntArray]:
    form = constraint.form
    linear, curvature = np.zeros(count, np.int64), np.zeros((count, count), np.int64)
    np.add.at(linear, class_of, form.linear)
    rows, cols = class_of[form.rows], class_of[form.cols]
    np.add.at(curvature, (rows, cols), form.coefs)
    np.add.at(curvature, (cols, rows), form.coefs)
    return linear, curvature


def _neighbours(program: Program) -> tuple[tuple[tuple[int, Coefficient], ...], ...]:
    found: list[list[tuple[int, Coefficient]]] = [[] for _ in program.groups]
    for pair in program.pairs:
        if pair.first == pair.second:
            width = program.groups[pair.first].width
            upper = dense(pair.coef, (width, width))
            found[pair.first].append((pair.first, upper + upper.T))
        else:
            found[pair.first].append((pair.second, pair.coef))
            found[pair.second].append((pair.first, transposed(pair.coef)))
    return tuple(tuple(f) for f in found)


def _coupled(program: Program, class_of: IntArray, count: int) -> BoolArray:
    coupled = np.zeros((count, count), np.bool_)
    for pair in program.pairs:
        a, b = class_of[pair.first], class_of[pair.second]
        coupled[a, b] = coupled[b, a] = True
    return coupled


def _colours(coupled: BoolArray) -> tuple[IntArray, ...]:
    """Greedy colouring, classes of high degree first; a class coupled with itself is alone in its colour."""
    order = np.argsort(-coupled.sum(axis=1), kind="stable")
    colours: list[list[int]] = []
    for t in order.tolist():
        for colour in colours:
            if not coupled[t, t] and not coupled[t, colour].any() and not coupled[colour[0], colour[0]]:
                colour.append(t)
                break
        else:
            colours.append([t])
    return tuple(np.asarray(sorted(c), dtype=np.int64) for c in colours)


def column_sum(coef: Coefficient, rows: IntArray, width: int) -> FloatArray:
    """``sum over rows of coef``, ``(width,)``."""
    if isinstance(coef, LowRank):
        return np.asarray(coef.right @ coef.left[rows].sum(axis=0))
    if isinstance(coef, np.ndarray):
        return coef[rows[0]] if len(rows) == 1 else np.asarray(coef[rows].sum(axis=0))
    return np.full(width, float(coef) * len(rows))
