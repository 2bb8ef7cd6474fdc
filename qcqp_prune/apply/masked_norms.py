"""Mask-aware operators that mix channels: norms, reductions and softmax, all of kept entries only."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from qcqp_prune.apply.masked_values import (
    Value,
    argument_of,
    hold,
    kept_count,
    per_channel,
    pointwise,
    reduced,
    run,
)
from qcqp_prune.errors import UnsupportedOpError


def channel_norm(target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Value:
    """Batch and instance norm: each channel for itself; statistics of the input are of kept entries."""
    source: Value = args[0]
    own = argument_of(
        target, args, kwargs, "use_input_stats", argument_of(target, args, kwargs, "training", False)
    )
    if source.mask is None or not own:
        return per_channel(target, args, kwargs)
    dims = list(range(2, source.value.ndim))
    dims = dims if "instance" in target._schema.name else [0, *dims]
    out = _normalised(
        source.value, source.mask, dims, argument_of(target, args, kwargs, "eps", 1e-5), (None, None)
    )
    return hold(_affine(target, args, kwargs, out), source.mask)


def _affine(target: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Tensor) -> Tensor:
    """Scale and shift of each channel."""
    shape = [1, -1] + [1] * (out.ndim - 2)
    for name, op in (("weight", torch.mul), ("bias", torch.add)):
        vector = argument_of(target, args, kwargs, name, None)
        out = out if vector is None else op(out, vector.value.reshape(shape))
    return out


def rms_norm(target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Value:
    """Mean square of kept entries."""
    source: Value = args[0]
    if source.mask is None:
        return Value(run(target, args, kwargs))
    dims = list(range(-len(args[1]), 0))
    eps = argument_of(target, args, kwargs, "eps", None)
    eps = torch.finfo(source.value.dtype).eps if eps is None else eps
    squares = (source.value.square() * source.mask).sum(dims, keepdim=True)
    out = source.value * torch.rsqrt(squares / source.mask.sum(dims, keepdim=True).clamp(min=1) + eps)
    weight = argument_of(target, args, kwargs, "weight", None)
    return hold(out if weight is None else out * weight.value, source.mask)


def layer_norm(target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Value:
    """Mean and variance of kept entries."""
    source: Value = args[0]
    if source.mask is None:
        return Value(run(target, args, kwargs))
    dims = list(range(-len(args[1]), 0))
    eps = argument_of(target, args, kwargs, "eps", 1e-5)
    scale, shift = (argument_of(target, args, kwargs, name, None) for name in ("weight", "bias"))
    return hold(_normalised(source.value, source.mask, dims, eps, (scale, shift)), source.mask)


def group_norm(target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Value:
    """Mean and variance of the kept entries of each group."""
    source, groups = args[0], args[1]
    if source.mask is None:
        return Value(run(target, args, kwargs))
    eps = argument_of(target, args, kwargs, "eps", 1e-5)
    batch, channels = source.value.shape[:2]
    value = source.value.reshape(batch, groups, channels // groups, -1)
    mask = source.mask.reshape(value.shape)
    out = _normalised(value, mask, [2, 3], eps, (None, None)).reshape(source.value.shape)
    return hold(_affine(target, args, kwargs, out), source.mask)


def _normalised(
    value: Tensor, mask: Tensor, dims: list[int], eps: float, affine: tuple[Value | None, Value | None]
) -> Tensor:
    count = mask.sum(dims, keepdim=True).clamp(min=1)
    mean = (value * mask).sum(dims, keepdim=True) / count
    variance = ((value - mean).square() * mask).sum(dims, keepdim=True) / count
    out = (value - mean) / torch.sqrt(variance + eps)
    out = out if affine[0] is None else out * affine[0].value
    return out if affine[1] is None else out + affine[1].value


def reduction(target: Any, args: tuple[Any, ...], kwargs: dict[str, Any], *, neutral: float) -> Any:
    """A reduction in which ``neutral`` changes nothing: removed entries are that."""
    source: Value = args[0]
    if source.mask is None:
        return pytree.tree_map_only(Tensor, Value, run(target, args, kwargs))
    if len(args) > 1 and isinstance(args[1], Value):  # max(a, b)
        return pointwise(target, args, kwargs)
    out = run(target, (Value(source.value.masked_fill(~source.mask, neutral)), *args[1:]), kwargs)
    left = kept_count(target, args, kwargs) > 0
    if isinstance(out, Tensor):
        return hold(out, left)
    return [hold(o, left) for o in out]


def mean(target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Value:
    """Mean of kept entries."""
    source: Value = args[0]
    out = run(target, args, kwargs)
    if source.mask is None:
        return Value(out)
    dims, keepdim = reduced(target, args, kwargs)
    count = kept_count(target, args, kwargs)
    return hold((source.value * source.mask).sum(dims, keepdim=keepdim) / count.clamp(min=1), count > 0)


def variance(target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """``var``, ``std`` and ``var_mean`` of kept entries."""
    source: Value = args[0]
    if source.mask is None:
        return pytree.tree_map_only(Tensor, Value, run(target, args, kwargs))
    dims, keepdim = reduced(target, args, kwargs)
    correction = argument_of(target, args, kwargs, "correction", None)
    if correction is None:
        correction = int(bool(argument_of(target, args, kwargs, "unbiased", True)))
    whole, count = source.mask.sum(dims, keepdim=True), kept_count(target, args, kwargs)
    centre = (source.value * source.mask).sum(dims, keepdim=True) / whole.clamp(min=1)
    squares = ((source.value - centre).square() * source.mask).sum(dims, keepdim=keepdim)
    spread = squares / (count - correction).clamp(min=0)
    if target._schema.name == "aten::var":
        return hold(spread, count > 0)
    if target._schema.name == "aten::std":
        return hold(spread.sqrt(), count > 0)
    return [hold(spread, count > 0), hold(centre.reshape(count.shape), count > 0)]


def vector_norm(target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Entries at zero add nothing to a norm of positive order."""
    order = argument_of(target, args, kwargs, "ord", 2)
    if order <= 0 and args[0].mask is not None:
        raise UnsupportedOpError(
            f"a norm of order {order} over pruned entries: pass the layer in ignored_layers"
        )
    return reduction(target, args, kwargs, neutral=0.0)


def softmax(target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Value:
    """Over kept entries."""
    source: Value = args[0]
    if source.mask is None:
        return Value(run(target, args, kwargs))
    filled = Value(source.value.masked_fill(~source.mask, float("-inf")))
    return hold(run(target, (filled, *args[1:]), kwargs), source.mask)
