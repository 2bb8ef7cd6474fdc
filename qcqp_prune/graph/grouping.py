"""From labels to units and groups: what lives and dies together, and what is alike."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase

import numpy as np

from qcqp_prune.errors import InvalidOptionError
from qcqp_prune.graph.axes import Axes, LabelTable
from qcqp_prune.graph.channels import BoolArray, Group, IntArray
from qcqp_prune.graph.links import Links
from qcqp_prune.graph.sharing import is_whole, pass_on, settle, unit_links

Amount = int | float | Mapping[str, int | float]
"""A number of units, or a share of them where it is a float up to 1; or one for each layer glob."""


@dataclass(frozen=True)
class NamedLayer:
    """What grouping needs to know of a layer: its name, the labels of its two sides, and whether it has a weight."""

    name: str
    in_labels: IntArray
    out_labels: IntArray
    has_weight: bool = True


@dataclass
class Grouping:
    """The result: groups, and the flat unit index of each class of labels.

    Attributes:
        groups: in order of first appearance.
        unit_of_class: ``{class: flat unit index}``.
        reasons: for each class that stays why.
        links: units that are kept exactly when a part of theirs is.
    """

    groups: list[Group]
    unit_of_class: dict[int, int]
    table: LabelTable
    reasons: Mapping[int, str]
    links: Links = field(init=False)
    _lookup: IntArray = field(init=False)
    _frozen: BoolArray = field(init=False)

    def __post_init__(self) -> None:
        classes = self.table.classes()
        self._lookup = np.full(int(classes.max(initial=-1)) + 1, -1, np.int64)
        for c, unit in self.unit_of_class.items():
            self._lookup[c] = unit
        self.links = unit_links(self.table, self.unit_of_class)
        frozen = [g.frozen_reason is not None for g in self.groups]
        self._frozen = np.repeat(np.asarray(frozen, np.bool_), [g.width for g in self.groups])

    def units(self, labels: IntArray) -> IntArray:
        """Flat unit index of each position; -1 for positions that belong to no unit."""
        return self._lookup[self.table.classes()[labels]]

    def is_kept(self, c: int) -> bool:
        """Whether a class is kept by every selection."""
        unit = self.unit_of_class.get(c)
        return c in self.reasons if unit is None else bool(self._frozen[unit])


def group_units(
    table: LabelTable, layers: list[NamedLayer], tensors: Mapping[str, Axes], limits: Limits
) -> Grouping:
    """Number the units and gather like ones into groups.

    Units are alike when they occupy the same dimensions equally often, within the same runs: then every resource
    count depends on how many of them are kept, not on which. Runs of a grouped convolution or group norm that are
    built alike are tied to keep equally many; where they are not alike, position ``j`` of every run is made one unit.
    """
    while True:
        settle(table)
        draft = _Draft(table, layers, tensors)
        if not _tie_runs(table, draft):
            return draft.finish(limits)


class _Draft:
    """One attempt at grouping, with the labels as merged and frozen so far."""

    def __init__(self, table: LabelTable, layers: list[NamedLayer], tensors: Mapping[str, Axes]) -> None:
        self.table, self.layers = table, layers
        self.classes = table.classes()
        self.reasons = table.frozen_reasons()
        self.ties: dict[int, int] = {}
        sides = [labels for layer in layers for labels in (layer.out_labels, layer.in_labels)]
        wholes = is_whole(table)
        active = self._present(sides) | wholes
        dims = [labels for axes in tensors.values() for labels in axes if labels is not None]
        dims = [d for d in dims if active[self.classes[d]].any()]
        numbered = self._present([*sides, *dims])
        unmade = numbered & ~self._present([x.out_labels for x in layers]) & ~wholes
        for c in np.flatnonzero(unmade).tolist():
            self.reasons.setdefault(c, "no layer makes it")
        pass_on(self.reasons, table)
        self.parts = [p for p in table.nonempty if numbered[self.classes[p]].all()]
        # Which channels of a sum remain is for its operands to say: only what must be is asked of them.
        self.runs = [
            r
            for r in table.runs
            if numbered[self.classes[r.labels]].all()
            and (r.required or not wholes[self.classes[r.labels]].any())
        ]
        self._number(sides, dims)

    def _present(self, dims: list[IntArray]) -> BoolArray:
        """Which classes occur in some of the dimensions, ``(classes,) bool``."""
        present = np.zeros(int(self.classes.max(initial=-1)) + 1, np.bool_)
        for labels in dims:
            present[self.classes[labels]] = True
        return present

    def _number(self, sides: list[IntArray], dims: list[IntArray]) -> None:
        """Groups by signature: the multiset of (place, positions in it) of each class."""
        split = [part for run in self.runs for part in run.labels.reshape(run.count, -1)]
        places = [*sides, *dims, *self.parts, *split]
        unique = {self.classes[p].tobytes(): p for p in places}
        signature = _signatures([self.classes[labels] for labels in unique.values()])
        members: dict[tuple[bytes, str | None], list[int]] = {}
        for c in _in_order([self.classes[labels] for labels in (*sides, *dims)]):
            members.setdefault((signature[c], self.reasons.get(c)), []).append(c)
        self.members = list(members.values())
        self.group_of = np.full(int(self.classes.max(initial=-1)) + 1, -1, np.int64)
        for g, classes in enumerate(self.members):
            self.group_of[classes] = g

    def composition(self, labels: IntArray) -> list[tuple[int, int]]:
        """Groups along a dimension in order of first appearance, with positions for each unit."""
        groups, first, counts = np.unique(
            self.group_of[self.classes[labels]], return_index=True, return_counts=True
        )
        shares = [(int(groups[k]), int(counts[k])) for k in np.argsort(first)]
        return [(g, n // len(self.members[g]) if n >= len(self.members[g]) else 0) for g, n in shares]

    def tie(self, groups: list[int]) -> None:
        """Ask that these groups, and all that are tied to one of them, keep equally many units."""
        first, *others = sorted({self.root(g) for g in groups})
        for g in others:
            self.ties[g] = first

    def root(self, group: int) -> int:
        """The first of the groups that a group is tied to, itself where it is tied to none."""
        path = []
        while group in self.ties:
            path.append(group)
            group = self.ties[group]
        for g in path:
            self.ties[g] = group
        return group

    def reason(self, group: int) -> str | None:
        return self.reasons.get(self.members[group][0])

    def finish(self, limits: Limits) -> Grouping:
        """Names, ties, and limits on counts."""
        names = self._names()
        groups = []
        tie_sizes: dict[int, int] = {}
        for g in range(len(self.members)):
            root = self.root(g)
            tie_sizes[root] = tie_sizes.get(root, 0) + 1
        for g, classes in enumerate(self.members):
            root = self.root(g)
            tie = names[root] if tie_sizes[root] > 1 else None
            groups.append(Group(names[g], len(classes), frozen_reason=self.reason(g), min_keep=0, tie=tie))
        limits.apply(groups, self, tie_sizes)
        order = [c for classes in self.members for c in classes]
        return Grouping(groups, {c: unit for unit, c in enumerate(order)}, self.table, self.reasons)

    def part_groups(self) -> dict[int, set[int]]:
        """For each group of wholes the groups of their parts; those of parts come before those of their wholes."""
        found: dict[int, set[int]] = {}
        links = unit_links(self.table, {c: c for classes in self.members for c in classes})
        for level in links.levels or ():
            for k in level.tolist():
                whole, part = (int(self.group_of[c]) for c in (links.wholes[k], links.parts[k]))
                found.setdefault(whole, set()).add(part)
        return found

    def _names(self) -> list[str]:
        """The first layer that makes a group's units, or reads them; numbered where several share it."""
        first: dict[int, str] = {}
        for layer in self.layers:
            for labels, suffix in ((layer.out_labels, ""), (layer.in_labels, ".in")):
                for g in np.unique(self.group_of[self.classes[labels]]).tolist():
                    first.setdefault(g, layer.name + suffix)
        seen: dict[str, int] = {}
        names = []
        for g in range(len(self.members)):
            base = first.get(g, "constant")
            seen[base] = seen.get(base, 0) + 1
            names.append(base if seen[base] == 1 else f"{base}#{seen[base]}")
        return names


def _signatures(places: list[IntArray]) -> dict[int, bytes]:
    """For each class where it stands, and how often there: equal for classes that stand in the same places.

    Args:
        places: classes of the positions of each place.
    """
    found = [np.unique(classes, return_counts=True) for classes in places]
    if not found:
        return {}
    classes = np.concatenate([some for some, _ in found])
    place = np.repeat(np.arange(len(found)), [len(some) for some, _ in found])
    order = np.argsort(classes, kind="stable")
    rows = np.stack([place, np.concatenate([counts for _, counts in found])], axis=1)[order]
    members, starts = np.unique(classes[order], return_index=True)
    ends = [*starts[1:].tolist(), len(rows)]
    return {c: rows[a:b].tobytes() for c, a, b in zip(members.tolist(), starts.tolist(), ends, strict=True)}


def _in_order(dims: list[IntArray]) -> list[int]:
    """The classes of some dimensions, each once, in the order in which they appear."""
    classes, first = np.unique(np.concatenate([*dims, np.zeros(0, np.int64)]), return_index=True)
    found: list[int] = classes[np.argsort(first)].tolist()
    return found


def _tie_runs(table: LabelTable, draft: _Draft) -> bool:
    """Tie the groups of each dimension that is divided into runs; True where labels changed and it must start over."""
    changed = False
    for run in sorted(draft.runs, key=lambda r: not r.required):
        parts = run.labels.reshape(run.count, -1)
        compositions = [draft.composition(part) for part in parts]
        if not _alike(draft, compositions):
            if run.required:
                table.merge_columns(parts)
                changed = True
            continue
        columns = [[g for g, _ in column] for column in zip(*compositions, strict=True)]
        if any(_partly_frozen(draft, groups) for groups in columns):
            if run.required:
                table.freeze(run.labels, f"{run.reason}, and some of them are kept for another reason")
                changed = True
            continue
        if not changed:
            for groups in columns:
                draft.tie(groups)
    return changed


def _partly_frozen(draft: _Draft, groups: list[int]) -> bool:
    reasons = [draft.reason(g) for g in groups]
    return None in reasons and any(reason is not None for reason in reasons)


def _alike(draft: _Draft, compositions: list[list[tuple[int, int]]]) -> bool:
    shapes = [[(len(draft.members[g]), n) for g, n in composition] for composition in compositions]
    return all(shape == shapes[0] and all(n > 0 for _, n in shape) for shape in shapes)


@dataclass(frozen=True)
class Limits:
    """What the user asks of counts.

    Attributes:
        round_to: kept channels of a layer are a multiple of this, or all; a number, or one for each layer glob.
        min_keep: least kept channels of a layer: a number, a share (float up to 1), or one for each layer glob.
    """

    round_to: Amount = 1
    min_keep: Amount = 1

    def __post_init__(self) -> None:
        for name, amount in (("round_to", self.round_to), ("min_keep", self.min_keep)):
            for value in amount.values() if isinstance(amount, Mapping) else [amount]:
                share = name == "min_keep" and isinstance(value, float) and 0 <= value <= 1
                whole = (
                    isinstance(value, int) and not isinstance(value, bool) and value >= (name == "round_to")
                )
                if not (share or whole):
                    kind = (
                        "a positive integer"
                        if name == "round_to"
                        else "a number of channels or a share up to 1.0"
                    )
                    raise InvalidOptionError(
                        f"{name}={value!r}: give {kind}, or a mapping from layer globs to such"
                    )

    def globs(self) -> list[str]:
        """Every layer glob used, to be checked against the layers that exist."""
        return [g for amount in (self.round_to, self.min_keep) if isinstance(amount, Mapping) for g in amount]

    def apply(self, groups: list[Group], draft: _Draft, tie_sizes: Mapping[int, int]) -> None:
        """Set ``multiple_of``, ``min_keep`` and the frozen reason of each group, in place."""
        for layer in draft.layers:
            if not layer.has_weight:  # a product counts heads, not channels
                continue
            composition = draft.composition(layer.out_labels)
            total = sum(groups[g].width * n for g, n in composition)
            for g, share in composition:
                group = groups[g]
                asked = _least(_of_layer(self.min_keep, layer.name, 1), group.width, total)
                step = _of_layer(self.round_to, layer.name, 1)
                step = int(step) // math.gcd(int(step), share * tie_sizes[draft.root(g)])
                groups[g] = replace(
                    group, min_keep=max(group.min_keep, asked), multiple_of=math.lcm(group.multiple_of, step)
                )
        for whole, parts in draft.part_groups().items():
            step = math.lcm(groups[whole].multiple_of, *(groups[p].multiple_of for p in parts))
            groups[whole] = replace(groups[whole], multiple_of=step)
        self._keep_nonempty(groups, draft)
        for g, group in enumerate(groups):
            if group.frozen_reason is None and len(group.counts()) == 1:
                few = f"min_keep or round_to leaves none of {group.width} free"
                groups[g] = replace(group, frozen_reason="its last channel" if group.width == 1 else few)

    @staticmethod
    def _keep_nonempty(groups: list[Group], draft: _Draft) -> None:
        """Something is left of every dimension: of its one group, or of the largest where it has several."""
        sides = [labels for layer in draft.layers for labels in (layer.out_labels, layer.in_labels)]
        for labels in [*sides, *draft.parts]:
            present = [g for g, _ in draft.composition(labels)]
            if not any(groups[g].min_keep or groups[g].frozen_reason for g in present):
                g = max(present, key=lambda k: groups[k].width)
                groups[g] = replace(groups[g], min_keep=1)


def _of_layer(amount: Amount, name: str, default: int) -> int | float:
    """The amount that applies to a layer: the last glob that matches it wins."""
    if not isinstance(amount, Mapping):
        return amount
    matching = [value for glob, value in amount.items() if matches(name, glob)]
    return matching[-1] if matching else default


def _least(value: int | float, width: int, total: int) -> int:
    """A layer's least count as a group's: in proportion where the group is only part of the layer."""
    if isinstance(value, float):
        return min(math.ceil(value * width), width)
    if total == width:
        return min(value, width)
    return 0 if value <= 1 else min(math.ceil(value * width / total), width)


def matches(name: str, pattern: str) -> bool:
    """Whether a layer is meant by a name or glob: itself, a later call, or anything inside; ``""`` means all."""
    if not pattern:
        return True
    base = name.split("@")[0]
    return any(fnmatchcase(text, pattern) for text in (name, base)) or any(
        fnmatchcase(base[:cut], pattern) for cut in _prefixes(base)
    )


def _prefixes(name: str) -> Iterable[int]:
    return (i for i, character in enumerate(name) if character == ".")
