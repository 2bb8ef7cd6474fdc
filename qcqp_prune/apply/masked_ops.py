"""Mask-aware operators: each takes values with masks and gives values with masks. Used by the oracle only."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from qcqp_prune.errors import UnsupportedOpError


@dataclass(frozen=True, eq=False)
class Value:
    """A tensor at full size and which of its entries are kept: same shape, bool, or None for all."""

    value: Tensor
    mask: Tensor | None = None


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
    """New positions are kept: the complement of the mask is padded with zeros."""
    out = _run(target, args, kwargs)
    source: Value = args[0]
    if source.mask is None:
        return Value(out)
    removed = (~source.mask).to(torch.float32)
    mode = args[2] if len(args) > 2 and isinstance(args[2], str) else kwargs.get("mode", "constant")
    padded = torch.nn.functional.pad(removed, args[1], mode=mode)
    return Value(out, padded == 0)


def matrix(target: Any, args: tuple[Any, ...], kwargs: dict[str, Any], *, out_dim: int) -> Value:
    """Convolution or linear map: an output is kept where its row of the weight is.

    Args:
        target: the operator.
        args, kwargs: its arguments: input, weight, ...
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
            return args[position] if position < len(args) else default
    return default


def per_channel(target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Value:
    """Each channel for itself, with parameters of its own: the mask passes."""
    return _hold(_run(target, args, kwargs), args[0].mask)


def layer_norm(target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Value:
    """Mean and variance of kept entries."""
    source: Value = args[0]
    if source.mask is None:
        return Value(_run(target, args, kwargs))
    dims = list(range(-len(args[1]), 0))
    eps = _argument(target, args, kwargs, "eps", 1e-5)
    scale, shift = (_argument(target, args, kwargs, name, None) for name in ("weight", "bias"))
    return _hold(_normalised(source.value, source.mask, dims, eps, (scale, shift)), source.mask)


def group_norm(target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Value:
    """Mean and variance of the kept entries of each group."""
    source, groups = args[0], args[1]
    if source.mask is None:
        return Value(_run(target, args, kwargs))
    eps = _argument(target, args, kwargs, "eps", 1e-5)
    batch, channels = source.value.shape[:2]
    value = source.value.reshape(batch, groups, channels // groups, -1)
    mask = source.mask.reshape(value.shape)
    out = _normalised(value, mask, [2, 3], eps, (None, None)).reshape(source.value.shape)
    shape = [1, channels] + [1] * (out.ndim - 2)
    for name, op in (("weight", torch.mul), ("bias", torch.add)):
        vector = _argument(target, args, kwargs, name, None)
        out = out if vector is None else op(out, vector.value.reshape(shape))
    return _hold(out, source.mask)


def _normalised(
    value: Tensor, mask: Tensor, dims: list[int], eps: float, affine: tuple[Value | None, Value | None]
) -> Tensor:
    count = mask.sum(dims, keepdim=True).clamp(min=1)
    mean = (value * mask).sum(dims, keepdim=True) / count
    variance = ((value - mean).square() * mask).sum(dims, keepdim=True) / count
    out = (value - mean) / torch.sqrt(variance + eps)
    out = out if affine[0] is None else out * affine[0].value
    return out if affine[1] is None else out + affine[1].value


def pooled(target: Any, args: tuple[Any, ...], kwargs: dict[str, Any], *, dims: int) -> Any:
    """The last dimensions are mixed; they are never pruned, so any of their positions tells a channel's mask."""
    out = _run(target, args, kwargs)
    source: Value = args[0]
    if source.mask is None:
        return pytree.tree_map_only(Tensor, Value, out)
    spatial = list(range(-dims, 0))
    channel = source.mask.amax(spatial, keepdim=True)
    if not bool((source.mask == channel).all()):
        raise UnsupportedOpError("pooling over positions of which some are pruned: pass the layer in ignored_layers")
    if isinstance(out, Tensor):
        return _hold(out, channel.expand(out.shape))
    return [_hold(o, channel.expand(o.shape)) for o in out]


def reduction(target: Any, args: tuple[Any, ...], kwargs: dict[str, Any], *, kind: str) -> Value:
    """Sum, mean or extremum of kept entries."""
    source: Value = args[0]
    out = _run(target, args, kwargs)
    if source.mask is None:
        return Value(out)
    rank = source.value.ndim
    dims = _argument(target, args, kwargs, "dim", None)
    dims = list(range(rank)) if dims in (None, []) else [d % rank for d in ([dims] if isinstance(dims, int) else dims)]
    keepdim = bool(_argument(target, args, kwargs, "keepdim", False))
    count = source.mask.sum(dims, keepdim=keepdim)
    if kind in ("sum", "mean"):
        out = (source.value * source.mask).sum(dims, keepdim=keepdim)
        out = out / count.clamp(min=1) if kind == "mean" else out
    else:
        fill = float("-inf") if kind == "amax" else float("inf")
        filled = source.value.masked_fill(~source.mask, fill)
        out = filled.amax(dims, keepdim=keepdim) if kind == "amax" else filled.amin(dims, keepdim=keepdim)
    return _hold(out, count > 0)


def glu(target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Value:
    """The mask of the first half."""
    out = _run(target, args, kwargs)
    source: Value = args[0]
    dim = _argument(target, args, kwargs, "dim", -1)
    return _hold(out, None if source.mask is None else source.mask.chunk(2, dim)[0])


def expand_as(target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Value:  # noqa: ARG001 - one shape for all rules
    """Broadcast to the layout of another tensor, whose removed positions go with it."""
    out, layout = args[0].value.expand_as(args[1].value), args[1].mask
    mask = _both(_broadcast(args[0].mask, out.shape), layout)
    return Value(out) if mask is None else _hold(out.clone(), mask)


def like(target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Value:
    """New contents in the layout of another tensor."""
    return _hold(_run(target, args, kwargs), args[0].mask)


def item(target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:  # noqa: ARG001 - one shape for all rules
    """One of several outputs."""
    return operator.getitem(args[0], args[1])


_MOVES = (
    "view reshape _unsafe_view flatten unflatten permute transpose swapaxes t numpy_T movedim squeeze unsqueeze cat "
    "concat concatenate stack split split_with_sizes chunk unsafe_chunk unsafe_split tensor_split slice narrow select "
    "unbind repeat tile expand pixel_shuffle pixel_unshuffle channel_shuffle roll contiguous clone detach alias"
).split()
_SAME = "dropout feature_dropout alpha_dropout feature_alpha_dropout lift_fresh_copy lift_fresh to _to_copy".split()
_LIKE = "zeros_like ones_like full_like".split()

RULES: dict[str, Rule] = {
    **{f"aten::{name}": move for name in _MOVES},
    **{f"aten::{name}": per_channel for name in (*_SAME, "batch_norm", "instance_norm", "prelu")},
    **{f"aten::{name}": like for name in _LIKE},
    **{f"aten::conv{n}d": partial(matrix, out_dim=-n - 1) for n in (1, 2, 3)},
    **{f"aten::conv_transpose{n}d": partial(matrix, out_dim=-n - 1) for n in (1, 2, 3)},
    **{
        f"aten::{kind}{n}d{suffix}": partial(pooled, dims=n)
        for n in (1, 2, 3)
        for kind in ("max_pool", "avg_pool", "adaptive_avg_pool", "adaptive_max_pool", "_adaptive_avg_pool", "lp_pool")
        for suffix in ("", "_with_indices")
    },
    **{
        f"aten::upsample_{name}": partial(pooled, dims=n)
        for name, n in (
            ("nearest1d", 1),
            ("linear1d", 1),
            ("nearest2d", 2),
            ("_nearest_exact2d", 2),
            ("bilinear2d", 2),
            ("bicubic2d", 2),
            ("nearest3d", 3),
            ("trilinear3d", 3),
        )
    },
    **{f"aten::{name}": partial(reduction, kind=name) for name in ("mean", "sum", "amax", "amin")},
    "aten::linear": partial(matrix, out_dim=-1),
    "aten::layer_norm": layer_norm,
    "aten::group_norm": group_norm,
    "aten::pad": constant_pad,
    "aten::constant_pad_nd": constant_pad,
    **{f"aten::{kind}_pad{n}d": move for kind in ("reflection", "replication") for n in (1, 2, 3)},
    "aten::glu": glu,
    "aten::expand_as": expand_as,
    **{f"aten::{name}": pointwise for name in ("hardtanh", "relu6", "hardswish", "silu", "mish", "where", "clamp")},
    "getitem": item,
}
