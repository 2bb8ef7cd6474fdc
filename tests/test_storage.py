"""Files are written aside and renamed; what cannot be read is refused."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest

from qcqp_prune.errors import PlanError
from qcqp_prune.storage import (
    digest_of,
    new_folder,
    read_json,
    require_file_place,
    require_free,
    write_bytes,
    write_json,
)


def test_json_round_trip_with_numpy_numbers(tmp_path: Path) -> None:
    path = write_json(tmp_path / "deep" / "x.json", {"a": np.int64(3), "b": [np.float64(0.5), True, None]})
    assert read_json(path, "a test") == {"a": 3, "b": [0.5, True, None]}


def test_a_place_is_asked_for_without_writing_anything(tmp_path: Path) -> None:
    require_file_place(tmp_path / "deep" / "x.json")
    require_free(tmp_path / "deep" / "folder", lambda _: False)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").write_text("")
    with pytest.raises(PlanError, match="is a folder"):
        require_file_place(tmp_path)
    for ask in (require_file_place, lambda path: require_free(path, lambda _: True)):
        with pytest.raises(PlanError, match="is a file: give another path"):
            ask(tmp_path / "file" / "below")


@pytest.mark.skipif(os.geteuid() == 0, reason="everything is writable to root")
def test_a_folder_that_takes_nothing_is_refused(tmp_path: Path) -> None:
    (tmp_path / "closed").mkdir(mode=0o500)
    with pytest.raises(PlanError, match="not writable"):
        require_file_place(tmp_path / "closed" / "x.json")


def test_not_a_number_is_never_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "x.json", {"a": float("nan")})
    assert list(tmp_path.iterdir()) == []


def test_a_failure_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_bytes(tmp_path / "x", b"old")

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_bytes(path, b"new")
    assert [p.name for p in tmp_path.iterdir()] == ["x"]
    assert path.read_bytes() == b"old"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "no valid JSON"),
        (b"\xff\xfe", "no valid JSON"),
        (b"[]", "JSON list"),
        (b"[" * 100_000, "no valid JSON"),
    ],
)
def test_unreadable_json(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "x").write_bytes(content)
    with pytest.raises(PlanError, match=message):
        read_json(tmp_path / "x", "a test")
    with pytest.raises(PlanError, match="cannot be read"):
        read_json(tmp_path, "a test")


def test_the_digest_is_of_the_data_not_of_its_layout() -> None:
    data = {"b": [1, 2.5], "a": {"x": None}}
    assert digest_of(data) == digest_of(json.loads(json.dumps(dict(reversed(data.items())), indent=3)))
    assert digest_of(data) != digest_of({**data, "b": [1, 2.25]})


def test_a_folder_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    target = tmp_path / "f"

    def stop_half_way() -> None:
        with new_folder(target, lambda _: True) as aside:
            (aside / "x").write_text("1")
            raise RuntimeError("half way")

    with pytest.raises(RuntimeError, match="half way"):
        stop_half_way()
    assert list(tmp_path.iterdir()) == []
    with new_folder(target, lambda _: False) as aside:
        (aside / "x").write_text("1")
        assert not target.exists()
    assert (target / "x").read_text() == "1"
    assert [p.name for p in tmp_path.iterdir()] == ["f"]


def test_what_may_not_be_replaced_is_left_alone(tmp_path: Path) -> None:
    target = tmp_path / "f"
    target.mkdir()
    with new_folder(target, lambda _: False) as aside:  # an empty one may go
        (aside / "x").write_text("1")
    with pytest.raises(PlanError, match="holds something else"), new_folder(target, lambda _: False):
        pass
    with new_folder(target, lambda _: True) as aside:
        (aside / "y").write_text("2")
    assert [p.name for p in target.iterdir()] == ["y"]
    with pytest.raises(PlanError, match="is a file"), new_folder(target / "y", lambda _: True):
        pass
    assert (target / "y").read_text() == "2"
