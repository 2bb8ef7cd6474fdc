"""Leaving a model as it was found: its modes, its device, and torch's random state."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from qcqp_prune.errors import InvalidOptionError


@contextmanager
def modes_kept(model: nn.Module) -> Iterator[None]:
    """Give every module the train or eval mode back that it had on entry, module by module."""
    before = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, training in before:
            module.training = training


@contextmanager
def placed(model: nn.Module, device: str) -> Iterator[torch.device]:
    """Move the model to `device` ("auto": an accelerator where there is one), and back at the end.

    Raises:
        InvalidOptionError: the device is unknown or not there.
    """
    tensors = [*model.parameters(), *model.buffers()]
    home = tensors[0].device if tensors else torch.device("cpu")
    target = _resolve(device)
    model.to(target)
    try:
        yield target
    finally:
        model.to(home)


@contextmanager
def random_state_kept(device: torch.device) -> Iterator[None]:
    """Leave torch's generators, which a seeded run resets, to the caller as they were."""
    devices = [device] if device.type not in ("cpu", "mps") else []
    with torch.random.fork_rng(devices=devices, device_type=device.type if devices else "cuda"):
        yield


def _resolve(device: str) -> torch.device:
    if device == "auto":
        found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        return found if found is not None else torch.device("cpu")
    try:
        target = torch.device(device)
        torch.empty(0, device=target)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise InvalidOptionError(
            f'Device "{device}" cannot be used here ({reason}). Give "auto", "cpu", or one that torch sees.'
        ) from error
    return target
