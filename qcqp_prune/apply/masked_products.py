"""Mask-aware products of two tensors and scaled dot-product attention, for the oracle."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qcqp_prune.apply.masked_ops import Rule, Value, _hold, _run
from qcqp_prune.errors import UnsupportedOpError


def product(target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Value:
    """An entry is kept where some kept entry of its row meets a kept one of its column."""
    return _hold(_run(target, args, kwargs), _met(*args[:2]))


def added_product(target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Value:
    """The same, with something added: kept where both are."""
    out, mask, added = _run(target, args, kwargs), _met(*args[1:3]), args[0].mask
    if added is not None:
        mask = added.expand(out.shape) if mask is None else mask & added
    return _hold(out, mask)


def attention(target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Value:
    """Heads or dimensions of all heads may be removed: what is removed of queries, keys and values is zero.

    The scale is that of the dense network: a removed dimension takes its term out of each score, no more.

    Raises:
        UnsupportedOpError: positions are removed.
    """
    q, k, v = args[:3]
    for name, value in zip(("query", "key", "value"), (q, k, v), strict=True):
        _require_alike(name, value, -2)
    out = _run(target, args, kwargs)
    mask = torch.ones_like(out, dtype=torch.bool)
    for value, dim in ((q, -1), (v, -2)):
        if value.mask is not None:
            mask &= _per_query_head(value.mask.any(dim, keepdim=True), out)
    return _hold(out, mask)


def _per_query_head(mask: Tensor, out: Tensor) -> Tensor:
    """Each head of keys and values serves several heads of queries where these are grouped."""
    if mask.ndim > 2 and 1 < mask.shape[-3] < out.shape[-3]:
        return mask.repeat_interleave(out.shape[-3] // mask.shape[-3], -3)
    return mask


def _require_alike(name: str, value: Value, dim: int) -> None:
    if value.mask is not None and not bool((value.mask == value.mask.amax(dim, keepdim=True)).all()):
        raise UnsupportedOpError(
            f"attention with a {name} of which only some positions are kept: pass the layer in ignored_layers"
        )


def _met(a: Value, b: Value) -> Tensor | None:
    if a.mask is None and b.mask is None:
        return None
    ones = [torch.ones_like(x.value, dtype=torch.bool) if x.mask is None else x.mask for x in (a, b)]
    return torch.matmul(ones[0].float(), ones[1].float()) > 0


PRODUCTS: dict[str, Rule] = {
    **{f"aten::{name}": product for name in ("matmul", "bmm", "mm")},
    **{f"aten::{name}": added_product for name in ("addmm", "baddbmm")},
    "aten::scaled_dot_product_attention": attention,
}
