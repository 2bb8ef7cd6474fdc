"""Sums in the oracle: which entries of a result are kept, where operands keep different ones.

An entry of a sum is kept where any operand keeps it. Some entries follow instead of deciding: zeros of a padding,
parameters, and a tensor that is broadcast along channels are there whatever is removed, and go with what they are
added to. ``Value.follows`` marks them. ``Value.copies`` gives for each entry of a tensor that was broadcast the number
of the entry that it is a copy of, wherever it was moved since: where copies of one entry meet both kept and removed
entries, that tensor follows, unless the graph says that these are channels of a layer (``KeptSum.repeats``).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from qcqp_prune.apply.masked_ops import (
    Rule,
    Value,
    constant_pad,
    item,
    like,
    matrix,
    move,
    per_channel,
    pointwise,
)
from qcqp_prune.graph.channels import KeptSum
from qcqp_prune.graph.walk import ADDITIONS


def addition(target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Value:
    """An element is kept where an operand that decides keeps it; where none decides, where all are kept."""
    values = [x for x in (*args, *kwargs.values()) if isinstance(x, Value)]
    plain = pytree.tree_map_only(Value, lambda v: v.value, (args, kwargs), is_leaf=_is_value)
    out: Tensor = target(*plain[0], **plain[1])
    if all(v.mask is None for v in values):
        return Value(out)
    masks = [_own(v).expand(out.shape) for v in values]
    follows = [_follows(v, out.shape, masks[:k] + masks[k + 1 :]) for k, v in enumerate(values)]
    # Whether a channel follows is asked of it as a whole: a class token put in front of a sequence shares its channels.
    along = [d for d in range(out.ndim) if not any(_varies(m, d) for m in masks)]
    follows = [f.amin(along, keepdim=True).expand(out.shape) if along else f for f in follows]
    any_kept = torch.stack([m & ~f for m, f in zip(masks, follows, strict=True)]).any(0)
    mask = torch.where(torch.stack(follows).all(0), torch.stack(masks).all(0), any_kept)
    uneven = any(bool(((m != mask) & ~f).any()) for m, f in zip(masks, follows, strict=True))
    return Value(out.masked_fill_(~mask, 0), mask, uneven=uneven)


def deciding(value: Any) -> Any:
    """An operand that decides although it may hold an entry several times."""
    return replace(value, copies=None) if isinstance(value, Value) else value


def with_kept(value: Value, kept: KeptSum) -> Value:
    """The result of an addition with the positions that stay whatever its operands keep."""
    if value.mask is None:
        return value
    mask = value.mask.clone()
    index = torch.tensor(kept.positions, dtype=torch.int64, device=mask.device)
    added = not bool(mask.index_select(kept.dim, index).all())
    mask.index_fill_(kept.dim, index, value=True)
    return replace(value, mask=mask, uneven=value.uneven or added)


def marked(rule: Rule, target: Any, call: tuple[tuple[Any, ...], Mapping[str, Any]], out: Any) -> Any:
    """The result of an operator, with the marks of entries that follow.

    Args:
        rule: how its masks were made.
        target: the operator.
        call: its arguments and keyword arguments, with ``Value`` in place of tensors.
        out: its result.
    """
    args, kwargs = call
    if rule is item:
        return out
    values = [x for x in pytree.tree_leaves((args, kwargs), is_leaf=_is_value) if isinstance(x, Value)]
    if rule is constant_pad and isinstance(out, Value):
        before = torch.zeros(values[0].value.shape) if values[0].follows is None else values[0].follows
        padded = torch.nn.functional.pad(before.to(torch.float32), args[1], value=1.0)
        return replace(out, follows=padded.to(out.value.device) > 0)
    if isinstance(out, Value):
        out = replace(out, copies=_copies(target, rule, (args, dict(kwargs)), out))
    if all(v.follows is None for v in values):
        return out
    if rule is move:
        swapped = pytree.tree_map_only(Value, _marks, (args, dict(kwargs)), is_leaf=_is_value)
        return _with(out, target(*swapped[0], **swapped[1]))
    if not isinstance(out, Value):
        return out
    if rule is pointwise or rule is addition:
        full = [v for v in values if v.value.shape == out.value.shape]
        marks = [_marks(v) for v in full]
        return replace(out, follows=torch.stack(marks).all(0) if marks else None)
    if values[0].follows is not None and _passes(rule, values[0], out):
        spatial = tuple(range(2, out.value.ndim))
        follows = values[0].follows
        if out.value.shape != values[0].value.shape:
            follows = follows.amax(spatial, keepdim=True).expand(out.value.shape)
        return replace(out, follows=follows)
    return out


def _passes(rule: Rule, source: Value, out: Value) -> bool:
    """Whether an operator leaves each channel of its first input where it was."""
    if getattr(rule, "func", rule) is matrix:
        return False
    return source.value.ndim == out.value.ndim and source.value.shape[:2] == out.value.shape[:2]


def _with(out: Any, follows: Any) -> Any:
    if isinstance(out, Value):
        return replace(out, follows=follows)
    return [replace(o, follows=f) for o, f in zip(out, follows, strict=True)]


def _own(value: Value) -> Tensor:
    return torch.ones_like(value.value, dtype=torch.bool) if value.mask is None else value.mask


def _marks(value: Value) -> Tensor:
    return torch.zeros_like(value.value, dtype=torch.bool) if value.follows is None else value.follows


def _is_value(x: Any) -> bool:
    return isinstance(x, Value)


def _follows(value: Value, shape: torch.Size, others: list[Tensor]) -> Tensor:
    """Which entries of an operand follow; all of them where copies of one entry meet what the others prune and keep."""
    copies = _origins(value, shape)
    if copies is not None and any(_parts(copies, mask) for mask in others):
        return torch.ones(shape, dtype=torch.bool, device=value.value.device)
    return _marks(value).expand(shape)


def _origins(value: Value, shape: torch.Size) -> Tensor | None:
    """The numbers of the entries that a tensor, broadcast to a shape, has copies of; None where each is there once."""
    if value.copies is None and value.value.shape == shape:
        return None
    return _numbers(value).expand(shape)


def _numbers(value: Value) -> Tensor:
    """For each entry of a tensor the number of the entry that it is a copy of."""
    if value.copies is not None:
        return value.copies
    return torch.arange(value.value.numel(), device=value.value.device).reshape(value.value.shape)


def _parts(copies: Tensor, mask: Tensor) -> bool:
    """Whether a mask keeps some copies of an entry and removes others."""
    if bool(mask.all()):
        return False
    kept, removed = (torch.zeros(int(copies.max()) + 1, dtype=torch.bool, device=mask.device) for _ in "kr")
    kept[copies[mask]] = True
    removed[copies[~mask]] = True
    return bool((kept & removed).any())


def _varies(mask: Tensor, dim: int) -> bool:
    return bool((mask != mask.narrow(dim, 0, 1)).any())


def _copies(
    target: Any, rule: Rule, call: tuple[tuple[Any, ...], dict[str, Any]], out: Value
) -> Tensor | None:
    """For each entry of a result the number of the entry that it is a copy of; None where each is there once."""
    values = [x for x in pytree.tree_leaves(call, is_leaf=_is_value) if isinstance(x, Value)]
    shape, name = out.value.shape, target._schema.name
    if name in ("aten::expand", "aten::expand_as"):
        return _origins(values[0], shape)
    if rule in (per_channel, like) and len(values) == 1:
        return values[0].copies
    if rule is move and len(values) == 1:
        if values[0].copies is None and name not in ("aten::repeat", "aten::tile"):
            return None
        args, kwargs = pytree.tree_map_only(Value, lambda v: Value(_numbers(v)), call, is_leaf=_is_value)
        moved: Tensor = move(target, args, kwargs).value
        return moved
    if rule is not pointwise and rule is not addition:
        return None
    return _common(values, shape)


def _common(values: list[Value], shape: torch.Size) -> Tensor | None:
    """Entries of a result are copies of one where all operands have copies of one there."""
    if any(v.copies is None and v.value.shape == shape for v in values):
        return None
    common: Tensor | None = None
    for numbers in (_numbers(v).expand(shape) for v in values):
        if common is None:
            common = numbers
        elif bool(numbers.any()):
            pairs = common * (int(numbers.max()) + 1) + numbers
            common = torch.unique(pairs, return_inverse=True)[1].reshape(pairs.shape)
    return common


SUMS: dict[str, Rule] = dict.fromkeys(ADDITIONS, addition)
