"""Loading of published weights into a network of the zoo, without running any code that a file might hold."""

from __future__ import annotations

import os
import pickle
import struct
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn

from qcqp_prune.errors import ModelLoadError

M = TypeVar("M", bound=nn.Module)

_PREFIX = "module."  # left in the names by nn.DataParallel
_SHOWN = 5  # differences named in an error
# What torch's restricted unpickler was seen to raise on damaged files.
_UNREADABLE = (
    pickle.UnpicklingError,
    ArithmeticError,
    AssertionError,
    AttributeError,
    EOFError,
    LookupError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
    struct.error,
)


def load_pretrained(model: M, path: str | os.PathLike[str]) -> M:
    """Copy the weights of a published file into `model`.

    The file is a state dict, or a dict that holds one under `state_dict`; a leading `module.` is taken off the names.
    It is read with `weights_only=True`. Nothing is copied unless every name and shape fits.

    Args:
        model: the network to fill, of the architecture that the file was written for.
        path: the file, as written by `torch.save`.

    Returns:
        `model` itself.

    Raises:
        ModelLoadError: the file is missing, unreadable, or of another architecture.
    """
    state = _read(Path(path))
    _check(model, state, path)
    model.load_state_dict(state)
    return model


def _read(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise ModelLoadError(f"There is no file {path}. Give the path of a file of pretrained weights.")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except _UNREADABLE as error:
        reason = _reason(error)
        raise ModelLoadError(
            f"{path} cannot be read as weights ({reason}). "
            "Fetch it again, or save it anew as a plain state dict with torch.save(model.state_dict(), path)."
        ) from error
    if isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
        content = content["state_dict"]
    if not isinstance(content, dict) or not all(isinstance(v, Tensor) for v in content.values()):
        raise ModelLoadError(
            f"{path} holds no state dict. Save one with torch.save(model.state_dict(), path)."
        )
    return {str(name).removeprefix(_PREFIX): tensor for name, tensor in content.items()}


def _reason(error: BaseException) -> str:
    """What is wrong with the file in words, without torch's advice to load it in unsafe ways."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if isinstance(error, pickle.UnpicklingError) and "Unsupported" in str(error):
        return "it holds more than tensors, and nothing in it is run"
    return f"it is damaged or of another format, {type(error).__name__}"


def _check(model: nn.Module, state: dict[str, Tensor], path: str | os.PathLike[str]) -> None:
    wanted = model.state_dict()
    # Files written before torch 0.4.1 lack this counter, which inference does not use.
    for name in wanted:
        if name.endswith("num_batches_tracked") and name not in state:
            state[name] = wanted[name]
    problems = [f"lacks {name}" for name in wanted if name not in state]
    problems += [f"has {name}, which the model lacks" for name in state if name not in wanted]
    problems += [
        f"{name} has shape {tuple(state[name].shape)} where the model's is {tuple(tensor.shape)}"
        for name, tensor in wanted.items()
        if name in state and state[name].shape != tensor.shape
    ]
    if problems:
        more = f"; and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
        raise ModelLoadError(
            f"{path} does not fit {type(model).__name__}: {'; '.join(problems[:_SHOWN])}{more}. "
            "Build the architecture that the file was written for."
        )
