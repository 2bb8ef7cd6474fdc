"""What a loader yields, taken apart: the arguments of a forward pass, and targets."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from qcqp_prune.errors import InvalidOptionError, QcqpPruneError
from qcqp_prune.graph.inputs import is_call

Call = tuple[tuple[Any, ...], dict[str, Any]]
"""Positional and keyword arguments."""

PAIRS = "pairs (inputs, targets): inputs a tensor, a tuple of arguments or a dict of keyword ones, targets a tensor"
"""What a loader is to yield, in words."""


def is_pair(batch: object) -> bool:
    """Whether a batch is inputs of any kind, and targets, an entry for each sample."""
    if not isinstance(batch, tuple | list) or len(batch) != 2:
        return False
    return isinstance(batch[1], Tensor) and batch[1].ndim > 0


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


def require_loader(loader: object, who: str) -> None:
    """Refuse what cannot be gone through.

    Raises:
        InvalidOptionError: it has no items.
    """
    if not (hasattr(loader, "__iter__") or hasattr(loader, "__getitem__")):
        kind = "None" if loader is None else type(loader).__name__
        raise InvalidOptionError(f"{who} was given {kind} for data: give a loader, or a list, of {PAIRS}")


def outputs_of(
    model: Callable[..., Any], call: Call, who: str, error: type[QcqpPruneError] = InvalidOptionError
) -> Any:
    """What a network makes of a batch.

    Args:
        model: the network.
        call: its arguments.
        who: calls it, for messages.
        error: what is raised where the network fails.

    Raises:
        QcqpPruneError: of the kind that was asked for; it has the network's own error as its cause.
    """
    args, kwargs = call
    try:
        return model(*args, **kwargs)
    except torch.OutOfMemoryError:  # no fault of the batch's kind, and callers may know what to do
        raise
    except (RuntimeError, TypeError, ValueError, LookupError) as cause:
        tensors = [str(tuple(x.shape)) for x in pytree.tree_leaves(call) if isinstance(x, Tensor)]
        said = str(cause).strip().partition("\n")[0]
        raise error(
            f"{who}: the network fails on a batch with inputs of shape {', '.join(tensors) or 'none'} "
            f"({type(cause).__name__}: {said}). Give batches like the inputs that it was made for."
        ) from cause


def shown(batch: object) -> str:
    """What a loader yielded, in words."""
    if isinstance(batch, tuple | list) and len(batch) == 2 and isinstance(batch[1], Tensor | int | float):
        return "a single sample, as a Dataset yields them, where batches are wanted (a DataLoader makes them)"
    if isinstance(batch, tuple | list):
        kinds = ", ".join(type(part).__name__ for part in batch)
        return f"a {type(batch).__name__} of {len(batch)} ({kinds})"
    return f"a {type(batch).__name__}"
