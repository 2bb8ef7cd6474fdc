"""Reading what stands on the command line."""

from __future__ import annotations

import difflib
import json
from collections.abc import Sequence
from typing import Any

from qcqp_prune.errors import ConfigError, InvalidBudgetError

IMPORTANCES = ("magnitude", "batch_norm_scale", "taylor")
VARIANTS = ("paper", "authors", "l2")


def nearest(word: str, known: Sequence[str]) -> str:
    """``did you mean 'x'? `` or nothing."""
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.4)
    return f"did you mean {near[0]!r}? " if near else ""


def parse_budgets(words: Sequence[str]) -> dict[str, int | float | str]:
    """``["macs=50%", "params=2M"]`` as a mapping; a bare ``50%`` is of the MACs.

    Raises:
        InvalidBudgetError: a word has no value, or a resource is named twice.
    """
    budgets: dict[str, int | float | str] = {}
    for word in words:
        name, equals, value = word.rpartition("=")
        name = name.strip() if equals else "macs"
        if not name or not value.strip():
            raise InvalidBudgetError(
                f"budget {word!r} cannot be read: write resource=limit, such as macs=50%"
            )
        if name in budgets:
            raise InvalidBudgetError(f"two budgets for {name}: give one")
        budgets[name] = value.strip()
    return budgets


def parse_kwargs(words: Sequence[str]) -> dict[str, Any]:
    """``["depth=20", "name=abc"]`` as a mapping; values are JSON where they can be read as such, else text.

    Raises:
        ConfigError: a word has no name.
    """
    kwargs: dict[str, Any] = {}
    for word in words:
        name, equals, value = word.partition("=")
        if not equals or not name.isidentifier():
            raise ConfigError(f"--kwarg {word!r} cannot be read: write name=value")
        try:
            kwargs[name] = json.loads(value)
        except ValueError:
            kwargs[name] = value
    return kwargs


def parse_shape(text: str) -> tuple[int, ...]:
    """``"1,3,32,32"`` or ``"1x3x32x32"``.

    Raises:
        ConfigError: it is no list of positive integers.
    """
    try:
        shape = tuple(int(word) for word in text.replace("x", ",").split(","))
    except ValueError:
        shape = ()
    if not shape or min(shape) < 1:
        raise ConfigError(f"--input-shape {text!r} cannot be read: write positive integers such as 1,3,32,32")
    return shape


def parse_importance(text: str) -> tuple[str, str]:
    """``"magnitude:l2"`` as name and variant; the paper's variant where none is named.

    Raises:
        ConfigError: there is no such importance.
    """
    name, _, variant = text.partition(":")
    if name not in IMPORTANCES:
        raise ConfigError(
            f"no importance is called {name!r}: {nearest(name, IMPORTANCES)}choose from {', '.join(IMPORTANCES)}"
        )
    if variant and (name != "magnitude" or variant not in VARIANTS):
        raise ConfigError(
            f"no importance is called {text!r}: variants are magnitude:{', magnitude:'.join(VARIANTS)}"
        )
    return name, variant or VARIANTS[0]
