"""How many samples are held: what was asked for, less where a network is large."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

import qcqp_prune as qp
from qcqp_prune.importance import samples as module
from qcqp_prune.importance.calibrated import Calibrated
from qcqp_prune.importance.samples import first, samples_of
from qcqp_prune.train import reconstruct

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


def graph() -> qp.ChannelGraph:
    return qp.trace(nn.Sequential(nn.Conv2d(1, 8, 3), nn.Flatten(), nn.Linear(32, 2)), DATA[0][0])


def test_a_small_first_batch_costs_no_others(caplog: pytest.LogCaptureFixture) -> None:
    small = (torch.randn(2, 1, 4, 4), torch.arange(2))
    with caplog.at_level(logging.WARNING):
        inputs, targets = samples_of([small, *DATA], graph(), 1000, CPU, who="test")
        assert not caplog.messages  # 5 of 55 are what any loader leaves over
    assert [len(t) for t in targets] == [10] * 5
    assert all(torch.equal(args[0], x) for (args, _), (x, _) in zip(inputs, DATA, strict=False))
    assert [len(t) for t in samples_of([small, DATA[0]], graph(), 9, CPU, who="test")[1]] == [7]


def test_batches_of_several_sizes_are_cut_to_one(caplog: pytest.LogCaptureFixture) -> None:
    """Nothing but what has an entry for each sample is cut, and targets stay with their inputs."""
    table = torch.randn(5, 5)

    def batch(start: int, size: int) -> tuple[tuple[object, ...], Tensor]:
        numbers = torch.arange(start, start + size)
        return ({"x": numbers[:, None].float(), "scale": 3}, table), 10 * numbers

    data = [batch(0, 4), batch(4, 6), batch(10, 7), batch(17, 3)]
    inputs, targets = samples_of(data, graph(), 1000, CPU, who="test")
    assert [len(t) for t in targets] == [7, 7]
    for (args, kwargs), mine in zip(inputs, targets, strict=True):
        assert (kwargs, args[0]["scale"]) == ({}, 3)
        assert torch.equal(args[1], table)
        assert torch.equal(10 * args[0]["x"][:, 0].long(), mine)
    # The largest first, as it came, then the others in their order.
    assert torch.cat(targets).div(10).tolist() == [*range(10, 17), *range(7)]
    assert "6 of 20 samples" in caplog.text


def test_of_several_shapes_the_commonest_is_used_and_the_rest_reported(
    caplog: pytest.LogCaptureFixture,
) -> None:
    read = []

    def lengths(*of: int) -> Iterator[tuple[Tensor, Tensor]]:
        for length in of:
            read.append(length)
            yield torch.zeros(8, length), torch.zeros(8)

    inputs, _ = samples_of(lengths(10, 7, 5, 7, 10, 7), graph(), 1000, CPU, who="test")
    assert [tuple(args[0].shape) for args, _ in inputs] == [(8, 7)] * 3
    assert "24 of 48 samples" in caplog.text
    read.clear()
    inputs, _ = samples_of(lengths(*range(1, 100)), graph(), 20, CPU, who="test")
    assert read == [1, 2, 3]  # no more is held than was asked for
    assert [tuple(args[0].shape) for args, _ in inputs] == [(8, 1)]


def test_labels_of_other_widths_do_not_matter_to_batches_of_one_size() -> None:
    data = [(torch.zeros(4, 3), torch.zeros(4, width)) for width in (1, 2, 5)]
    data.insert(0, (torch.zeros(2, 3), torch.zeros(2, 1)))
    data.append((torch.zeros(2, 3), torch.zeros(2, 9)))
    inputs, targets = samples_of(data, graph(), 1000, CPU, who="test")
    assert [tuple(t.shape) for t in targets] == [(4, 1), (4, 2), (4, 5)]
    assert len(inputs) == 3


def test_sentences_of_several_lengths() -> None:
    """Scored and reconstructed on the length that most have; that ended in an error of shapes."""

    class Words(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words, self.mix, self.out = nn.Embedding(20, 12), nn.Linear(12, 12), nn.Linear(12, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(torch.relu(self.mix(self.words(x))).mean(1))

    torch.manual_seed(0)
    model = Words().eval()
    data = [(torch.randint(20, (8, n)), torch.randint(4, (8,))) for n in (10, 7, 10, 5)]
    graph = qp.trace(model, data[0][0])
    problem = qp.PruningProblem.build(graph, Calibrated(data)(model, graph), {"macs": "60%"})
    masks = qp.solve(problem, time_limit=5).masks
    assert reconstruct(qp.shrink(model, graph, masks), model, graph, masks, data).samples == 16
