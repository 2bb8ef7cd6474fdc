"""Data and losses of a user's own in configuration files."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path

import pytest
import torch

import qcqp_prune as qp
from qcqp_prune.report import PruneReport
from tests.cli.conftest import Run

OWN = """
from typing import NamedTuple

import shared
import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(5, 8), nn.Linear(8, 2)

    def forward(self, x):
        return self.b(torch.relu(self.a(x)))


def pairs(count, seed):
    x = torch.randn(count, 5, generator=torch.Generator().manual_seed(seed))
    return TensorDataset(x, torch.stack([x[:, 0] * x[:, 1], x.sum(1)], 1))


def loaders(size=16):
    return DataLoader(pairs(64, 0), size, shuffle=True), DataLoader(pairs(40, 1), 20)


def unmeasured():
    return loaders()[0], None


def one():
    return loaders()[0]


def sets():
    return pairs(8, 0), pairs(8, 1)


def reversed_loaders():
    return None, loaders()[1]


def broken():
    raise OSError("the disk is gone")


class Batches(IterableDataset):
    def __len__(self):
        return 4

    def __iter__(self):
        return iter(loaders()[0])


def in_batches():
    return Batches(), None


class Pair(NamedTuple):
    first: torch.Tensor
    second: torch.Tensor


class Paired(Net):
    def forward(self, x):
        return Pair(*super().forward(x).split(1, 1))


def of_pairs(outputs, targets):
    assert isinstance(outputs, Pair)
    return shared.squared(torch.cat(outputs, 1), targets)


def thrice(outputs, targets):
    return 3 * nn.functional.mse_loss(outputs, targets)


number = 3
"""

JOB = """
[model]
source = "own.py:Net"
[input]
shape = [1, 5]
[data]
source = "own.py:loaders"
kwargs = { size = 32 }
loss = "own.py:thrice"
[pretrain]
epochs = 2
lr = 0.02
[budgets]
macs = "50%"
[solver]
name = "highs"
[finetune]
epochs = 1
lr = 0.01
[output]
folder = "out"
"""


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A configuration beside its functions; the program runs elsewhere."""
    (tmp_path / "own.py").write_text(OWN)
    (tmp_path / "shared.py").write_text("def squared(a, b):\n    return (a - b).square().mean()\n")
    # What one test puts on the path and imports from its folder is not the next one's.
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.delitem(sys.modules, "shared", raising=False)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    path = tmp_path / "job.toml"
    path.write_text(JOB)
    return path


def reported(job: Path) -> PruneReport:
    return PruneReport.read(job.parent / "out" / "report.json")


def test_a_network_is_trained_scored_and_measured_with_data_and_loss_of_ones_own(run: Run, job: Path) -> None:
    result = run("run", job)
    assert result.code == 0, result.err
    report = reported(job)
    assert report.importance == "Calibrated"
    assert report.accuracy.dense is None
    assert report.accuracy.samples == 40
    assert set(report.accuracy.losses) == {"dense", "pruned", "repaired", "finetuned"}
    assert f"loss finetuned: {report.accuracy.losses['finetuned']:.6g} over 40" in result.out
    # By the loss that was named, on the validation part, of the network that was written.
    own = runpy.run_path(str(job.parent / "own.py"))
    small = qp.load(job.parent / "out" / "model", own["Net"])
    x, targets = own["pairs"](40, 1).tensors
    with torch.no_grad():
        loss = 3 * (small(x) - targets).square().mean()
    assert report.accuracy.losses["finetuned"] == pytest.approx(float(loss), rel=1e-5)


@pytest.mark.parametrize("name", ["taylor", "fisher", "output_change", "activation"])
def test_scores_of_ones_own_data(run: Run, job: Path, name: str) -> None:
    job.write_text(JOB + f'[importance]\nname = "{name}"\nbatches = 1\n')
    result = run("run", job)
    assert result.code == 0, result.err
    assert reported(job).importance.casefold().startswith(name.replace("_", ""))


def test_a_training_under_a_regulariser_has_the_loss(run: Run, job: Path) -> None:
    job.write_text(JOB + '[training]\nmethod = "spr"\nepochs = 1\n')
    result = run("run", job)
    assert result.code == 0, result.err
    assert set(reported(job).accuracy.losses) >= {"regularised", "finetuned"}


def test_a_loss_knows_the_classes_of_the_network_beside_it(run: Run, job: Path) -> None:
    job.write_text(JOB.replace("own.py:Net", "own.py:Paired").replace("own.py:thrice", "own.py:of_pairs"))
    result = run("run", job)
    assert result.code == 0, result.err
    assert reported(job).accuracy.losses["finetuned"] > 0


def test_a_data_set_that_yields_batches_is_a_loader(run: Run, job: Path) -> None:
    text = JOB.replace("own.py:loaders", "own.py:in_batches").replace("kwargs = { size = 32 }\n", "")
    job.write_text(text)
    result = run("run", job)
    assert result.code == 0, result.err


SWEEP = """
[training]
method = "spr"
epochs = 1
control = false
[sweep]
strengths = [0.1]
alphas = [0.5]
"""


def test_a_sweep_shows_the_loss_and_goes_on_from_rows_of_the_same_one_only(run: Run, job: Path) -> None:
    pretraining = JOB[JOB.index("[pretrain]") : JOB.index("[budgets]")]
    text = JOB.replace(pretraining, "") + SWEEP
    job.write_text(text)
    result = run("sweep", job)
    assert result.code == 0, result.err
    (row,) = json.loads((job.parent / "out" / "sweep.json").read_text())["rows"]
    assert f"{row['accuracy']['losses']['finetuned']:.4g}" in result.out
    job.write_text(text.replace("own.py:thrice", "torch.nn.functional:mse_loss"))
    other = run("sweep", job)
    assert other.code != 0
    assert "differs in loss" in other.err


def test_without_validation_nothing_is_measured(run: Run, job: Path) -> None:
    text = JOB.replace("own.py:loaders", "own.py:unmeasured").replace("kwargs = { size = 32 }\n", "")
    job.write_text(text)
    result = run("run", job)
    assert result.code == 0, result.err
    assert reported(job).accuracy.losses == {}
    assert len(reported(job).training["epochs"]) == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (('source = "own.py:loaders"', 'source = "own.py:loaders"\nname = "digits"'), "a name and a source"),
        (("kwargs", "batch_size = 4\nkwargs"), "batch_size is of a data set by name"),
        (('source = "own.py:loaders"', 'name = "digits"'), "kwargs is of a source"),
        (('source = "own.py:loaders"\nkwargs = { size = 32 }', ""), "a loss and no data"),
        (("own.py:loaders", "own.py:loader"), "did you mean 'loaders'"),
        (("size = 32", "sise = 32"), "fails with TypeError"),
        (("own.py:loaders", "own.py:number"), "is a int: name a class or function that returns two loaders"),
        (("own.py:thrice", "own.py:number"), "is a int: name a function of the network's outputs"),
        (("own.py:thrice", "torch.nn.functional:mse_los"), "did you mean 'mse_loss'"),
        (("own.py:thrice", "torch.nn.functional:one_hot"), "the loss one_hot does not take"),
        (("own.py:thrice", "torch.nn:MSELoss"), "is a class: name a function"),
        (("[finetune]", "[finetune]\nlabel_smoothing = 0.1"), "label"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_written(
    run: Run, job: Path, change: tuple[str, str], message: str
) -> None:
    assert change[0] in JOB
    job.write_text(JOB.replace(*change))
    result = run("run", job)
    assert result.code in (1, 2)
    assert result.err.count("error: ") == 1
    assert message in " ".join(result.err.split())
    assert not (job.parent / "out").exists()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("one", "returns a DataLoader: have it return two loaders"),
        ("sets", "returns a TensorDataset, which yields single samples"),
        ("reversed_loaders", "which are no loaders"),
        ("broken", "fails with OSError: the disk is gone"),
    ],
)
def test_functions_that_return_no_loaders(run: Run, job: Path, name: str, message: str) -> None:
    job.write_text(JOB.replace("own.py:loaders", f"own.py:{name}").replace("kwargs = { size = 32 }\n", ""))
    result = run("run", job)
    assert result.code == 2
    assert message in " ".join(result.err.split())
    assert not (job.parent / "out").exists()
