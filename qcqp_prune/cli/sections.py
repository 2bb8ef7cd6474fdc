"""From a table of a TOML file to a frozen dataclass, with every key and value checked."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import MISSING, fields, replace
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from qcqp_prune.cli.arguments import nearest
from qcqp_prune.errors import ConfigError

T = TypeVar("T")

_VARIABLE = re.compile(r"\$\{([A-Za-z_][A-Za-z0-9_]*)\}")


def read_section(kind: type[T], table: object, where: str, *, base: T | None = None) -> T:
    """Make a dataclass from a table.

    Args:
        kind: the dataclass; its annotations say what each value must be.
        table: from the file.
        where: what the section is called in the file, for messages.
        base: the values of keys that are left out; the dataclass's own defaults where None.

    Raises:
        ConfigError: a key is unknown or missing, or a value has the wrong type.
    """
    if not isinstance(table, Mapping):
        raise ConfigError(f"[{where}] is {_shown(table)}: write a table of key = value")
    hints = get_type_hints(kind)
    known = [f.name for f in fields(kind)]  # type: ignore[arg-type]
    for key in table:
        require_known(key, known, f"key {key!r} in [{where}]")
    values = {key: _converted(value, hints[key], f"{where}.{key}") for key, value in table.items()}
    if base is not None:
        return replace(base, **values)  # type: ignore[type-var]
    for f in fields(kind):  # type: ignore[arg-type]
        if f.name not in values and f.default is MISSING and f.default_factory is MISSING:
            raise ConfigError(f"[{where}] has no {f.name}: add it")
    return kind(**values)


def require_known(key: str, known: list[str], what: str) -> None:
    """Refuse a name that is not among the known ones, with the nearest of them.

    Raises:
        ConfigError: it is not.
    """
    if key not in known:
        raise ConfigError(f"unknown {what}: {nearest(key, known)}choose from {', '.join(known)}")


def with_environment(value: Any, where: str) -> Any:
    """A value with every ``${NAME}`` in its texts replaced from the environment.

    Raises:
        ConfigError: a variable is not set.
    """
    if isinstance(value, str):
        for name in _VARIABLE.findall(value):
            if name not in os.environ:
                raise ConfigError(f"{where} needs the environment variable {name}, which is not set: set it")
        return _VARIABLE.sub(lambda match: os.environ[match[1]], value)
    if isinstance(value, Mapping):
        return {
            key: with_environment(inner, f"{where}.{key}" if where else key) for key, inner in value.items()
        }
    if isinstance(value, list):
        return [with_environment(inner, where) for inner in value]
    return value


def _converted(value: Any, hint: Any, where: str) -> Any:
    """The value as its annotation wants it: lists become tuples, whole numbers floats."""
    if get_origin(hint) is tuple:
        if isinstance(value, list):
            inner = get_args(hint)[0]
            return tuple(_converted(v, inner, where) for v in value)
    elif hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    elif get_origin(hint) in (Union, UnionType):
        for option in get_args(hint):
            if _fits(value, option):
                return _converted(value, option, where)
    elif _fits(value, hint):
        return value
    raise ConfigError(f"{where} is {_shown(value)}: give {_described(hint)}")


def _fits(value: Any, hint: Any) -> bool:
    origin = get_origin(hint)
    if origin is Literal:
        return value in get_args(hint)
    if origin is tuple:
        return isinstance(value, list)
    if origin is not None:
        return isinstance(value, origin)
    if hint in (int, float):
        kinds = (int, float) if hint is float else (int,)
        return isinstance(value, kinds) and not isinstance(value, bool)
    return hint is Any or isinstance(value, hint)


def _described(hint: Any) -> str:
    names = {str: "a text", int: "a whole number", float: "a number", bool: "true or false"}
    origin = get_origin(hint)
    if origin is Literal:
        return " or ".join(f'"{option}"' for option in get_args(hint))
    if origin in (Union, UnionType):
        return ", or ".join(_described(option) for option in get_args(hint) if option is not NoneType)
    if origin is tuple:
        return f"a list, each entry {_described(get_args(hint)[0])}"
    return names.get(hint, "a table" if origin is not None else str(hint))


def _shown(value: object) -> str:
    return f'"{value}"' if isinstance(value, str) else repr(value)
