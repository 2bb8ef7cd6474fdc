"""The count program: maximise tables and products of sums of counts, exactly, by elimination.

Variables are the counts of tie classes and the sums of counts that layers read or write (a concatenation, a stream
whose channels belong to several groups). Two things keep tables small. A sum is built up class by class, so that a
long concatenation is a chain. And couplings are products: where a variable meets a neighbour only through one, its
best value depends on one slope, and the maximum over it is a concave envelope. A table that is constant on runs of its
values needs one envelope for each run.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from qcqp_prune.program.coefficients import FloatArray, IntArray
from qcqp_prune.program.tables import Shares
from qcqp_prune_solvers.decomposition.couplings import Couplings
from qcqp_prune_solvers.decomposition.elimination import Relation, Step, TooWide, plan
from qcqp_prune_solvers.decomposition.kernels import envelope_maxima, run_maxima
from qcqp_prune_solvers.decomposition.lookups import VariableTables

Products = dict[tuple[int, int], float]


class CountProgram:
    """Exact maximisation over counts; variables and the order of elimination are set up once."""

    def __init__(self, couplings: Couplings) -> None:
        """Plan the elimination.

        Raises:
            TooWide: the greedy order needs a table that is too large.
        """
        self._classes = len(couplings.allowed)
        self._scales = [e.scale for e in couplings.items]
        self._values = [a.astype(np.float64) for a in couplings.allowed]
        self._relations: list[Relation] = []
        self._sums: dict[Shares, int] = {}
        forms = {form for e in couplings.items for form in (e.class_first, e.class_second)}
        forms |= {form for e in couplings.lookups for form in (e.class_first, e.class_second) if form}
        for form in sorted(forms, key=lambda f: (len(f), f)):
            self._variable(form)
        self._pairs = [
            tuple(sorted((self._sums[e.class_first], self._sums[e.class_second]))) for e in couplings.items
        ]
        self._sizes = [len(v) for v in self._values]
        looked_up = [
            (self._sums[e.class_first], self._sums[e.class_second] if e.class_second else None)
            for e in couplings.lookups
        ]
        self._tables = VariableTables(couplings.lookups, looked_up, self._values, couplings.needs)
        met = {(a, b) for a, b in self._pairs if a != b}
        met |= {(min(pair), max(pair)) for pair in self._tables.pairs}
        self._met = met
        self._steps = plan(self._sizes, met, self._relations, self._tables.runs)
        self._ending: dict[int, list[Step] | None] = {}
        self._lookups = {r: self._lookup(r) for r in self._relations}

    @property
    def table_entries(self) -> int:
        """Entries of all messages together, as they are held during one elimination."""
        return sum(math.prod(self._sizes[c] for c in s.scope) for s in self._steps)

    @property
    def definitions(self) -> list[list[int]]:
        """The sums, which follow the classes as variables: ``[]`` for zero, ``[part, single, share]`` otherwise."""
        made = {r.total: [r.part, r.single, r.share] for r in self._relations}
        return [made.get(v, []) for v in range(self._classes, len(self._values))]

    @property
    def order(self) -> list[int]:
        """Variables in the order of their elimination."""
        return [step.variable for step in self._steps]

    def _variable(self, form: Shares) -> int:
        """The variable of a sum, built on the largest sum that it contains."""
        if form in self._sums:
            return self._sums[form]
        if len(form) == 1 and form[0][1] == 1:
            self._sums[form] = form[0][0]
            return form[0][0]
        inside = [f for f in self._sums if len(f) < len(form) and set(f) <= set(form)]
        known = max(inside, key=len) if inside else None
        if known is None:
            # Start from a single class; a share above 1 cannot stand alone, for sums have no common factor.
            known = next((part,) for part in form if part[1] == 1) if any(n == 1 for _, n in form) else ()
        part = self._variable(known) if known else self._zero()
        rest = [pair for pair in form if pair not in known]
        built = known
        for single, share in rest:
            built = tuple(sorted((*built, (single, share))))
            if built in self._sums:
                part = self._sums[built]
                continue
            total = len(self._values)
            self._values.append(np.unique(np.add.outer(self._values[part], share * self._values[single])))
            self._relations.append(Relation(total, part, single, share))
            self._sums[built] = part = total
        return part

    def _zero(self) -> int:
        """A variable that is always zero, to start a sum in which every class counts several times."""
        if () not in self._sums:
            self._sums[()] = len(self._values)
            self._values.append(np.zeros(1))
        return self._sums[()]

    def _lookup(self, relation: Relation) -> dict[int, IntArray]:
        """For each variable of a relation the place of its value given the other two, ascending; -1 for none."""
        total, part, single = (self._values[v] for v in (relation.total, relation.part, relation.single))
        derived = {
            relation.total: (np.add.outer(part, relation.share * single), (relation.part, relation.single)),
            relation.part: (
                np.subtract.outer(total, relation.share * single),
                (relation.total, relation.single),
            ),
            relation.single: (
                np.subtract.outer(total, part) / relation.share,
                (relation.total, relation.part),
            ),
        }
        places = {}
        for variable, (wanted, order) in derived.items():
            values = self._values[variable]
            place = np.searchsorted(values, wanted).clip(max=len(values) - 1)
            place = np.where(values[place] == wanted, place, -1)
            places[variable] = place if order[0] < order[1] else place.T
        return places

    def maximise(
        self, unary: Sequence[FloatArray], coefficients: FloatArray, weights: FloatArray | None = None
    ) -> tuple[float, IntArray]:
        """``max sum_c unary[c][n_c] + sum_e coefficients[e] first_e(n) second_e(n) + sum_j weights[j] table_j(n)``.

        Args:
            unary: for each class one value for each allowed count.
            coefficients: ``(couplings,)``.
            weights: ``(lookups,)``; none where there are no tables.

        Returns:
            The maximum and the maximising counts, ``(classes,)``.
        """
        own, products = self._prepared(unary, coefficients, weights)
        messages = self._messages(self._steps, own, products)
        value = sum(float(t) for t, step in zip(messages, self._steps, strict=True) if not step.scope)
        return value, self._backtrack(messages, own, products)

    def marginals(
        self, unary: Sequence[FloatArray], coefficients: FloatArray, weights: FloatArray | None = None
    ) -> list[FloatArray | None]:
        """For each class the maximum at each of its allowed counts; None where that needs too large a table.

        One elimination for each class, with the class at its end.
        """
        own, products = self._prepared(unary, coefficients, weights)
        found: list[FloatArray | None] = []
        for c in range(self._classes):
            steps = self._ending_with(c)
            if steps is None:
                found.append(None)
                continue
            messages = self._messages(steps[:-1], own, products)
            rest = sum(float(t) for t, step in zip(messages, steps, strict=False) if not step.scope)
            found.append(rest + np.asarray(self._gathered(steps, -1, messages, (own, products))))
        return found

    def _ending_with(self, c: int) -> list[Step] | None:
        if c not in self._ending:
            try:
                self._ending[c] = plan(self._sizes, self._met, self._relations, self._tables.runs, last=c)
            except TooWide:
                self._ending[c] = None
        return self._ending[c]

    def _prepared(
        self, unary: Sequence[FloatArray], coefficients: FloatArray, weights: FloatArray | None
    ) -> tuple[list[FloatArray], Products]:
        """What each variable is worth by itself, and what each product of two is."""
        own = [*unary, *(np.zeros(size) for size in self._sizes[self._classes :])]
        products: Products = {}
        self._weights = np.zeros(0) if weights is None else weights
        self._tables.add_own(own, self._weights)
        for value, scale, (a, b) in zip(coefficients.tolist(), self._scales, self._pairs, strict=True):
            if a == b:
                own[a] = own[a] + value * scale * self._values[a] ** 2
            else:
                products[a, b] = products.get((a, b), 0.0) + value * scale
        return own, products

    def _messages(
        self, steps: Sequence[Step], own: Sequence[FloatArray], products: Products
    ) -> list[FloatArray]:
        """What each step leaves for its neighbours."""
        messages: list[FloatArray] = []
        for k, step in enumerate(steps):
            table = self._gathered(steps, k, messages, (own, products))
            if step.relation is None:
                messages.append(self._maximised(step, table, products))
            else:
                messages.append(self._determined(step, table))
        return messages

    def _gathered(
        self,
        steps: Sequence[Step],
        place: int,
        tables: list[FloatArray],
        worth: tuple[Sequence[FloatArray], Products],
    ) -> FloatArray:
        """All that depends on a step's variable and its tabled neighbours, the variable's dimension last."""
        step, (own, products) = steps[place], worth
        scope = (*step.tabled, step.variable)
        total = own[step.variable].reshape([1] * len(step.tabled) + [-1])
        for k in step.messages:
            earlier = steps[k].scope
            table = tables[k].transpose([earlier.index(c) for c in scope if c in earlier])
            total = total + table.reshape([self._sizes[c] if c in earlier else 1 for c in scope])
        for other in step.coupled:
            if other in step.tabled:
                slope = _coefficient(step.variable, other, products) * self._values[other]
                shape = [-1 if c == other else 1 for c in step.tabled]
                total = total + slope.reshape(shape)[..., None] * self._values[step.variable]
                looked = self._tables.worth((other, step.variable), self._weights, slice(None), slice(None))
                if looked is not None:
                    total = total + looked.reshape([*shape, self._sizes[step.variable]])
        return total

    def _maximised(self, step: Step, table: FloatArray, products: Products) -> FloatArray:
        """The maximum over the variable, ``(tabled..., free...)``."""
        if not step.free:
            return np.asarray(table.max(-1))
        values = self._values[step.variable]
        slopes = [_coefficient(step.variable, c, products) * self._values[c] for c in step.free]
        base = np.zeros(1)
        for part in slopes[:-1]:
            base = np.add.outer(base, part).ravel()
        rows = np.ascontiguousarray(table.reshape(-1, len(values)))
        out = np.empty((len(rows), len(base), len(slopes[-1])))
        ends = self._tables.ends(step.variable, step.free)
        if ends is None:
            envelope_maxima(rows, values, base, slopes[-1], out)
        else:
            run_maxima(rows, values, base, slopes[-1], (ends, *self._run_worth(step, ends)), out)
        return out.reshape([*table.shape[:-1], *(self._sizes[c] for c in step.free)])

    def _run_worth(self, step: Step, ends: IntArray) -> tuple[FloatArray, FloatArray]:
        """What tables with free neighbours are worth in each run: with all but the last of them, and with the last."""
        parts = []
        for other in step.free:
            looked = self._tables.worth((step.variable, other), self._weights, ends - 1, slice(None))
            parts.append(np.zeros((len(ends), self._sizes[other])) if looked is None else looked)
        base = np.zeros((len(ends), 1))
        for part in parts[:-1]:
            base = (base[:, :, None] + part[:, None, :]).reshape(len(ends), -1)
        return base, np.ascontiguousarray(parts[-1])

    def _determined(self, step: Step, table: FloatArray) -> FloatArray:
        """The variable's value looked up from the other two of its relation; ``-inf`` where there is none."""
        assert step.relation is not None
        place = self._lookups[step.relation][step.variable]
        others = sorted(step.relation.variables - {step.variable})
        place = place.reshape([self._sizes[c] if c in others else 1 for c in step.tabled])
        full = [self._sizes[c] for c in step.tabled]
        looked = np.take_along_axis(
            np.broadcast_to(table, [*full, table.shape[-1]]),
            np.broadcast_to(place, full)[..., None].clip(min=0),
            -1,
        )[..., 0]
        return np.where(place >= 0, looked, -np.inf)

    def _backtrack(self, tables: list[FloatArray], own: Sequence[FloatArray], products: Products) -> IntArray:
        """Choose the variables in reverse order, each given those after it."""
        index = np.zeros(len(self._sizes), np.int64)
        for step in reversed(self._steps):
            if step.relation is not None:
                others = sorted(step.relation.variables - {step.variable})
                index[step.variable] = self._lookups[step.relation][step.variable][tuple(index[others])]
                continue
            values = own[step.variable].copy()
            for k in step.messages:
                earlier = self._steps[k].scope
                values += tables[k][tuple(slice(None) if c == step.variable else index[c] for c in earlier)]
            for other in step.coupled:
                slope = _coefficient(step.variable, other, products) * self._values[other][index[other]]
                values += slope * self._values[step.variable]
                at = index[[other]]
                looked = self._tables.worth((other, step.variable), self._weights, at, slice(None))
                if looked is not None:
                    values += looked[0]
            index[step.variable] = int(values.argmax())
        return np.asarray([self._values[c][index[c]] for c in range(self._classes)], np.int64)


def _coefficient(a: int, b: int, products: Products) -> float:
    return products.get((min(a, b), max(a, b)), 0.0)
