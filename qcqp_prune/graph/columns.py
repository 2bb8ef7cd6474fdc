"""Kernel columns as units: which layers get them, and the groups, axes and links that this makes.

The *shape column* ``(j, a, b)`` of a convolution is what its filter j holds at kernel position ``(a, b)``, over all
input channels. With columns as units a filter is a whole: it exists exactly when at least one of its columns does.

References:
    Jeong et al., "Optimal channel selection with discrete QCQP" (AISTATS 2022), section 2.3, eq. 3.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import cast

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from torch import nn
from torch.fx import Node

from qcqp_prune.errors import InvalidOptionError
from qcqp_prune.graph.channels import ChannelGraph, Group, IntArray, Note
from qcqp_prune.graph.export import canonical_names
from qcqp_prune.graph.grouping import Grouping, NamedLayer
from qcqp_prune.graph.links import Links
from qcqp_prune.graph.walk import FoundLayer, Walk, has_hooks

Columns = bool | str | Iterable[str]
"""Layers whose kernel columns are units: none, all that can have them, or those that a name or glob means."""

WHERE = "columns"


@dataclass(frozen=True)
class ColumnUnits:
    """Column units of some layers, numbered after all others.

    Attributes:
        groups: one for each layer that has columns.
        axes: for the index of each such layer the unit of each of its columns, filter after filter.
        pairs: rows ``(unit of a filter, unit of a column)``, see ``Links``.
        notes: which layers have none, and why.
    """

    groups: tuple[Group, ...] = ()
    axes: Mapping[int, IntArray] = field(default_factory=dict)
    pairs: tuple[IntArray, ...] = ()
    notes: tuple[Note, ...] = ()


def read_globs(wanted: bool | str | Iterable[str], option: str) -> tuple[str, ...]:
    """An option as globs; ``("",)`` means everything that it can be asked of.

    Raises:
        InvalidOptionError: it is neither a truth value nor made of names.
    """
    if isinstance(wanted, bool):
        return ("",) if wanted else ()
    globs = [wanted] if isinstance(wanted, str) else wanted
    listed = tuple(globs) if isinstance(globs, Iterable) else (None,)
    if not all(isinstance(g, str) and g for g in listed):
        raise InvalidOptionError(
            f"{option}={wanted!r}: give True for everything that can have it, or names or globs"
        )
    return listed


def column_units(
    walk: Walk, model: nn.Module, layers: Sequence[NamedLayer], grouping: Grouping, wanted: Mapping[int, bool]
) -> ColumnUnits:
    """Give kernel columns to the layers that are asked for and can have them.

    Several layers may write one channel (a residual stream under strict sharing). It is kept exactly when one of them
    has a column for it, so each of them must have some: one that was not asked for, or whose kernel is 1 x 1, takes
    part with one column for each filter, the filter itself. Where one of them cannot, none of them gets any.

    Args:
        walk: after the walk.
        model: the traced module.
        layers: names of ``walk.layers``.
        grouping: the channel units.
        wanted: indices of the layers that are asked for; true where one is in ``ignored_layers``.
    """
    if not wanted:
        return ColumnUnits()
    hurdles = _hurdles(walk, model)
    left_out: dict[int, str] = {}
    for k, ignored in wanted.items():
        reason = "it is in ignored_layers" if ignored else hurdles[k]
        if reason is None and _positions(walk.layers[k]) == 1:
            reason = "its kernel is 1 x 1"
        if reason is not None:
            left_out[k] = reason
    per_filter: dict[int, int] = {}
    for members in _sharing(walk.layers, grouping):
        chosen = [k for k in members if k in wanted and k not in left_out]
        unable = [k for k in members if hurdles[k] is not None]
        if chosen and unable:
            why = f"its channels are also written by {layers[unable[0]].name}, and {hurdles[unable[0]]}"
            left_out.update(dict.fromkeys(chosen, why))
        elif chosen:
            per_filter.update({k: _positions(walk.layers[k]) if k in chosen else 1 for k in members})
    names = [layer.name for layer in layers]
    return replace(_numbered(walk, names, grouping, per_filter), notes=_notes(names, left_out, per_filter))


def with_columns(graph: ChannelGraph, columns: ColumnUnits) -> ChannelGraph:
    """A graph whose layers are handed over to their columns."""
    layers, axes = list(graph.layers), list(graph.axes)
    tensors = {spec.name: spec for spec in graph.tensors}
    for k, units in columns.axes.items():
        layer = layers[k]
        per_filter = len(units) // len(axes[layer.out_axis])
        layers[k] = replace(layer, columns=len(axes), macs_per_pair=layer.macs_per_pair // per_filter)
        tensors[layer.weight] = replace(tensors[layer.weight], columns=len(axes))
        axes.append(units)
    pairs = [np.stack([graph.links.wholes, graph.links.parts], axis=1), *columns.pairs]
    return replace(
        graph,
        groups=(*graph.groups, *columns.groups),
        axes=tuple(axes),
        layers=tuple(layers),
        tensors=tuple(tensors.values()),
        notes=tuple(dict.fromkeys([*graph.notes, *columns.notes])),
        links=Links.of(np.concatenate(pairs)),
    )


def _hurdles(walk: Walk, model: nn.Module) -> list[str | None]:
    """Why the kernel of each layer cannot be cut into columns; None where it can."""
    modules = dict(model.named_modules())
    tied = Counter(canonical_names(model).values())
    uses = Counter(layer.weight for layer in walk.layers)
    found: list[str | None] = []
    for layer in walk.layers:
        path = walk.module_path(layer.node)
        module = modules.get(path)
        if layer.op != "conv2d":
            found.append(f"a {layer.op} has no kernel columns")
        elif layer.segments > 1:
            found.append("it is grouped")
        elif uses[layer.weight] > 1 or tied[layer.weight] > 1:
            found.append("its weight is used more than once")
        elif type(module) is not nn.Conv2d or layer.weight != f"{path}.weight":
            found.append("its weight is not that of a plain nn.Conv2d within the model")
        elif _weight(layer).op != "placeholder" or len(_weight(layer).users) > 1:
            found.append("its weight is computed, or read elsewhere too")
        elif module.padding_mode != "zeros":
            found.append(f"its padding is {module.padding_mode}, not zeros")
        else:
            found.append("it has hooks" if has_hooks(module) else None)
    return found


def _positions(layer: FoundLayer) -> int:
    """Kernel positions of a convolution."""
    return math.prod(_weight(layer).meta["val"].shape[2:])


def _weight(layer: FoundLayer) -> Node:
    return cast(Node, layer.node.args[1])


def _sharing(found: Sequence[FoundLayer], grouping: Grouping) -> list[list[int]]:
    """Layers in sets that write the same channels, directly or through others; frozen channels do not count.

    A depthwise convolution and a product of two tensors pass on channels that others write.
    """
    frozen = np.repeat(
        [g.frozen_reason is not None for g in grouping.groups], [g.width for g in grouping.groups]
    )
    rows, cols, writers = [], [], []
    for k, layer in enumerate(found):
        outs = grouping.units(layer.out_labels)
        depthwise = layer.segments > 1 and np.isin(outs, grouping.units(layer.in_labels)).all()
        if depthwise or not layer.weight:
            continue
        writers.append(k)
        free = np.unique(outs[~frozen[outs]])
        rows.append(np.full(len(free), k, np.int64))
        cols.append(len(found) + free)
    edges = (np.concatenate([np.zeros(0, np.int64), *rows]), np.concatenate([np.zeros(0, np.int64), *cols]))
    size = len(found) + len(frozen)
    joined = coo_array((np.ones(len(edges[0]), np.int8), edges), shape=(size, size))
    component = connected_components(joined, directed=False)[1]
    sets: dict[int, list[int]] = {}
    for k in writers:
        sets.setdefault(int(component[k]), []).append(k)
    return list(sets.values())


def _numbered(
    walk: Walk, names: Sequence[str], grouping: Grouping, per_filter: Mapping[int, int]
) -> ColumnUnits:
    """Groups, axes and links of the layers that have columns, in execution order."""
    taken = {g.id for g in grouping.groups}
    start = sum(g.width for g in grouping.groups)
    groups, axes, pairs = [], {}, []
    for k in sorted(per_filter):
        filters = grouping.units(walk.layers[k].out_labels)
        width = len(filters) * per_filter[k]
        name = f"{names[k]}.columns"
        while name in taken:
            name += "#"
        taken.add(name)
        groups.append(Group(name, width, frozen_reason="its last column" if width == 1 else None))
        axes[k] = np.arange(start, start + width, dtype=np.int64)
        pairs.append(np.stack([np.repeat(filters, per_filter[k]), axes[k]], axis=1))
        start += width
    return ColumnUnits(tuple(groups), axes, tuple(pairs))


def _notes(
    names: Sequence[str], left_out: Mapping[int, str], per_filter: Mapping[int, int]
) -> tuple[Note, ...]:
    """One note for each reason, with the layers that it holds for."""
    reasons: dict[str, list[str]] = {}
    for k, reason in sorted(left_out.items()):
        if k not in per_filter:
            reasons.setdefault(f"no kernel columns, {reason}", []).append(names[k])
    whole = [names[k] for k, count in sorted(per_filter.items()) if count == 1]
    if whole:
        why = "one column for each filter, because layers with kernel columns write the same channels"
        reasons.setdefault(why, []).extend(whole)
    return tuple(Note(WHERE, f"{reason}: {', '.join(layers)}") for reason, layers in reasons.items())
