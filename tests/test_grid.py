"""A grid of strength and alpha: same start for every pair, and nothing done twice."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import qcqp_prune as qp
from qcqp_prune.grid import SweepRow

CONFIG = qp.FinetuneConfig(lr=0.05, schedule="constant", device="cpu")
GRID = {"strengths": (0.0, 3.0), "alphas": (0.1, 0.6)}


def net(seed: int = 0) -> nn.Module:
    """Unit 3 of the first layer is dead: nothing reaches it, so no training revives it, and the rule takes it away."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 2))
    with torch.no_grad():
        model[0].weight[3] = model[0].bias[3] = 0.0
    return model


class Data:
    """Batches whose order depends on the epoch, and a count of the passes over them."""

    def __init__(self, most: int | None = None) -> None:
        x = torch.randn(6, 32, 8, generator=torch.Generator().manual_seed(1))
        self.batches = [(b, (b.sum(1) > 0).long()) for b in x]
        self.epoch, self.passes, self.most = 0, 0, most

    def __len__(self) -> int:
        return len(self.batches)

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[Any]:
        self.passes += 1
        if self.passes == self.most:
            raise KeyboardInterrupt
        yield from self.batches[self.epoch % 6 :] + self.batches[: self.epoch % 6]


def rows_of(data: Data, results: Path | None = None, model: nn.Module | None = None, **changes: Any) -> Any:
    training = qp.Training(data, 4, qp.SPRConfig(structure="units"), config=CONFIG)
    recovery = qp.Recovery(validation=data.batches, train=data, epochs=1, config=CONFIG)
    options = {"training": training, "recovery": recovery, "solver": "highs", **GRID, **changes}
    return qp.sweep(model or net(), torch.zeros(1, 8), options.pop("training"), results=results, **options)


def plain(rows: Any) -> list[SweepRow]:
    return [replace(row, seconds=0.0) for row in rows]


def test_each_pair_is_what_prune_gives_by_itself() -> None:
    model = net()
    rows = list(rows_of(Data(), model=model))
    assert [(r.strength, r.alpha) for r in rows] == [(0.0, 0.1), (0.0, 0.6), (3.0, 0.1), (3.0, 0.6)]
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), net().parameters(), strict=True))
    # Without strength alpha means nothing: equal rows say that start and order of the data were equal.
    assert plain(rows)[0] == replace(plain(rows)[1], alpha=0.1)
    assert rows[0].removed == pytest.approx(1 / 20)
    assert rows[0].used["params"] == 8 * 11 + 11 + 11 * 8 + 8 + 8 * 2 + 2
    strong = rows[3]
    data = Data()
    training = qp.Training(data, 4, qp.SPRConfig(3.0, 0.6, structure="units"), None, config=CONFIG)
    recovery = qp.Recovery(validation=data.batches, train=data, epochs=1, config=CONFIG)
    small, report = qp.prune(model, torch.zeros(1, 8), training=training, recovery=recovery, solver="highs")
    assert strong.used["params"] == sum(p.numel() for p in small.parameters())
    assert strong.accuracy == report.accuracy
    assert strong.accuracy != rows[0].accuracy


def test_an_interrupted_sweep_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "sweep.json"
    whole = plain(rows_of(Data()))
    killed = Data(most=9)  # a pair takes six passes: the second one is interrupted in its third epoch
    with pytest.raises(KeyboardInterrupt):
        list(rows_of(killed, path))
    assert len(json.loads(path.read_text())["rows"]) == 1
    assert [p.name for p in tmp_path.iterdir()] == ["sweep.json"]
    rest = Data()
    assert plain(rows_of(rest, path)) == whole
    assert rest.passes == 3 * 6
    again = Data()
    assert plain(rows_of(again, path)) == whole
    assert again.passes == 0
    # A larger grid keeps what is there.
    assert len(list(rows_of(again, path, alphas=(0.1, 0.6, 0.9)))) == 6
    assert again.passes == 2 * 6


def test_the_results_of_another_sweep_are_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "sweep.json"
    list(rows_of(Data(), path, strengths=(0.0,), alphas=(0.1,)))
    before = path.read_bytes()
    method = qp.SPRConfig(structure="units")
    training = qp.Training(Data(), 4, method, config=CONFIG)
    for changes, what in (
        ({"model": net(1)}, "weights"),
        ({"min_keep": 2}, "options"),
        ({"options": qp.SolveOptions(gap_limit=0.1)}, "options"),
        ({"importance": qp.Magnitude("l2")}, "options"),
        ({"training": replace(training, method=replace(method, clamp=False))}, "method"),
        ({"training": replace(training, epochs=5)}, "epochs"),
    ):
        with pytest.raises(qp.PlanError, match=f"differs in {what}:"):
            rows_of(Data(), path, **changes)
    assert path.read_bytes() == before
    kept = tmp_path / "options.json"
    list(rows_of(Data(), kept, strengths=(0.0,), alphas=(0.1,), options=qp.SolveOptions(gap_limit=0.1)))
    with pytest.raises(qp.PlanError, match="differs in options:"):
        rows_of(Data(), kept, options=qp.SolveOptions(gap_limit=0.2))
    path.write_text("{}")
    with pytest.raises(qp.PlanError, match="something else"):
        rows_of(Data(), path)


def test_bad_sweeps_are_refused_at_once(tmp_path: Path) -> None:
    training = qp.Training(Data(), 1, qp.PSPConfig("channel"))
    with pytest.raises(qp.InvalidOptionError, match="SPRConfig"):
        rows_of(Data(), training=training)
    with pytest.raises(qp.InvalidOptionError, match="checkpoint"):
        rows_of(Data(), training=qp.Training(Data(), 1, checkpoint=tmp_path / "c"))
    with pytest.raises(qp.InvalidOptionError, match="no pair"):
        rows_of(Data(), alphas=())
    with pytest.raises(qp.InvalidOptionError, match=r"alpha=1\.5"):
        rows_of(Data(), alphas=(0.5, 1.5))
