"""Mask-aware windows and writes into part of a tensor, for the oracle."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from qcqp_prune.apply.masked_ops import Rule, Value, _argument, _hold, _run
from qcqp_prune.errors import UnsupportedOpError


def im2col(target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Value:
    """A row is kept where its channel is."""
    out, source = _run(target, args, kwargs), args[0]
    if source.mask is None:
        return Value(out)
    channels = _per_channel(source.mask, (-2, -1)).squeeze(-1)
    rows = channels.repeat_interleave(math.prod(_argument(target, args, kwargs, "kernel_size", ())), -2)
    return _hold(out, rows.expand(out.shape))


def col2im(target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Value:
    """A channel is kept where its rows are; they go together."""
    out, source = _run(target, args, kwargs), args[0]
    if source.mask is None:
        return Value(out)
    size = math.prod(_argument(target, args, kwargs, "kernel_size", ()))
    rows = source.mask.unflatten(-2, (-1, size))
    return _hold(out, _per_channel(rows, (-2, -1)).expand(out.shape))


def written(target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Value:
    """``a[...] = b``: what is written must be kept where the place is that it is written to."""
    place, source = args[:2]
    if source.mask is not None:
        kept = source.mask.expand(place.value.shape)
        if not torch.equal(kept, torch.ones_like(kept) if place.mask is None else place.mask):
            raise UnsupportedOpError(
                "a tensor of which some entries are pruned is written into one that keeps others: "
                "pass the layer in ignored_layers"
            )
    return _hold(_run(target, args, kwargs), place.mask)


def _per_channel(mask: Tensor, dims: tuple[int, ...]) -> Tensor:
    channels = mask.amax(dims, keepdim=True)
    if not bool((mask == channels).all()):
        raise UnsupportedOpError(
            "windows over positions of which some are pruned: pass the layer in ignored_layers"
        )
    return channels


WINDOWS: dict[str, Rule] = {"aten::im2col": im2col, "aten::col2im": col2im, "aten::copy": written}
