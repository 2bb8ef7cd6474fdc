"""From a PyTorch module and an example input to its channel graph, by ``torch.export``."""

from __future__ import annotations

import difflib
import logging
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Literal, get_args

import numpy as np
from torch import nn

from qcqp_prune.errors import InvalidOptionError, UnknownLayerError
from qcqp_prune.graph.axes import Axes
from qcqp_prune.graph.channels import (
    Attribute,
    ChannelGraph,
    InputSpec,
    IntArray,
    KeptSum,
    Layer,
    Note,
    TensorSpec,
)
from qcqp_prune.graph.columns import Columns, column_units, read_globs, with_columns
from qcqp_prune.graph.export import canonical_names, export, state_placeholders
from qcqp_prune.graph.follow import Progress, follow, silent
from qcqp_prune.graph.grouping import Amount, Grouping, Limits, NamedLayer, group_units, matches
from qcqp_prune.graph.inputs import ExampleInputs, as_call, batch_size, describe
from qcqp_prune.graph.liveness import find_activations
from qcqp_prune.graph.ops import HANDLERS
from qcqp_prune.graph.refused import require_sizes
from qcqp_prune.graph.removable import Blocks, Traced, with_blocks
from qcqp_prune.graph.sharing import always_kept, free, repeats
from qcqp_prune.graph.uniform import Uniform, tied_alike
from qcqp_prune.graph.units import UnitBook, UnitChoice, Units, freeze_unasked, keep_one_size, keep_pairs
from qcqp_prune.graph.walk import FoundLayer, Handler, Walk

logger = logging.getLogger(__name__)

Sharing = Literal["strict", "free"]
"""Whether tensors that are added keep the same channels, or each its own."""

Ignored = Iterable[str | nn.Module]


def trace(
    model: nn.Module,
    example_inputs: ExampleInputs,
    *,
    ignored_layers: Ignored = (),
    round_to: Amount = 1,
    min_keep: Amount = 1,
    units: Units | None = None,
    columns: Columns = False,
    sharing: Sharing = "strict",
    blocks: Blocks = False,
    uniform: Uniform = False,
    handlers: Mapping[str, Handler] | None = None,
    progress: Progress | None = None,
) -> ChannelGraph:
    """Find which channels of a network live and die together, and what each costs.

    The model is exported in eval mode and comes back in the mode it came in; nothing of it is changed.

    Args:
        model: any module that ``torch.export`` takes.
        example_inputs: a tensor, a tuple of arguments, or a dict of keyword arguments. The first dimension of the
            first tensor is the batch; counts are of one sample.
        ignored_layers: modules, names or globs whose outputs are all kept. Their inputs may still shrink.
        round_to: kept channels of a layer are a multiple of this, or all of them; a number, or one for each glob.
        min_keep: least kept channels of a layer: a number, a share (float up to 1), or one for each glob.
            Where a layer's channels fall into several groups it is asked of each in proportion, rounded up.
        units: what may be removed: kinds among ``widths``, ``heads``, ``head_dim``, ``experts`` and ``stream`` (see
            ``qcqp_prune.graph.units.Unit``), or such kinds for each layer glob, of which the last that matches a layer
            wins. By default ``widths``, ``heads`` and ``experts``. Of one layer either heads go or dimensions of heads.
        columns: convolutions whose kernel columns are units too: True for all that can have them, or names or globs.
            A filter is then kept exactly when at least one of its columns is. Notes say which layers have none.
        sharing: ``strict`` ties the channels of tensors that are added; ``free`` gives each sum channels of its own,
            which are there as soon as one operand writes them. The smaller network then scatters where operands differ.
        blocks: residual branches that may be removed as a whole, so that ``x + f(x)`` becomes ``x``: True for all that
            can be, or names or globs. Whatever ``min_keep`` says, all of a branch's channels then may go together.
            Notes say which branches cannot. Not together with ``columns``, ``uniform`` or free sharing.
        uniform: which layers keep equally many units, for a network that is built from one number for all of its
            blocks. True ties those whose names differ in numbers only (``layers.0.mlp.fc`` and ``layers.1.mlp.fc``);
            of several globs each ties all layers of one width that it matches.
        handlers: further operator handlers by schema name, such as ``{"torchvision::deform_conv2d": my_handler}``.
        progress: told how far it is, operator by operator; nobody unless given.

    Raises:
        TraceError: the model does not run on the example inputs, or does not export.
        UnknownLayerError: an ignored layer or a glob matches nothing.
        InvalidOptionError: an option has a value outside its domain.
    """
    limits, choice = Limits(round_to, min_keep), UnitChoice.read(units)
    split, even = read_globs(columns, "columns"), read_globs(uniform, "uniform")
    branches = read_globs(blocks, "blocks")
    if branches and (split or even or sharing == "free"):
        other = "columns" if split else "uniform" if even else 'sharing="free"'
        raise InvalidOptionError(f"blocks and {other} at once: choose one of the two")
    if sharing not in get_args(Sharing):
        raise InvalidOptionError(f"sharing={sharing!r}: choose from {', '.join(get_args(Sharing))}")
    call = as_call(example_inputs)
    inputs, tree = describe(call)
    tell = progress or silent
    tell("exporting the network", 0, 0)
    program = export(model, call)
    require_sizes(program, model)
    names = canonical_names(model)
    placeholders = state_placeholders(program, names)
    walk = Walk(model, placeholders, batch_size(call), free_sums=sharing == "free")
    aliases = _aliases(names)
    walk.units = UnitBook(choice, lambda found: _base_name(walk, found, aliases))
    follow(walk, program, placeholders, {**HANDLERS, **(handlers or {})}, tell)
    tell("grouping what lives and dies together", 0, 0)
    layers = _named_layers(walk, aliases)
    keep_one_size(walk)
    freeze_unasked(walk, layers)
    ignored = _ignore(walk, model, ignored_layers, layers)
    keep_pairs(walk)
    for glob in (*limits.globs(), *filter(None, (*split, *even)), *choice.globs()):
        _require_match(glob, [x.name for x in layers], model)
    grouping = group_units(walk.table, layers, _with_segments(walk), limits)
    _note_strict_sums(walk)
    axes = _AxisPool(grouping)
    graph = _assemble(model, walk, layers, axes, names, (inputs, tree))
    # How a sum of unlike operands is put together, and what that takes, is not known before they are chosen.
    activations = () if len(graph.links) else find_activations(program, walk, axes.tracked)
    groups = tied_alike(graph.groups, even) if even else graph.groups
    graph = replace(graph, groups=groups, axes=tuple(axes.units), activations=activations)
    wanted = {k: layers[k].name in ignored for k in _asked(walk, layers, split)}
    graph = with_columns(graph, column_units(walk, model, layers, grouping, wanted))
    user_inputs = frozenset(program.graph_signature.user_inputs)
    traced = Traced(program.graph, walk, placeholders, user_inputs, frozenset(ignored), model)
    return with_blocks(graph, traced, branches)


def _asked(walk: Walk, layers: list[NamedLayer], globs: tuple[str, ...]) -> list[int]:
    """Layers that the globs of an option mean; where they mean all, convolutions."""
    return [
        k
        for k, layer in enumerate(layers)
        if any(matches(layer.name, g) if g else walk.layers[k].op.startswith("conv") for g in globs)
    ]


def _aliases(names: Mapping[str, str]) -> dict[str, list[str]]:
    """Every path of each tensor, by its canonical name."""
    aliases: dict[str, list[str]] = {}
    for name, canonical in names.items():
        aliases.setdefault(canonical, []).append(name)
    return aliases


def _base_name(walk: Walk, found: FoundLayer, aliases: Mapping[str, list[str]]) -> str:
    """The module path where the operator is its module's own, else the weight's path."""
    path = walk.module_path(found.node)
    if not found.weight:
        return f"{path}.{found.op}" if path else found.op
    if found.by_weight:
        return found.weight
    owners = [_owner(alias) for alias in aliases.get(found.weight, [])]
    raw = found.op == "linear_transposed" and not path  # a parameter of the model itself
    return path if path in owners and not raw else (owners[0] or found.weight)


def _named_layers(walk: Walk, aliases: Mapping[str, list[str]]) -> list[NamedLayer]:
    """Unique names: a later call of a layer is numbered."""
    seen: dict[str, int] = {}
    layers = []
    for found in walk.layers:
        base = _base_name(walk, found, aliases)
        seen[base] = seen.get(base, 0) + 1
        name = base if seen[base] == 1 else f"{base}@{seen[base]}"
        layers.append(NamedLayer(name, found.in_labels, found.out_labels, has_weight=bool(found.weight)))
    return layers


def _owner(parameter: str) -> str:
    """Path of the module that a parameter belongs to, whether or not it is parametrised."""
    module, _, _ = parameter.rpartition(".")
    return module.partition(".parametrizations.")[0]


def _ignore(walk: Walk, model: nn.Module, ignored: Ignored, layers: list[NamedLayer]) -> set[str]:
    """Freeze the outputs of layers that are to be left alone; their names."""
    found: set[str] = set()
    if isinstance(ignored, str | nn.Module):
        ignored = [ignored]
    chosen = list(ignored) if isinstance(ignored, Iterable) else [ignored]
    if not all(isinstance(x, str | nn.Module) for x in chosen):
        raise InvalidOptionError(
            f"ignored_layers={ignored!r}: give modules, names or globs, or a list of them"
        )
    names = [x.name for x in layers]
    for entry in chosen:
        pattern = _pattern(model, entry, names) if isinstance(entry, nn.Module) else entry
        _require_match(pattern, names, model)
        for layer in layers:
            if matches(layer.name, pattern):
                why = f"in ignored_layers ({pattern})" if pattern else "in ignored_layers"
                walk.table.freeze(layer.out_labels, why)
                found.add(layer.name)
    return found


def _pattern(model: nn.Module, module: nn.Module, layers: list[str]) -> str:
    """The path of a module, of several the one that names a layer."""
    paths = [path for path, other in model.named_modules(remove_duplicate=False) if other is module]
    if not paths:
        raise UnknownLayerError(
            f"ignored_layers holds a {type(module).__name__} that is no part of {type(model).__name__}: "
            "take it from the model that is traced"
        )
    return next((path for path in paths if any(matches(name, path) for name in layers)), str(paths[0]))


def _require_match(pattern: str, layers: list[str], model: nn.Module) -> None:
    if any(matches(name, pattern) for name in layers):
        return
    modules = dict(model.named_modules())
    if pattern in modules:
        raise UnknownLayerError(
            f"{pattern!r} is a {type(modules[pattern]).__name__} with no convolution or linear layer in it: "
            "name a layer that has a weight matrix"
        )
    near = difflib.get_close_matches(pattern, [*layers, *modules], n=1, cutoff=0.0)
    raise UnknownLayerError(
        f"no layer is called {pattern!r}: did you mean {near[0]!r}?" if near else "no layers"
    )


def _with_segments(walk: Walk) -> dict[str, Axes]:
    """Labels of each tensor's dimensions; dimension 1 of a grouped weight lists the segments one after another."""
    axes = {name: list(labels) for name, labels in walk.tensor_axes.items()}
    for name, (_, labels) in walk.segmented.items():
        axes[name][1] = labels
    return axes


def _assemble(
    model: nn.Module,
    walk: Walk,
    named: list[NamedLayer],
    axes: _AxisPool,
    names: Mapping[str, str],
    inputs: tuple[tuple[InputSpec, ...], str],
) -> ChannelGraph:
    layers = [
        Layer(
            name=layer.name,
            op=found.op,
            weight=found.weight,
            in_axis=axes.index(found.in_labels),
            out_axis=axes.index(found.out_labels),
            segments=found.segments,
            macs_per_pair=found.macs_per_pair,
            out_elements=found.out_elements,
            itemsize=found.itemsize,
            rows=found.rows,
        )
        for found, layer in zip(walk.layers, named, strict=True)
    ]
    tensors = list(_tensors(model, walk, axes, names))
    return ChannelGraph(
        model=type(model).__name__,
        groups=tuple(axes.grouping.groups),
        axes=tuple(axes.units),
        layers=tuple(layers),
        tensors=tuple(tensors),
        inputs=inputs[0],
        batch=walk.batch,
        input_tree=inputs[1],
        attributes=tuple(_attributes(walk, axes.grouping)),
        notes=tuple(dict.fromkeys(walk.notes)),
        links=axes.grouping.links,
        kept_sums=tuple(_kept_sums(walk, axes.grouping)),
    )


def _note_strict_sums(walk: Walk) -> None:
    walk.notes += [Note(s.where, f"shared strictly: {s.strict}") for s in walk.table.sums if s.strict]


def _kept_sums(walk: Walk, grouping: Grouping) -> Iterator[KeptSum]:
    for one in free(walk.table):
        positions = always_kept(one, walk.table, grouping.is_kept)
        repeated = repeats(one, walk.table)
        if positions or repeated:
            yield KeptSum(one.index, one.dim, positions, repeated)


class _AxisPool:
    """Distinct axes, numbered in order of appearance."""

    def __init__(self, grouping: Grouping) -> None:
        self.units: list[IntArray] = []
        self.grouping = grouping
        self._index: dict[bytes, int] = {}

    def index(self, labels: IntArray) -> int:
        units = self.grouping.units(labels)
        key = units.tobytes()
        if key not in self._index:
            self._index[key] = len(self.units)
            self.units.append(units)
        return self._index[key]

    def tracked(self, labels: IntArray | None) -> int | None:
        """The axis of a dimension all of whose positions belong to units; None otherwise."""
        if labels is None or (self.grouping.units(labels) < 0).any():
            return None
        return self.index(labels)

    def pair(self, tracked: list[int | None]) -> tuple[int | None, ...]:
        """The axes of a tensor; of one with more than two, those that cannot shrink are left out."""
        if sum(axis is not None for axis in tracked) <= 2:
            return tuple(tracked)
        stays = np.repeat([g.stays for g in self.grouping.groups], [g.width for g in self.grouping.groups])
        return tuple(None if axis is None or stays[self.units[axis]].all() else axis for axis in tracked)


def _tensors(model: nn.Module, walk: Walk, axes: _AxisPool, names: Mapping[str, str]) -> Iterator[TensorSpec]:
    labels = _with_segments(walk)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    tensors = {**parameters, **dict(model.named_buffers(remove_duplicate=False))}
    for name, tensor in tensors.items():
        if names[name] != name:
            continue
        dims = labels.get(name, [None] * tensor.ndim)
        yield TensorSpec(
            name=name,
            aliases=tuple(alias for alias, first in names.items() if first == name and alias != name),
            kind="parameter" if name in parameters else "buffer",
            shape=tuple(tensor.shape),
            itemsize=tensor.element_size(),
            axes=axes.pair([axes.tracked(d) for d in dims]),
            segments=walk.segmented[name][0] if name in walk.segmented else 1,
        )


def _attributes(walk: Walk, grouping: Grouping) -> Iterator[Attribute]:
    for found in walk.attributes.values():
        parts: list[tuple[int, ...] | int] = []
        for part in found.parts:
            if isinstance(part, int):
                parts.append(part)
                continue
            units = grouping.units(part)
            parts.append(len(part) if (units < 0).any() else tuple(units.tolist()))
        if any(not isinstance(part, int) for part in parts):
            yield Attribute(found.module, found.name, tuple(parts), found.scalar)
