"""Mask-aware operators: each takes values with masks and gives values with masks."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from qcqp_prune.errors import UnsupportedOpError
from qcqp_prune.graph.ops.joins import UNTAGGED
from qcqp_prune.graph.ops.pooling import POOLING, SAMPLING, UPSAMPLING
from qcqp_prune.graph.ops.reductions import ORDERED


@dataclass(frozen=True, eq=False)
class Value:
    """A tensor at full size and which of its entries are kept: same shape, bool, or None for all.

    ``follows``, ``copies`` and ``uneven`` are for sums, see ``masked_sums``; ``uneven`` tells that the operands of
    one keep different entries.
    """

    value: Tensor
    mask: Tensor | None = None
    follows: Tensor | None = None
    copies: Tensor | None = None
    uneven: bool = False


Rule = Callable[[Any, tuple[Any, ...], dict[str, Any]], Any]


def _values(tree: Any) -> list[Value]:
    return [x for x in pytree.tree_leaves(tree, is_leaf=_is_value) if isinstance(x, Value)]


def _is_value(x: Any) -> bool:
    return isinstance(x, Value)


def _run(target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    plain = pytree.tree_map_only(Value, lambda v: v.value, (args, kwargs), is_leaf=_is_value)
    return target(*plain[0], **plain[1])


def _hold(value: Tensor, mask: Tensor | None) -> Value:
    """Zero what is removed, in place so that in-place operators of the network keep their aliases."""
    if mask is None or bool(mask.all()):
        return Value(value)
    return Value(value.masked_fill_(~mask, 0), mask)


def _broadcast(mask: Tensor | None, shape: torch.Size) -> Tensor | None:
    return None if mask is None else mask.expand(shape)


def _both(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    if a is None or b is None:
        return a if b is None else b
    return a & b


def pointwise(target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Value:
    """An element is kept where all that it is made of is kept."""
    out = _run(target, args, kwargs)
    mask: Tensor | None = None
    for v in _values((args, kwargs)):
        mask = _both(mask, _broadcast(v.mask, out.shape))
    return _hold(out, mask)


def move(target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Positions move: the same operator moves the masks."""
    if target is torch.ops.aten.view.default:  # in another dtype a tensor may lie in memory in another order
        target = torch.ops.aten.reshape.default
    out = _run(target, args, kwargs)
    if all(v.mask is None for v in _values((args, kwargs))):
        return pytree.tree_map_only(Tensor, Value, out)
    moved = _move_masks(target, args, kwargs)
    if isinstance(out, Tensor):
        return Value(out, moved)
    return [Value(o, m) for o, m in zip(out, moved, strict=True)]


def _move_masks(target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    def own(v: Value) -> Tensor:
        return torch.ones_like(v.value, dtype=torch.bool) if v.mask is None else v.mask

    swapped = pytree.tree_map_only(Value, own, (args, kwargs), is_leaf=_is_value)
    return target(*swapped[0], **swapped[1])


def constant_pad(target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Value:
    """New positions are kept, except those of a channel that is removed: its complement is padded with zeros."""
    out = _run(target, args, kwargs)
    source: Value = args[0]
    if source.mask is None:
        return Value(out)
    removed = (~source.mask).to(torch.float32)
    mode = args[2] if len(args) > 2 and isinstance(args[2], str) else kwargs.get("mode", "constant")
    padded = torch.nn.functional.pad(removed, args[1], mode=mode)
    along = sorted({-1 - k // 2 for k, amount in enumerate(args[1]) if amount})
    whole = source.mask.amax(along, keepdim=True) if along else source.mask
    return Value(out, (padded == 0) & whole)


def matrix(target: Any, args: tuple[Any, ...], kwargs: dict[str, Any], *, out_dim: int) -> Value:
    """Convolution or linear map: an output is kept where its row of the weight is.

    Args:
        target: the operator.
        args: its positional arguments: input, weight, ...
        kwargs: its keyword arguments.
        out_dim: dimension of the output that holds channels, counted from the end.
    """
    out = _run(target, args, kwargs)
    weight: Value = args[1]
    if weight.mask is None:
        return Value(out)
    name = target._schema.name
    if "transpose" in name:
        groups = _argument(target, args, kwargs, "groups", 1)
        rows = weight.mask.reshape(groups, -1, *weight.mask.shape[1:]).flatten(3).any(-1).any(1).reshape(-1)
    else:
        rows = weight.mask.flatten(1).any(1)
    mask = rows.reshape([-1 if d == out.ndim + out_dim else 1 for d in range(out.ndim)])
    return _hold(out, mask.expand(out.shape))


def _argument(target: Any, args: tuple[Any, ...], kwargs: dict[str, Any], name: str, default: Any) -> Any:
    for position, argument in enumerate(target._schema.arguments):
        if argument.name == name:
            if name in kwargs:
                return kwargs[name]
            if position < len(args):
                return args[position]
            return argument.default_value if argument.has_default_value() else default
    return default


def per_channel(target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Value:
    """Each channel for itself, with parameters of its own: the mask passes."""
    return _hold(_run(target, args, kwargs), args[0].mask)


def pooled(target: Any, args: tuple[Any, ...], kwargs: dict[str, Any], *, dims: int) -> Any:
    """The last dimensions are mixed; they are never pruned, so any of their positions tells a channel's mask."""
    out = _run(target, args, kwargs)
    source: Value = args[0]
    if source.mask is None:
        return pytree.tree_map_only(Tensor, Value, out)
    spatial = list(range(-dims, 0))
    channel = source.mask.amax(spatial, keepdim=True)
    if not bool((source.mask == channel).all()):
        raise UnsupportedOpError(
            "pooling over positions of which some are pruned: pass the layer in ignored_layers"
        )
    if isinstance(out, Tensor):
        return _hold(out, channel.expand(out.shape))
    return [_hold(o, channel.expand(o.shape)) for o in out]


def sampled(target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Value:
    """``grid_sample``: only channels may be removed."""
    source: Value = args[0]
    return pooled(target, args, kwargs, dims=source.value.ndim - 2)  # type: ignore[no-any-return]


def reduction(target: Any, args: tuple[Any, ...], kwargs: dict[str, Any], *, neutral: float) -> Any:
    """A reduction in which ``neutral`` changes nothing: removed entries are that."""
    source: Value = args[0]
    if source.mask is None:
        return pytree.tree_map_only(Tensor, Value, _run(target, args, kwargs))
    if len(args) > 1 and isinstance(args[1], Value):  # max(a, b)
        return pointwise(target, args, kwargs)
    out = _run(target, (Value(source.value.masked_fill(~source.mask, neutral)), *args[1:]), kwargs)
    left = _kept_count(target, args, kwargs) > 0
    if isinstance(out, Tensor):
        return _hold(out, left)
    return [_hold(o, left) for o in out]


def mean(target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Value:
    """Mean of kept entries."""
    source: Value = args[0]
    out = _run(target, args, kwargs)
    if source.mask is None:
        return Value(out)
    dims, keepdim = _reduced(target, args, kwargs)
    count = _kept_count(target, args, kwargs)
    return _hold((source.value * source.mask).sum(dims, keepdim=keepdim) / count.clamp(min=1), count > 0)


def variance(target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """``var``, ``std`` and ``var_mean`` of kept entries."""
    source: Value = args[0]
    if source.mask is None:
        return pytree.tree_map_only(Tensor, Value, _run(target, args, kwargs))
    dims, keepdim = _reduced(target, args, kwargs)
    correction = _argument(target, args, kwargs, "correction", None)
    if correction is None:
        correction = int(bool(_argument(target, args, kwargs, "unbiased", True)))
    whole, count = source.mask.sum(dims, keepdim=True), _kept_count(target, args, kwargs)
    centre = (source.value * source.mask).sum(dims, keepdim=True) / whole.clamp(min=1)
    squares = ((source.value - centre).square() * source.mask).sum(dims, keepdim=keepdim)
    spread = squares / (count - correction).clamp(min=0)
    if target._schema.name == "aten::var":
        return _hold(spread, count > 0)
    if target._schema.name == "aten::std":
        return _hold(spread.sqrt(), count > 0)
    return [_hold(spread, count > 0), _hold(centre.reshape(count.shape), count > 0)]


def vector_norm(target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Entries at zero add nothing to a norm of positive order."""
    order = _argument(target, args, kwargs, "ord", 2)
    if order <= 0 and args[0].mask is not None:
        raise UnsupportedOpError(
            f"a norm of order {order} over pruned entries: pass the layer in ignored_layers"
        )
    return reduction(target, args, kwargs, neutral=0.0)


def softmax(target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Value:
    """Over kept entries."""
    source: Value = args[0]
    if source.mask is None:
        return Value(_run(target, args, kwargs))
    filled = Value(source.value.masked_fill(~source.mask, float("-inf")))
    return _hold(_run(target, (filled, *args[1:]), kwargs), source.mask)


def _reduced(target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[list[int], bool]:
    rank = args[0].value.ndim
    dims = _argument(target, args, kwargs, "dim", None)
    dims = (
        list(range(rank))
        if dims in (None, [])
        else [d % rank for d in ([dims] if isinstance(dims, int) else dims)]
    )
    return dims, bool(_argument(target, args, kwargs, "keepdim", False))


def _kept_count(target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    dims, keepdim = _reduced(target, args, kwargs)
    mask: Tensor = args[0].mask
    return mask.sum(dims, keepdim=keepdim)


def ordered(target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Cumulative sums, sorting, flips: along dimensions of which nothing is removed."""
    source: Value = args[0]
    out = _run(target, args, kwargs)
    if source.mask is None:
        return pytree.tree_map_only(Tensor, Value, out)
    dims = _argument(target, args, kwargs, "dim", _argument(target, args, kwargs, "dims", -1))
    along = source.mask.amax(dims, keepdim=True)
    if not bool((source.mask == along).all()):
        raise UnsupportedOpError(
            "ordering positions of which some are pruned: pass the layer in ignored_layers"
        )
    if isinstance(out, Tensor):
        return _hold(out, along.expand(out.shape))
    return [_hold(o, along.expand(o.shape)) for o in out]


def glu(target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Value:
    """The mask of the first half."""
    out = _run(target, args, kwargs)
    source: Value = args[0]
    dim = _argument(target, args, kwargs, "dim", -1)
    return _hold(out, None if source.mask is None else source.mask.chunk(2, dim)[0])


def expand_as(target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Value:
    """Broadcast to the layout of another tensor, whose removed positions go with it."""
    out, layout = args[0].value.expand_as(args[1].value), args[1].mask
    mask = _both(_broadcast(args[0].mask, out.shape), layout)
    return Value(out) if mask is None else _hold(out.clone(), mask)


def like(target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Value:
    """New contents in the layout of another tensor."""
    return _hold(_run(target, args, kwargs), args[0].mask)


def made_anew(target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Value:
    """New contents of a written size: of another tensor the dtype only."""
    return Value(_run(target, args, kwargs))


def item(target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """One of several outputs."""
    return operator.getitem(args[0], args[1])


_MOVES = [
    "view",
    "view_as",
    "reshape_as",
    "reshape",
    "_unsafe_view",
    "flatten",
    "unflatten",
    "permute",
    "transpose",
    "swapaxes",
    "swapdims",
    "moveaxis",
    "t",
    "numpy_T",
    "movedim",
    "squeeze",
    "unsqueeze",
    "cat",
    "concat",
    "concatenate",
    "stack",
    "split",
    "split_with_sizes",
    "chunk",
    "unsafe_chunk",
    "unsafe_split",
    "tensor_split",
    "slice",
    "narrow",
    "select",
    "unbind",
    "unfold",
    "repeat",
    "tile",
    "expand",
    "pixel_shuffle",
    "pixel_unshuffle",
    "channel_shuffle",
    "roll",
    "contiguous",
    "clone",
    "alias",
]
_SAME = [
    "detach",  # in place on a tensor that is written into a forward: masks may be views
    "dropout",
    "feature_dropout",
    "alpha_dropout",
    "feature_alpha_dropout",
    "lift_fresh_copy",
    "lift_fresh",
    "to",
    "_to_copy",
    "type_as",
]
_NEUTRAL = {"sum": 0.0, "prod": 1.0, "amax": -math.inf, "max": -math.inf, "amin": math.inf, "min": math.inf}
_NEUTRAL |= {"logsumexp": -math.inf}
_LIKE = ["zeros_like", "ones_like", "full_like", "empty_like"]

RULES: dict[str, Rule] = {
    **{f"aten::{name}": move for name in _MOVES},
    **{f"aten::{name}": per_channel for name in (*_SAME, "prelu")},
    **{f"aten::{name}": like for name in _LIKE},
    "aten::new_empty": made_anew,
    **{f"aten::conv{n}d": partial(matrix, out_dim=-n - 1) for n in (1, 2, 3)},
    **{f"aten::conv_transpose{n}d": partial(matrix, out_dim=-n - 1) for n in (1, 2, 3)},
    **{f"aten::{name}": partial(pooled, dims=n) for name, n in {**POOLING, **UPSAMPLING}.items()},
    **{f"aten::{name}": sampled for name in SAMPLING},
    **{f"aten::{name}": partial(reduction, neutral=x) for name, x in _NEUTRAL.items()},
    **{f"aten::{name}": variance for name in ("var", "std", "var_mean")},
    **{f"aten::{name}": softmax for name in ("softmax", "log_softmax", "_softmax", "_log_softmax")},
    **{f"aten::{name}": ordered for name in ORDERED},
    "aten::mean": mean,
    "aten::linalg_vector_norm": vector_norm,
    "aten::linear": partial(matrix, out_dim=-1),
    "aten::pad": constant_pad,
    "aten::constant_pad_nd": constant_pad,
    **{f"aten::{kind}_pad{n}d": move for kind in ("reflection", "replication") for n in (1, 2, 3)},
    "aten::glu": glu,
    "aten::expand_as": expand_as,
    **{f"aten::{name}": pointwise for name in UNTAGGED},
    "getitem": item,
}
