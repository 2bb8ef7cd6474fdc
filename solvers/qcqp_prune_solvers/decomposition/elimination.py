"""In which order the variables of a count program are eliminated, and what each elimination touches."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

TABLE_LIMIT = 50_000_000
"""Entries of the largest table that elimination may build (8 bytes each)."""
EFFORT_LIMIT = 1_000_000_000
"""Largest effort of one elimination: about a second."""


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
        free: neighbours that it meets through products and tables only, ascending; none where a relation determines it.
        coupled: all neighbours that it is coupled with by a product or a table.
        messages: indices of earlier steps whose messages it takes in.
        relation: what determines it, or None where it is maximised over.
        work: entries of the largest table that the step builds.
        effort: the same, times the number of parts in which an envelope is built.
    """

    variable: int
    tabled: tuple[int, ...]
    free: tuple[int, ...]
    coupled: tuple[int, ...]
    messages: tuple[int, ...]
    relation: Relation | None
    work: int
    effort: int

    @property
    def scope(self) -> tuple[int, ...]:
        """Dimensions of its message."""
        return (*self.tabled, *self.free)


Runs = Callable[[int, Iterable[int]], int]
"""Given a variable and neighbours: in how many parts its values fall where its tables with these do not change."""


def plan(
    sizes: Sequence[int],
    products: set[tuple[int, int]],
    relations: Sequence[Relation],
    runs: Runs = lambda variable, neighbours: 1,
    *,
    last: int | None = None,
) -> list[Step]:
    """Greedy: always the variable that takes the least effort.

    A variable in one relation is determined by the other two; one in several has to wait until others are gone.

    Args:
        sizes: number of values of each variable.
        products: pairs of different variables that a product or a table couples.
        relations: sums of variables.
        runs: 1 where there are no tables.
        last: a variable that is to be eliminated after all others.

    Raises:
        TooWide: a table above ``TABLE_LIMIT`` is needed.
    """
    state = _State(sizes, products, relations, runs)
    left = set(range(len(sizes)))
    while left:
        open_ = sorted(left - {last}) or sorted(left)
        candidates = [step for v in open_ if (step := state.step(v, left)) is not None]
        if not candidates:
            raise TooWide(f"no order of elimination ends with variable {last}")
        step = min(candidates, key=lambda s: s.effort)
        if step.work > TABLE_LIMIT:
            raise TooWide(f"a table of {step.work:,} entries is needed, at most {TABLE_LIMIT:,} are allowed")
        if step.effort > EFFORT_LIMIT:
            raise TooWide(
                f"one elimination takes {step.effort:,} steps, at most {EFFORT_LIMIT:,} are allowed"
            )
        state.take(step)
        left.remove(step.variable)
    return state.steps


class _State:
    """What is left during planning."""

    def __init__(
        self,
        sizes: Sequence[int],
        products: set[tuple[int, int]],
        relations: Sequence[Relation],
        runs: Runs,
    ) -> None:
        self._sizes, self._runs = sizes, runs
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
            relation = relations[0]
            return Step(variable, _ascending(tabled), (), _ascending(coupled), messages, relation, work, work)
        free = coupled - tabled
        rows = math.prod(self._sizes[c] for c in tabled)
        work = rows * max(self._sizes[variable], math.prod(self._sizes[c] for c in free))
        effort = work * self._runs(variable, free)
        return Step(
            variable, _ascending(tabled), _ascending(free), _ascending(coupled), messages, None, work, effort
        )

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
