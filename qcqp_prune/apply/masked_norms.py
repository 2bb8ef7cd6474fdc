"""Mask-aware norms: statistics are of kept entries."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qcqp_prune.apply.masked_ops import Rule, Value, _argument, _hold, _run, per_channel


def channel_norm(target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Value:
    """Batch and instance norm: each channel for itself; statistics of the input are of kept entries."""
    source: Value = args[0]
    own = _argument(
        target, args, kwargs, "use_input_stats", _argument(target, args, kwargs, "training", False)
    )
    if source.mask is None or not own:
        return per_channel(target, args, kwargs)
    dims = list(range(2, source.value.ndim))
    dims = dims if "instance" in target._schema.name else [0, *dims]
    out = _normalised(
        source.value, source.mask, dims, _argument(target, args, kwargs, "eps", 1e-5), (None, None)
    )
    return _hold(_affine(target, args, kwargs, out), source.mask)


def _affine(target: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Tensor) -> Tensor:
    """Scale and shift of each channel."""
    shape = [1, -1] + [1] * (out.ndim - 2)
    for name, op in (("weight", torch.mul), ("bias", torch.add)):
        vector = _argument(target, args, kwargs, name, None)
        out = out if vector is None else op(out, vector.value.reshape(shape))
    return out


def rms_norm(target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Value:
    """Mean square of kept entries."""
    source: Value = args[0]
    if source.mask is None:
        return Value(_run(target, args, kwargs))
    dims = list(range(-len(args[1]), 0))
    eps = _argument(target, args, kwargs, "eps", None)
    eps = torch.finfo(source.value.dtype).eps if eps is None else eps
    squares = (source.value.square() * source.mask).sum(dims, keepdim=True)
    out = source.value * torch.rsqrt(squares / source.mask.sum(dims, keepdim=True).clamp(min=1) + eps)
    weight = _argument(target, args, kwargs, "weight", None)
    return _hold(out if weight is None else out * weight.value, source.mask)


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
    return _hold(_affine(target, args, kwargs, out), source.mask)


def _normalised(
    value: Tensor, mask: Tensor, dims: list[int], eps: float, affine: tuple[Value | None, Value | None]
) -> Tensor:
    count = mask.sum(dims, keepdim=True).clamp(min=1)
    mean = (value * mask).sum(dims, keepdim=True) / count
    variance = ((value - mean).square() * mask).sum(dims, keepdim=True) / count
    out = (value - mean) / torch.sqrt(variance + eps)
    out = out if affine[0] is None else out * affine[0].value
    return out if affine[1] is None else out + affine[1].value


NORMS: dict[str, Rule] = {
    **{f"aten::{name}": channel_norm for name in ("batch_norm", "instance_norm")},
    "aten::layer_norm": layer_norm,
    "aten::rms_norm": rms_norm,
    "aten::group_norm": group_norm,
}
