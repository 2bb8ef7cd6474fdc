"""Files: written aside and then renamed, so that a kill leaves the old one or the new one, never half of one."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

from qcqp_prune.errors import PlanError

StrPath = str | os.PathLike[str]


def library_version() -> str:
    """The installed version of this library, ``unknown`` where it runs from a bare source tree."""
    try:
        return version("qcqp-prune")
    except PackageNotFoundError:
        return "unknown"


def write_bytes(path: StrPath, content: bytes) -> Path:
    """Write a file aside, flush it to the disk, and rename it; folders on the way are made."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    aside = _aside(target)
    try:
        with aside.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        aside.replace(target)
    finally:
        aside.unlink(missing_ok=True)
    return target


def write_json(path: StrPath, data: Mapping[str, Any]) -> Path:
    """Write plain data as JSON; numpy scalars become numbers."""
    text = json.dumps(data, indent=1, allow_nan=False, default=_plain)
    return write_bytes(path, text.encode() + b"\n")


def read_json(path: StrPath, what: str) -> dict[str, Any]:
    """Read a JSON object.

    Args:
        path: the file.
        what: what it should be, for the message: ``"a report"``.

    Raises:
        PlanError: the file is missing, unreadable, or holds no JSON object.
    """
    file = Path(path)
    try:
        data = json.loads(file.read_bytes())
    except FileNotFoundError as error:
        raise PlanError(f"there is no file {file}: give the path of {what}") from error
    except OSError as error:
        raise PlanError(f"{file} cannot be read ({error.strerror}): give the path of {what}") from error
    except (ValueError, RecursionError) as error:
        raise PlanError(f"{file} is not {what}, it holds no valid JSON ({error}): write it anew") from error
    if not isinstance(data, dict):
        raise PlanError(f"{file} is not {what}, it holds a JSON {type(data).__name__}: give another file")
    return data


def sha256(content: bytes) -> str:
    """Hexadecimal SHA-256."""
    return hashlib.sha256(content).hexdigest()


def digest_of(data: Mapping[str, Any]) -> str:
    """SHA-256 of plain data in a canonical spelling: layout and order of keys do not enter."""
    return sha256(json.dumps(data, sort_keys=True, separators=(",", ":"), default=_plain).encode())


def require_free(path: StrPath, may_replace: Callable[[Path], bool]) -> None:
    """Ask, before any work is done, whether ``new_folder`` could take this place; nothing is written.

    Raises:
        PlanError: something that may not be replaced stands there, or nothing can be written there.
    """
    target = Path(path).absolute()
    if target.exists() and not (target.is_dir() and (_is_empty(target) or may_replace(target))):
        kind = "holds something else" if target.is_dir() else "is a file"
        raise PlanError(f"{target} {kind} and is left alone: give a folder that is new or empty")
    _require_writable(target)


def require_file_place(path: StrPath) -> None:
    """Ask, before any work is done, whether a file could be written here; nothing is written.

    Raises:
        PlanError: a folder stands there, or nothing can be written there.
    """
    target = Path(path).absolute()
    if target.is_dir():
        raise PlanError(f"{target} is a folder: give the path of a file")
    _require_writable(target)


def _require_writable(target: Path) -> None:
    """Refuse a path whose nearest folder that exists is none, or takes no new entry."""
    above = next(folder for folder in target.parents if folder.exists() or folder == folder.parent)
    if not above.is_dir():
        raise PlanError(f"{target} cannot be written, {above} is a file: give another path")
    if not os.access(above, os.W_OK | os.X_OK):
        raise PlanError(f"{target} cannot be written, {above} is not writable: give another path")


@contextmanager
def new_folder(path: StrPath, may_replace: Callable[[Path], bool]) -> Iterator[Path]:
    """A folder to fill, which takes its place under ``path`` once the block ends without an error.

    Args:
        path: where it will stand.
        may_replace: whether the folder that stands there already may go; asked before anything is written.

    Raises:
        PlanError: something that may not be replaced stands there.
    """
    require_free(path, may_replace)
    target = Path(path).absolute()
    target.parent.mkdir(parents=True, exist_ok=True)
    aside = _aside(target)
    aside.mkdir()
    try:
        yield aside
        if target.exists():
            old = _aside(target)
            target.rename(old)
            aside.rename(target)
            shutil.rmtree(old)
        else:
            aside.rename(target)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _is_empty(folder: Path) -> bool:
    return not any(folder.iterdir())


def _aside(target: Path) -> Path:
    return target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.tmp")


def _plain(value: object) -> Any:
    if isinstance(value, np.generic):
        return value.item()
    raise TypeError(f"a {type(value).__name__} cannot be written as JSON")
