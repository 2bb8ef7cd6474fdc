"""The pruning problem as a user states it: a graph, what its units are worth, and what may be spent."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import lru_cache
from importlib.metadata import entry_points
from typing import Protocol, runtime_checkable

import numpy as np

from qcqp_prune.errors import (
    InvalidBudgetError,
    InvalidOptionError,
    InvalidScoreError,
    NothingToPruneError,
)
from qcqp_prune.graph.channels import BoolArray, ChannelGraph, IntArray
from qcqp_prune.program.forms import PairwiseForm, UseForm
from qcqp_prune.program.infeasible import infeasible, remedy

RESOURCE_ENTRY_POINTS = "qcqp_prune.resources"


@runtime_checkable
class Resource(Protocol):
    """Something that a network uses up, counted exactly.

    A resource may also have ``measure(module, example_inputs) -> int``, an independent count on a real network, and
    ``on_request = True``: then, where it is registered, it is only counted where a budget names it.
    """

    name: str
    unit: str

    def form(self, graph: ChannelGraph) -> UseForm:
        """The use as an integer form in the kept counts of the graph's groups, or the maximum of several."""


BudgetValue = int | float | str
Budgets = BudgetValue | Mapping[str, BudgetValue]


@dataclass(frozen=True)
class Budget:
    """At most ``at_most`` units of a resource, or at most the share ``fraction`` of what the dense network uses.

    A band also has a lower end, ``at_least`` units or ``least_fraction``.
    """

    resource: str
    at_most: int | None = None
    fraction: Fraction | None = None
    at_least: int | None = None
    least_fraction: Fraction | None = None

    def limit(self, dense: int) -> int:
        """The largest integer use that meets the budget."""
        return self.at_most if self.at_most is not None else math.floor(Fraction(self.fraction or 0) * dense)

    def least(self, dense: int) -> int | None:
        """The smallest integer use in the band, None where there is no lower end."""
        if self.at_least is not None or self.least_fraction is None:
            return self.at_least
        return math.ceil(self.least_fraction * dense)


@dataclass(frozen=True, eq=False)
class BudgetRow:
    """A resource with its exact form, and its limit where there is one.

    Attributes:
        dense, smallest: use of the whole network, and the least that any allowed selection reaches.
        limit: largest allowed use, None where the resource is only reported.
        least: smallest allowed use, None where there is none.
    """

    resource: str
    unit: str
    form: UseForm
    dense: int
    smallest: int
    limit: int | None = None
    least: int | None = None


@dataclass(frozen=True, eq=False)
class PruningProblem:
    """Maximise ``objective`` over the graph's units so that each budget is met.

    Build it with ``PruningProblem.build``. Source: Jeong et al., "Optimal channel selection with discrete QCQP"
    (AISTATS 2022), eq. 2.

    Attributes:
        graph: the channel graph.
        objective: what kept units are worth.
        rows: every known resource, budgeted or only reported.
    """

    graph: ChannelGraph
    objective: PairwiseForm
    rows: tuple[BudgetRow, ...]

    @classmethod
    def build(
        cls,
        graph: ChannelGraph,
        objective: PairwiseForm,
        budgets: Budgets,
        *,
        resources: Sequence[Resource] = (),
    ) -> PruningProblem:
        """State a problem and check that it can be solved at all.

        Args:
            graph: from ``trace``.
            objective: from an importance, over the graph's units.
            budgets: ``"50%"`` or ``300_000_000`` for MACs, or a mapping such as ``{"macs": "50%", "params": "2M"}``.
                Percentages and floats up to 1 are shares of the dense network; suffixes k, M, G and, for bytes,
                kB, MB, GB are decimal. ``"49.8%..50%"`` also asks that at least so much is used.
            resources: further resources, usable by name in ``budgets``.

        Raises:
            InvalidBudgetError: a budget cannot be read, is not positive, is above 100 %, or its resource is unknown.
            InvalidScoreError: the objective is not over this graph's units.
            NothingToPruneError: every unit is frozen.
            InfeasibleError: a budget is below the smallest attainable use.
        """
        _require_objective(objective, graph.unit_count)
        if graph.prunable_count == 0:
            reasons = sorted({g.frozen_reason or "" for g in graph.groups})
            raise NothingToPruneError(
                f"no layer of {graph.model} can be pruned ({'; '.join(reasons) or 'it has no layer with a weight'}): "
                f"{remedy(reasons)}"
            )
        parsed = {b.resource: b for b in parse_budgets(budgets, all_resources(resources))}
        known = counted_resources(resources, parsed)
        counts = least_counts(graph)
        rows = []
        for name, resource in known.items():
            form = resource.form(graph)
            _require_monotone(name, form)
            dense = form.evaluate([g.width for g in graph.groups])
            row = BudgetRow(name, resource.unit, form, dense, form.evaluate(counts))
            rows.append(_limited(row, parsed[name]) if name in parsed else row)
        problem = cls(graph, objective, tuple(rows))
        problem.require_feasible()
        return problem

    def with_objective(self, objective: PairwiseForm) -> PruningProblem:
        """The same budgets and another objective.

        Raises:
            InvalidScoreError: the objective is not over this graph's units.
        """
        _require_objective(objective, self.graph.unit_count)
        return replace(self, objective=objective)

    @property
    def budgeted(self) -> tuple[BudgetRow, ...]:
        """The rows that have a limit."""
        return tuple(r for r in self.rows if r.limit is not None)

    @property
    def limits(self) -> dict[str, int]:
        """By resource, the upper end of its budget."""
        return {row.resource: row.limit for row in self.rows if row.limit is not None}

    def counts(self, mask: BoolArray) -> IntArray:
        """Kept units of each group, ``(group_count,)``."""
        return np.bincount(self.graph.group_of_unit[mask], minlength=len(self.graph.groups)).astype(np.int64)

    def usage(self, mask: BoolArray) -> dict[str, int]:
        """Exact use of every known resource at a 0/1 mask over all units."""
        counts = self.counts(mask)
        return {row.resource: row.form.evaluate(counts) for row in self.rows}

    def require_feasible(self) -> None:
        """Raise ``InfeasibleError``, with the floors that cause it, where the least allowed counts exceed a budget."""
        short = [r for r in self.budgeted if r.limit is not None and r.limit < r.smallest]
        if short:
            raise infeasible(self.graph, short, least_counts)


@lru_cache(maxsize=1)
def known_resources() -> dict[str, Resource]:
    """The resources registered under the entry points ``qcqp_prune.resources``, ours and third parties' alike."""
    points = sorted(entry_points(group=RESOURCE_ENTRY_POINTS), key=lambda point: point.name)
    loaded = [point.load()() for point in points]
    return {resource.name: resource for resource in loaded}


def all_resources(further: Sequence[Resource] = ()) -> dict[str, Resource]:
    """What a budget may name: the registered resources and further ones, which win where names are equal."""
    return {r.name: r for r in (*known_resources().values(), *further)}


def counted_resources(further: Sequence[Resource] = (), named: Iterable[str] = ()) -> dict[str, Resource]:
    """What is counted: the above without what is registered for requests only, unless a budget names it."""
    given, wanted = {r.name for r in further}, set(named)
    return {
        name: r
        for name, r in all_resources(further).items()
        if name in given or name in wanted or not getattr(r, "on_request", False)
    }


def least_counts(graph: ChannelGraph) -> list[int]:
    """The least kept count of each group that ties, limits and links leave: every resource is smallest there."""
    return [a[0] for a in allowed_counts(graph)]


def allowed_counts(graph: ChannelGraph) -> list[list[int]]:
    """The kept counts that each group may have, ascending; tied groups share those that suit them all.

    Links and blocks cut off counts that no selection has: kept parts need wholes, and kept wholes need parts; what lies
    in a block needs the block.

    Raises:
        InvalidOptionError: tied groups have no count in common, or unlike widths.
    """
    shared: dict[str, set[int]] = {}
    widths: dict[str, int] = {}
    for group in graph.groups:
        if group.tie is not None:
            if widths.setdefault(group.tie, group.width) != group.width:
                raise InvalidOptionError(
                    f"{group.id} has {group.width} units and is tied to groups of {widths[group.tie]}: groups of one "
                    "tie are of one width, mend the graph"
                )
            shared[group.tie] = shared.get(group.tie, set(group.counts())) & set(group.counts())
            if not shared[group.tie]:
                raise InvalidOptionError(
                    f"{group.id} must keep as many units as {group.tie}, and no count suits both: change round_to or "
                    "min_keep for one of them"
                )
    allowed = [sorted(shared[g.tie]) if g.tie is not None else g.counts() for g in graph.groups]
    if len(graph.needs):
        allowed = graph.needs.settled(
            allowed, tie_classes([g.tie or f"group {k}" for k, g in enumerate(graph.groups)])
        )
        if not all(allowed):
            empty = graph.groups[[len(a) for a in allowed].index(0)].id
            raise InvalidOptionError(
                f"no count of {empty} suits its block: change round_to or min_keep for it"
            )
    return _linked(graph, allowed) if graph.count_links else allowed


def tie_classes(names: Sequence[str]) -> list[int]:
    """Equal names as equal numbers, from 0 in order of appearance."""
    order: dict[str, int] = {}
    return [order.setdefault(name, len(order)) for name in names]


def _linked(graph: ChannelGraph, allowed: list[list[int]]) -> list[list[int]]:
    """Allowed counts raised until those of linked groups suit each other."""
    single = Counter(link.whole for link in graph.count_links)
    covered = {
        g: len(np.unique(graph.links.heads[graph.group_of_unit[graph.links.heads] == g])) for g in single
    }
    changed = True
    while changed:
        changed = False
        for link in graph.count_links:
            needs = [(link.whole, link.least_whole(allowed[link.part][0]))]
            if single[link.whole] == 1 and not graph.groups[link.whole].stays:
                free = graph.groups[link.whole].width - covered[link.whole]
                needs.append((link.part, math.ceil((allowed[link.whole][0] - free) / link.spread)))
            for group, least in needs:
                if allowed[group][0] < least:
                    kept = [n for n in allowed[group] if n >= least]
                    for other, counts in enumerate(allowed):
                        tie = graph.groups[other].tie
                        if other == group or (tie is not None and tie == graph.groups[group].tie):
                            allowed[other] = [n for n in counts if n in kept]
                    if not all(allowed):
                        raise InvalidOptionError(
                            f"no count of {graph.groups[group].id} suits the groups that it is linked with: change "
                            "round_to or min_keep for one of them"
                        )
                    changed = True
    return allowed


def parse_budgets(budgets: Budgets, known: Mapping[str, Resource]) -> list[Budget]:
    """Read what the user wrote; see ``PruningProblem.build``."""
    if not isinstance(budgets, Mapping):
        budgets = {"macs": budgets}
    if not budgets:
        raise InvalidBudgetError('no budget given: ask for something such as {"macs": "50%"}')
    for name in budgets:
        if name not in known:
            raise InvalidBudgetError(
                f"unknown resource {name!r} in budgets: choose from {', '.join(sorted(known))}"
            )
    return [_parse_band(name, value) for name, value in budgets.items()]


def _limited(row: BudgetRow, budget: Budget) -> BudgetRow:
    """A row with its limits in whole units."""
    limit, least = budget.limit(row.dense), budget.least(row.dense)
    if least is None:
        return replace(row, limit=limit)
    if len(row.form.parts) > 1:
        raise InvalidBudgetError(
            f"{row.resource} is the largest of several steps, so it takes no lower end: give an upper one only"
        )
    if least > (most := min(limit, row.dense)):
        # Rounding to whole units moves the ends apart by one at most.
        advice = "swap its ends" if least > limit + 1 else "widen the band"
        raise InvalidBudgetError(
            f"no use of {row.resource} lies between {least:,} and {most:,} {row.unit}: {advice}"
        )
    return replace(row, limit=limit, least=least)


def _parse_band(name: str, value: BudgetValue) -> Budget:
    """A budget, or two of them with ``..`` between."""
    if not isinstance(value, str) or ".." not in value:
        return _parse_budget(name, value)
    low, _, high = value.partition("..")
    least, most = _parse_budget(name, low), _parse_budget(name, high)
    return replace(most, at_least=least.at_most, least_fraction=least.fraction)


_NUMBER = re.compile(r"\s*([0-9][0-9_,]*\.?[0-9]*(?:[eE][+-]?[0-9]+)?|\.[0-9]+)\s*(%|[kMG]?B?)\s*")
_SCALE = {"": 1, "k": 10**3, "M": 10**6, "G": 10**9}


def _parse_budget(name: str, value: BudgetValue) -> Budget:
    hint = (
        'give a positive integer, a percentage such as "50%", a share such as 0.5, or a number such as "300M"'
    )
    if isinstance(value, bool) or not isinstance(value, int | float | str | np.integer | np.floating):
        raise InvalidBudgetError(f"budget {value!r} for {name} is not a number: {hint}")
    if isinstance(value, str):
        match = _NUMBER.fullmatch(value)
        if not match:
            raise InvalidBudgetError(f"budget {value!r} for {name} cannot be read: {hint}")
        number = Fraction(match[1].replace("_", "").replace(",", ""))
        is_share = match[2] == "%"
        # "0.5" means what 0.5 means: a command line knows texts only.
        is_plain_share = not match[2] and 0 < number <= 1 and not match[1].isdigit()
        amount = number / 100 if is_share else number * _SCALE[match[2].removesuffix("B")]
        if not match[2] and number.denominator != 1 and not is_plain_share:
            raise InvalidBudgetError(
                f"budget {value!r} for {name} is neither a share up to 1 nor a whole amount: {hint}"
            )
        is_share = is_share or is_plain_share
    else:
        if not math.isfinite(value):
            raise InvalidBudgetError(f"budget {value!r} for {name} is not finite: {hint}")
        is_share = isinstance(value, float | np.floating) and 0 < value <= 1
        amount = Fraction(str(float(value))) if is_share else Fraction(value)
        if amount.denominator != 1 and not is_share:
            raise InvalidBudgetError(
                f"budget {value!r} for {name} is neither a share up to 1 nor a whole amount: {hint}"
            )
    if amount <= 0:
        raise InvalidBudgetError(f"budget {value!r} for {name} is not positive: {hint}")
    if is_share:
        if amount > 1:
            raise InvalidBudgetError(
                f"budget {value!r} for {name} is above 100 % of the dense network: {hint}"
            )
        return Budget(name, fraction=amount)
    return Budget(name, at_most=math.floor(amount))


def _require_objective(objective: PairwiseForm, count: int) -> None:
    if not isinstance(objective, PairwiseForm):
        raise InvalidScoreError(
            f"the objective is a {type(objective).__name__}: give the PairwiseForm that an importance returns"
        )
    if objective.unary.shape != (count,):
        raise InvalidScoreError(
            f"the objective has {objective.unary.shape} scores, the graph {count} units: "
            "compute the importance on this graph"
        )
    for term in objective.pairs:
        for units in (term.rows, term.cols):
            if len(units) and not (int(units.min()) >= 0 and int(units.max()) < count):
                raise InvalidScoreError(
                    f"a pair term names the units {int(units.min())} to {int(units.max())}, the graph has {count}, "
                    "numbered from 0: compute the importance on this graph"
                )


def _require_monotone(name: str, form: UseForm) -> None:
    if any((part.linear < 0).any() or (part.coefs < 0).any() for part in form.parts):
        raise InvalidBudgetError(
            f"resource {name!r} has a negative coefficient, so keeping more could cost less: "
            "a resource must be a non-negative form of the kept counts"
        )
