"""Mask-aware complex numbers as pairs of real ones, for the oracle."""

from __future__ import annotations

from typing import Any

from qcqp_prune.apply.masked_ops import Rule, Value, _run
from qcqp_prune.errors import UnsupportedOpError


def as_complex(target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Value:
    """A number is kept where both of its parts are."""
    out, mask = _run(target, args, kwargs), args[0].mask
    if mask is None:
        return Value(out)
    if not bool((mask[..., 0] == mask[..., 1]).all()):
        raise UnsupportedOpError(
            "a complex number of which one part is pruned: pass the layer in ignored_layers"
        )
    return Value(out, mask[..., 0])


def as_real(target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Value:
    """Both parts of a number are kept where it is."""
    out, mask = _run(target, args, kwargs), args[0].mask
    return Value(out, None if mask is None else mask[..., None].expand(out.shape))


COMPLEX: dict[str, Rule] = {"aten::view_as_complex": as_complex, "aten::view_as_real": as_real}
