"""How many samples are held: what was asked for, less where a network is large."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import qcqp_prune as qp
from qcqp_prune.importance import samples as module
from qcqp_prune.importance.samples import first, samples_of

CPU = torch.device("cpu")
DATA = [(torch.randn(10, 1, 4, 4), torch.arange(10)) for _ in range(5)] + [
    (torch.randn(3, 1, 4, 4), torch.arange(3))
]


def test_batches_of_one_size_up_to_a_number(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.Flatten(), nn.Linear(128, 2))
    graph = qp.trace(model, DATA[0][0])

    def sizes(samples: int) -> list[int]:
        inputs, targets = samples_of(DATA, graph, samples, CPU, who="test")
        assert [len(args[0]) for args, _ in inputs] == [len(t) for t in targets]
        return [len(t) for t in targets]

    assert sizes(1000) == [10] * 5
    assert sizes(39) == [10] * 3
    assert sizes(4) == [4]
    # The convolution's result takes 8 x 16 floats of a sample; it is counted four times.
    monkeypatch.setattr(module, "HELD", 4 * 8 * 16 * 4 * 25)
    assert sizes(1000) == [10] * 2


def test_the_first_of_them() -> None:
    inputs, targets = [((x, 3, None), {"mask": x[:, 0]}) for x, _ in DATA[:2]], [y for _, y in DATA[:2]]
    assert [len(t) for t in first(inputs, targets, 25)[1]] == [10, 10]
    assert [len(t) for t in first(inputs, targets, 19)[1]] == [10]
    ((args, kwargs),), (labels,) = first(inputs, targets, 4)
    assert torch.equal(args[0], DATA[0][0][:4])
    assert args[1:] == (3, None)
    assert (len(kwargs["mask"]), labels.tolist()) == (4, [0, 1, 2, 3])
