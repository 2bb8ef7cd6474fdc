"""A user's own functions and classes by name: ``package.module:callable`` or ``file.py:callable``."""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

from qcqp_prune.cli.arguments import nearest
from qcqp_prune.errors import ConfigError, QcqpPruneError


def called(source: str, kwargs: Mapping[str, Any], returns: str) -> Any:
    """What a callable returns.

    Args:
        source: its name.
        kwargs: its keyword arguments.
        returns: what it is to return, in words.

    Raises:
        ConfigError: there is no such callable, or it fails.
    """
    make = find_callable(source, f"a class or function that returns {returns}")
    try:
        return make(**kwargs)
    except QcqpPruneError:
        raise
    except Exception as error:  # whatever a user's function raises
        arguments = ", ".join(f"{k}={v!r}" for k, v in kwargs.items())
        raise ConfigError(
            f"{source}({arguments}) fails with {type(error).__name__}: {error}. It is called "
            f"{'with these arguments' if kwargs else 'without arguments'}, and is to return {returns}"
        ) from error


def find_callable(source: str, what: str) -> Callable[..., Any]:
    """What a name means.

    Args:
        source: the name.
        what: it is to be, in words.

    Raises:
        ConfigError: there is no such thing, or it cannot be called.
    """
    where, colon, name = source.rpartition(":")
    if not colon or not where or not name:
        raise ConfigError(
            f"{source!r} cannot be read: write package.module:callable or file.py:callable, {what}"
        )
    module = _module_in(Path(where).absolute()) if where.endswith(".py") else _module_called(where)
    found: Any = module
    for part in name.split("."):
        if not hasattr(found, part):
            raise ConfigError(f"{where} has no {name!r}: {nearest(part, dir(found))}Name {what}")
        found = getattr(found, part)
    if not callable(found):
        raise ConfigError(f"{source} is a {type(found).__name__}: name {what}")
    call: Callable[..., Any] = found
    return call


def _module_called(name: str) -> ModuleType:
    if (here := os.getcwd()) not in sys.path:
        sys.path.insert(0, here)  # as `python -m` does, so that a user's own module is found
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"module {name!r} cannot be imported ({error}): install it, or run where it lies"
        ) from error
    except Exception as error:  # whatever a user's module raises
        raise ConfigError(
            f"module {name!r} fails on import with {type(error).__name__}: {error}. Repair it"
        ) from error


def _module_in(path: Path) -> ModuleType:
    if not path.is_file():
        raise ConfigError(f"there is no file {path}: give the path of a Python file")
    return _executed(path, path.stat().st_mtime_ns)


@cache
def _executed(path: Path, written: int) -> ModuleType:
    """A file as the module of its name, executed once: what a network and a loss of one file share is one and the same.

    Its folder is searched for what it imports, as that of a script is; processes that a loader starts find it there.

    Args:
        path: of the file, absolute.
        written: when it was last changed, so that an edited file is executed anew.
    """
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None  # its name ends in .py
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    if (folder := str(path.parent.resolve())) not in sys.path:
        sys.path.append(folder)
    sys.modules.setdefault(path.stem, module)
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # whatever a user's file raises
        raise ConfigError(
            f"{path} fails on import with {type(error).__name__}: {error}. Repair it"
        ) from error
    return module
