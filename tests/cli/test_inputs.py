"""What a network is traced with, from the command line: token numbers, several inputs, inputs by name."""

from __future__ import annotations

from pathlib import Path

import pytest

from qcqp_prune.graph.channels import ChannelGraph
from qcqp_prune.program.files import read_traced
from tests.cli.conftest import Run

WORDS = """
import torch
from torch import nn


class Words(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(40, 8)
        self.up = nn.Linear(8, 24)
        self.down = nn.Linear(24, 3)

    def forward(self, ids, mask=None):
        x = self.down(self.up(self.embed(ids)).relu())
        return x if mask is None else x * mask[..., None]


def named():
    return {"ids": torch.arange(6).reshape(1, 6), "mask": torch.tensor([[1.0, 1, 1, 1, 0, 0]])}


def broken():
    raise ValueError("no inputs today")


def nothing():
    return "text"
"""


@pytest.fixture
def words(tmp_path: Path) -> Path:
    path = tmp_path / "words.py"
    path.write_text(WORDS)
    return path


def graph_of(path: Path) -> ChannelGraph:
    return read_traced(path).graph


def test_token_numbers_are_drawn_below_the_vocabulary(run: Run, words: Path, tmp_path: Path) -> None:
    out = tmp_path / "g.json"
    options = ["--input-shape", "2,30", "--input-dtype", "int64", "--input-below", "40"]
    result = run("trace", f"{words}:Words", *options, "-o", out)
    assert result.code == 0, result.err
    (spec,) = graph_of(out).inputs
    assert (spec.shape, spec.dtype) == ((2, 30), "int64")
    assert 0 <= spec.low < spec.high < 40
    assert not spec.pattern  # not taken for a mask, so that a comparison draws other tokens
    assert (
        run("trace", f"{words}:Words", "--input-shape", "2,30", "-o", out).code == 1
    )  # floats are no tokens


def test_inputs_that_a_function_makes(run: Run, words: Path, tmp_path: Path) -> None:
    out = tmp_path / "g.json"
    result = run("trace", f"{words}:Words", "--inputs", f"{words}:named", "-o", out)
    assert result.code == 0, result.err
    assert [(spec.shape, spec.dtype) for spec in graph_of(out).inputs] == [
        ((1, 6), "int64"),
        ((1, 6), "float32"),
    ]
    assert run("solve", out, "-b", "macs=50%", "-o", tmp_path / "m.json").code == 0
    assert run("shrink", out, tmp_path / "m.json", "-o", tmp_path / "small").code == 0


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (["--inputs", "{words}:broken"], 2, "fails with ValueError: no inputs today"),
        (["--inputs", "{words}:nothing"], 1, "holds no tensor"),
        (["--inputs", "{words}:absent"], 2, "has no 'absent'"),
        ([], 2, "give one of the two"),
    ],
)
def test_inputs_that_cannot_be_made(
    run: Run, words: Path, tmp_path: Path, options: list[str], code: int, message: str
) -> None:
    wanted = [option.format(words=words) for option in options]
    result = run("trace", f"{words}:Words", *wanted, "-o", tmp_path / "g.json")
    assert result.code == code
    assert message in " ".join(result.err.split())
    assert not (tmp_path / "g.json").exists()


def test_a_configuration_file_names_the_function_that_lies_beside_it(
    run: Run, words: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = tmp_path / "job.toml"
    text = (
        '[model]\nsource = "words.py:Words"\n[input]\n{}\n[budgets]\nmacs = "50%"\n[output]\nfolder = "out"\n'
    )
    job.write_text(text.format('source = "words.py:named"'))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    result = run("run", job)
    assert result.code == 0, result.err
    job.write_text(text.format('shape = [2, 9]\ndtype = "int64"\nbelow = 40'))
    assert run("run", job).code == 0
    job.write_text(text.format('shape = [2, 9]\nsource = "words.py:named"'))
    assert "give one of the two" in " ".join(run("run", job).err.split())
