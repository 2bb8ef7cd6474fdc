"""Mask-aware operators: each takes values with masks and gives values with masks. Used by the oracle only."""

from __future__ import annotations

import math
import operator
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from qcqp_prune.apply import masked_norms as norms
from qcqp_prune.apply.masked_values import (
    Rule,
    Value,
    argument_of,
    both,
    broadcast,
    hold,
    is_value,
    per_channel,
    pointwise,
    run,
    values_in,
)
from qcqp_prune.errors import UnsupportedOpError
from qcqp_prune.graph.ops.joins import FACTORIES, UNTAGGED
from qcqp_prune.graph.ops.pooling import POOLING, SAMPLING, UPSAMPLING
from qcqp_prune.graph.ops.reductions import ORDERED


def move(target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Positions move: the same operator moves the masks."""
    out = run(target, args, kwargs)
    if all(v.mask is None for v in values_in((args, kwargs))):
        return pytree.tree_map_only(Tensor, Value, out)
    moved = _move_masks(target, args, kwargs)
    if isinstance(out, Tensor):
        return Value(out, moved)
    return [Value(o, m) for o, m in zip(out, moved, strict=True)]


def _move_masks(target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    def own(v: Value) -> Tensor:
        return torch.ones_like(v.value, dtype=torch.bool) if v.mask is None else v.mask

    swapped = pytree.tree_map_only(Value, own, (args, kwargs), is_leaf=is_value)
    return target(*swapped[0], **swapped[1])


def constant_pad(target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Value:
    """New positions along a dimension are kept, in all that is kept of the other dimensions."""
    source: Value = args[0]
    mode = argument_of(target, args, kwargs, "mode", "constant")
    if source.mask is None or mode != "constant":
        return move(target, args, kwargs)  # type: ignore[no-any-return]
    out = run(target, args, kwargs)
    amounts = list(args[1])
    mask = torch.ones(out.shape, dtype=torch.bool, device=out.device)
    product = torch.ones_like(source.mask)
    for d in range(out.ndim):
        others = [k for k in range(out.ndim) if k != d]
        along = source.mask.amax(others) if others else source.mask
        shape = [-1 if k == d else 1 for k in range(out.ndim)]
        product &= along.reshape(shape)
        first = 2 * (out.ndim - 1 - d)
        if first < len(amounts):
            along = torch.nn.functional.pad(along.to(torch.uint8), amounts[first : first + 2], value=1) > 0
        mask &= along.reshape(shape)
    if not torch.equal(product, source.mask):
        raise UnsupportedOpError(
            "padding a tensor whose kept entries are no box: pass the layer in ignored_layers"
        )
    return hold(out, mask)


def matrix(target: Any, args: tuple[Any, ...], kwargs: dict[str, Any], *, out_dim: int) -> Value:
    """Convolution or linear map: an output is kept where its row of the weight is.

    Args:
        target: the operator.
        args: its positional arguments: input, weight, ...
        kwargs: its keyword arguments.
        out_dim: dimension of the output that holds channels, counted from the end.
    """
    out = run(target, args, kwargs)
    weight: Value = args[1]
    if weight.mask is None:
        return Value(out)
    name = target._schema.name
    if "transpose" in name:
        groups = argument_of(target, args, kwargs, "groups", 1)
        rows = weight.mask.reshape(groups, -1, *weight.mask.shape[1:]).flatten(3).any(-1).any(1).reshape(-1)
    else:
        rows = weight.mask.flatten(1).any(1)
    mask = rows.reshape([-1 if d == out.ndim + out_dim else 1 for d in range(out.ndim)])
    return hold(out, mask.expand(out.shape))


def pooled(target: Any, args: tuple[Any, ...], kwargs: dict[str, Any], *, dims: int) -> Any:
    """The last dimensions are mixed; they are never pruned, so any of their positions tells a channel's mask."""
    out = run(target, args, kwargs)
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
        return hold(out, channel.expand(out.shape))
    return [hold(o, channel.expand(o.shape)) for o in out]


def sampled(target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Value:
    """``grid_sample``: only channels may be removed."""
    source: Value = args[0]
    return pooled(target, args, kwargs, dims=source.value.ndim - 2)  # type: ignore[no-any-return]


def ordered(target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Cumulative sums, sorting, flips: along dimensions of which nothing is removed."""
    source: Value = args[0]
    out = run(target, args, kwargs)
    if source.mask is None:
        return pytree.tree_map_only(Tensor, Value, out)
    dims = argument_of(target, args, kwargs, "dim", argument_of(target, args, kwargs, "dims", -1))
    along = source.mask.amax(dims, keepdim=True)
    if not bool((source.mask == along).all()):
        raise UnsupportedOpError(
            "ordering positions of which some are pruned: pass the layer in ignored_layers"
        )
    if isinstance(out, Tensor):
        return hold(out, along.expand(out.shape))
    return [hold(o, along.expand(o.shape)) for o in out]


def glu(target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Value:
    """The mask of the first half."""
    out = run(target, args, kwargs)
    source: Value = args[0]
    dim = argument_of(target, args, kwargs, "dim", -1)
    return hold(out, None if source.mask is None else source.mask.chunk(2, dim)[0])


def expand_as(target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Value:
    """Broadcast to the layout of another tensor, whose removed positions go with it."""
    out, layout = args[0].value.expand_as(args[1].value), args[1].mask
    mask = both(broadcast(args[0].mask, out.shape), layout)
    return Value(out) if mask is None else hold(out.clone(), mask)


def like(target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Value:
    """New contents in the layout of another tensor."""
    return hold(run(target, args, kwargs), args[0].mask)


def created(target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Value:
    """A new tensor of a written size, whatever the tensor that lends its dtype."""
    return Value(run(target, args, kwargs))


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
    "repeat",
    "tile",
    "expand",
    "pixel_shuffle",
    "pixel_unshuffle",
    "channel_shuffle",
    "roll",
    "contiguous",
    "clone",
    "detach",
    "alias",
]


_SAME = [
    "dropout",
    "feature_dropout",
    "alpha_dropout",
    "feature_alpha_dropout",
    "lift_fresh_copy",
    "lift_fresh",
    "to",
    "_to_copy",
]


_NEUTRAL = {"sum": 0.0, "prod": 1.0, "amax": -math.inf, "max": -math.inf, "amin": math.inf, "min": math.inf}

_NEUTRAL |= {"logsumexp": -math.inf}


_LIKE = ["zeros_like", "ones_like", "full_like"]

RULES: dict[str, Rule] = {
    **{f"aten::{name}": move for name in _MOVES},
    **{f"aten::{name}": per_channel for name in (*_SAME, "prelu")},
    **{f"aten::{name}": like for name in _LIKE},
    **{f"aten::{name}": created for name in FACTORIES},
    **{f"aten::conv{n}d": partial(matrix, out_dim=-n - 1) for n in (1, 2, 3)},
    **{f"aten::conv_transpose{n}d": partial(matrix, out_dim=-n - 1) for n in (1, 2, 3)},
    **{f"aten::{name}": partial(pooled, dims=n) for name, n in {**POOLING, **UPSAMPLING}.items()},
    **{f"aten::{name}": sampled for name in SAMPLING},
    **{f"aten::{name}": norms.channel_norm for name in ("batch_norm", "instance_norm")},
    **{f"aten::{name}": partial(norms.reduction, neutral=x) for name, x in _NEUTRAL.items()},
    **{f"aten::{name}": norms.variance for name in ("var", "std", "var_mean")},
    **{f"aten::{name}": norms.softmax for name in ("softmax", "log_softmax", "_softmax", "_log_softmax")},
    **{f"aten::{name}": ordered for name in ORDERED},
    "aten::mean": norms.mean,
    "aten::linalg_vector_norm": norms.vector_norm,
    "aten::linear": partial(matrix, out_dim=-1),
    "aten::layer_norm": norms.layer_norm,
    "aten::rms_norm": norms.rms_norm,
    "aten::group_norm": norms.group_norm,
    "aten::pad": constant_pad,
    "aten::constant_pad_nd": constant_pad,
    **{f"aten::{kind}_pad{n}d": move for kind in ("reflection", "replication") for n in (1, 2, 3)},
    "aten::glu": glu,
    "aten::expand_as": expand_as,
    **{f"aten::{name}": pointwise for name in UNTAGGED},
    "getitem": item,
}
