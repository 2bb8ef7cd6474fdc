"""Layers that keep equally many units though nothing in the network asks for it.

Whoever builds a network from one number for all of its blocks, as configurations of language models do, needs that.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import replace

from qcqp_prune.graph.channels import Group
from qcqp_prune.graph.grouping import matches

Uniform = bool | str | Iterable[str]
"""False for none, True for layers whose names differ in numbers only, or globs, of which each ties what it matches."""


def tied_alike(groups: tuple[Group, ...], globs: tuple[str, ...]) -> tuple[Group, ...]:
    """Tie groups of one width of which some may go: those that one glob matches, or of names that are alike.

    Ties that are there already stay: what is tied to one of several groups is then tied to all of them.

    Args:
        groups: of a graph.
        globs: of layers; the empty one means all whose names are the same but for numbers.
    """
    alike: dict[tuple[str, int], list[int]] = {}
    for g, group in enumerate(groups):
        if group.frozen_reason is not None:
            continue
        layer = re.sub(r"(\.in)?(#\d+)?$", "", group.id)
        for glob in globs:
            if matches(layer, glob):
                alike.setdefault((glob or _without_numbers(group.id), group.width), []).append(g)
    tie = {g: group.tie for g, group in enumerate(groups) if group.tie is not None}
    for members in alike.values():
        if len(members) > 1:
            root = tie.get(members[0], groups[members[0]].id)
            old = {tie[g] for g in members if g in tie}
            joined = {*members, *(g for g, name in tie.items() if name in old)}
            tie |= dict.fromkeys(joined, root)
    return tuple(replace(group, tie=tie.get(g)) for g, group in enumerate(groups))


def _without_numbers(name: str) -> str:
    return ".".join("*" if part.isdigit() else part for part in name.split("."))
