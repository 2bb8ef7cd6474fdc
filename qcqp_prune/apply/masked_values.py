"""Values with masks, and what every mask-aware operator needs. Used by the oracle only."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree


@dataclass(frozen=True, eq=False)
class Value:
    """A tensor at full size and which of its entries are kept: same shape, bool, or None for all."""

    value: Tensor
    mask: Tensor | None = None


Rule = Callable[[Any, tuple[Any, ...], dict[str, Any]], Any]


def values_in(tree: Any) -> list[Value]:
    """The values in a tree of arguments."""
    return [x for x in pytree.tree_leaves(tree, is_leaf=is_value) if isinstance(x, Value)]


def is_value(x: Any) -> bool:
    """Whether a leaf of a tree of arguments is a value."""
    return isinstance(x, Value)


def run(target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The operator itself, on plain tensors."""
    plain = pytree.tree_map_only(Value, lambda v: v.value, (args, kwargs), is_leaf=is_value)
    return target(*plain[0], **plain[1])


def hold(value: Tensor, mask: Tensor | None) -> Value:
    """Zero what is removed, in place so that in-place operators of the network keep their aliases."""
    if mask is None or bool(mask.all()):
        return Value(value)
    return Value(value.masked_fill_(~mask, 0), mask)


def both(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    """Kept where both masks keep."""
    if a is None or b is None:
        return a if b is None else b
    return a & b


def broadcast(mask: Tensor | None, shape: torch.Size) -> Tensor | None:
    """A mask in a larger shape."""
    return None if mask is None else mask.expand(shape)


def argument_of(target: Any, args: tuple[Any, ...], kwargs: dict[str, Any], name: str, default: Any) -> Any:
    """An operator's argument by its schema name, or the schema's default, or ``default``."""
    for position, argument in enumerate(target._schema.arguments):
        if argument.name == name:
            if name in kwargs:
                return kwargs[name]
            if position < len(args):
                return args[position]
            return argument.default_value if argument.has_default_value() else default
    return default


def reduced(target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[list[int], bool]:
    """The dimensions that a reduction removes, and whether they stay with size 1."""
    rank = args[0].value.ndim
    dims = argument_of(target, args, kwargs, "dim", None)
    dims = (
        list(range(rank))
        if dims in (None, [])
        else [d % rank for d in ([dims] if isinstance(dims, int) else dims)]
    )
    return dims, bool(argument_of(target, args, kwargs, "keepdim", False))


def kept_count(target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """How many kept entries each result of a reduction is made of."""
    dims, keepdim = reduced(target, args, kwargs)
    mask: Tensor = args[0].mask
    return mask.sum(dims, keepdim=keepdim)


def pointwise(target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Value:
    """An element is kept where all that it is made of is kept."""
    out = run(target, args, kwargs)
    mask: Tensor | None = None
    for v in values_in((args, kwargs)):
        mask = both(mask, broadcast(v.mask, out.shape))
    return hold(out, mask)


def per_channel(target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Value:
    """Each channel for itself, with parameters of its own: the mask passes."""
    return hold(run(target, args, kwargs), args[0].mask)
