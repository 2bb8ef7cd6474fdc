"""In which order the variables of a count program are eliminated, and what each elimination touches."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

TABLE_LIMIT = 50_000_000
"""Entries of the largest table that elimination may build (8 bytes each)."""


class TooWide(Exception):
    """The couplings need a table larger than ``TABLE_LIMIT``."""


@dataclass(frozen=True)
class Relation:
    """``total = part + share * single`` between three variables."""

    total: int
    part: int
    single: int
    share: int

    @property
    def variables(self) -> frozenset[int]:
        """All three."""
        return frozenset((self.total, self.part, self.single))


@dataclass(frozen=True)
class Step:
    """Elimination of one variable.

    Attributes:
        variable: the variable that goes.
        tabled: neighbours that earlier messages share with it, ascending; where a relation determines the
            variable, all of its neighbours and the other two of the relation.
        free: neighbours that it meets through products only, ascending; none where a relation determines it.
        coupled: all neighbours that it is coupled with by a product.
        messages: indices of earlier steps whose messages it takes in.
        relation: what determines it, or None where it is maximised over.
        work: entries of the largest table that the step builds.
    """

    variable: int
    tabled: tuple[int, ...]
    free: tuple[int, ...]
    coupled: tuple[int, ...]
    messages: tuple[int, ...]
    relation: Relation | None
    work: int

    @property
    def scope(self) -> tuple[int, ...]:
        """Dimensions of its message."""
        return (*self.tabled, *self.free)


def plan(sizes: Sequence[int], products: set[tuple[int, int]], relations: Sequence[Relation]) -> list[Step]:
    """Greedy: always the variable that takes the smallest table.

    A variable in one relation is determined by the other two; one in several has to wait until others are gone.

    Args:
        sizes: number of values of each variable.
        products: pairs of different variables that a product couples.
        relations: sums of variables.

    Raises:
        TooWide: a table above ``TABLE_LIMIT`` is needed.
    """
    state = _State(sizes, products, relations)
    left = set(range(len(sizes)))
    while left:
        candidates = [step for v in sorted(left) if (step := state.step(v, left)) is not None]
        step = min(candidates, key=lambda s: s.work)
        if step.work > TABLE_LIMIT:
            raise TooWide(f"a table of {step.work:,} entries is needed, at most {TABLE_LIMIT:,} are allowed")
        state.take(step)
        left.remove(step.variable)
    return state.steps


class _State:
    """What is left during planning."""

    def __init__(
        self, sizes: Sequence[int], products: set[tuple[int, int]], relations: Sequence[Relation]
    ) -> None:
        self._sizes = sizes
        self._partners: list[set[int]] = [set() for _ in sizes]
        for a, b in products:
            self._partners[a].add(b)
            self._partners[b].add(a)
        self._relations = list(relations)
        self._scopes: dict[int, tuple[int, ...]] = {}
        self.steps: list[Step] = []

    def step(self, variable: int, left: set[int]) -> Step | None:
        """What eliminating a variable now would take; None where it has to wait."""
        relations = [r for r in self._relations if variable in r.variables]
        if len(relations) > 1:
            return None
        messages = tuple(k for k, scope in self._scopes.items() if variable in scope)
        tabled = {c for k in messages for c in self._scopes[k]} - {variable}
        coupled = self._partners[variable] & left
        if relations:
            tabled |= coupled | (relations[0].variables - {variable})
            work = math.prod(self._sizes[c] for c in tabled)
            # Couplings make a table over the variable too, before its value is looked up.
            own = {c for k in messages for c in self._scopes[k]} | coupled | {variable}
            work = max(work, math.prod(self._sizes[c] for c in own))
            return Step(variable, _ascending(tabled), (), _ascending(coupled), messages, relations[0], work)
        free = coupled - tabled
        rows = math.prod(self._sizes[c] for c in tabled)
        work = rows * max(self._sizes[variable], math.prod(self._sizes[c] for c in free))
        return Step(variable, _ascending(tabled), _ascending(free), _ascending(coupled), messages, None, work)

    def take(self, step: Step) -> None:
        """Eliminate."""
        for k in step.messages:
            del self._scopes[k]
        self._scopes[len(self.steps)] = step.scope
        if step.relation is not None:
            self._relations.remove(step.relation)
        self.steps.append(step)


def _ascending(variables: set[int]) -> tuple[int, ...]:
    return tuple(sorted(variables))
