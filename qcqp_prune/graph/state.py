"""What a model holds, changed for a while and put back: its tensors, and what its forward keeps between calls."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn


@contextlib.contextmanager
def tensors_replaced(model: nn.Module, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Every parameter and buffer replaced by what ``change`` makes of it; afterwards each is back in its place.

    ``torch.func.functional_call`` goes by paths: of a module that is registered at three of them it leaves the
    replacement behind. Here each place is visited once, whatever paths lead to it.

    Args:
        model: whose tensors are replaced.
        change: called once for each tensor, however many places hold it.
    """
    stores = [store for module in model.modules() for store in (module._parameters, module._buffers)]
    places = [
        (store, name, tensor) for store in stores for name, tensor in store.items() if tensor is not None
    ]
    new = {id(tensor): change(tensor) for tensor in {id(t): t for _, _, t in places}.values()}
    try:
        for store, name, tensor in places:
            store[name] = new[id(tensor)]  # type: ignore[assignment]
        yield
    finally:
        for store, name, tensor in places:
            store[name] = tensor  # type: ignore[assignment]


@contextlib.contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """The model in eval mode and without caches; afterwards modes and buffers are what they were."""
    modes = {module: module.training for module in model.modules()}
    with caches_dropped(model), buffers_kept(model):
        try:
            model.eval()
            yield
        finally:
            for module, training in modes.items():
                module.training = training


@contextlib.contextmanager
def buffers_kept(model: nn.Module) -> Iterator[None]:
    """Buffers that a forward writes, such as a count of its calls, hold afterwards what they held.

    One that it put another of the same shape in the place of, too. A table that is made when it is first needed stays.
    """
    held = [
        (module._buffers, name, buffer, buffer.detach().clone())
        for module in model.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None and not buffer.is_meta and buffer.layout is torch.strided
    ]
    try:
        yield
    finally:
        with torch.no_grad():
            for store, name, buffer, before in held:
                now = store.get(name)
                if now is not None and now.shape == before.shape:
                    store[name] = buffer
                    if not torch.equal(buffer, before):
                        buffer.copy_(before)


@contextlib.contextmanager
def caches_dropped(model: nn.Module) -> Iterator[None]:
    """The model without tensors that its forward keeps from one call for the next.

    Such as a bias table that is gathered once: a network that is traced must compute it, or it is a constant that
    nothing may be cut from. Afterwards each module holds what it held, so that nothing made in another dtype, or
    while the network was traced, is left behind.
    """
    held = {module: _held(module) for module in model.modules()}
    try:
        drop_caches(model)
        yield
    finally:
        for module, before in held.items():
            _put_back(module, before)


def drop_caches(model: nn.Module) -> None:
    """Change the mode to and fro: modules that keep tensors between calls drop them where their mode changes."""
    modes = {module: module.training for module in model.modules()}
    model.train()
    model.eval()
    for module, training in modes.items():
        module.training = training


def _held(module: nn.Module) -> dict[str, Any]:
    """What a module's own attributes refer to, and a copy of those that are containers."""
    return {
        name: (value, copy.copy(value) if isinstance(value, dict | list) else None)
        for name, value in vars(module).items()
        if name not in _INTERNAL
    }


def _put_back(module: nn.Module, before: dict[str, Any]) -> None:
    now = vars(module)
    for name in [name for name in now if name not in _INTERNAL]:
        if name not in before:
            if _has_tensors(now[name]):
                del now[name]
            continue
        value, content = before[name]
        if now[name] is not value and (_has_tensors(now[name]) or _has_tensors(value)):
            now[name] = value
        if isinstance(value, dict) and (_has_tensors(value) or _has_tensors(content)):
            value.clear()
            value.update(content)
        elif isinstance(value, list) and (_has_tensors(value) or _has_tensors(content)):
            value[:] = content


def _has_tensors(value: Any) -> bool:
    inside = (
        value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else [value]
    )
    return any(isinstance(x, Tensor) for x in inside)


_INTERNAL = frozenset(vars(nn.Module()))
"""Attributes that every module has: parameters, buffers, children, hooks."""
