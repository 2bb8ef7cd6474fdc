"""What flows through a network's layers: its exported graph run on data, with a look at each call of a layer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, cast

from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind
from torch.fx import Node
from torch.utils import _pytree as pytree

from qcqp_prune.errors import MaskMismatchError
from qcqp_prune.graph.channels import ChannelGraph
from qcqp_prune.graph.export import canonical_names, export, plain_attention, state_placeholders
from qcqp_prune.graph.follow import follow
from qcqp_prune.graph.inputs import ExampleInputs, as_call, batch_size
from qcqp_prune.graph.ops import HANDLERS
from qcqp_prune.graph.outputs import traced_state
from qcqp_prune.graph.walk import Handler, Walk, argument

See = Callable[[int, Tensor, Tensor], "Tensor | None"]
"""Told of each call of a layer: its index in ``graph.layers``, what it reads, what it makes. May return another."""


class Observed:
    """A network in eval mode whose layers are looked at while it runs.

    The exported graph is interpreted, so that it makes no difference whether a layer is a module, a function, part of
    a packed projection, or called twice. It computes with the model's own tensors: gradients reach its parameters, and
    a weight that is changed in place counts from the next operator on. Exported anew for each shape of the inputs.

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
    """

    def __init__(
        self, model: nn.Module, graph: ChannelGraph, call: Any, table: Mapping[str, Handler]
    ) -> None:
        self.model = model
        self.program: ExportedProgram = export(model, call)
        placeholders = state_placeholders(self.program, canonical_names(model))
        walk = Walk(model, placeholders, batch_size(call))
        follow(walk, self.program, placeholders, table)
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


class Steps:
    """A run of a program, node by node; ``steps[node]`` is what it gave for each batch.

    Iterating gives each operator before it is computed. What it made is dropped after its last use.
    """

    def __init__(self, followed: Followed, calls: Sequence[Any]) -> None:
        self.followed = followed
        self.outputs: list[Any] = []
        self._nodes = list(followed.program.graph.nodes)
        self._leaves = [pytree.tree_leaves(call) for call in calls]
        self._values: dict[Node, list[Any]] = {}

    def __getitem__(self, node: Node) -> list[Any]:
        return self._values[node]

    def __setitem__(self, node: Node, values: list[Any]) -> None:
        self._values[node] = values

    def __contains__(self, node: Node) -> bool:
        return node in self._values

    def __iter__(self) -> Iterator[Node]:
        last: dict[Node, Node] = {}
        for node in self._nodes:
            for source in node.all_input_nodes:
                last[source] = node
        done: dict[Node, list[Node]] = {}
        for source, node in last.items():
            done.setdefault(node, []).append(source)
        with traced_state(self.followed.model), plain_attention():
            self._bind()
            for node in self._nodes:
                if node.op == "output":
                    self.outputs = [
                        self._values[x] if isinstance(x, Node) else x for x in pytree.tree_leaves(node.args)
                    ]
                elif node.op != "placeholder":
                    yield node
                    if node not in self._values:
                        self.evaluate(node)
                for source in done.get(node, ()):
                    self._values.pop(source, None)

    def evaluate(self, node: Node) -> list[Any]:
        """Compute an operator whose inputs are there."""
        if node.op == "get_attr":
            module: Any = self.followed.program.graph_module
            for name in str(node.target).split("."):
                module = getattr(module, name)
            self._values[node] = [module] * len(self._leaves)
            return self._values[node]
        target = cast(Callable[..., Any], node.target)
        self._values[node] = []
        for batch in range(len(self._leaves)):
            here = {source: self._values[source][batch] for source in node.all_input_nodes}
            args, kwargs = pytree.tree_map_only(Node, here.__getitem__, (node.args, dict(node.kwargs)))
            self._values[node].append(target(*args, **kwargs))
        return self._values[node]

    def _bind(self) -> None:
        """Give every placeholder its tensor: the model's own, or of the inputs."""
        program, model = self.followed.program, self.followed.model
        state: dict[str, Tensor] = {
            **dict(model.named_parameters(remove_duplicate=False)),
            **dict(model.named_buffers(remove_duplicate=False)),
        }
        places = [node for node in self._nodes if node.op == "placeholder"]
        leaves = [iter(leaves) for leaves in self._leaves]
        for node, spec in zip(places, program.graph_signature.input_specs, strict=True):
            if spec.kind is InputKind.USER_INPUT:
                self._values[node] = [next(x) for x in leaves]
            elif spec.kind in (InputKind.PARAMETER, InputKind.BUFFER):
                self._values[node] = [state[str(spec.target)]] * len(leaves)
            else:
                self._values[node] = [program.constants[str(spec.target)]] * len(leaves)


def read_by(node: Node) -> Node:
    """The tensor that a layer's operator multiplies with its weight."""
    source = _source(node)
    assert source is not None, node
    return source


def _source(node: Node) -> Node | None:
    """The same; None where the operator hides it."""
    for name in ("input", "mat1", "self"):
        source = argument(node, name)
        if isinstance(source, Node) and (name != "input" or argument(node, "weight") is not None):
            return source
    return None
