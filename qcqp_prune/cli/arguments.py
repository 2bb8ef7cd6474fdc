"""Reading what stands on the command line."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qcqp_prune.errors import ConfigError, InvalidBudgetError
from qcqp_prune.program.problem import Resource
from qcqp_prune.resources.accelerator import AcceleratorCycles
from qcqp_prune.resources.latency import LatencyTable


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


def parse_amount(option: str, words: Sequence[str]) -> int | float | dict[str, int | float]:
    """``["4"]`` as a number, ``["0.1"]`` as a share, ``["4", "stem*=0.5"]`` as a mapping from layer globs; 1 for none.

    A word without a glob is for every layer that no glob matches; among globs the last that matches a layer wins.

    Raises:
        ConfigError: a word holds no number, or a glob stands twice.
    """
    amounts: dict[str, int | float] = {}
    for word in words:
        pattern, equals, text = word.rpartition("=")
        pattern = pattern.strip() if equals else "*"
        if not pattern:
            raise ConfigError(f"{option} {word!r} cannot be read: write a number, or LAYER_GLOB=number")
        if pattern in amounts:
            every = "all layers" if pattern == "*" else pattern
            raise ConfigError(f"{option} is given twice for {every}: give one")
        try:
            amounts[pattern] = float(text) if set(text) & set(".eE") else int(text)
        except ValueError:
            raise ConfigError(
                f"{option} {word!r} cannot be read: write a whole number, a share such as 0.1, or LAYER_GLOB=number"
            ) from None
    if list(amounts) == ["*"]:
        return amounts["*"]
    # The last glob that matches wins, so what is meant for all the others goes first.
    return {"*": amounts.pop("*"), **amounts} if "*" in amounts else (amounts or 1)


def parse_units(words: Sequence[str]) -> tuple[str, ...] | dict[str, tuple[str, ...]] | None:
    """``["heads,widths"]`` as kinds, ``["blocks.0*=head_dim"]`` as a mapping from layer globs; None for none.

    Words without a glob add up to the kinds of every layer that no glob matches.

    Raises:
        ConfigError: a glob stands twice, or has no name.
    """
    every: list[str] = []
    some: dict[str, tuple[str, ...]] = {}
    for word in words:
        pattern, equals, text = word.rpartition("=")
        kinds = tuple(kind.strip() for kind in text.split(",") if kind.strip())
        if not equals:
            every += kinds
        elif not pattern.strip() or pattern.strip() in some:
            raise ConfigError(
                f"--units {word!r} cannot be read: write kinds, or LAYER_GLOB=kinds once for each glob"
            )
        else:
            some[pattern.strip()] = kinds
    if not some:
        return tuple(every) or None
    return {"*": tuple(every), **some} if every else some


def parse_globs(words: Sequence[str]) -> bool | tuple[str, ...]:
    """Names and globs as they are; True where one of them is ``*``, False for none."""
    return "*" in words or (tuple(words) or False)


def further_resources(latency_table: Path | None, accelerator: str | None) -> list[Resource]:
    """Resources that need more than a name: ``latency`` from a file, ``cycles`` of an engine such as ``8x8``.

    Raises:
        PlanError: the file is no latency table.
        ConfigError: the engine cannot be read.
    """
    found: list[Resource] = []
    if latency_table is not None:
        found.append(LatencyTable.load(latency_table))
    if accelerator is not None:
        match = re.fullmatch(r"\s*([1-9][0-9]*)\s*x\s*([1-9][0-9]*)\s*", accelerator)
        if not match:
            raise ConfigError(
                f"accelerator {accelerator!r} cannot be read: write the channels that it reads and writes at a time, "
                "such as 8x8"
            )
        found.append(AcceleratorCycles(int(match[1]), int(match[2])))
    return found


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


def parse_shape(text: str | None) -> tuple[int, ...]:
    """``"1,3,32,32"`` or ``"1x3x32x32"``; nothing where there is none.

    Raises:
        ConfigError: it is no list of positive integers.
    """
    if text is None:
        return ()
    try:
        shape = tuple(int(word) for word in text.replace("x", ",").split(","))
    except ValueError:
        shape = ()
    if not shape or min(shape) < 1:
        raise ConfigError(f"--input-shape {text!r} cannot be read: write positive integers such as 1,3,32,32")
    return shape
