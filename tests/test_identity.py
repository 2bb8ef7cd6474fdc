"""Two runs of one job have the same settings, and two jobs that can be told apart have not."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import qcqp_prune as qp
from qcqp_prune.identity import settings_of
from qcqp_prune.resources import LatencyTable, LayerLatency


@dataclass
class Own:
    """Not of the library: all that is said of it is its kind."""

    root: str

    def __len__(self) -> int:
        return len(self.root)


def mean(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return (x.mean(1) - y).square().mean()


def table(nanoseconds: int) -> LatencyTable:
    one = np.ones(1, np.int64)
    return LatencyTable({"fc": LayerLatency(one, one, nanoseconds * np.ones((1, 1), np.int64))})


CALIBRATED = qp.Calibrated([Own("a")], ratios=(0.5,))
TRAINING = qp.Training([Own("a")], 2)
OPTIONS = qp.SolveOptions(time_limit=3.0)


@pytest.mark.parametrize(
    ("one", "same"),
    [
        (CALIBRATED, replace(CALIBRATED, batches=[Own("b")])),
        (TRAINING, replace(TRAINING, checkpoint="elsewhere")),
        (qp.FinetuneConfig(device="cpu"), qp.FinetuneConfig(device="cuda", progress=True)),
        (OPTIONS, replace(OPTIONS, on_event=print, stop=bool)),
        (Own("a"), Own("b")),
        (np.float32(3), 3.0),
        (nn.ReLU(), nn.ReLU()),
    ],
    ids=lambda x: type(x).__name__,
)
def test_the_same_job(one: Any, same: Any) -> None:
    assert settings_of(one) == settings_of(same)
    assert json.loads(json.dumps(settings_of(one))) == settings_of(one)  # as it comes back from a file


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (CALIBRATED, replace(CALIBRATED, ratios=(0.25,))),
        (CALIBRATED, replace(CALIBRATED, batches=[Own("a"), Own("a")])),
        (qp.Concave(qp.Magnitude()), qp.Concave(qp.Magnitude("l2"))),
        (replace(TRAINING, loss=mean), replace(TRAINING, loss=torch.mean)),
        (torch.Tensor.relu, torch.Tensor.exp),
        (qp.Recovery(batches=3), qp.Recovery(batches=4)),
        ([qp.Magnitude()], [qp.Magnitude("l2")]),
        (qp.AcceleratorCycles(4, 4), qp.AcceleratorCycles(4, 2)),
        ({"resources": [table(3)]}, {"resources": [table(4)]}),
        (nn.Linear(2, 2), nn.Linear(2, 2)),
        (OPTIONS, replace(OPTIONS, seed=1)),
        (OPTIONS, replace(OPTIONS, warm_start=np.ones(3, np.bool_))),
        (np.zeros(2), np.zeros((2, 1))),
    ],
    ids=lambda x: type(x).__name__,
)
def test_another_job(one: Any, other: Any) -> None:
    assert settings_of(one) != settings_of(other)
