"""Groups that are empty together, as a search sees them: a pattern says which sets are empty, the rest is as ever.

At a given pattern a program with blocks is one without: what is empty stays so, and everything else keeps at least one
unit. Moves within a pattern need not know of blocks; this module changes patterns.
"""

from __future__ import annotations

import numpy as np

from qcqp_prune.program.coefficients import BoolArray, FloatArray, IntArray
from qcqp_prune_solvers.search.moves import drop_to_budget, fill, polish
from qcqp_prune_solvers.search.state import State
from qcqp_prune_solvers.search.structure import Structure


class Families:
    """The sets of groups of a program that are empty together.

    Attributes:
        structure: of the program, whatever is empty.
        sets: groups of each family.
        above: for each family all that it needs, itself included, ``(families, families) bool``.
    """

    def __init__(self, structure: Structure) -> None:
        self.structure = structure
        program = structure.program
        ties = [g.tie for g in program.groups]
        self.sets = program.needs.families(ties)
        self.above = np.eye(len(self.sets), dtype=np.bool_)
        family = {g: k for k, groups in enumerate(self.sets) for g in groups}
        for k in range(len(self.sets)):  # each after those that it needs
            for g, h in program.needs.pairs:
                if family[g] == k and family[h] != k:
                    self.above[k] |= self.above[family[h]]
        self._classes = [np.unique([ties[g] for g in groups]) for groups in self.sets]

    def __len__(self) -> int:
        return len(self.sets)

    def empty(self, x: BoolArray) -> BoolArray:
        """Which families are empty at a point, ``(families,)``; those with an empty group are taken for empty."""
        counts = self.structure.program.counts(x)
        found = np.asarray([(counts[list(groups)] == 0).any() for groups in self.sets], np.bool_)
        return np.asarray((self.above & found).any(1))

    def flipped(self, empty: BoolArray, family: int) -> BoolArray:
        """The pattern with one family emptied, with all that need it, or opened, with all that it needs."""
        out = empty.copy()
        if empty[family]:
            out[self.above[family]] = False
        else:
            out[self.above[:, family]] = True
        return out

    def narrowed(self, empty: BoolArray) -> Structure:
        """The structure in which the families of a pattern stay empty and the others do not become so."""
        allowed = list(self.structure.allowed)
        for classes, closed in zip(self._classes, empty.tolist(), strict=True):
            for t in classes.tolist():
                allowed[t] = allowed[t][(allowed[t] == 0) == closed]
        return self.structure.narrowed(tuple(allowed))

    def entered(self, x: BoolArray, empty: BoolArray) -> BoolArray:
        """A point of a pattern: what the pattern empties is dropped, what it opens is whole."""
        out, groups = x.copy(), self.structure.program.groups
        for members, closed in zip(self.sets, empty.tolist(), strict=True):
            for g in members:
                if closed or not x[groups[g].span].any():
                    out[groups[g].span] = not closed
        return out

    def state(self, x: BoolArray) -> State:
        """The state at a point, with moves within the point's pattern."""
        empty = self.empty(x)
        return State(self.narrowed(empty), self.entered(x, empty))

    def by_worth(self) -> IntArray:
        """Families in the order in which they are best emptied: least loss for what it frees in the whole network."""
        program = self.structure.program
        whole = np.ones(program.size, np.bool_)
        best, dense = program.objective(whole), self._uses(whole)
        room = np.maximum(dense - [c.limit for c in program.constraints], 1)
        price: FloatArray = np.zeros(len(self))
        for k in range(len(self)):
            x = self.entered(whole, self.flipped(np.zeros(len(self), np.bool_), k))
            freed = float(((dense - self._uses(x)) / room).sum())
            price[k] = (best - program.objective(x)) / max(freed, 1e-12)
        return np.argsort(price, kind="stable").astype(np.int64)

    def _uses(self, x: BoolArray) -> IntArray:
        program = self.structure.program
        return np.asarray([c.form.evaluate(program.counts(x)) for c in program.constraints], np.int64)


def rounded(families: Families, x: BoolArray) -> State:
    """A point near a given one within the budgets, if need be with every family empty; then filled up."""
    state = families.state(x)
    if not drop_to_budget(state):
        state = families.state(families.entered(x, np.ones(len(families), np.bool_)))
        drop_to_budget(state)
    fill(state)
    polish(state)
    fill(state)
    return state
