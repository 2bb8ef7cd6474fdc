"""What flows through a network's layers: its exported graph run on data, with a look at each call of a layer."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind
from torch.fx import Node
from torch.utils import _pytree as pytree

from qcqp_prune.errors import MaskMismatchError
from qcqp_prune.graph.channels import ChannelGraph
from qcqp_prune.graph.export import canonical_names, export, state_placeholders
from qcqp_prune.graph.follow import follow
from qcqp_prune.graph.inputs import ExampleInputs, as_call, batch_size
from qcqp_prune.graph.ops import HANDLERS
from qcqp_prune.graph.walk import Handler, Walk, argument, op_name

See = Callable[[int, Tensor, Tensor], "Tensor | None"]
"""Told of each call of a layer: its index in ``graph.layers``, what it reads, what it makes. May return another."""


class Arithmetic(Protocol):
    """What a run computes with; by default tensors, by PyTorch."""

    def state(self, name: str, tensor: Tensor) -> Any:
        """What stands for a parameter or buffer."""

    def step(self, node: Node, env: Mapping[Node, Any]) -> Any:
        """The result of an operator, given what it reads."""

    def plain(self, value: Any) -> Any:
        """A result as PyTorch has it."""


class _Tensors:
    """PyTorch's own."""

    def state(self, name: str, tensor: Tensor) -> Any:
        return tensor

    def step(self, node: Node, env: Mapping[Node, Any]) -> Any:
        args, kwargs = pytree.tree_map_only(Node, env.__getitem__, (node.args, dict(node.kwargs)))
        return cast(Callable[..., Any], node.target)(*args, **kwargs)

    def plain(self, value: Any) -> Any:
        return value


class Observed:
    """A network in eval mode whose layers are looked at while it runs.

    The exported graph is interpreted, so that it makes no difference whether a layer is a module, a function, part of
    a packed projection, or called twice. It computes with the model's own tensors: gradients reach its parameters, and
    a weight that is changed in place counts from the next operator on. Of a buffer that the forward writes each batch
    has a copy. Exported anew for each shape of the inputs.

    Args:
        model: the module that was traced, or one with the same layers.
        graph: its channel graph.
        handlers: as for ``trace``.
    """

    def __init__(
        self, model: nn.Module, graph: ChannelGraph, *, handlers: Mapping[str, Handler] | None = None
    ) -> None:
        self.model, self.graph = model, graph
        self._table = {**HANDLERS, **(handlers or {})}
        self._known: dict[Any, Followed] = {}

    def tensor(self, name: str) -> Tensor:
        """A parameter or buffer of the network, detached, by any of its names."""
        module, _, own = name.rpartition(".")
        found: Tensor = getattr(self.model.get_submodule(module), own)
        return found.detach()

    def run(self, inputs: ExampleInputs, see: See) -> list[Any]:
        """A forward pass.

        Args:
            inputs: of the model, as for ``trace``.
            see: called with each layer that has a weight of its own, in execution order. Not for recurrent layers,
                whose operators hide what they multiply.

        Returns:
            The leaves of the output.
        """
        steps = self.steps([inputs])
        for node in steps:
            layer = steps.followed.layer_of.get(node)
            if layer is not None:
                (made,) = steps.evaluate(node)
                seen = see(layer, steps[read_by(node)][0], made)
                if seen is not None:
                    steps[node] = [seen]
        return [leaf[0] if isinstance(leaf, list) else leaf for leaf in steps.outputs]

    def steps(self, batches: Sequence[ExampleInputs]) -> Steps:
        """The same step by step, for several batches of one shape side by side."""
        calls = [as_call(inputs) for inputs in batches]
        key = tuple(
            (tuple(x.shape), x.dtype) if isinstance(x, Tensor) else x for x in pytree.tree_leaves(calls[0])
        )
        if key not in self._known:
            self._known[key] = Followed(self.model, self.graph, calls[0], self._table)
        return Steps(self._known[key], calls)


class Followed:
    """A program exported for inputs of one shape, and which of its operators are which layers.

    Attributes:
        program: the exported program.
        layer_of: index in ``graph.layers`` of each node that is a call of a layer with a weight of its own.
        state: name of the parameter or buffer that each placeholder stands for, of tied ones the first.
        done_after: what is read for the last time by each node.
        written: placeholders of buffers that an operator writes, such as a count of calls.
    """

    def __init__(
        self, model: nn.Module, graph: ChannelGraph, call: Any, table: Mapping[str, Handler]
    ) -> None:
        self.model = model
        self.program: ExportedProgram = export(model, call, what="a batch of the data")
        names = state_placeholders(self.program, canonical_names(model))
        walk = Walk(model, names, batch_size(call))
        follow(walk, self.program, names, table)
        found = [layer.weight for layer in walk.layers]
        if found != [layer.weight for layer in graph.layers]:
            raise MaskMismatchError(
                f"the {type(model).__name__} makes {len(found)} products with weights and each other where the graph "
                f"has {len(graph.layers)}: trace this model, with inputs like those it is to be run on"
            )
        self.layer_of = {
            layer.node: k
            for k, layer in enumerate(walk.layers)
            if layer.weight and not layer.by_weight and _source(layer.node) is not None
        }
        self.state = {node: names[node.name] for node in self.program.graph.nodes if node.name in names}
        last = {source: node for node in self.program.graph.nodes for source in node.all_input_nodes}
        self.done_after: dict[Node, list[Node]] = {}
        for source, node in last.items():
            self.done_after.setdefault(node, []).append(source)
        roots = [_root(x) for node in self.program.graph.nodes for x in _written(node)]
        written = {root for root in roots if isinstance(root, Node)}
        self.written = {node for node in self.state if node in written}


class Steps:
    """A run of a program, node by node; ``steps[node]`` is what it gave for each batch.

    Iterating gives each operator before it is computed, and goes on where it stopped. What an operator made is dropped
    after its last use.
    """

    def __init__(self, followed: Followed, calls: Sequence[Any]) -> None:
        self.followed = followed
        self.outputs: list[Any] = []
        self._nodes = list(followed.program.graph.nodes)
        self._batches = len(calls)
        self._next = 0
        self._values: dict[Node, list[Any]] = {}
        self._arithmetic: Arithmetic = _Tensors()
        self._replaced: Mapping[Node, Node] = {}
        self._bind([iter(pytree.tree_leaves(call)) for call in calls])

    def __getitem__(self, node: Node) -> list[Any]:
        return self._values[node]

    def __setitem__(self, node: Node, values: list[Any]) -> None:
        self._values[node] = values

    def __contains__(self, node: Node) -> bool:
        return node in self._values

    def __iter__(self) -> Iterator[Node]:
        while self._next < len(self._nodes):
            node = self._nodes[self._next]
            if node.op == "output":
                self.outputs = [
                    self._values[x] if isinstance(x, Node) else x for x in pytree.tree_leaves(node.args)
                ]
            elif node.op != "placeholder":
                yield node
                if node not in self._values:
                    self.evaluate(node)
            self._next += 1
            for source in self.followed.done_after.get(node, ()):
                self._values.pop(source, None)

    def evaluate(self, node: Node) -> list[Any]:
        """Compute an operator whose inputs are there."""
        if node.op == "get_attr":
            module: Any = self.followed.program.graph_module
            for name in str(node.target).split("."):
                module = getattr(module, name)
            self._values[node] = [module] * self._batches
            return self._values[node]
        if node in self._replaced:
            self._values[node] = copy.deepcopy(self._values[self._replaced[node]])
            return self._values[node]
        self._values[node] = [
            self._arithmetic.step(node, {source: self._values[source][b] for source in node.all_input_nodes})
            for b in range(self._batches)
        ]
        return self._values[node]

    def fork(
        self,
        changes: Mapping[str, Tensor],
        arithmetic: Arithmetic | None = None,
        *,
        replaced: Mapping[Node, Node] | None = None,
    ) -> Steps:
        """A run from here on with other parameters or buffers, which nothing that was computed so far has read.

        Args:
            changes: by name, in the network's own shapes.
            arithmetic: that it computes with from here on; this run's own when None.
            replaced: operators that are not computed, but give what one that they read gave.
        """
        other = copy.copy(self)
        other._arithmetic = arithmetic or self._arithmetic
        other._replaced = {**self._replaced, **(replaced or {})}
        state, written = self.followed.state, self.followed.written
        # One copy for all: operators that work in place find views of one tensor still views of one.
        own = {
            node: values
            for node, values in self._values.items()
            if node not in state or (node in written and state[node] not in changes)
        }
        other._values = dict(zip(own, copy.deepcopy(list(own.values())), strict=True))
        for node, values in self._values.items():
            if node not in own:
                name = state[node]
                tensor = changes[name] if name in changes else self._arithmetic.plain(values[0])
                held = other._arithmetic.state(name, tensor)
                copied = node in written
                other._values[node] = [copy.deepcopy(held) if copied else held for _ in range(self._batches)]
        return other

    def results(self) -> list[Any]:
        """Run to the end; what the model returns for each batch."""
        for _ in self:
            pass
        spec = self.followed.program.call_spec.out_spec
        return [
            pytree.tree_unflatten(
                [self._arithmetic.plain(x[b]) if isinstance(x, list) else x for x in self.outputs], spec
            )
            for b in range(self._batches)
        ]

    def _bind(self, leaves: list[Iterator[Any]]) -> None:
        """Give every placeholder its tensor: the model's own, or of the inputs."""
        program, model = self.followed.program, self.followed.model
        tensors: dict[str, Tensor] = {
            **dict(model.named_parameters(remove_duplicate=False)),
            **dict(model.named_buffers(remove_duplicate=False)),
        }
        places = [node for node in self._nodes if node.op == "placeholder"]
        for node, spec in zip(places, program.graph_signature.input_specs, strict=True):
            if spec.kind is InputKind.USER_INPUT:
                self._values[node] = [next(x) for x in leaves]
            elif spec.kind in (InputKind.PARAMETER, InputKind.BUFFER):
                tensor = tensors[str(spec.target)]
                self._values[node] = [
                    tensor.detach().clone() if node in self.followed.written else tensor for _ in leaves
                ]
            else:
                self._values[node] = [program.constants[str(spec.target)]] * len(leaves)


def read_by(node: Node) -> Node:
    """The tensor that a layer's operator multiplies with its weight."""
    source = _source(node)
    assert source is not None, node
    return source


def norm_after(node: Node) -> Node | None:
    """The batch norm that alone reads a result, None where there is none."""
    users = list(node.users)
    return users[0] if len(users) == 1 and op_name(users[0]) == "aten::batch_norm" else None


def _written(node: Node) -> list[Any]:
    """What an operator writes; of norms that take statistics of their inputs the schema does not say so."""
    if op_name(node) in ("aten::batch_norm", "aten::instance_norm"):
        counts = argument(node, "training", False) or argument(node, "use_input_stats", False)
        return [argument(node, name) for name in ("running_mean", "running_var")] if counts else []
    return [node.args[0]] if (alias := _alias(node)) is not None and alias.is_write else []


def _root(source: Any) -> Any:
    """What a view is a view of."""
    while _alias(source) is not None:
        source = source.args[0]
    return source


def _alias(node: Any) -> Any:
    """What the schema says of an operator that works on, or gives a view of, its first argument."""
    if isinstance(node, Node) and isinstance(node.target, torch._ops.OpOverload) and node.args:
        return node.target._schema.arguments[0].alias_info
    return None


def _source(node: Node) -> Node | None:
    """The same; None where the operator hides it."""
    for name in ("input", "mat1", "self"):
        source = argument(node, name)
        if isinstance(source, Node) and (name != "input" or argument(node, "weight") is not None):
            return source
    return None
