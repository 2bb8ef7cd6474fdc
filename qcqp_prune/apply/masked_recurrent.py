"""Mask-aware recurrent layers, for the oracle."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from qcqp_prune.apply.masked_ops import Rule, Value, _argument, _run
from qcqp_prune.errors import UnsupportedOpError
from qcqp_prune.graph.ops.recurrent import GATES, STEPS, Cell


def recurrence(target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Value]:
    """A removed unit is zero at all steps: its rows are zero in every gate, and its state starts at zero.

    What is kept is read off the rows of the weights; states that are given start at zero where those are removed.

    Raises:
        UnsupportedOpError: a packed sequence, or a unit of which only some gates are kept.
    """
    if target._overloadname != "input":
        raise UnsupportedOpError(
            f"{target} over a packed sequence: pad it, or pass its layers in ignored_layers"
        )
    bidirectional = bool(_argument(target, args, kwargs, "bidirectional", False))
    count = int(_argument(target, args, kwargs, "num_layers", 1)) * (1 + bidirectional)
    given = _argument(target, args, kwargs, "hx", None)
    params = _argument(target, args, kwargs, "params", None)
    cells = Cell.of(params, bool(_argument(target, args, kwargs, "has_biases", True)), count)
    gates = GATES[target._schema.name]
    hidden = [_units(cell.ih, gates) for cell in cells]
    outputs = [
        h if cell.projection is None else _units(cell.projection, 1)
        for cell, h in zip(cells, hidden, strict=True)
    ]
    rows = [
        torch.stack(own)[:, None] for own in ((outputs, hidden) if isinstance(given, list) else (outputs,))
    ]
    states = given if isinstance(given, list) else [given]
    # Zeros made in forward have the traced dtype written into them.
    start = [
        replace(s, value=s.value.masked_fill(~own.to(s.value.device), 0).to(args[0].value.dtype))
        for s, own in zip(states, rows, strict=True)
    ]
    out = _run(target, (args[0], start if isinstance(given, list) else start[0], *args[2:]), kwargs)
    last = torch.cat(outputs[-(1 + bidirectional) :])
    if all(bool(own.all()) for own in rows):
        return [Value(o) for o in out]
    return [
        Value(o, mask.to(o.device).expand(o.shape).contiguous())
        for o, mask in zip(out, [last, *rows], strict=True)
    ]


def step(target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """One step of one layer, from a state that is zero where units are removed."""
    source, given = args[:2]
    kept = _units(args[2], STEPS[target._schema.name]).to(source.value.device)
    states = given if isinstance(given, list) else [given]
    start = [replace(s, value=s.value.masked_fill(~kept, 0).to(source.value.dtype)) for s in states]
    out = _run(target, (source, start if isinstance(given, list) else start[0], *args[2:]), kwargs)
    values = out if isinstance(out, tuple) else (out,)
    whole = bool(kept.all())
    found = [Value(o, None if whole else kept.expand(o.shape).contiguous()) for o in values]
    return found if isinstance(out, tuple) else found[0]


def _units(weight: Value, gates: int) -> Tensor:
    """Which units a weight has rows for, ``(hidden,) bool``."""
    if weight.mask is None:
        return torch.ones(weight.value.shape[0] // gates, dtype=torch.bool)
    by_gate = weight.mask.any(1).reshape(gates, -1).cpu()
    if not bool((by_gate == by_gate[0]).all()):
        raise UnsupportedOpError(
            "a recurrent unit of which only some gates are kept: trace the model again, or pass the layer in "
            "ignored_layers"
        )
    return by_gate[0]


RECURRENT: dict[str, Rule] = {**dict.fromkeys(GATES, recurrence), **dict.fromkeys(STEPS, step)}
