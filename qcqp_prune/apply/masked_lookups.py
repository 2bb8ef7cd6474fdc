"""Mask-aware look-ups and sums by number, for the oracle."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qcqp_prune.apply.masked_ops import Rule, Value, _argument, _both, _hold, _run, _values
from qcqp_prune.errors import UnsupportedOpError


def indexed(target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Value:
    """Positions are taken by number, and their masks with them."""
    out, source = _run(target, args, kwargs), args[0]
    if any(v.mask is not None for v in _values(args[1:])):
        raise UnsupportedOpError(
            "an index of which some entries are pruned: pass the layer in ignored_layers"
        )
    return Value(out) if source.mask is None else Value(out, _run(target, (source.mask, *args[1:]), kwargs))


def gathered(target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Value:
    """Each entry of the index takes one of the values: what it takes is kept where both are."""
    out, index = _run(target, args, kwargs), args[2]
    if args[0].mask is None:
        return _hold(out, index.mask)
    return _hold(out, _both(_run(target, (args[0].mask, *args[1:]), kwargs), index.mask))


def embedding(target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Value:
    """Rows of a table are taken by number, and their masks with them."""
    table, out = args[0], _run(target, args, kwargs)
    if args[1].mask is not None:
        raise UnsupportedOpError(
            "an index of which some entries are pruned: pass the layer in ignored_layers"
        )
    return Value(out) if table.mask is None else Value(out, table.mask[args[1].value])


def added(target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Value:
    """Sums at numbered positions: all of these are kept, and of the rest what both tensors keep."""
    dim, index = (_argument(target, args, kwargs, name, None) for name in ("dim", "index"))
    operands: list[Value] = [args[0], _argument(target, args, kwargs, "source", None)]
    out = _run(target, args, kwargs)
    across: Tensor | None = None
    for mask in (value.mask for value in operands):
        if mask is None:
            continue
        along = mask.amax(dim, keepdim=True)
        if index.mask is not None or not bool((mask == along).all()):
            raise UnsupportedOpError(
                "a sum by number of which some positions are pruned: pass the layer in ignored_layers"
            )
        across = _both(across, along)
    return _hold(out, None if across is None else across.expand(out.shape))


def filled(target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Value:
    """``a[condition] = value``: an entry is kept where both it and its condition are."""
    out, source = _run(target, args, kwargs), args[0]
    chosen = [d for d, index in enumerate(args[1]) if index is not None]
    condition: Any = args[1][chosen[0]] if chosen else None
    mask = source.mask
    if len(chosen) == 1 and condition.value.dtype == torch.bool and args[2].value.numel() == 1:
        if condition.mask is not None:
            after = out.ndim - chosen[0] - condition.mask.ndim
            mask = _both(mask, condition.mask[(..., *[None] * after)].expand(out.shape))
    elif any(v.mask is not None for v in _values((args, kwargs))):
        raise UnsupportedOpError(
            "a write by number of which some positions are pruned: pass the layer in ignored_layers"
        )
    return _hold(out, mask)


LOOKUPS: dict[str, Rule] = {
    "aten::index": indexed,
    "aten::index_select": indexed,
    "aten::gather": gathered,
    "aten::embedding": embedding,
    "aten::index_add": added,
    "aten::index_put": filled,
}
