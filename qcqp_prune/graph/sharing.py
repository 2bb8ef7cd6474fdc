"""Free sharing: a sum has channels of its own, each there as soon as one of its operands writes it.

During the walk every addition that may be shared freely is recorded as a ``Sum``: new labels for the result, and the
labels of both operands as their parts. Later ties can contradict that: a sum that is multiplied by its own operand, a
weight that is used before and after it. Such sums are merged after all, as under strict sharing.

References:
    Jeong et al., "Optimal channel selection with discrete QCQP" (AISTATS 2022), section 3: ``u <= v <= sum u``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from qcqp_prune.graph.axes import LabelTable, Sum
from qcqp_prune.graph.channels import BoolArray, IntArray
from qcqp_prune.graph.links import Links

UNEVEN_RUNS = "its channels fall into groups that must keep equally many"
TIED = "its channels are tied to channels that other layers write"
CIRCULAR = "one of its operands is tied to the sum itself"


def settle(table: LabelTable) -> None:
    """Merge the sums that cannot be shared freely, until what is left contradicts nothing."""
    while True:
        classes = table.classes()
        uneven = _in_runs(table, classes)
        found = [(s, UNEVEN_RUNS) for s in free(table) if uneven[classes[s.out]].any()]
        found = found or [(s, CIRCULAR) for s in _circular(table, classes)]
        found = found or [(s, TIED) for s in _tied(table, classes)]
        changed = bool(found)
        for one, why in found:
            one.strict = why
            for part in one.parts:
                table.merge(one.out, part, why)
        for one in free(table):
            changed |= _merge_same(table, one, classes)
        if not changed:
            return


def free(table: LabelTable) -> list[Sum]:
    """The sums that are shared freely so far."""
    return [s for s in table.sums if not s.strict]


def _in_runs(table: LabelTable, classes: IntArray) -> BoolArray:
    """Which classes stand in a dimension whose runs must keep equally many, ``(classes,) bool``."""
    out = np.zeros(int(classes.max(initial=-1)) + 1, np.bool_)
    for run in table.runs:
        if run.required:
            out[classes[run.labels]] = True
    return out


def _merge_same(table: LabelTable, one: Sum, classes: IntArray) -> bool:
    """Where both operands came to be one unit, their sum is that unit as well."""
    first, second = (classes[part] for part in one.parts)
    same = (first == second) & (classes[one.out] != first)
    if same.any():
        table.merge(one.out[same], one.parts[0][same], "")
    return bool(same.any())


def _circular(table: LabelTable, classes: IntArray) -> list[Sum]:
    """Sums that are, directly or through others, a part of themselves."""
    wholes, parts = class_links(table)
    if not len(wholes):
        return []
    count = int(classes.max()) + 1
    ones = np.ones(len(wholes), np.int8)
    links = coo_array((ones, (wholes, parts)), shape=(count, count))
    component = connected_components(links, directed=True, connection="strong")[1]
    # A class alone in its component is circular only where it is its own operand.
    found = []
    for one in free(table):
        own, (first, second) = classes[one.out], (classes[part] for part in one.parts)
        trivial = (own == first) & (own == second)
        inside = (component[own] == component[first]) | (component[own] == component[second])
        if (inside & ~trivial).any():
            found.append(one)
    return found


def _tied(table: LabelTable, classes: IntArray) -> list[Sum]:
    """Sums of which a channel is one unit with a channel that has other operands: it may stay where its own all go.

    A grouped convolution that reads a sum ties the sum's channels to each other, a product of two sums ties both.
    """
    rows: list[IntArray] = []
    for one in free(table):
        both = np.sort(np.stack([classes[part] for part in one.parts]), axis=0)
        rows.append(np.stack([classes[one.out], *both], axis=1))
    if not rows:
        return []
    unique = np.unique(np.concatenate(rows), axis=0)
    unique = unique[(unique[:, 1] != unique[:, 0]) | (unique[:, 2] != unique[:, 0])]
    wholes, counts = np.unique(unique[:, 0], return_counts=True)
    tied = wholes[counts > 1]
    return [s for s in free(table) if np.isin(classes[s.out], tied).any()]


def class_links(table: LabelTable) -> tuple[IntArray, IntArray]:
    """Pairs ``(whole, part)`` of classes, each once, as two arrays ``(m,)``."""
    classes = table.classes()
    pairs = [np.stack([classes[s.out], classes[part]], axis=1) for s in free(table) for part in s.parts]
    if not pairs:
        return np.zeros(0, np.int64), np.zeros(0, np.int64)
    unique = np.unique(np.concatenate(pairs), axis=0)
    unique = unique[unique[:, 0] != unique[:, 1]]
    return unique[:, 0], unique[:, 1]


def is_whole(table: LabelTable) -> BoolArray:
    """For each class whether it is a whole, ``(classes,) bool``."""
    out = np.zeros(int(table.classes().max(initial=-1)) + 1, np.bool_)
    out[class_links(table)[0]] = True
    return out


def pass_on(reasons: dict[int, str], table: LabelTable) -> None:
    """A whole with a part that is always kept is always kept itself, for the same reason; in place."""
    wholes, parts = class_links(table)
    above: dict[int, list[int]] = {}
    for whole, part in zip(wholes.tolist(), parts.tolist(), strict=True):
        above.setdefault(part, []).append(whole)
    front = [c for c in above if c in reasons]
    while front:
        part = front.pop()
        for whole in above.get(part, ()):
            if whole not in reasons:
                reasons[whole] = reasons[part]
                front.append(whole)


def unit_links(table: LabelTable, unit_of_class: Mapping[int, int]) -> Links:
    """The links between units. A sum that no layer reads is no unit: its parts take its place."""
    wholes, parts = class_links(table)
    below: dict[int, list[int]] = {}
    for whole, part in zip(wholes.tolist(), parts.tolist(), strict=True):
        below.setdefault(whole, []).append(part)
    found: dict[int, set[int]] = {}

    def units(c: int) -> set[int]:
        if c in unit_of_class:
            return {unit_of_class[c]}
        if c not in found:
            found[c] = {u for part in below.get(c, ()) for u in units(part)}
        return found[c]

    pairs = [
        (unit_of_class[whole], unit)
        for whole, members in below.items()
        if whole in unit_of_class
        for part in members
        for unit in units(part)
    ]
    return Links.of(pairs) if pairs else Links.none()


def always_kept(one: Sum, table: LabelTable, is_kept: Callable[[int], bool]) -> tuple[int, ...]:
    """The positions of a sum that stay without any of its operands.

    Args:
        one: the sum.
        table: its labels.
        is_kept: says of a class whether no selection removes it.
    """
    classes = table.classes()
    fixed = {c: is_kept(c) for c in np.unique(classes[one.out]).tolist()}
    kept = [fixed[c] for c in classes[one.out].tolist()]
    return tuple(one.positions[kept].tolist())


def repeats(one: Sum, table: LabelTable) -> bool:
    """Whether an operand of a sum has a channel at several positions."""
    classes = table.classes()
    return any(len(np.unique(classes[side])) < len(side) for side in one.sides)
