"""A network that is looked at computes what it computes anyway, and shows what each layer reads and makes."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import qcqp_prune as qp
from qcqp_prune.errors import MaskMismatchError
from qcqp_prune.graph.observe import Observed
from qcqp_prune.models import DigitsNet
from tests.networks import liven


class Mixed(nn.Module):
    """A convolution called twice, a packed projection, a functional weight, a recurrent layer and a tied head."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(11, 8)
        self.conv = nn.Conv1d(8, 8, 3, padding=1, groups=2)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.raw = nn.Parameter(torch.randn(8, 6))
        self.memory = nn.LSTM(6, 5, batch_first=True)
        self.out = nn.Linear(5, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.words(x).transpose(1, 2)
        x = self.conv(torch.relu(self.conv(x))).transpose(1, 2)
        x = self.attention(x, x, x)[0]
        x = self.memory(x @ self.raw)[0]
        return F.linear(self.out(x), self.words.weight)


@pytest.mark.parametrize("batch", [2, 3])
def test_observed_layers_are_what_their_weights_make_of_what_they_read(batch: int) -> None:
    model = Mixed().eval()
    graph = qp.trace(model, torch.zeros(2, 7, dtype=torch.long))
    x = torch.randint(11, (batch, 7))
    state = dict(model.named_parameters())
    seen = []

    def see(k: int, read: torch.Tensor, made: torch.Tensor) -> None:
        layer = graph.layers[k]
        seen.append(layer.name)
        weight = state[layer.weight]
        bias = state.get(layer.weight.replace("weight", "bias"))
        if layer.rows is not None:
            weight, bias = weight[slice(*layer.rows)], bias[slice(*layer.rows)]
        if layer.op == "conv1d":
            wanted = F.conv1d(read, weight, bias, padding=1, groups=2)
        elif layer.op == "linear_transposed":
            wanted = read @ weight
        else:
            wanted = F.linear(read, weight, None if layer.weight == "words.weight" else bias)
        torch.testing.assert_close(made.reshape(wanted.shape), wanted)

    (out,) = Observed(model, graph).run(x, see)
    torch.testing.assert_close(out, model(x))
    assert seen[:2] == ["conv", "conv@2"]
    with_weight = [layer.name for layer in graph.layers if layer.weight]
    assert sorted(set(with_weight) - set(seen)) == sorted(n for n in with_weight if n.startswith("memory."))
    assert len(seen) == len(set(seen))
    assert any(n.startswith("memory.") for n in with_weight)


def test_what_is_returned_takes_the_place_of_what_was_made() -> None:
    model = liven(DigitsNet()).eval()
    graph = qp.trace(model, torch.zeros(1, 1, 8, 8))
    x = torch.randn(4, 1, 8, 8)
    cut = [k for k, layer in enumerate(graph.layers) if layer.name == "block1.conv2"]
    (out,) = Observed(model, graph).run(x, lambda k, read, made: made * 0 if k in cut else None)
    with torch.no_grad():
        model.block1.conv2.weight.zero_()
    torch.testing.assert_close(out, model(x))
    assert out.requires_grad


def test_modes_come_back_and_another_network_is_refused() -> None:
    model = DigitsNet().train()
    graph = qp.trace(model, torch.zeros(1, 1, 8, 8))
    before = model.stem.training, {n: b.clone() for n, b in model.named_buffers()}
    Observed(model, graph).run(torch.randn(3, 1, 8, 8), lambda *_: None)
    assert model.training
    assert model.stem.training == before[0]
    assert all(torch.equal(b, before[1][n]) for n, b in model.named_buffers())
    other = nn.Sequential(nn.Conv2d(1, 3, 3), nn.Flatten(), nn.Linear(108, 2))
    with pytest.raises(MaskMismatchError, match="trace this model"):
        Observed(other, graph).run(torch.randn(3, 1, 8, 8), lambda *_: None)


class Counting(nn.Module):
    """Buffers that a forward writes: in place, through a view, and by putting another in their place."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(5, 8), nn.Linear(8, 4)
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("seen", torch.zeros(2, 3))
        self.register_buffer("last", torch.zeros(()))
        self.register_buffer("mean", torch.zeros(5))
        self.register_buffer("spread", torch.zeros(5))
        self.register_buffer("sparse", torch.zeros(3, 3).to_sparse())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls.add_(1)
        self.seen[1] += 2
        self.last = self.last + 3
        x = torch.nn.functional.batch_norm(x, self.mean, self.spread, training=True)
        return self.second(torch.relu(self.first(x)))


@pytest.mark.parametrize(
    "score",
    [qp.Calibrated, qp.Taylor, qp.Activation, qp.OutputChange, qp.NeuronSensitivity],
    ids=lambda x: x.__name__,
)
def test_scoring_leaves_buffers_that_a_forward_writes(score: type) -> None:
    torch.manual_seed(0)
    model = Counting()
    data = [(torch.randn(6, 5), torch.randint(4, (6,))) for _ in range(2)]
    graph = qp.trace(model, data[0][0])
    held = dict(model.named_buffers())
    score(data)(model, graph)
    for name, buffer in model.named_buffers():
        assert buffer is held[name]
        assert not buffer.to_dense().any(), name
