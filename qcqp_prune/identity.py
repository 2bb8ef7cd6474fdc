"""What two runs must have in common for one to go on from where the other stopped."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any

import numpy as np
from torch import nn

from qcqp_prune.importance.losses import name_of
from qcqp_prune.storage import sha256
from qcqp_prune.train.batches import length_of
from qcqp_prune.train.checkpoint import state_digest

_APART = frozenset({"checkpoint", "device", "progress", "on_event", "stop", "log_level"})
"""Fields that may differ between two runs of one job: where it runs, where it is stored, and who watches."""

_DATA = frozenset({"batches", "loader", "train", "validation"})
"""Fields that may hold data, of which no more can be seen than how many batches there are."""


def settings_of(thing: Any) -> Any:
    """What something was made with, as plain data to compare two runs by.

    Dataclasses of this library are taken apart, networks and arrays are told by their values. Of everything else only
    the kind is said, with its module: data and functions cannot be told apart by looking at them.
    """
    if isinstance(thing, np.generic):
        thing = thing.item()
    if thing is None or isinstance(thing, bool | int | float | str):
        return thing
    if isinstance(thing, Mapping):
        return {str(key): settings_of(value) for key, value in thing.items()}
    if isinstance(thing, list | tuple):
        return [settings_of(value) for value in thing]
    if isinstance(thing, np.ndarray):
        return {"name": "array", "shape": list(thing.shape), "values": sha256(thing.tobytes())}
    said: dict[str, Any] = {"name": name_of(thing)}
    if isinstance(thing, nn.Module):
        said["state"] = state_digest(thing)
    elif is_dataclass(thing) and type(thing).__module__.startswith("qcqp_prune."):
        for field in fields(thing):
            value = getattr(thing, field.name)
            if field.name in _DATA and not isinstance(value, int | None):
                said[field.name] = {"batches": length_of(value)}
            elif field.name not in _APART:
                said[field.name] = settings_of(value)
    return said
