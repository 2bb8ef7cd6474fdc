"""Blocks as units: which residual branches may be removed as a whole, and what that makes of groups and costs.

A branch gets a unit of its own. Groups inside are empty exactly where it is removed; what else it costs (norms and
depthwise work on the stream, last biases) goes with its unit, as a product of that unit and a count.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from torch import nn
from torch.fx import Graph, Node

from qcqp_prune.errors import UnknownLayerError
from qcqp_prune.graph.branches import Branch, find_branches, why_not
from qcqp_prune.graph.channels import ChannelGraph, Group, Note
from qcqp_prune.graph.grouping import matches
from qcqp_prune.graph.needs import Block
from qcqp_prune.graph.walk import Walk, op_name

Blocks = bool | str | Iterable[str]
"""Residual branches that may be removed: none, all that can be, or those that a name or glob means."""

FREE_BY_FLOORS = ("its last channel", "min_keep or round_to")
"""Reasons for which a group stays that do not bind where its whole branch goes."""


@dataclass(frozen=True)
class Traced:
    """What a graph was made from, as far as blocks need it.

    Attributes:
        nodes: the exported graph.
        walk: over it.
        tensors: state-dict name by placeholder.
        inputs: names of the nodes that are inputs of the network.
        ignored: names of layers in ``ignored_layers``.
        model: the traced module.
    """

    nodes: Graph
    walk: Walk
    tensors: Mapping[str, str]
    inputs: frozenset[str]
    ignored: frozenset[str]
    model: nn.Module


def with_blocks(graph: ChannelGraph, traced: Traced, globs: Sequence[str]) -> ChannelGraph:
    """A graph in which residual branches are units.

    Raises:
        UnknownLayerError: a glob matches no residual branch.
    """
    if not globs:
        return graph
    finder = _Finder(graph, traced, globs)
    return finder.finish()


@dataclass
class _Found:
    """A branch on its way to a block."""

    branch: Branch
    name: str
    layers: list[int]
    tensors: list[str]
    groups: list[int]
    outer: int | None = None


class _Finder:
    """Decides which branches become blocks. Everything belongs to the innermost branch around it."""

    def __init__(self, graph: ChannelGraph, traced: Traced, globs: Sequence[str]) -> None:
        self.graph, self.traced = graph, traced
        self.notes: list[Note] = []
        self._layer_nodes = [layer.node for layer in traced.walk.layers]
        self._homes: dict[str, set[Node]] = {}
        for node in traced.nodes.nodes:
            if node.name in traced.tensors:
                self._homes.setdefault(traced.tensors[node.name], set()).add(node)
        branches, others = find_branches(traced.nodes)
        for node, why in others:
            self._note(traced.walk.module_path(node) or node.name, why)
        self._places = self._places_of_groups()
        calls = (n for n in traced.nodes.nodes if n.op == "call_function")
        self._sizes = Counter(path for n in calls for path in _paths(n))
        self.left = self._chosen(branches, globs)

    def _note(self, where: str, why: str) -> None:
        self.notes.append(Note(where, f"no block that can be removed: {why}"))

    def _chosen(self, branches: list[Branch], globs: Sequence[str]) -> list[_Found]:
        """Branches that are meant and whose removal leaves the identity, smallest first."""
        seen: dict[str, int] = {}
        meant: list[_Found] = []
        for branch in branches:
            layers = [k for k, node in enumerate(self._layer_nodes) if node in branch.nodes]
            if not any(self.graph.layers[k].weight for k in layers):
                continue
            name = _common_path([self.graph.layers[k].name for k in layers if self.graph.layers[k].weight])
            name = name or branch.addition.name
            seen[name] = seen.get(name, 0) + 1
            name = name if seen[name] == 1 else f"{name}@{seen[name]}"
            meant.append(_Found(branch, name, layers, [], []))
        for glob in globs:
            if not any(matches(found.name, glob) for found in meant) and glob:
                known = ", ".join(found.name for found in meant[:5]) or "none"
                raise UnknownLayerError(
                    f"blocks={glob!r} names no residual branch of {self.graph.model}: choose from {known}"
                    + (", ..." if len(meant) > 5 else "")
                )
        chosen = []
        for found in meant:
            if not any(matches(found.name, glob) for glob in globs):
                continue
            ignored = [n for k in found.layers if (n := self.graph.layers[k].name) in self.traced.ignored]
            why = (
                f"{ignored[0]} is in ignored_layers" if ignored else why_not(found.branch, self.traced.inputs)
            )
            if why is None:
                chosen.append(found)
            else:
                self._note(found.name, why)
        return sorted(chosen, key=lambda f: len(f.branch.nodes))

    def _places_of_groups(self) -> list[set[Node]]:
        """For each group the nodes of all layers and tensors that it touches."""
        places: list[set[Node]] = [set() for _ in self.graph.groups]
        axes = [np.unique(self.graph.group_of_unit[axis]).tolist() for axis in self.graph.axes]
        for layer, node in zip(self.graph.layers, self._layer_nodes, strict=True):
            for axis in (layer.in_axis, layer.out_axis):
                for g in axes[axis]:
                    places[g].add(node)
        for spec in self.graph.tensors:
            for tracked in spec.axes:
                for g in axes[tracked] if tracked is not None else ():
                    places[g] |= self._homes.get(spec.name, set())
        return places

    def finish(self) -> ChannelGraph:
        """The graph with what is left as blocks."""
        while True:
            self._assign()
            failed = [
                (found, why) for k, found in enumerate(self.left) if (why := self._hurdle(k)) is not None
            ]
            if not failed:
                break
            for found, why in failed:
                self._note(found.name, why)
                self.left.remove(found)
        if not self.left:
            self._note(self.graph.model, "it has no residual branch that leaves its input where it goes")
        return self._with_units()

    def _assign(self) -> None:
        """Give every layer, tensor and group to the smallest branch that holds all of it."""
        for found in self.left:
            found.layers, found.tensors, found.groups, found.outer = [], [], [], None
        for k, node in enumerate(self._layer_nodes):
            if (home := self._home({node})) is not None:
                self.left[home].layers.append(k)
        for name, nodes in self._all_homes().items():
            if (home := self._home(nodes)) is not None:
                self.left[home].tensors.append(name)
        for g, group in enumerate(self.graph.groups):
            if _may_empty(group) and (home := self._home(self._places[g])) is not None:
                self.left[home].groups.append(g)
        for k, found in enumerate(self.left):
            found.outer = self._home({found.branch.addition}, after=k)

    def _home(self, nodes: set[Node], after: int = -1) -> int | None:
        if not nodes:
            return None
        inside = (k for k, f in enumerate(self.left) if k > after and nodes <= f.branch.nodes)
        return next(inside, None)

    def _all_homes(self) -> dict[str, set[Node]]:
        """Nodes of each parameter and buffer; what no operator reads goes with the rest of its module."""
        homes = dict(self._homes)
        beside: dict[str, set[Node]] = {}
        for name, nodes in self._homes.items():
            beside.setdefault(name.rpartition(".")[0], set()).update(n for n in nodes if n.users)
        for spec in self.graph.tensors:
            if spec.kind == "buffer" and not any(node.users for node in homes.get(spec.name, ())):
                homes[spec.name] = beside.get(spec.name.rpartition(".")[0], set())
        return homes

    def _inside(self, k: int) -> set[int]:
        """Groups that are empty where a branch is removed."""
        below = [j for j, found in enumerate(self.left) if found.outer == k]
        return set(self.left[k].groups).union(*(self._inside(j) for j in below))

    def _hurdle(self, k: int) -> str | None:
        """Why the costs of a branch are no products of two counts once its own unit is one of them."""
        found, graph, gone = self.left[k], self.graph, self._inside(k)
        for g in found.groups:
            tie = graph.groups[g].tie
            if tie is not None and any(x.tie == tie and h not in gone for h, x in enumerate(graph.groups)):
                return f"{graph.groups[g].id} keeps as many channels as others outside of it"
        for layer in (graph.layers[j] for j in found.layers):
            axes = (layer.in_axis,) if graph.is_depthwise(layer) else (layer.in_axis, layer.out_axis)
            if self._free(axes, gone) > 1:
                return f"both the inputs and the outputs of {layer.name} may be pruned and stay without it"
        specs = {spec.name: spec for spec in graph.tensors}
        for spec in (specs[name] for name in found.tensors):
            tracked = [axis for axis in spec.axes if axis is not None]
            tracked = tracked[:1] if spec.segments > 1 and spec.segments == spec.shape[0] else tracked
            if self._free(tracked, gone) > 1:
                return f"{spec.name} has two dimensions of which channels stay without it"
        return None

    def _free(self, axes: Sequence[int], gone: set[int]) -> int:
        """Of how many axes the count is a choice that is left without the branch; 0 where one of them vanishes."""
        sides = [np.unique(self.graph.group_of_unit[self.graph.axes[axis]]).tolist() for axis in axes]
        if any(set(side) <= gone for side in sides):
            return 0
        return sum(any(self.graph.groups[g].frozen_reason is None for g in side) for side in sides)

    def _with_units(self) -> ChannelGraph:
        """Units after all others, one for each block; groups inside may be empty."""
        graph = self.graph
        groups, taken = list(graph.groups), {g.id for g in graph.groups}
        order = sorted(range(len(self.left)), key=lambda k: self.left[k].branch.index)
        place = {k: b for b, k in enumerate(order)}
        blocks = []
        for b, k in enumerate(order):
            found = self.left[k]
            for g in found.groups:
                groups[g] = _optional(groups[g])
            name = f"{found.name} (block)"
            while name in taken:
                name += "#"
            taken.add(name)
            groups.append(Group(name, 1, min_keep=0))
            module, after = self._module(found)
            outer = None if found.outer is None else place[found.outer]
            blocks.append(
                Block(
                    found.name,
                    graph.unit_count + b,
                    tuple(found.groups),
                    outer,
                    found.branch.index,
                    found.branch.operand,
                    tuple(found.layers),
                    tuple(found.tensors),
                    module,
                    after,
                )
            )
        notes = tuple(dict.fromkeys([*graph.notes, *self.notes]))
        # What is alive when depends on the blocks that are there.
        activations = () if blocks else graph.activations
        return replace(
            graph, groups=tuple(groups), blocks=tuple(blocks), notes=notes, activations=activations
        )

    def _module(self, found: _Found) -> tuple[str, str]:
        """The outermost module that computes the sum and nothing else, and what it does to it afterwards."""
        node = found.branch.addition
        last, after = node, ""
        users = list(node.users)
        if len(users) == 1 and op_name(users[0]) == "aten::relu":
            last, after = users[0], "relu"
        for top, end in ((last, after), (node, "")):
            inside = {n for n in found.branch.nodes if n.op == "call_function"} | {node, top}
            for path in _paths(node):
                if self._sizes[path] == len(inside) and all(path in _paths(n) for n in inside):
                    return path, end
        return "", ""


def _paths(node: Node) -> list[str]:
    """Modules that an operator stands in, outermost first; the model itself and modules called twice left out."""
    stack = node.meta.get("nn_module_stack") or {}
    return [str(path) for path, _ in stack.values() if path and "@" not in str(path)]


def _common_path(names: Sequence[str]) -> str:
    """The longest module path that all names start with; a single name stands for itself."""
    split = [name.split("@")[0].split(".") for name in names]
    common = split[0]
    for parts in split[1:]:
        same = next((i for i, (a, b) in enumerate(zip(common, parts, strict=False)) if a != b), None)
        common = common[:same] if same is not None else common[: min(len(common), len(parts))]
    return ".".join(common)


def _may_empty(group: Group) -> bool:
    return group.frozen_reason is None or group.frozen_reason.startswith(FREE_BY_FLOORS)


def _optional(group: Group) -> Group:
    """A group that may also be empty; where its floors left no choice, it is all of it or nothing."""
    if group.frozen_reason is None:
        return replace(group, optional=True)
    return replace(group, frozen_reason=None, optional=True, multiple_of=group.width, min_keep=group.width)
