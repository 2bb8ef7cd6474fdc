"""Both sides of the comparison of tracing are measured alike, and what fails is named, not left out."""

from __future__ import annotations

import time

import pytest
import torch
from torch import nn

import qcqp_prune as qp
from benchmarks.rival_tracing import measured, ours
from benchmarks.rival_tracing_table import PARTS, medians, table


def network() -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(128, 5)]
    return nn.Sequential(*layers).eval(), torch.randn(1, 3, 8, 8)


def test_ours_meets_the_budget_and_every_part_is_timed() -> None:
    model, x = network()
    dense = qp.Macs().measure(model, x)
    row = measured(ours, model, x, dense, 60.0)
    assert row["through"]
    assert set(row["parts"]) == set(PARTS["ours"])
    assert row["seconds"] == pytest.approx(sum(row["parts"].values()), abs=0.01)
    assert 0 < row["macs_left"] <= 0.5
    assert qp.Macs().measure(model, x) == dense  # it worked on a copy


def test_a_side_that_fails_hangs_or_does_nothing_is_not_through() -> None:
    model, x = network()
    dense = qp.Macs().measure(model, x)

    def hangs(model: nn.Module, x: torch.Tensor, seconds: dict[str, float]) -> nn.Module:
        while time.process_time() > 0:
            pass
        return model

    def loses_an_output(model: nn.Module, x: torch.Tensor, seconds: dict[str, float]) -> nn.Module:
        return nn.Sequential(*list(model)[:-1], nn.Linear(128, 4))

    errors = {
        hangs: "took more than 1 s",
        loses_an_output: "the outputs have shape",
        lambda model, x, seconds: model: "nothing was removed",
    }
    for side, message in errors.items():
        row = measured(side, model, x, dense, 1.0)
        assert not row["through"]
        assert message in row["error"]


def test_medians_are_over_what_both_get_through() -> None:
    def side(name: str, seconds: float | None) -> dict[str, object]:
        if seconds is None:
            return {"through": False, "error": "it broke"}
        parts = dict.fromkeys(PARTS[name], seconds)
        return {"through": True, "seconds": seconds, "parts": parts, "macs_left": 0.5}

    pairs = [(1.0, 0.5), (3.0, 0.25), (50.0, None), (2.0, 0.75)]
    rows = [
        {"model": f"m{k}", "ours": side("ours", a), "torch_pruning": side("torch_pruning", b)}
        for k, (a, b) in enumerate(pairs)
    ]
    assert medians(rows) == {"ours": 2.0, "torch_pruning": 0.5}
    text = table(rows)
    assert "| ours | 4 of 4 | 2.00 s (3 networks)" in text
    assert "| Torch-Pruning | 3 of 4 | 0.50 s (3 networks)" in text
    assert "it broke" in text
