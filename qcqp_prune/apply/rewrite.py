"""The other realisation: the exported graph with every written shape replaced by the kept one.

Needed where a ``forward`` has numbers written into it that no module attribute holds: ``x[:, :8]``, a functional pad
of channels, ``x.view(-1, 512 * 7 * 7)``. The result is a ``torch.fx.GraphModule`` with the same parameter paths.
"""

from __future__ import annotations

import inspect
import itertools
import math
import operator
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.fx import GraphModule, Node
from torch.fx.experimental.symbolic_shapes import free_symbols
from torch.utils import _pytree as pytree

from qcqp_prune.apply.joined_sum import JoinedSum, places_in
from qcqp_prune.apply.masked import MaskedNetwork, exported_module
from qcqp_prune.apply.masked_ops import Value
from qcqp_prune.apply.rewrite_recurrent import call_recurrent_modules
from qcqp_prune.apply.shape_conv import ShapeConv2d
from qcqp_prune.errors import TraceError, VerificationError
from qcqp_prune.graph.channels import BoolArray, ChannelGraph
from qcqp_prune.graph.export import export
from qcqp_prune.graph.heads import PRODUCTS
from qcqp_prune.graph.inputs import make_inputs
from qcqp_prune.graph.ops import joins, norms, pooling
from qcqp_prune.graph.walk import ADDITIONS, CONSTANTS, is_pointwise, op_name

_LAYOUT_KEPT = {*joins.HANDLERS, *norms.HANDLERS, *pooling.HANDLERS} - {"aten::glu"}

Kept = list[BoolArray]
"""For each dimension of a tensor which positions are kept."""

_KEEPS_LAYOUT = "qcqp_prune.keeps_layout"

REALISATION_KEY = "qcqp_prune.rewritten"
"""Set in the ``meta`` of what is returned, to tell it from a user's own graph module."""


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


def rewritten(model: nn.Module, small: nn.Module, graph: ChannelGraph, flat: BoolArray) -> GraphModule:
    """A graph module that computes the smaller network.

    Args:
        model: the traced module, unchanged.
        small: a copy after surgery; its parameters and its batch norm, dropout and column modules are taken over.
        graph: the channel graph.
        flat: ``(unit_count,) bool``.

    Returns:
        A graph module; its batch size is free where ``torch.export`` allows that.
    """
    module, call = _exported(model, graph)
    kept: dict[Node, Any] = {}
    network = MaskedNetwork(model, graph, flat)
    network.without_blocks(module)
    network.run(module, call, hook=lambda node, value: kept.setdefault(node, _kept(value)))
    # A column module that was traced itself is in the graph with all its parts: none of them is the whole of it.
    traced = {path for path, m in model.named_modules() if isinstance(m, ShapeConv2d)}
    modules = {path: m for path, m in small.named_modules() if path not in traced}
    call_recurrent_modules(module, modules, kept)
    for node in list(module.graph.nodes):
        if node.op != "call_function" or _as_module(module, node, modules, kept):
            continue
        if op_name(node) in ADDITIONS and _as_joined_sum(module, node, kept):
            continue
        _patch(node, kept)
    _ask_for_sizes(module)
    module.graph.lint()
    result = _rooted(module, small)
    result.train(model.training)
    result.meta[REALISATION_KEY] = True
    return result


def _exported(model: nn.Module, graph: ChannelGraph) -> tuple[GraphModule, Any]:
    """The exported module with a free batch size, or with the traced one where that cannot be."""
    device = next(iter(model.parameters()), torch.zeros(0)).device
    call = make_inputs(graph, device=device)
    double = pytree.tree_map(lambda x: torch.cat([x, x]) if _has_batch(x, graph.batch) else x, call)
    shapes = pytree.tree_map(
        lambda x: {0: torch.export.Dim.AUTO} if _has_batch(x, graph.batch) else None, call
    )
    args, kwargs = shapes
    try:
        names = list(inspect.signature(model.forward).parameters)
        spec = {**dict(zip(names, args, strict=False)), **kwargs}
        program = export(model, double, dynamic_shapes=spec)
        if _is_free(program, double, 2 * graph.batch):
            return exported_module(program), double
    except TraceError:
        pass
    return exported_module(export(model, call)), call


def _is_free(program: ExportedProgram, call: Any, batch: int) -> bool:
    """Whether the batch of every input stayed free: some operators need a number, and the export writes it down."""
    inputs = set(program.graph_signature.user_inputs)
    values = [n.meta["val"] for n in program.graph.nodes if n.op == "placeholder" and n.name in inputs]
    free = [v for v in values if isinstance(v, Tensor) and v.ndim and free_symbols(v.shape[0])]
    return len(free) == sum(_has_batch(x, batch) for x in pytree.tree_leaves(call))


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


def _has_batch(leaf: Any, batch: int) -> bool:
    return isinstance(leaf, Tensor) and leaf.ndim > 0 and leaf.shape[0] == batch


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


def _as_module(module: GraphModule, node: Node, modules: dict[str, nn.Module], kept: dict[Node, Any]) -> bool:
    """Batch norm and dropout become their modules again, so that training mode works; columns need their own."""
    kinds = _MODULES.get(op_name(node), ())
    stack = node.meta.get("nn_module_stack") or {"": ("", None)}
    path = str(list(stack.values())[-1][0]).split("@")[0]
    if type(modules.get(path)) not in kinds:  # a subclass may do more than the operator
        return False
    module.add_submodule(path, modules[path])
    with module.graph.inserting_before(node):
        call = module.graph.call_module(path, (node.args[0],))
    _take_place(module, node, call, kept)
    call.meta[_KEEPS_LAYOUT] = not isinstance(modules[path], ShapeConv2d)
    return True


def _as_joined_sum(module: GraphModule, node: Node, kept: dict[Node, Any]) -> bool:
    """An addition whose operands keep different channels becomes a module that puts them in their places."""
    operands = [a for a in node.args[:2] if isinstance(a, Node) and kept.get(a) is not None]
    if len(operands) != 2:
        return False
    rank = len(kept[node])
    places: dict[int, list[Tensor | None]] = {}
    for dim in range(rank):
        result = kept_after_joins(node, kept, dim)
        places[dim] = [_places(a, kept, dim - rank, result) for a in operands]
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
    size = int(kept_after_joins(node, kept, dim).sum())
    path = next(p for k in itertools.count() if not hasattr(module, p := f"joined_sum_{k}"))
    module.add_submodule(path, JoinedSum(dim - rank, places[dim], size, scale=alpha))
    with module.graph.inserting_before(node):
        call = module.graph.call_module(path, tuple(operands))
    _take_place(module, node, call, kept)
    return True


def _places(operand: Node, kept: dict[Node, Any], back: int, result: BoolArray) -> Tensor | None:
    own = kept[operand]
    if len(own) < -back or len(own[back]) != len(result):
        return None  # broadcast
    return places_in(result, kept_after_joins(operand, kept, len(own) + back))


def _take_place(module: GraphModule, node: Node, call: Node, kept: dict[Node, Any]) -> None:
    call.meta = {**node.meta, _KEEPS_LAYOUT: True}
    kept[call] = kept.pop(node)
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


def _patch(node: Node, kept: dict[Node, Any]) -> None:
    """Replace the sizes written into one call by the kept ones."""
    name = op_name(node).removeprefix("aten::")
    out: Any = kept.get(node)
    if name in ("view", "reshape", "_unsafe_view", "_reshape_alias"):
        if node.target is torch.ops.aten.view.default:  # a smaller tensor may lie in memory in another order
            node.target = torch.ops.aten.reshape.default
        _set(node, 1, _computed(node, _sizes(node.args[1], out), out))
    elif name == "expand":
        _set(node, 1, _sizes(node.args[1], [kept_after_joins(node, kept, d) for d in range(len(out))]))
    elif op_name(node) in CONSTANTS:
        place = 1 if name.startswith("new_") else 0
        _set(
            node, place, _sizes(node.args[place], [kept_after_joins(node, kept, d) for d in range(len(out))])
        )
    elif name == "unflatten":
        dim = int(node.args[1]) % (len(out) - len(node.args[2]) + 1)  # type: ignore[arg-type]
        _set(node, 2, _sizes(node.args[2], out[dim:]))
    elif name in ("chunk", "split", "split_with_sizes", "unsafe_chunk", "unsafe_split", "tensor_split"):
        _patch_split(node, out)
    elif name in ("slice", "narrow"):
        _patch_slice(node, kept, name)
    elif name in ("pad", "constant_pad_nd"):
        _patch_pad(node, kept)
    elif name in ("layer_norm", "rms_norm"):
        shape = node.args[1]
        _set(node, 1, _sizes(shape, out[-len(shape) :]))  # type: ignore[arg-type]
    elif name == "scaled_dot_product_attention":
        _patch_scale(node, kept)
    elif name == "group_norm" and node.args[1] == len(out[1]):
        _set(node, 1, int(out[1].sum()))
    elif name.startswith("conv"):
        _patch_groups(node, kept)


def _patch_scale(node: Node, kept: dict[Node, Any]) -> None:
    """The scale of attention is the dense one's, also where it is worked out from the size of a head."""
    dims = kept[node.args[0]][-1]  # type: ignore[index]
    if node.kwargs.get("scale") is None and not dims.all():
        node.kwargs = {**node.kwargs, "scale": 1 / math.sqrt(len(dims))}


def _sizes(written: Any, kept: Kept) -> list[Any]:
    """Written sizes with those of pruned dimensions replaced; -1 and computed sizes stay."""
    return [
        int(k.sum()) if isinstance(size, int) and size != -1 and not k.all() else size
        for size, k in zip(written, kept, strict=False)
    ]


def _computed(node: Node, sizes: list[Any], kept: Kept) -> list[Any]:
    """Sizes that the graph computes, such as samples times heads, in the proportion that is kept."""
    out = []
    for size, k in zip(sizes, kept, strict=True):
        if isinstance(size, Node) and not k.all():
            share = math.gcd(int(k.sum()), len(k))
            with node.graph.inserting_before(node):
                size = node.graph.call_function(operator.mul, (size, int(k.sum()) // share))
                size = node.graph.call_function(operator.floordiv, (size, len(k) // share))
        out.append(size)
    return out


def _set(node: Node, position: int, value: Any) -> None:
    args = list(node.args)
    args[position] = value
    node.args = tuple(args)


def _dim(node: Node, rank: int, position: int) -> int:
    value = node.args[position] if len(node.args) > position else node.kwargs.get("dim", 0)
    return int(value) % rank  # type: ignore[arg-type]


def _patch_split(node: Node, out: list[Kept]) -> None:
    dim = _dim(node, len(out[0]), 2)
    if all(piece[dim].all() for piece in out):
        return
    sizes = [int(piece[dim].sum()) for piece in out]
    node.target = torch.ops.aten.split_with_sizes.default
    node.args, node.kwargs = (node.args[0], sizes, dim), {}


def _patch_slice(node: Node, kept: dict[Node, Any], name: str) -> None:
    source = kept[node.args[0]]  # type: ignore[index]
    dim = _dim(node, len(source), 1)
    along = source[dim]
    if along.all():
        return
    start = node.args[2] if len(node.args) > 2 else None
    first = 0 if start is None else int(start)  # type: ignore[arg-type]
    if name == "narrow":
        stop = first + int(node.args[3])  # type: ignore[arg-type]
    else:
        stop = len(along) if len(node.args) < 4 or node.args[3] is None else int(node.args[3])  # type: ignore[arg-type]
    first, stop, _ = slice(first, stop).indices(len(along))
    begin, length = int(along[:first].sum()), int(along[first:stop].sum())
    node.args = (node.args[0], dim, begin, length if name == "narrow" else begin + length)


def _patch_pad(node: Node, kept: dict[Node, Any]) -> None:
    source, out = kept[node.args[0]], kept[node]  # type: ignore[index]
    amounts = list(node.args[1])  # type: ignore[arg-type]
    for k in range(len(amounts) // 2):
        dim = len(source) - 1 - k
        before, after = amounts[2 * k], amounts[2 * k + 1]
        along = kept_after_joins(node, kept, dim)
        if out[dim].all() and along.all():
            continue
        amounts[2 * k] = int(along[:before].sum()) if before > 0 else before
        amounts[2 * k + 1] = int(along[len(along) - after :].sum()) if after > 0 else after
    _set(node, 1, amounts)


def kept_after_joins(node: Node, kept: dict[Node, Any], dim: int) -> BoolArray:
    """Which positions of padding or of an expansion survive: those that the tensors it is joined with keep.

    Such positions are always kept by the masks; what they are joined with decides. It is followed through operators
    that leave every position where it is.
    """
    along: BoolArray = kept[node][dim]
    back = dim - len(kept[node])  # joins align from the right
    seen, front = {node}, list(node.users)
    while front:
        user = front.pop()
        if user in seen:
            continue
        seen.add(user)
        if op_name(user) == "aten::scaled_dot_product_attention":  # heads of a mask are those of the queries
            queries = kept[user.args[0]]  # type: ignore[index]
            if -len(queries) <= back < -2 and queries[back].shape == along.shape:
                along = along & queries[back]
            continue
        if not (_keeps_layout(user) or _repeats(user, back)):
            continue
        after = kept[user]
        if len(after) >= -back and after[back].shape == along.shape:
            along = along & after[back]
            front += list(user.users)
    return along


def _repeats(node: Node, back: int) -> bool:
    """Whether an operator is a product of matrices that is repeated over a dimension, counted from the right."""
    return node.op == "call_function" and op_name(node) in PRODUCTS and back < -2


def _keeps_layout(node: Node) -> bool:
    if node.op == "call_module":
        return bool(node.meta.get(_KEEPS_LAYOUT))
    name = op_name(node)
    return node.op == "call_function" and (name in _LAYOUT_KEPT or is_pointwise(node))


def _patch_groups(node: Node, kept: dict[Node, Any]) -> None:
    """Groups of a depthwise convolution go with their channels; those of any other one stay."""
    arguments = [a.name for a in node.target._schema.arguments]  # type: ignore[union-attr]
    position = arguments.index("groups")
    if len(node.args) <= position:
        return
    if isinstance(node.args[position], Node):
        return  # a group for each sample
    groups = int(node.args[position])  # type: ignore[arg-type]
    rows = kept[node.args[1]][0].reshape(groups, -1)  # type: ignore[index]
    _set(node, position, int(rows.any(1).sum()))
