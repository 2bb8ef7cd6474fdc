"""Rows that processes of their own measure: they come back, and a process that takes too much is stopped."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from benchmarks import recording
from benchmarks.recording import Limits, ProcessFailed, in_a_process, record, stage

HERE = "tests.test_recording"


def answer(a: int, b: str) -> dict[str, Any]:
    stage("answer")
    print("something else")  # noqa: T201 - the row is found among whatever else is printed
    return {"a": a, "b": b, "pid": os.getpid()}


def sleep() -> dict[str, Any]:
    stage("sleep")
    time.sleep(60)
    return {}


def eat() -> dict[str, Any]:
    stage("eat")
    eaten = bytearray(os.urandom(1)) * 300_000_000
    time.sleep(60)
    return {"eaten": len(eaten)}


def stumble() -> dict[str, Any]:
    stage("stumble")
    raise ValueError("over a stone")


def test_a_row_comes_back_from_another_process() -> None:
    row = in_a_process(f"{HERE}:answer", 3, "x|'y'")
    assert (row["a"], row["b"]) == (3, "x|'y'")
    assert row["pid"] != os.getpid()


@pytest.mark.parametrize(
    ("name", "limits", "message"),
    [
        ("sleep", Limits(seconds=3), "did not end within 3 s"),
        ("eat", Limits(seconds=50, memory_mb=200), "took more than 200 MB of memory"),
        ("stumble", Limits(), "ValueError: over a stone"),
    ],
)
def test_one_that_fails_says_why_and_where(name: str, limits: Limits, message: str) -> None:
    started = time.monotonic()
    with pytest.raises(ProcessFailed, match=message) as failed:
        in_a_process(f"{HERE}:{name}", limits=limits)
    assert failed.value.stage in (name, "start")  # a slow machine may stop it before it begins
    assert time.monotonic() - started < 55


def test_a_file_names_the_commands_that_made_its_rows(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(recording, "RESULTS", tmp_path)

    def commands(rows: list[dict[str, Any]], *arguments: str) -> list[str]:
        monkeypatch.setattr(sys, "argv", ["/anywhere/things.py", *arguments])
        found: list[str] = json.loads(record("things", rows).read_text())["commands"]
        return [c.removeprefix("python -m benchmarks.things") for c in found]

    a, b = {"a": 1}, {"b": 2}
    assert commands([a], "--only", "a thing") == [" --only 'a thing'"]
    assert commands([a, b]) == [" --only 'a thing'", ""]
    assert commands([a, b], "--only", "a thing") == ["", " --only 'a thing'"]
    assert commands([{"a": 3}], "--again") == [" --again"]  # nothing of the others is left
