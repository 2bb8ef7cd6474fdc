"""The oracle: the whole network, computed with masks.

Every operator of the exported graph is executed twice, on values and on masks of the same shape. Operators that only
move positions move the masks with PyTorch's own implementation, so nothing here depends on the labels of the graph
extractor but the masks of the parameters, and ``KeptSum`` of freely shared sums. Operators that mix positions use kept
entries only. What surgery returns must compute the same (identity 3).
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.fx import GraphModule, Node
from torch.utils import _pytree as pytree

from qcqp_prune.apply.masked_complex import COMPLEX
from qcqp_prune.apply.masked_lookups import LOOKUPS
from qcqp_prune.apply.masked_norms import NORMS
from qcqp_prune.apply.masked_ops import RULES, Value, pointwise
from qcqp_prune.apply.masked_products import PRODUCTS
from qcqp_prune.apply.masked_recurrent import RECURRENT
from qcqp_prune.apply.masked_sums import SUMS, deciding, marked, with_kept
from qcqp_prune.apply.masked_windows import WINDOWS
from qcqp_prune.apply.removed import without_blocks
from qcqp_prune.apply.widened import Widened
from qcqp_prune.errors import UnsupportedOpError
from qcqp_prune.graph.channels import BoolArray, ChannelGraph
from qcqp_prune.graph.export import canonical_names, export, plain_attention
from qcqp_prune.graph.inputs import ExampleInputs, as_call
from qcqp_prune.graph.masks import Masks
from qcqp_prune.graph.outputs import output_leaves, traced_state
from qcqp_prune.graph.walk import CONSTANTS, additions, is_pointwise, op_name
from qcqp_prune.graph.zeroed import kernel_mask, tensor_mask

Hook = Callable[[Node, Any], None]

_ASSERTION = torch.ops.aten._assert_tensor_metadata.default

_TABLES = (SUMS, RULES, NORMS, PRODUCTS, LOOKUPS, WINDOWS, RECURRENT, COMPLEX)


def masked(model: nn.Module, graph: ChannelGraph, masks: Masks) -> MaskedNetwork:
    """The network with everything that the masks remove held at zero, at full size.

    Args:
        model: the module that was traced; it is not changed.
        graph: its channel graph.
        masks: which units are kept.

    Returns:
        A callable with the model's own arguments; inputs may be of any floating dtype, weights follow it.

    Raises:
        MaskMismatchError: graph and masks do not belong together.
    """
    return MaskedNetwork(model, graph, masks.flat(graph))


class MaskedNetwork:
    """Interprets the exported graph of a model with mask-aware operators; see ``masked``."""

    def __init__(self, model: nn.Module, graph: ChannelGraph, flat: BoolArray) -> None:
        self._model, self._graph, self._flat = model, graph, flat
        self._canonical = canonical_names(model)
        self._specs = {spec.name: spec for spec in graph.tensors}
        # A filter without a column is still a channel: it gives its bias. So columns are zeroed, not masked.
        self._kernels = {
            spec.name: kernel_mask(graph, spec, flat) for spec in graph.tensors if spec.columns is not None
        }
        self._kept_sums = {kept.index: kept for kept in graph.kept_sums}
        self.uneven_sums: set[int] = set()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What the model returns, with everything that is removed held at zero."""
        module = self.without_blocks(exported_module(export(self._model, self._in_own_dtype((args, kwargs)))))
        leaves = self.run(module, (args, kwargs))
        return pytree.tree_unflatten(leaves, module.graph._codegen.pytree_info.out_spec)  # type: ignore[attr-defined]

    def without_blocks(self, module: GraphModule) -> GraphModule:
        """An exported module of this model without the branches that are removed as a whole, in place."""
        return without_blocks(module, self._graph, self._flat)

    def _in_own_dtype(self, call: Any) -> Any:
        """Floating inputs in the dtype of the weights, for the export."""
        own = next((p.dtype for p in self._model.parameters() if p.is_floating_point()), None)
        cast = lambda x: x.to(own) if x.is_floating_point() and own is not None else x  # noqa: E731
        return pytree.tree_map_only(Tensor, cast, call)

    def run(
        self,
        module: GraphModule,
        call: ExampleInputs,
        hook: Hook | None = None,
        *,
        dtype: torch.dtype | None = None,
    ) -> list[Any]:
        """Interpret an exported module of this model.

        Args:
            module: from ``exported_module`` and ``without_blocks``.
            call: ``(args, kwargs)``.
            hook: called with each node and its ``Value`` (or sequence of them).
            dtype: of floating weights; the dtype of the floating inputs when None. In double precision nothing is
                narrower, whatever the forward asks for.

        Returns:
            The leaves of the output.
        """
        inputs = iter(pytree.tree_leaves(as_call(call)))
        dtype = dtype or _dtype(call)
        env: dict[Node, Any] = {}
        last_use = _last_uses(module)
        sums = additions(module.graph)
        with torch.no_grad(), Widened() if dtype is torch.float64 else contextlib.nullcontext():
            for node in _weights_when_read(module):
                if node.op == "output":
                    return [x.value if isinstance(x, Value) else x for x in _leaves(node.args, env)]
                if node in sums:
                    env[node] = self._added(node, sums[node], env)
                else:
                    env[node] = self._evaluate(module, node, env, inputs, dtype)
                if hook is not None:
                    hook(node, env[node])
                for done in last_use.get(node, ()):
                    del env[done]
        raise UnsupportedOpError("the exported graph has no output: trace a model that returns something")

    def _evaluate(
        self,
        module: GraphModule,
        node: Node,
        env: Mapping[Node, Any],
        inputs: Iterator[Any],
        dtype: torch.dtype | None,
    ) -> Any:
        if node.op == "placeholder":
            leaf = next(inputs)
            return Value(leaf) if isinstance(leaf, Tensor) else leaf
        if node.op == "get_attr":
            return self._state(module, str(node.target), dtype)
        return execute(node, env)

    def arithmetic(self, program: ExportedProgram) -> MaskedArithmetic:
        """For a run of the network's layers with masks, step by step, from wherever its masks begin to matter."""
        return MaskedArithmetic(self._held, self._added, additions(program.graph))

    def _added(self, node: Node, index: int, env: Mapping[Node, Any]) -> Any:
        """The result of an addition, given its number and what it reads."""
        kept = self._kept_sums.get(index)
        if kept is not None and kept.repeats:
            env = {n: deciding(env[n]) for n in node.all_input_nodes}
        value = execute(node, env)
        if not isinstance(value, Value):
            return value
        if kept is not None:
            value = with_kept(value, kept)
        if value.uneven:
            self.uneven_sums.add(index)
        return value

    def _state(self, module: GraphModule, target: str, dtype: torch.dtype | None) -> Any:
        tensor = _attribute(module, target)
        if not isinstance(tensor, Tensor):
            return tensor
        return self._held(self._canonical.get(target, ""), tensor, dtype)

    def _held(self, name: str, tensor: Tensor, dtype: torch.dtype | None = None) -> Value:
        """A parameter or buffer, with what is removed at zero."""
        spec, kernel = self._specs.get(name), self._kernels.get(name)
        # Made when read: masks of all weights at once take a byte for each.
        mask = None if spec is None else tensor_mask(self._graph, spec, self._flat)
        tensor = tensor.detach()
        if dtype is not None and tensor.is_floating_point():
            tensor = tensor.to(dtype)
        if kernel is not None:
            tensor = tensor * kernel.to(tensor.device)
        follows = torch.ones((), dtype=torch.bool, device=tensor.device).expand(tensor.shape)
        if mask is None:
            return Value(tensor.clone(), follows=follows)
        mask = mask.to(tensor.device)
        return Value(tensor.masked_fill(~mask, 0), mask, follows)


@dataclass(frozen=True)
class MaskedArithmetic:
    """An ``observe.Arithmetic`` on values and masks; a tensor without a mask is kept as a whole.

    Attributes:
        held: a parameter or buffer of a name, with what is removed at zero.
        added: the result of an addition, given its number and what it reads.
        sums: the numbers of a program's additions.
    """

    held: Callable[[str, Tensor], Value]
    added: Callable[[Node, int, Mapping[Node, Any]], Any]
    sums: Mapping[Node, int]

    def state(self, name: str, tensor: Tensor) -> Any:
        """What stands for a parameter or buffer."""
        return self.held(name, tensor)

    def step(self, node: Node, env: Mapping[Node, Any]) -> Any:
        """The result of an operator, given what it reads."""
        if node.target is _ASSERTION:
            return None
        values = pytree.tree_map_only(Tensor, Value, dict(env))
        return self.added(node, self.sums[node], values) if node in self.sums else execute(node, values)

    def plain(self, value: Any) -> Any:
        """A result as PyTorch has it."""
        return value.value if isinstance(value, Value) else value


def _weights_when_read(module: GraphModule) -> Iterator[Node]:
    """The nodes in order, weights just before what first reads them: not all need to be there in double precision."""
    seen: set[Node] = set()
    for node in module.graph.nodes:
        if node.op == "get_attr":
            continue
        for source in node.all_input_nodes:
            if source.op == "get_attr" and source not in seen:
                seen.add(source)
                yield source
        yield node


def exported_module(program: ExportedProgram) -> GraphModule:
    """The program as a graph module with the model's own parameter paths, without input guards."""
    guards = {"check_guards": False} if "check_guards" in inspect.signature(program.module).parameters else {}
    module = program.module(**guards)
    assert isinstance(module, GraphModule)
    # Assertions on dtypes, which a comparison in double precision would break.
    for part in [m for m in module.modules() if isinstance(m, GraphModule)]:
        for node in part.graph.find_nodes(op="call_function", target=_ASSERTION):
            part.graph.erase_node(node)
        part.recompile()
    return module


def execute(node: Node, env: Mapping[Node, Any]) -> Any:
    """One operator on values and masks."""
    args, kwargs = pytree.tree_map_only(Node, env.__getitem__, (node.args, dict(node.kwargs)))
    name = op_name(node)
    rule = next((r for table in _TABLES if (r := table.get(name)) is not None), None)
    rule = rule or (pointwise if is_pointwise(node) else None)
    values = [x for x in pytree.tree_leaves((args, kwargs), is_leaf=_is_value) if isinstance(x, Value)]
    if rule is not None and values:
        return marked(rule, node.target, (args, kwargs), rule(node.target, args, kwargs))
    is_size = name.startswith("aten::sym_")
    if (
        not is_size
        and name not in CONSTANTS
        and any(v.mask is not None and not bool(v.mask.all()) for v in values)
    ):
        raise UnsupportedOpError(
            f"{name} has no mask-aware version, yet something that it reads is pruned: "
            "pass its layers in ignored_layers"
        )
    plain_args, plain_kwargs = pytree.tree_map_only(Value, _plain, (args, kwargs), is_leaf=_is_value)
    out = node.target(*plain_args, **plain_kwargs)  # type: ignore[operator]
    if name in CONSTANTS:
        return Value(out, copies=torch.zeros((), dtype=torch.long, device=out.device).expand(out.shape))
    return pytree.tree_map_only(Tensor, Value, out)


def model_outputs(model: nn.Module, call: tuple[tuple[Any, ...], dict[str, Any]]) -> list[Any]:
    """The leaves of a forward pass in eval mode, without gradients, by PyTorch's plain attention."""
    args, kwargs = call
    with traced_state(model), torch.no_grad(), plain_attention():
        return output_leaves(model(*args, **kwargs))


def _is_value(x: Any) -> bool:
    return isinstance(x, Value)


def _plain(value: Value) -> Tensor:
    return value.value


def _dtype(call: Any) -> torch.dtype | None:
    floats = [x.dtype for x in pytree.tree_leaves(call) if isinstance(x, Tensor) and x.is_floating_point()]
    return floats[0] if floats else None


def _attribute(module: nn.Module, path: str) -> Any:
    for name in path.split("."):
        module = getattr(module, name)
    return module


def _leaves(args: Sequence[Any], env: Mapping[Node, Any]) -> list[Any]:
    return [env[x] if isinstance(x, Node) else x for x in pytree.tree_leaves(args)]


def _last_uses(module: GraphModule) -> dict[Node, list[Node]]:
    """After which node each value is not needed any more; in-place operators keep their argument's storage alive."""
    last: dict[Node, Node] = {}
    for node in module.graph.nodes:
        for source in node.all_input_nodes:
            last[source] = node
    done: dict[Node, list[Node]] = {}
    for source, node in last.items():
        if node.op != "output":
            done.setdefault(node, []).append(source)
    return done
