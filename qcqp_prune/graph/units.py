"""Kinds of units, which of them are asked for where, and the freezing of those that are not."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, cast, get_args

import numpy as np

from qcqp_prune.errors import InvalidOptionError
from qcqp_prune.graph.channels import BoolArray, IntArray, Note
from qcqp_prune.graph.grouping import NamedLayer, matches
from qcqp_prune.graph.streams import marked, stream_labels

if TYPE_CHECKING:
    from qcqp_prune.graph.walk import FoundLayer, Walk

Unit = Literal["widths", "heads", "head_dim", "experts", "stream"]
"""A kind of unit.

* ``widths``: channels of convolutions and features of linear maps, as in feed-forward layers; residual streams of
  convolutional networks belong here.
* ``heads``: whole heads of attention; where several heads of queries share one of keys and values, all of them.
* ``head_dim``: one dimension of every head of a layer at once. The scale of attention stays what it was.
* ``experts``: branches of a mixture that is computed as a whole, with their gates.
* ``stream``: the width of a transformer, which all its blocks read and add to.
"""

Units = str | Collection[str] | Mapping[str, "str | Collection[str]"]
"""Kinds of units that may be removed; or, for each layer glob, such kinds."""

DEFAULT: frozenset[str] = frozenset({"widths", "heads", "experts"})
KINDS = get_args(Unit)
WHERE = "units"

_NAMES = {
    "widths": "widths of layers stay whole",
    "heads": "heads of attention stay",
    "head_dim": "dimensions of heads stay whole",
    "experts": "experts of a mixture stay",
    "stream": "the residual stream of a transformer stays whole",
}
THIRD = "a third dimension of one parameter: two of them can shrink, as a count is a product of two"
REASONS = {kind: f"{text} unless units holds {kind!r}" for kind, text in _NAMES.items()}


@dataclass(frozen=True)
class UnitChoice:
    """Which kinds of units are asked for in each layer.

    Attributes:
        entries: layer globs and kinds; the last glob that matches a layer wins, one that none matches has ``DEFAULT``.
    """

    entries: tuple[tuple[str, frozenset[str]], ...] = ()

    @classmethod
    def read(cls, units: Units | None) -> UnitChoice:
        """The option of ``trace``.

        Raises:
            InvalidOptionError: a kind is unknown, or both heads and their dimensions are asked for in one place.
        """
        if units is None:
            return cls()
        if isinstance(units, Mapping):
            if not all(isinstance(glob, str) and glob for glob in units):
                raise InvalidOptionError(
                    f"units={units!r}: the keys of a mapping are names or globs of layers"
                )
            return cls(tuple((glob, _kinds(chosen)) for glob, chosen in units.items()))
        return cls((("", _kinds(units)),))

    def globs(self) -> list[str]:
        """Every layer glob used, to be checked against the layers that exist."""
        return [glob for glob, _ in self.entries if glob]

    def of(self, layer: str) -> frozenset[str]:
        """The kinds that are asked for in a layer."""
        chosen = [kinds for glob, kinds in self.entries if matches(layer, glob)]
        return chosen[-1] if chosen else DEFAULT


def _kinds(units: object) -> frozenset[str]:
    listed = [units] if isinstance(units, str) else units
    kinds = list(listed) if isinstance(listed, Iterable) else [listed]
    unknown = [kind for kind in kinds if kind not in KINDS]
    if unknown:
        raise InvalidOptionError(f"units holds {unknown[0]!r}: choose from {', '.join(KINDS)}")
    found = frozenset(cast("list[str]", kinds))
    if {"heads", "head_dim"} <= found:
        raise InvalidOptionError(
            "units holds both 'heads' and 'head_dim': of one layer either whole heads go or dimensions of all of them; "
            "choose one, or one for each layer glob, such as {'*': ['heads'], 'blocks.0.*': ['head_dim']}"
        )
    return found


@dataclass
class UnitBook:
    """What a walk finds out about kinds of units.

    Attributes:
        choice: what is asked for.
        name_of: the name of a layer, without the number of its call.
        marks: labels that are known to be of a kind.
        one_size: dimensions of heads, such as those of queries and of values, whose number a module holds once.
    """

    choice: UnitChoice = UnitChoice()
    name_of: Callable[[FoundLayer], str] | None = None
    marks: list[tuple[str, IntArray]] = field(default_factory=list)
    one_size: list[tuple[IntArray, IntArray]] = field(default_factory=list)
    _writer: dict[int, int] = field(default_factory=dict)
    _marked: set[int] = field(default_factory=set)
    _read: int = 0

    def mark(self, kind: Unit, labels: IntArray) -> None:
        """Note of what kind the units are that own these positions."""
        self.marks.append((kind, labels))
        self._marked.update(labels.tolist())

    def is_marked(self, labels: IntArray) -> bool:
        """Whether a reshape made heads, or dimensions of heads, of these positions."""
        return not self._marked.isdisjoint(labels.tolist())

    def asked(self, walk: Walk, labels: IntArray, place: str) -> frozenset[str]:
        """The kinds that all layers ask for that write these positions.

        Args:
            walk: what was found so far.
            labels: as the layers gave them, before anything was merged.
            place: path of a module, which answers where no layer writes them.
        """
        while self._read < len(walk.layers):
            layer = walk.layers[self._read]
            if layer.weight:
                for label in layer.out_labels.tolist():
                    self._writer.setdefault(label, self._read)
            self._read += 1
        writers = {self._writer[x] for x in np.unique(labels).tolist() if x in self._writer}
        if not writers or self.name_of is None:
            return self.choice.of(place)
        return frozenset.intersection(*(self.choice.of(self.name_of(walk.layers[k])) for k in writers))


def _experts(walk: Walk) -> BoolArray:
    """Classes of experts: the first of three or more dimensions of a parameter, that is summed over in the end.

    No layer has such a parameter for its weight: a mixture multiplies its gates with it, or puts tokens into each part.
    """
    weights = {layer.weight for layer in walk.layers}
    held = [axes[0] for name, axes in walk.tensor_axes.items() if len(axes) > 2 and name not in weights]
    return marked(walk, [x for x in held if x is not None and len(x) > 1]) & marked(walk, walk.summed)


def keep_pairs(walk: Walk) -> None:
    """Freeze what is left of a parameter beyond two dimensions that can shrink: a count is a product of two."""
    classes = walk.table.classes()
    made = marked(walk, [layer.out_labels for layer in walk.layers])
    for axes in walk.tensor_axes.values():
        dims = [labels for labels in axes if labels is not None and made[classes[labels]].any()]
        if len(dims) < 3:
            continue
        free = [labels for labels in dims if not walk.table.is_frozen(labels)]
        for labels in free[2:]:
            walk.table.freeze(labels, THIRD)


def keep_one_size(walk: Walk) -> None:
    """Ask that heads of which a module holds one size keep equally many dimensions, so that its own forward fits.

    Rotary positions turn dimensions of queries and keys in pairs; those of values then go in the same pairs.
    """
    for first, second in ((0, 1), (1, 0)):
        classes = walk.table.classes()
        for pair in walk.units.one_size:
            _, index, inverse = np.unique(classes[pair[first]], return_index=True, return_inverse=True)
            walk.table.merge(pair[second], pair[second][index[inverse.reshape(-1)]], "")
    for a, b in walk.units.one_size:
        walk.table.add_runs(np.concatenate([a, b]), 2, "heads of one size", required=False)


def freeze_unasked(walk: Walk, layers: Sequence[NamedLayer]) -> None:
    """Freeze the units of every layer that are of a kind that is not asked for in it, and note which there are."""
    book = walk.units
    for labels in stream_labels(walk):
        book.mark("stream", labels)
    classes = walk.table.classes()
    kind_of = np.where(_experts(walk), KINDS.index("experts"), KINDS.index("widths"))
    whole: dict[str, list[str]] = {}
    for kind, labels in book.marks:
        kind_of[classes[labels]] = KINDS.index(kind)
    for layer in layers:
        chosen = book.choice.of(layer.name)
        if not layer.has_weight or chosen == frozenset(KINDS):
            continue
        found = kind_of[classes[layer.out_labels]]
        for k, kind in enumerate(KINDS):
            if kind not in chosen and (found == k).any():
                walk.table.freeze(layer.out_labels[found == k], REASONS[kind])
                whole.setdefault(kind, []).append(layer.name)
    for kind, names in whole.items():
        few = f"{', '.join(names[:3])}{' and others' if len(names) > 3 else ''}"
        walk.notes.append(Note(WHERE, f"{REASONS[kind]} (written by {few})"))
