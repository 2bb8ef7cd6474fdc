"""What a loader yields, taken apart: the arguments of a forward pass, and targets."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from qcqp_prune.graph.inputs import is_call

Call = tuple[tuple[Any, ...], dict[str, Any]]
"""Positional and keyword arguments."""

PAIRS = "pairs (inputs, targets): inputs a tensor, a tuple of arguments or a dict of keyword ones, targets a tensor"
"""What a loader is to yield, in words."""


def is_pair(batch: object) -> bool:
    """Whether a batch is inputs of any kind, and targets."""
    return isinstance(batch, tuple | list) and len(batch) == 2 and isinstance(batch[1], Tensor)


def arguments(inputs: Any, device: torch.device, *, non_blocking: bool = False) -> Call:
    """The inputs of a batch as arguments, their tensors on a device.

    Keyword arguments are put in the order of their names: what runs several batches side by side goes by places, and
    one loader need not yield all its dicts in one order.

    Args:
        inputs: a tensor, a tuple or list of arguments, a mapping of keyword arguments, or ``(args, kwargs)``.
        device: where to.
        non_blocking: as for ``Tensor.to``.
    """
    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = {}
    if is_call(inputs):
        args, kwargs = inputs
    elif isinstance(inputs, Mapping):
        kwargs = inputs
    else:
        args = tuple(inputs) if isinstance(inputs, tuple | list) else (inputs,)
    call = args, {name: kwargs[name] for name in sorted(kwargs)}
    moved: Call = pytree.tree_map_only(Tensor, lambda x: x.to(device, non_blocking=non_blocking), call)
    return moved


def shown(batch: object) -> str:
    """What a loader yielded, in words."""
    if isinstance(batch, tuple | list):
        kinds = ", ".join(type(part).__name__ for part in batch)
        return f"a {type(batch).__name__} of {len(batch)} ({kinds})"
    return f"a {type(batch).__name__}"
