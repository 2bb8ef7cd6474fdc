"""The other realisation: the exported graph with every written shape replaced by the kept one.

Needed where a ``forward`` has numbers written into it that no module attribute holds: ``x[:, :8]``, a functional pad
of channels, ``x.view(-1, 512 * 7 * 7)``. The result is a ``torch.fx.GraphModule`` with the same parameter paths.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from qcqp_prune.apply.joined_sum import JoinedSum, places_in
from qcqp_prune.apply.masked import MaskedNetwork
from qcqp_prune.apply.masked_ops import Value
from qcqp_prune.apply.rewrite_inputs import Exported, check_ranges, exports
from qcqp_prune.apply.rewrite_joins import Kept, Positions
from qcqp_prune.apply.rewrite_recurrent import call_recurrent_modules
from qcqp_prune.apply.rewrite_sizes import with_kept_sizes
from qcqp_prune.apply.shape_conv import ShapeConv2d
from qcqp_prune.errors import VerificationError
from qcqp_prune.graph.channels import BoolArray, ChannelGraph
from qcqp_prune.graph.walk import ADDITIONS, op_name

logger = logging.getLogger(__name__)

REALISATION_KEY = "qcqp_prune.rewritten"
"""Set in the ``meta`` of what is returned, to tell it from a user's own graph module; what it takes, in words."""


_MODULES: dict[str, tuple[type[nn.Module], ...]] = {
    "aten::batch_norm": (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm),
    "aten::dropout": (nn.Dropout,),
    "aten::feature_dropout": (nn.Dropout1d, nn.Dropout2d, nn.Dropout3d),
    "aten::alpha_dropout": (nn.AlphaDropout,),
    "aten::feature_alpha_dropout": (nn.FeatureAlphaDropout,),
    "aten::conv2d": (ShapeConv2d,),
}


_BY_METHOD: dict[Any, str] = {
    torch.ops.aten.sym_size.int: "size",
    torch.ops.aten.view.default: "view",
    torch.ops.aten.reshape.default: "reshape",
    torch.ops.aten._unsafe_view.default: "reshape",
    torch.ops.aten.expand.default: "expand",
}


def rewritings(
    model: nn.Module, small: nn.Module, graph: ChannelGraph, flat: BoolArray
) -> Iterator[GraphModule]:
    """Graph modules that compute the smaller network, those with more free sizes of inputs first.

    Not every number that a graph works out from sizes can be replaced by what is kept: then one with fewer that are
    free is what does.

    Args:
        model: the traced module, unchanged.
        small: a copy after surgery; its parameters and its batch norm, dropout and column modules are taken over.
        graph: the channel graph.
        flat: ``(unit_count,) bool``.

    Yields:
        Graph modules, each made when it is asked for; the last has no free size.
    """
    for exported in exports(model, graph):
        try:
            yield _rewritten(exported, model, small, graph, flat)
        except (RuntimeError, TypeError, ValueError) as error:
            if not exported.ranges:
                raise
            logger.debug("%s cannot be rewritten with free sizes: %s", graph.model, error)


def _rewritten(
    exported: Exported, model: nn.Module, small: nn.Module, graph: ChannelGraph, flat: BoolArray
) -> GraphModule:
    module, call = exported.module, exported.call
    kept: dict[Node, Any] = {}
    network = MaskedNetwork(model, graph, flat)
    network.without_blocks(module)
    copies: set[Node] = set()

    def note(node: Node, value: Any) -> None:
        kept[node] = _kept(value)
        if isinstance(value, Value) and value.copies is not None:
            copies.add(node)

    network.run(module, call, hook=note)
    # A column module that was traced itself is in the graph with all its parts: none of them is the whole of it.
    traced = {path for path, m in model.named_modules() if isinstance(m, ShapeConv2d)}
    modules = {path: m for path, m in small.named_modules() if path not in traced}
    call_recurrent_modules(module, modules, kept)
    positions, numbers = Positions.of(module.graph, kept, copies), itertools.count()
    for node in list(module.graph.nodes):
        if node.op != "call_function" or _as_module(module, node, modules, positions):
            continue
        if op_name(node) in ADDITIONS and _as_joined_sum(module, node, positions, numbers):
            continue
        with_kept_sizes(node, positions)
    check_ranges(module, exported.ranges)
    _ask_for_sizes(module)
    module.graph.lint()
    result = _rooted(module, small)
    result.train(model.training)
    result.meta[REALISATION_KEY] = exported.takes
    return result


def _ask_for_sizes(module: GraphModule) -> None:
    """Sizes that are computed are asked for and passed by methods of tensors.

    ``torch.jit.trace`` follows these; an operator that is called by itself turns sizes into the numbers of the example.
    """
    for node in list(module.graph.nodes):
        name = _BY_METHOD.get(node.target) if node.op == "call_function" else None
        if name is None or (name != "size" and not any(isinstance(s, Node) for s in node.args[1])):
            continue
        with module.graph.inserting_before(node):
            call = module.graph.call_method(name, node.args)
        call.meta = dict(node.meta)
        node.replace_all_uses_with(call)
        module.graph.erase_node(node)


def _kept(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return [_kept(v) for v in value]
    if not isinstance(value, Value):
        return None
    shape = value.value.shape
    if value.mask is None:
        return [torch.ones(s, dtype=torch.bool).numpy() for s in shape]
    other = [[k for k in range(len(shape)) if k != d] for d in range(len(shape))]
    return [(value.mask.amax(dims) if dims else value.mask).cpu().numpy() for dims in other]


def _as_module(module: GraphModule, node: Node, modules: dict[str, nn.Module], positions: Positions) -> bool:
    """Batch norm and dropout become their modules again, so that training mode works; columns need their own."""
    kinds = _MODULES.get(op_name(node), ())
    stack = node.meta.get("nn_module_stack") or {"": ("", None)}
    path = str(list(stack.values())[-1][0]).split("@")[0]
    if type(modules.get(path)) not in kinds:  # a subclass may do more than the operator
        return False
    module.add_submodule(path, modules[path])
    with module.graph.inserting_before(node):
        call = module.graph.call_module(path, (node.args[0],))
    _take_place(module, node, call, positions)
    return True


def _as_joined_sum(module: GraphModule, node: Node, positions: Positions, numbers: Iterator[int]) -> bool:
    """An addition whose operands keep different channels becomes a module that puts them in their places."""
    operands = [a for a in node.args[:2] if isinstance(a, Node) and a in positions.joined]
    if len(operands) != 2:
        return False
    results = positions.joined[node]
    rank = len(results)
    places = [
        [_places(positions.joined[a], dim - rank, results[dim]) for a in operands] for dim in range(rank)
    ]
    uneven = [dim for dim in range(rank) if any(p is not None for p in places[dim])]
    if not uneven:
        return False
    if len(uneven) > 1:  # the extractor shares along one dimension only
        raise VerificationError(
            f"the operands of {node.name} differ along {len(uneven)} dimensions: report it with the model"
        )
    (dim,) = uneven
    name = op_name(node).removeprefix("aten::")
    alpha = cast(float, node.kwargs.get("alpha", 1)) * (1 if name == "add" else -1)
    if name == "rsub":
        operands, places[dim] = operands[::-1], places[dim][::-1]
    path = next(p for k in numbers if not hasattr(module, p := f"joined_sum_{k}"))
    module.add_submodule(path, JoinedSum(dim - rank, places[dim], int(results[dim].sum()), scale=alpha))
    with module.graph.inserting_before(node):
        call = module.graph.call_module(path, tuple(operands))
    _take_place(module, node, call, positions)
    return True


def _places(operand: Kept, back: int, result: BoolArray) -> Tensor | None:
    if len(operand) < -back or len(operand[back]) != len(result):
        return None  # broadcast
    return places_in(result, operand[back])


def _take_place(module: GraphModule, node: Node, call: Node, positions: Positions) -> None:
    call.meta = dict(node.meta)
    positions.move(node, call)
    node.replace_all_uses_with(call)
    module.graph.erase_node(node)


def _rooted(module: GraphModule, small: nn.Module) -> GraphModule:
    """The same graph over the parameters of the smaller network, constants of the export beside them."""
    root = nn.Module()
    for node in module.graph.find_nodes(op="call_module"):
        _place(root, node.target, module.get_submodule(node.target))
    for node in module.graph.find_nodes(op="get_attr"):
        if not node.users:
            module.graph.erase_node(node)
        else:
            _place(root, node.target, _find(small, node.target, _find(module, node.target, None)))
    result = GraphModule(root, module.graph)
    # Tensors that the graph does not use belong to the state dict all the same.
    for path, owner in small.named_modules(remove_duplicate=False):
        tensors = {**owner._parameters, **owner._buffers}
        for leaf, tensor in tensors.items():
            if tensor is not None:
                persistent = leaf not in owner._non_persistent_buffers_set
                _place(result, f"{path}.{leaf}" if path else leaf, tensor, persistent=persistent)
    return result


def _find(module: nn.Module, path: str, default: Any) -> Any:
    current: Any = module
    for name in path.split("."):
        if not hasattr(current, name):
            return default
        current = getattr(current, name)
    return current


def _place(root: nn.Module, path: str, value: Any, *, persistent: bool = True) -> None:
    *parents, leaf = path.split(".")
    for name in parents:
        if not hasattr(root, name):
            root.add_module(name, nn.Module())
        root = getattr(root, name)
    if isinstance(value, Tensor) and not isinstance(value, nn.Parameter):
        root.register_buffer(leaf, value, persistent=persistent)
    elif not hasattr(root, leaf):
        setattr(root, leaf, value)
