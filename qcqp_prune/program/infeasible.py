"""Why no selection meets a budget: which floors hold the smallest use up, and what each would give back.

Every resource is a form of the kept counts that never falls when more is kept. So the least allowed counts use least
of *every* resource at once, and each budget can be judged on its own: two budgets never conflict with each other, only
with the floors.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from qcqp_prune.errors import InfeasibleError
from qcqp_prune.graph.channels import ChannelGraph, Group, IntArray

if TYPE_CHECKING:
    from qcqp_prune.program.problem import BudgetRow

SHOWN = 5
# How the extractor begins the reasons that options lead to.
IGNORED, LIMITS = "in ignored_layers", "min_keep or round_to leaves none"
REMEDIES = {
    "ignored": "take layers out of ignored_layers",
    "min_keep": "lower min_keep",
    "round_to": "lower round_to",
}

# What such a reason holds, and what then is to be done where it leaves nothing to prune.
_THAW = {
    IGNORED: REMEDIES["ignored"],
    LIMITS: "lower min_keep or round_to",
    "unless units holds": "name further kinds in units",
    "head_dim among the units": "name further kinds in units",
    "no handler": "pass a handler for the operator to trace(handlers=...)",
}


def remedy(reasons: Iterable[str]) -> str:
    """What to do about reasons that together leave nothing to prune; of options only those that cause it are named."""
    found = [text for part, text in _THAW.items() if any(part in reason for reason in reasons)]
    return ", ".join((*dict.fromkeys(found), "or choose another model" if found else "choose another model"))


@dataclass(frozen=True)
class Cause:
    """A floor that keeps the smallest use of a resource up.

    Attributes:
        kind: ``ignored`` (by ignored_layers), ``frozen`` (by the network), ``min_keep``, ``round_to``, ``tie``, or
            several joined by ``+`` where none of them gives anything back alone.
        groups: ids of the groups that it holds up.
        text: the floor in words.
        gives_back: by how much the smallest use would fall without it, all others in place, in the resource's unit.
    """

    kind: str
    groups: tuple[str, ...]
    text: str
    gives_back: int


@dataclass(frozen=True)
class Conflict:
    """A budget that cannot be met.

    Attributes:
        resource, unit: which, and in what the numbers are.
        limit: largest use asked for.
        smallest: the smallest attainable use, which is also the nearest feasible budget.
        dense: use of the whole network.
        lifted: the smallest use without anything that an option asks for: ignored_layers, min_keep, round_to.
        causes: largest contribution first.
    """

    resource: str
    unit: str
    limit: int
    smallest: int
    dense: int
    lifted: int
    causes: tuple[Cause, ...]

    @property
    def nearest_percent(self) -> float:
        """The nearest feasible budget in percent of the dense use, rounded up to two digits."""
        return math.ceil(self.smallest * 10_000 / self.dense) / 100 if self.dense else 100.0

    def __str__(self) -> str:
        """The conflict in lines, the first ``SHOWN`` causes and how many more there are."""
        head = (
            f"{self.resource}: the smallest attainable use is {self.smallest:,} of {self.dense:,} {self.unit} "
            f"({self.nearest_percent:.2f}%), the budget is {self.limit:,}"
        )
        if not self.causes:
            return f"{head}; that is with one unit of each layer, and no option holds it up"
        width = len(f"{self.causes[0].gives_back:,}")
        lines = [f"{head}; what holds it up, and what each would give back:"]
        lines += [f"  {c.gives_back:>{width},}  {c.text}" for c in self.causes[:SHOWN]]
        if len(self.causes) > SHOWN:
            lines.append(f"  and {len(self.causes) - SHOWN} more")
        if self.lifted < self.smallest:
            verdict = "which meets the budget" if self.lifted <= self.limit else "which still exceeds it"
            lines.append(f"  without ignored_layers, min_keep and round_to: {self.lifted:,}, {verdict}")
        return "\n".join(lines)


def infeasible(
    graph: ChannelGraph, rows: Sequence[BudgetRow], least: Callable[[ChannelGraph], list[int]]
) -> InfeasibleError:
    """The error for budgets below the smallest attainable use, with its causes.

    Args:
        graph: of the problem.
        rows: those whose limit is below their smallest use; at least one.
        least: gives the least kept counts of a graph's groups.
    """
    floors = _Floors(graph, least)
    conflicts = sorted(
        (floors.conflict(row) for row in rows), key=lambda c: c.smallest / max(c.limit, 1), reverse=True
    )
    first = conflicts[0]
    head = f"no selection meets the budget of {first.limit:,} {first.unit} ({first.resource})"
    if len(conflicts) > 1:
        head = f"no selection meets {len(conflicts)} of the budgets, each too small by itself"
    nearest = " and ".join(f"{c.resource} to {c.smallest:,} ({c.nearest_percent:.2f}%)" for c in conflicts)
    kinds = {part for c in conflicts for cause in c.causes for part in cause.kind.split("+")}
    remedies = [
        f"raise {nearest}, the nearest that can be met",
        *(t for k, t in REMEDIES.items() if k in kinds),
    ]
    body = "\n".join(str(c) for c in conflicts)
    return InfeasibleError(
        f"{head}\n{body}\nWhat to do: {', or '.join(remedies)}",
        resource=first.resource,
        limit=first.limit,
        smallest=first.smallest,
        causes=first.causes,
        conflicts=tuple(conflicts),
    )


_Floor = tuple[tuple[str, ...], list[Group], IntArray]
"""Kinds of floors, the groups that they hold up, and the least counts of all groups without them."""


class _Floors:
    """What holds the least counts of a graph up, floor by floor."""

    def __init__(self, graph: ChannelGraph, least: Callable[[ChannelGraph], list[int]]) -> None:
        self._graph, self._least = graph, least
        self._now = np.asarray(least(graph), np.int64)
        self._found: list[_Floor] = []
        everything = list(graph.groups)
        for members in _classes(graph.groups):
            present = [graph.groups[g] for g in members]
            kinds = [kind for kind in _LIFT if any(_lift(x, (kind,)) != x for x in present)]
            found: list[_Floor] = [((kind,), present, self._without(members, (kind,))) for kind in kinds]
            if len(kinds) > 1 and not any((counts < self._now).any() for _, _, counts in found):
                found = [(tuple(kinds), present, self._without(members, tuple(kinds)))]
            self._found += found
            for g in members:
                everything[g] = _lift(everything[g], OPTIONS)
        self._lifted = least(replace(graph, groups=tuple(everything)))

    def _without(self, members: list[int], kinds: tuple[str, ...]) -> IntArray:
        """The least counts without some floors of one class of tied groups."""
        groups = list(self._graph.groups)
        for g in members:
            groups[g] = _lift(groups[g], kinds)
        if self._graph.count_links or self._graph.blocks:  # then other groups may follow
            return np.asarray(self._least(replace(self._graph, groups=tuple(groups))), np.int64)
        counts = self._now.copy()
        counts[members] = _least([groups[g] for g in members])
        return counts

    def conflict(self, row: BudgetRow) -> Conflict:
        """Each floor's contribution to the smallest use of one resource."""
        gains = [(kinds, groups, row.smallest - row.form.evaluate(n)) for kinds, groups, n in self._found]
        causes = [_cause(kinds, groups, gain) for kinds, groups, gain in gains if gain > 0]
        return Conflict(
            row.resource,
            row.unit,
            row.limit or 0,
            row.smallest,
            row.dense,
            row.form.evaluate(self._lifted),
            tuple(sorted(causes, key=lambda cause: -cause.gives_back)),
        )


def _classes(groups: Sequence[Group]) -> list[list[int]]:
    """Indices of groups that must keep equally many, together."""
    classes: dict[str, list[int]] = {}
    for g, group in enumerate(groups):
        classes.setdefault(f"group {g}" if group.tie is None else f"tie {group.tie}", []).append(g)
    return list(classes.values())


def _least(groups: Sequence[Group]) -> list[int]:
    """The least count of each group of one class: tied groups share those that suit them all."""
    shared: dict[str, set[int]] = {}
    for group in groups:
        if group.tie is not None:
            shared[group.tie] = shared.get(group.tie, set(group.counts())) & set(group.counts())
    return [min(group.counts() if group.tie is None else shared[group.tie]) for group in groups]


_LIFT = ("ignored", "frozen", "min_keep", "round_to", "tie")
OPTIONS = ("ignored", "min_keep", "round_to")


def _lift(group: Group, kinds: tuple[str, ...]) -> Group:
    """The group without some of its floors. One unit always stays: a layer never loses all of them."""
    reason = group.frozen_reason
    is_frozen_by = None if reason is None else _frozen_by(reason)
    if "min_keep" in kinds and group.min_keep > 1:
        group = replace(group, min_keep=1)
    if "round_to" in kinds:
        group = replace(group, multiple_of=1)
    if "tie" in kinds:
        group = replace(group, tie=None)
    # Where min_keep and round_to leave no choice, the extractor freezes the group: lifting either may thaw it.
    if is_frozen_by is not None and is_frozen_by in kinds:
        group = replace(group, frozen_reason=None, min_keep=max(group.min_keep, 1))
    elif is_frozen_by == "limits" and {"min_keep", "round_to"} & set(kinds):
        group = replace(group, frozen_reason=None)
    return group


def _frozen_by(reason: str) -> str:
    if reason.startswith(IGNORED):
        return "ignored"
    return "limits" if reason.startswith(LIMITS) else "frozen"


def _cause(kinds: tuple[str, ...], groups: list[Group], gain: int) -> Cause:
    names = tuple(group.id for group in groups)
    where = names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} tied to it"
    words = {
        "ignored": groups[0].frozen_reason or "",
        "frozen": f"frozen ({groups[0].frozen_reason})",
        "min_keep": f"at least {max(group.min_keep for group in groups)} are kept (min_keep)",
        "round_to": f"kept in multiples of {max(group.multiple_of for group in groups)} (round_to)",
        "tie": "all must keep equally many",
    }
    return Cause("+".join(kinds), names, f"{where}: {' and '.join(words[kind] for kind in kinds)}", gain)
