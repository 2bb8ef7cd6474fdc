"""The channel graph: which units a network has, where each sits, and what it costs. Plain data, no torch.

Words used throughout:

* A *unit* is the smallest thing that is kept or removed as a whole: usually one channel, with every slice of every
  tensor that belongs to it.
* A *group* is a set of like units: each touches the same axes equally often, so that every exact resource count
  depends on *how many* units of the group are kept only. Units are numbered flat, group after group.
* An *axis* says for each position of a tensor dimension which unit owns it. A flattened 512 x 7 x 7 feature map has
  an axis of 25,088 positions in which each unit occurs 49 times.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from qcqp_prune.errors import PlanError
from qcqp_prune.graph.links import CountLink, Links
from qcqp_prune.graph.needs import Block, Needs

IntArray = npt.NDArray[np.int64]
BoolArray = npt.NDArray[np.bool_]

SCHEMA_VERSION = 3


@dataclass(frozen=True)
class Group:
    """A set of like units.

    Attributes:
        id: unique, readable: the path of the layer that first produces the units.
        width: number of units, >= 1.
        multiple_of: a kept count is a multiple of this, or the full width.
        min_keep: least number of units kept.
        frozen_reason: why no unit may go, or None where units may.
        tie: groups with the same tie keep equally many units (segments of a grouped convolution or group norm).
        optional: whether it may also be empty, whatever its floors say: it lies in a block that can be removed.
    """

    id: str
    width: int
    multiple_of: int = 1
    min_keep: int = 1
    frozen_reason: str | None = None
    tie: str | None = None
    optional: bool = False

    @property
    def stays(self) -> bool:
        """Whether the group can only be kept whole, by itself: frozen, or with a floor at its width."""
        return self.counts() == [self.width]

    def counts(self) -> list[int]:
        """The kept counts that are allowed, ascending; always holds the full width."""
        if self.frozen_reason is not None:
            return [self.width]
        first = max(math.ceil(self.min_keep / self.multiple_of), 0) * self.multiple_of
        allowed = list(range(first, self.width + 1, self.multiple_of))
        allowed = allowed if allowed and allowed[-1] == self.width else [*allowed, self.width]
        return [0, *allowed] if self.optional and allowed[0] > 0 else allowed


@dataclass(frozen=True)
class Layer:
    """One call of an operator that multiplies matrices: a convolution, a linear map, or a product of two tensors.

    Attributes:
        name: module path; a second call of the same module is ``path@2``.
        op: ``conv1d``, ``conv2d``, ``conv3d``, ``conv_transpose1d`` to ``3d``, ``linear``, ``linear_transposed`` for a
            weight stored ``(inputs, outputs)``, or a product of two tensors: ``matmul``, ``bmm``, ``mm``, ``baddbmm``,
            ``attention_scores``, ``attention_values``.
        weight: name of the weight tensor, empty for a product of two tensors.
        in_axis, out_axis: indices into ``ChannelGraph.axes``.
        segments: groups of a grouped convolution; both axes fall into this many equal runs, and run ``k`` of the
            input meets run ``k`` of the output only. 1 for a dense layer.
        macs_per_pair: multiply-adds of one sample for each kept (input, output) pair of positions; where the layer has
            columns, for each kept (input, column) pair.
        out_elements: output elements of one sample for each kept output position.
        itemsize: bytes of one output element.
        rows: first and last-but-one row of the weight where the call uses some of them only (packed projections of
            queries, keys and values); None for all.
        columns: axis of the kernel columns, equally many for each filter, filter after filter. None where a filter is
            kept or removed with its output channel.
    """

    name: str
    op: str
    weight: str
    in_axis: int
    out_axis: int
    segments: int
    macs_per_pair: int
    out_elements: int
    itemsize: int
    rows: tuple[int, int] | None = None
    columns: int | None = None

    @property
    def made_axis(self) -> int:
        """The axis whose kept positions each meet every kept input: of the columns where there are some."""
        return self.out_axis if self.columns is None else self.columns


@dataclass(frozen=True)
class TensorSpec:
    """A parameter or buffer and the axis of each of its dimensions.

    Attributes:
        name: state-dict path.
        aliases: further paths of the same (tied) tensor.
        kind: ``parameter`` or ``buffer``.
        shape: full shape.
        itemsize: bytes of one element.
        axes: for each dimension an index into ``ChannelGraph.axes``, or None where nothing can be removed.
        segments: where larger than 1 (a grouped convolution's weight), dimension 1 is local to the segment of
            dimension 0 in which it stands: its axis has ``segments * shape[1]`` positions.
        columns: of a convolution's weight whose kernel columns are units: their axis of ``shape[0] * m`` positions,
            filter after filter, each for ``prod(shape[2:]) / m`` positions of the kernel. An entry is then kept where
            its input channel and its column are; ``axes[0]`` says which filters exist.
    """

    name: str
    aliases: tuple[str, ...]
    kind: str
    shape: tuple[int, ...]
    itemsize: int
    axes: tuple[int | None, ...]
    segments: int = 1
    columns: int | None = None


@dataclass(frozen=True)
class InputSpec:
    """One leaf of the example inputs, enough to make another like it.

    Attributes:
        path: where it stands in ``(args, kwargs)``.
        shape, dtype: of a tensor; ``dtype`` is ``python`` for a plain value.
        low, high: range of an integer tensor's values.
        value: the plain value.
        pattern: of an integer tensor with at most two values, such as a mask, where the larger one stands: its bits in
            row-major order, packed, compressed by zlib, in base 64. Empty otherwise.
    """

    path: str
    shape: tuple[int, ...]
    dtype: str
    low: int = 0
    high: int = 1
    value: int | float | str | bool | None = None
    pattern: str = ""


@dataclass(frozen=True)
class Attribute:
    """A module attribute that follows the kept counts, such as ``in_channels`` or ``normalized_shape``.

    Attributes:
        module: module path.
        name: attribute name.
        parts: for each entry of the value the flat unit index of each position that it counts, or the integer that
            it stays.
        scalar: whether the value is one integer, not a tuple.
    """

    module: str
    name: str
    parts: tuple[tuple[int, ...] | int, ...]
    scalar: bool


@dataclass(frozen=True)
class Activation:
    """A tensor of a forward pass that takes memory of its own; views and parameters are none.

    Attributes:
        name: the node that makes it, for readers.
        size: bytes of one sample for each kept position of its axes.
        axes: indices into ``ChannelGraph.axes`` of the dimensions that can shrink.
        first: the step that makes it.
        last: the last step that reads it or a view of it.
    """

    name: str
    size: int
    axes: tuple[int, ...]
    first: int
    last: int


@dataclass(frozen=True)
class KeptSum:
    """What the operands of an addition do not tell about its result by what they keep.

    Only where sums are shared freely.

    Attributes:
        index: number of the addition among those of the exported graph.
        dim: dimension of the result, counted from the end.
        positions: along that dimension, those that stay even where all operands are removed there, and are zero then: a
            result that is a network output, for instance, has its full size.
        repeats: whether an operand has a channel at several positions, as after ``repeat``: it decides what the result
            keeps, where a tensor that holds copies would otherwise follow the other operand.
    """

    index: int
    dim: int
    positions: tuple[int, ...]
    repeats: bool = False


@dataclass(frozen=True)
class Note:
    """Something the extractor wants the user to know: which node, and what was decided about it."""

    where: str
    text: str


@dataclass(frozen=True, eq=False)
class ChannelGraph:
    """Everything the optimiser needs to know of a network.

    Attributes:
        model: the class name of the traced module.
        groups: sets of like units; the flat unit index runs through them in order.
        axes: for each axis the flat unit index of each position, ``(size,) int64``.
        layers: calls with a weight matrix, in execution order.
        tensors: every parameter and buffer of the model.
        inputs: the leaves of the example inputs that were traced.
        input_tree: how the leaves make up ``(args, kwargs)``, as ``torch.utils._pytree`` writes it.
        attributes: module attributes that surgery has to update.
        batch: samples in the example input; all counts are of one sample.
        notes: decisions of the extractor worth knowing.
        activations: which tensors are alive when; empty in graphs of an older version or where
            sums are shared freely.
        links: units that are kept exactly when a part of theirs is, over the flat unit index.
        kept_sums: additions of whose results more is kept than their operands tell.
        blocks: residual branches that may be removed as a whole.
    """

    model: str
    groups: tuple[Group, ...]
    axes: tuple[IntArray, ...]
    layers: tuple[Layer, ...]
    tensors: tuple[TensorSpec, ...]
    inputs: tuple[InputSpec, ...]
    batch: int
    input_tree: str = ""
    attributes: tuple[Attribute, ...] = field(default=())
    notes: tuple[Note, ...] = field(default=())
    activations: tuple[Activation, ...] = field(default=())
    links: Links = field(default_factory=Links.none)
    kept_sums: tuple[KeptSum, ...] = field(default=())
    blocks: tuple[Block, ...] = field(default=())

    @cached_property
    def offsets(self) -> IntArray:
        """Flat index of each group's first unit, and the total at the end: ``(len(groups) + 1,)``."""
        return np.concatenate([[0], np.cumsum([g.width for g in self.groups], dtype=np.int64)]).astype(
            np.int64
        )

    @property
    def unit_count(self) -> int:
        """Number of units, frozen ones included."""
        return int(self.offsets[-1])

    @property
    def prunable_count(self) -> int:
        """Number of units that may be removed."""
        return sum(g.width for g in self.groups if g.frozen_reason is None)

    @cached_property
    def group_of_unit(self) -> IntArray:
        """Index of the group of each unit, ``(unit_count,)``."""
        return np.repeat(np.arange(len(self.groups), dtype=np.int64), [g.width for g in self.groups])

    @cached_property
    def stays(self) -> BoolArray:
        """Units of groups that can only be kept whole, ``(unit_count,)``: as wholes they need no part."""
        return np.asarray([g.stays for g in self.groups], np.bool_)[self.group_of_unit]

    @cached_property
    def count_links(self) -> tuple[CountLink, ...]:
        """What the links say about the counts of groups."""
        return self.links.between(self.group_of_unit, len(self.groups))

    @cached_property
    def needs(self) -> Needs:
        """Which groups are kept only where others are: those of blocks."""
        own = [int(self.group_of_unit[block.unit]) for block in self.blocks]
        pairs = []
        for z, block in zip(own, self.blocks, strict=True):
            pairs += [(g, z) for g in block.groups]
            # A group without a floor may also go alone.
            pairs += [(z, g) for g in block.groups if replace(self.groups[g], optional=False).counts()[0] > 0]
            pairs += [] if block.outer is None else [(z, own[block.outer])]
        return Needs(tuple(pairs))

    @cached_property
    def block_of_layer(self) -> dict[int, int]:
        """Index of the innermost block around each layer that lies in one, by the layer's index."""
        return {k: b for b, block in enumerate(self.blocks) for k in block.layers}

    @cached_property
    def block_of_tensor(self) -> dict[str, int]:
        """The same for parameters and buffers, by name."""
        return {name: b for b, block in enumerate(self.blocks) for name in block.tensors}

    def emptied_with(self, block: int) -> frozenset[int]:
        """Groups of a block and of all blocks within it."""
        found = set(self.blocks[block].groups)
        for b, other in enumerate(self.blocks):
            if other.outer == block:
                found |= self.emptied_with(b)
        return frozenset(found)

    def removed_blocks(self, flat: BoolArray) -> tuple[int, ...]:
        """Indices of the blocks that a mask ``(unit_count,)`` removes."""
        return tuple(b for b, block in enumerate(self.blocks) if not flat[block.unit])

    def removed_layers(self, flat: BoolArray) -> frozenset[int]:
        """Indices of the layers that go with the blocks which a mask removes."""
        return frozenset(k for b in self.removed_blocks(flat) for k in self.blocks[b].layers)

    def removed_tensors(self, flat: BoolArray) -> frozenset[str]:
        """Names of the parameters and buffers that go with them."""
        return frozenset(name for b in self.removed_blocks(flat) for name in self.blocks[b].tensors)

    def units(self, group: int) -> slice:
        """The flat range of a group's units."""
        return slice(int(self.offsets[group]), int(self.offsets[group + 1]))

    def axis_counts(self, axis: int, positions: slice | None = None) -> dict[int, int]:
        """How many positions of an axis each unit of a group owns: ``{group index: positions per unit}``.

        Args:
            axis: index into ``axes``.
            positions: a part of the axis; all of it when None.
        """
        units = self.axes[axis] if positions is None else self.axes[axis][positions]
        share = np.bincount(self.group_of_unit[units], minlength=len(self.groups))
        distinct = np.bincount(self.group_of_unit[np.unique(units)], minlength=len(self.groups))
        return {int(g): int(share[g] // distinct[g]) for g in np.flatnonzero(share)}

    def segments(self, axis: int, count: int) -> list[slice]:
        """The ``count`` equal runs into which a grouped operator divides an axis."""
        size = len(self.axes[axis]) // count
        return [slice(k * size, (k + 1) * size) for k in range(count)]

    def kernel_mask(self, tensor: TensorSpec, flat: BoolArray) -> BoolArray:
        """Which kernel positions of each filter of a weight with columns are kept, ``(filters, positions)``.

        Args:
            tensor: one with ``columns``.
            flat: ``(unit_count,) bool``.
        """
        assert tensor.columns is not None
        kept = flat[self.axes[tensor.columns]].reshape(tensor.shape[0], -1)
        return np.broadcast_to(kept, (tensor.shape[0], math.prod(tensor.shape[2:])))

    def is_depthwise(self, layer: Layer) -> bool:
        """Whether each segment of a grouped layer belongs to one unit, so that its cost is linear in the count."""
        if layer.segments == 1:
            return False
        ins = self.axes[layer.in_axis].reshape(layer.segments, -1)
        outs = self.axes[layer.out_axis].reshape(layer.segments, -1)
        return bool((ins == ins[:, :1]).all() and (outs == ins[:, :1]).all())

    def why_not_pruned(self, layer: Layer) -> str | None:
        """The reason that none of a layer's outputs can be removed, or None where some can."""
        groups = np.unique(self.group_of_unit[self.axes[layer.out_axis]])
        reasons = [self.groups[g].frozen_reason for g in groups]
        return None if any(r is None for r in reasons) else "; ".join(sorted({r for r in reasons if r}))

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the structure: names, shapes and who owns what. Constraints on counts do not enter."""
        digest = hashlib.sha256()
        parts: Iterable[Any] = (
            [(g.id, g.width) for g in self.groups],
            [asdict(x) for x in self.layers],
            [asdict(t) for t in self.tensors],
        )
        digest.update(json.dumps(list(parts), sort_keys=True).encode())
        if self.kept_sums:
            digest.update(json.dumps([asdict(k) for k in self.kept_sums]).encode())
        if self.blocks:
            digest.update(json.dumps([asdict(b) for b in self.blocks]).encode())
        for ends in (self.links.wholes, self.links.parts):
            digest.update(ends.astype("<i8").tobytes())
        # Axes of activations come last and say nothing new about who owns what.
        named = [a for x in self.layers for a in (x.in_axis, x.out_axis, x.made_axis)]
        named += [a for t in self.tensors for a in t.axes if a is not None]
        for axis in self.axes[: max(named, default=-1) + 1]:
            digest.update(axis.astype("<i8").tobytes())
        return digest.hexdigest()

    def to_json(self) -> dict[str, Any]:
        """Plain data for ``json.dump``; ``from_json`` gives the graph back."""
        return {
            "schema": SCHEMA_VERSION,
            "model": self.model,
            "fingerprint": self.fingerprint,
            "batch": self.batch,
            "groups": [asdict(g) for g in self.groups],
            "axes": [a.tolist() for a in self.axes],
            "layers": [asdict(x) for x in self.layers],
            "tensors": [asdict(t) for t in self.tensors],
            "inputs": [asdict(i) for i in self.inputs],
            "input_tree": self.input_tree,
            "attributes": [asdict(a) for a in self.attributes],
            "notes": [asdict(n) for n in self.notes],
            "activations": [asdict(a) for a in self.activations],
            "links": self.links.to_json(),
            "kept_sums": [asdict(k) for k in self.kept_sums],
            "blocks": [asdict(b) for b in self.blocks],
        }

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> ChannelGraph:
        """The inverse of ``to_json``.

        Raises:
            PlanError: the data is of another schema, incomplete, or does not match its own fingerprint.
        """
        try:
            if data["schema"] != SCHEMA_VERSION:
                raise PlanError(
                    f"graph file has schema {data['schema']}, this version reads {SCHEMA_VERSION}: "
                    "trace the model again"
                )
            graph = cls(
                model=data["model"],
                groups=tuple(Group(**g) for g in data["groups"]),
                axes=tuple(np.asarray(a, dtype=np.int64) for a in data["axes"]),
                layers=tuple(_layer(x) for x in data["layers"]),
                tensors=tuple(_tensor(t) for t in data["tensors"]),
                inputs=tuple(InputSpec(**{**i, "shape": tuple(i["shape"])}) for i in data["inputs"]),
                batch=data["batch"],
                input_tree=data["input_tree"],
                attributes=tuple(_attribute(a) for a in data["attributes"]),
                notes=tuple(Note(**n) for n in data["notes"]),
                activations=tuple(
                    Activation(**{**a, "axes": tuple(a["axes"])}) for a in data.get("activations", ())
                ),
                links=Links.from_json(data["links"]),
                kept_sums=tuple(_kept_sum(k) for k in data.get("kept_sums", ())),
                blocks=tuple(Block.from_json(b) for b in data.get("blocks", ())),
            )
            expected = data["fingerprint"]
        except (KeyError, TypeError, ValueError) as error:
            if isinstance(error, PlanError):
                raise
            raise PlanError(f"not a channel graph file ({error!r}): trace the model again") from error
        if graph.fingerprint != expected:
            raise PlanError(
                "the graph file does not match its own fingerprint, it was changed: trace the model again"
            )
        return graph


def _tensor(data: dict[str, Any]) -> TensorSpec:
    lists = {key: tuple(data[key]) for key in ("aliases", "shape", "axes")}
    return TensorSpec(**{**data, **lists})


def _layer(data: dict[str, Any]) -> Layer:
    rows = data["rows"]
    return Layer(**{**data, "rows": None if rows is None else (rows[0], rows[1])})


def _kept_sum(data: dict[str, Any]) -> KeptSum:
    return KeptSum(**{**data, "positions": tuple(data["positions"])})


def _attribute(data: dict[str, Any]) -> Attribute:
    parts = tuple(p if isinstance(p, int) else tuple(p) for p in data["parts"])
    return Attribute(**{**data, "parts": parts})


def nested_keep(widths: Sequence[int], counts: Sequence[int]) -> BoolArray:
    """The mask that keeps the first ``counts[g]`` units of each group: ``(sum(widths),)``."""
    return np.concatenate([np.arange(w) < n for w, n in zip(widths, counts, strict=True)])
