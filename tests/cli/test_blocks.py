"""Residual branches that go as a whole, and layers that keep equally many units, from the command line."""

from __future__ import annotations

import json
import runpy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

import qcqp_prune as qp
from qcqp_prune.program.files import read_traced
from qcqp_prune.report import PruneReport

NET = '''
import torch
from torch import nn


class Branch(nn.Module):
    def __init__(self, decay):
        super().__init__()
        self.up, self.down = nn.Linear(6, 8), nn.Linear(8, 6)
        with torch.no_grad():
            self.up.weight.copy_(decay ** torch.arange(8.0)[:, None])
            self.down.weight.copy_(decay ** torch.arange(8.0)[None])

    def forward(self, x):
        return x + self.down(torch.tanh(self.up(x)))


class Net(nn.Module):
    """6 -> two branches of 8 on the stream -> 3. Of the first branch most channels are worth next to nothing."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.Sequential(Branch(0.2), Branch(1.0))
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        return self.head(self.blocks(x))
'''

BRANCH, HEAD = 2 * 6 * 8, 6 * 3
ONE_BRANCH = f"macs={BRANCH + HEAD}"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "branches.py"
    path.write_text(NET)
    return path


def cut(
    run: Any, file: Path, tmp_path: Path, options: Sequence[object], budget: str
) -> tuple[Any, str, Path]:
    """The traced network, what ``shrink`` said, and the folder of the smaller network."""
    graph, masks, folder = tmp_path / "g.json", tmp_path / "m.json", tmp_path / "small"
    traced = run("trace", f"{file}:Net", "--input-shape", "1,6", "-o", graph, *options)
    assert traced.code == 0, traced.err
    solved = run("solve", graph, "-b", budget, "-o", masks, "--solver", "highs", "--time-limit", 60)
    assert solved.code == 0, solved.err
    assert json.loads(masks.read_text())["usage"]["macs"]["used"] <= int(budget.removeprefix("macs="))
    small = run("shrink", graph, masks, "-o", folder)
    assert small.code == 0, small.err
    return read_traced(graph), small.out, folder


@pytest.mark.parametrize(
    ("named", "gone"), [("*", "blocks.0"), ("blocks.0", "blocks.0"), ("blocks.1", "blocks.1")]
)
def test_a_branch_goes_and_is_named(run: Any, file: Path, tmp_path: Path, named: str, gone: str) -> None:
    # With every channel of a branch that stays, half of the work is one branch of two.
    _, said, folder = cut(run, file, tmp_path, ["--blocks", named, "--min-keep", 8], ONE_BRANCH)
    assert f"residual branches removed as a whole: {gone}" in said
    small = qp.load(folder, runpy.run_path(str(file))["Net"])
    assert {name.rpartition(".up")[0] for name, _ in small.named_parameters() if ".up" in name} == {
        "blocks.0",
        "blocks.1",
    } - {gone}


def test_no_branch_goes_unasked(run: Any, file: Path, tmp_path: Path) -> None:
    _, said, _ = cut(run, file, tmp_path, [], ONE_BRANCH)
    assert "removed as a whole" not in said


def test_a_branch_that_is_none_is_refused(run: Any, file: Path, tmp_path: Path) -> None:
    result = run(
        "trace", f"{file}:Net", "--input-shape", "1,6", "-o", tmp_path / "g.json", "--blocks", "body.*"
    )
    assert result.code == 2
    assert "body.*" in result.err


def test_a_job_says_which_branches_went(run: Any, file: Path, tmp_path: Path) -> None:
    job = tmp_path / "job.toml"
    job.write_text(
        f'[model]\nsource = "{file.name}:Net"\n[input]\nshape = [1, 6]\n[budgets]\nmacs = {BRANCH + HEAD}\n'
        '[trace]\nblocks = true\nmin_keep = 8\n[solver]\nname = "highs"\n[output]\nfolder = "out"\n'
    )
    result = run("run", job)
    assert result.code == 0, result.err
    assert "residual branches removed as a whole: blocks.0" in result.out
    report = PruneReport.read(tmp_path / "out" / "report.json")
    assert report.verification.removed_blocks == ("blocks.0",)


@pytest.mark.parametrize(
    ("options", "equal"),
    [
        ([], False),
        (["--uniform", "*"], True),
        (["--uniform", "blocks.*.up"], True),
        (["--uniform", "head"], False),
    ],
)
def test_layers_that_keep_equally_many(
    run: Any, file: Path, tmp_path: Path, options: list[str], equal: bool
) -> None:
    _, _, folder = cut(run, file, tmp_path, options, f"macs={BRANCH + HEAD}")
    small = qp.load(folder, runpy.run_path(str(file))["Net"])
    first, second = (small.get_submodule(f"blocks.{k}.up").weight.shape[0] for k in (0, 1))
    assert (first == second) is equal
    assert first + second == 8
