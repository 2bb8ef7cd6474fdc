"""Running the program inside the tests' own process, and files for it to read."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from qcqp_prune.cli import main
from qcqp_prune.cli.console import OUT

NET = '''
import torch
from torch import nn


class Net(nn.Module):
    """1 -> 6 -> 8 channels on 8 x 8 pixels, and a classifier."""

    def __init__(self, classes=10, act="relu"):
        super().__init__()
        self.a = nn.Conv2d(1, 6, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(6)
        self.b = nn.Conv2d(6, 8, 3, padding=1)
        self.head = nn.Linear(8, classes)
        self.act = getattr(torch, act)

    def forward(self, x):
        return self.head(self.act(self.b(self.act(self.bn(self.a(x))))).mean((2, 3)))


def broken():
    raise RuntimeError("the constructor is ill")


number = 3
'''


@dataclass(frozen=True)
class Result:
    """What the program left behind: its exit code and what it wrote."""

    code: int
    out: str
    err: str


Run = Callable[..., Result]


@pytest.fixture(autouse=True)
def log_put_back() -> Iterator[None]:
    """Whatever of the program a test runs, the library's log is afterwards what it was."""
    logger = logging.getLogger("qcqp_prune")
    before = (list(logger.handlers), logger.level, logger.propagate)
    yield
    logger.handlers, logger.propagate = before[0], before[2]
    logger.setLevel(before[1])


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """Call the program with arguments."""
    monkeypatch.setattr(OUT, "width", 200)  # no cell of a table is broken over lines

    def call(*arguments: object) -> Result:
        with pytest.raises(SystemExit) as left:
            main([str(a) for a in arguments])
        code = left.value.code
        out, err = capsys.readouterr()
        return Result(0 if code is None else int(code), out, err)

    return call


@pytest.fixture
def net(tmp_path: Path) -> Path:
    """A Python file with a network of a user's own."""
    path = tmp_path / "net.py"
    path.write_text(NET)
    return path


@pytest.fixture
def traced(run: Run, net: Path, tmp_path: Path) -> Path:
    """What `trace` writes for that network."""
    graph = tmp_path / "graph.json"
    assert run("trace", f"{net}:Net", "--input-shape", "1,1,8,8", "-o", graph).code == 0
    return graph
