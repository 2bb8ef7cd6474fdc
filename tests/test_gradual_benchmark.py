"""The comparison of one cut with several rounds: equal batches, equal budgets, and rows that are measured once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import qcqp_prune as qp
from benchmarks import gradual, recording
from benchmarks.gradual_table import table
from benchmarks.settings import Setting
from qcqp_prune.data import digits
from qcqp_prune.models import DigitsNet
from qcqp_prune.train import FinetuneConfig


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[list[int]]:
    """Results and checkpoints in a folder of the test, and one small network; which epochs were drawn."""
    drawn: list[list[int]] = []

    class Counted(Setting):
        def loader(self, seed: int, batches: int) -> Any:
            loader, seen = super().loader(seed, batches), list[int]()
            drawn.append(seen)
            set_epoch = loader.set_epoch
            loader.set_epoch = lambda epoch: (seen.append(epoch), set_epoch(epoch))[1]  # type: ignore[method-assign]
            return loader

    def digits_net() -> Setting:
        torch.manual_seed(0)
        recipe = FinetuneConfig(lr=0.05, schedule="cosine", device="cpu")
        return Counted("digits", DigitsNet(), torch.zeros(1, 1, 8, 8), digits(), None, recipe)

    monkeypatch.setattr(recording, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(gradual, "CACHE", tmp_path / "cache")
    monkeypatch.setattr(gradual, "SETTINGS", {"digits": digits_net})
    return drawn


CALL = ["--instances", "digits", "--budgets", "60%", "--seeds", "0", "--objectives", "paper"]
CALL += ["--epochs", "2", "--batches", "2"]


def test_arms_differ_in_cuts_only_and_are_measured_once(small: list[list[int]], tmp_path: Path) -> None:
    gradual.main([*CALL, "--rounds", "1", "2"])
    rows = recording.recorded("gradual")
    assert [(r["count"], r["epochs"]) for r in rows] == [(1, 2), (2, 1)]
    for row in rows:
        assert row["macs"]["dense"] == 269_000
        assert row["macs"]["used"] <= row["macs"]["limit"] == 161_400
        assert len(row["each"]) == (row["count"] if row["count"] > 1 else 0)
    assert [sorted(set(seen)) for seen in small] == [[0, 1], [0, 1]]  # the same batches for both
    gradual.main([*CALL, "--rounds", "1", "2"])
    assert len(small) == 2
    gradual.main([*CALL, "--rounds", "1", "--again", "--dry"])
    assert len(small) == 3
    assert recording.recorded("gradual") == rows
    assert len(list((tmp_path / "cache").glob("*.round*.json"))) == 2


def test_a_training_that_diverges_is_a_row(small: list[list[int]], monkeypatch: pytest.MonkeyPatch) -> None:
    def diverged(*arguments: Any, **options: Any) -> None:
        raise qp.TrainingError("the loss is nan\n in epoch 1")

    with monkeypatch.context() as broken:
        broken.setattr(qp, "prune", diverged)
        gradual.main([*CALL, "--rounds", "1"])
    gradual.main([*CALL, "--rounds", "1", "--seeds", "0", "1"])
    first, second = recording.recorded("gradual")
    assert first["error"] == "TrainingError: the loss is nan in epoch 1"
    assert (line := table([first, second]).splitlines()[-1]).split("|")[6].strip() == "2, 1 diverged"
    assert f"{100 * second['accuracy']['finetuned']:.2f}" in line
    assert table([first]).splitlines()[-1].endswith("| 1, 1 diverged | - | - | - | - | - |")


def test_parts_are_equal(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        gradual.main(["--epochs", "6", "--rounds", "4"])
    assert "equal parts" in capsys.readouterr().err


def test_the_table_lays_arms_of_one_total_beside_each_other() -> None:
    def row(count: int, seed: int, accuracy: float, budget: str = "50%") -> dict[str, Any]:
        return {
            "instance": "net",
            "budget": budget,
            "objective": "paper",
            "spacing": "geometric",
            "batches": 10,
            "count": count,
            "epochs": 8 // count,
            "seed": seed,
            "macs": {"used": 49, "limit": 50, "dense": 100},
            "accuracy": {"dense": 0.9, "pruned": 0.5, "finetuned": accuracy},
        }

    rows = [row(4, 0, 0.86), row(1, 0, 0.84), row(1, 1, 0.88), row(2, 0, 0.8, "25%")]
    lines = [line for line in table(rows).splitlines() if line.startswith("| net ")]
    assert [line.split("|")[5].strip() for line in lines] == ["1 x 8 x 10", "4 x 2 x 10", "2 x 4 x 10"]
    assert "| 2 | 49.00 % | 90.00 | 50.00 | - | 86.00 ± 2.00 |" in lines[0]
    assert lines[1].endswith("| 86.00 |")
