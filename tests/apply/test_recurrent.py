"""LSTM, GRU and plain RNN: hidden units go with their rows in every gate; layers and directions each keep their own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence

import qcqp_prune as qp
from qcqp_prune.apply.uneven_rnn import UnevenRNN
from qcqp_prune.errors import UnsupportedOpError
from tests.networks import all_kept, keep, liven, prune_and_check, random_masks, reasons, uses, widths

X = torch.randn(2, 5, 4, generator=torch.Generator().manual_seed(0))  # two sequences of five steps

pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")


class Net(nn.Module):
    """x(4) -> recurrent layers of 6 -> what ``read`` takes of (outputs, last states) -> linear(3)."""

    def __init__(self, kind: type[nn.RNNBase], read: str, **options: Any) -> None:
        super().__init__()
        self.rnn, self.read = kind(4, 6, batch_first=True, **options), read
        directions = 1 + self.rnn.bidirectional
        states = {"all": self.rnn.num_layers * directions, "last two": 2, "outputs": directions}.get(read, 1)
        self.head = nn.Linear(
            states * (self.rnn.proj_size if read != "cells" and self.rnn.proj_size else 6), 3
        )

    def forward(self, x: Tensor) -> Tensor:
        out, states = self.rnn(x)
        h, c = states if self.rnn.mode == "LSTM" else (states, None)
        if self.read == "outputs":
            return self.head(out.mean(1))
        if self.read == "last two":
            back = h[-2:]
            return self.head(torch.cat([back[1], back[0]], 1))
        if self.read == "all":
            return self.head(h.transpose(0, 1).flatten(1))
        return self.head({"last": h, "first": h, "cells": c}[self.read][0 if self.read == "first" else -1])


CASES = [
    (nn.LSTM, "outputs", {"num_layers": 2, "bidirectional": True}),
    (nn.LSTM, "last", {"num_layers": 2}),
    (nn.LSTM, "cells", {"num_layers": 2, "proj_size": 3}),
    (nn.GRU, "last two", {"num_layers": 2, "bidirectional": True, "bias": False}),
    (nn.GRU, "all", {"num_layers": 2}),
    (nn.RNN, "first", {"num_layers": 3, "nonlinearity": "relu"}),
]


@pytest.mark.parametrize("realisation", ["modules", "graph"])
@pytest.mark.parametrize(("kind", "read", "options"), CASES)
def test_recurrent_networks(
    kind: type[nn.RNNBase], read: str, options: dict[str, Any], realisation: str
) -> None:
    model = liven(Net(kind, read, **options))
    graph = qp.trace(model, X)
    assert graph.notes == ()
    for seed in range(2):
        prune_and_check(model, X, graph, random_masks(graph, seed), realisation=realisation, live=False)


def test_units_and_costs_of_a_two_layer_bidirectional_lstm() -> None:
    """Each step: 4 gates of 6 rows meet the inputs and the 6 states; layer 1 reads both directions of layer 0."""
    model = liven(Net(nn.LSTM, "outputs", num_layers=2, bidirectional=True))
    graph = qp.trace(model, X)
    cells = [f"rnn.weight_ih_l{k}{back}" for k in (0, 1) for back in ("", "_reverse")]
    assert widths(graph, free=True) == dict.fromkeys(cells, 6)
    assert uses(graph)["macs"] == 5 * 2 * (4 * 6 * (4 + 6) + 4 * 6 * (12 + 6)) + 12 * 3
    masks = keep(graph, rnn_weight_ih_l0=[1, 5], rnn_weight_ih_l1_reverse=[0, 2, 3])
    layer0 = 4 * 2 * (4 + 2) + 4 * 6 * (4 + 6)
    layer1 = 4 * 6 * (2 + 6 + 6) + 4 * 3 * (2 + 6 + 3)
    assert uses(graph, masks)["macs"] == 5 * (layer0 + layer1) + (6 + 3) * 3
    small, _ = prune_and_check(model, X, graph, masks)
    assert {
        n: tuple(p.shape) for n, p in small.rnn.named_parameters() if "_l0" in n and "reverse" not in n
    } == {
        "weight_ih_l0": (8, 4),
        "weight_hh_l0": (8, 2),
        "bias_ih_l0": (8,),
        "bias_hh_l0": (8,),
    }


def test_states_that_are_read_together_tie_the_layers() -> None:
    separate = qp.trace(liven(Net(nn.GRU, "last", num_layers=2)), X)
    together = qp.trace(liven(Net(nn.GRU, "all", num_layers=2)), X)
    assert sorted(widths(separate, free=True).values()) == [6, 6]
    assert list(widths(together, free=True).values()) == [6]


def test_equal_widths_keep_the_class_and_uneven_ones_keep_names() -> None:
    model = liven(Net(nn.LSTM, "last", num_layers=2, dropout=0.5))
    graph = qp.trace(model, X)
    even = qp.shrink(model, graph, keep(graph, rnn_weight_ih_l0=[0, 1, 4], rnn_weight_ih_l1=[2, 3, 5]))
    assert type(even.rnn) is nn.LSTM
    assert (even.rnn.hidden_size, even.rnn.input_size) == (3, 4)
    uneven = qp.shrink(model, graph, keep(graph, rnn_weight_ih_l0=[0, 1], rnn_weight_ih_l1=[2, 3, 5]))
    assert isinstance(uneven.rnn, UnevenRNN)
    assert (uneven.rnn.hidden_sizes, uneven.rnn.output_sizes) == ((2, 3), (2, 3))
    assert list(uneven.state_dict()) == list(model.state_dict())
    assert "hidden_sizes=(2, 3)" in repr(uneven)
    uneven.train()
    torch.manual_seed(0)
    assert not torch.equal(uneven(X), uneven(X))  # dropout between the layers
    uneven(X).sum().backward()
    assert all(p.grad is not None for name, p in uneven.named_parameters() if "_l0" in name)


def test_an_uneven_layer_is_saved_traced_and_cut_again(tmp_path: Path) -> None:
    model = liven(Net(nn.GRU, "last", num_layers=2, bidirectional=True)).eval()
    graph = qp.trace(model, X)
    masks = random_masks(graph, 3)
    small, _ = prune_and_check(model, X, graph, masks)
    qp.save(small, tmp_path / "plan", graph=graph, masks=masks)
    again = qp.load(tmp_path / "plan", lambda: Net(nn.GRU, "last", num_layers=2, bidirectional=True))
    assert torch.equal(again.eval()(X), small(X))
    second = qp.trace(small, X)
    assert uses(second)["macs"] == uses(graph, masks)["macs"]
    prune_and_check(small, X, second, random_masks(second, 1), live=False)


def test_a_projection_as_wide_as_its_units() -> None:
    """PyTorch tells a projection by its width, so that here it would not see it."""
    model = liven(Net(nn.LSTM, "outputs", proj_size=3, bidirectional=True))
    graph = qp.trace(model, X)
    masks = keep(graph, rnn_weight_ih_l0=[0, 2, 5], rnn_weight_ih_l0_reverse=[1])
    small, _ = prune_and_check(model, X, graph, masks)
    assert isinstance(small.rnn, UnevenRNN)
    assert (small.rnn.hidden_sizes, small.rnn.output_sizes) == ((3, 1), (3, 3))


class Started(nn.Module):
    """Initial states written into forward, learned, or made of the input."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.hidden_size = how, 6
        self.rnn = nn.LSTM(4, 6, 2 if how != "computed" else 1)
        self.h0, self.c0 = nn.Parameter(torch.randn(2, 1, 6)), nn.Parameter(torch.randn(2, 1, 6))
        self.start, self.head = nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = x.transpose(0, 1)
        if self.how == "zeros":
            h = torch.zeros(2, x.shape[1], self.hidden_size, dtype=x.dtype)
            states = (h, h.clone())
        elif self.how == "learned":
            states = tuple(s.expand(-1, x.shape[1], -1).contiguous() for s in (self.h0, self.c0))
        else:
            h = self.start(x[0])[None]
            states = (h, torch.tanh(h))
        return self.head(self.rnn(x, states)[0][-1])


@pytest.mark.parametrize("how", ["zeros", "learned", "computed"])
def test_initial_states(how: str) -> None:
    """Zeros follow; one tensor for both layers ties them; a state made by a layer is that layer's channels."""
    model = liven(Started(how))
    graph = qp.trace(model, X)
    free = {
        "zeros": {"rnn.weight_ih_l0": 6, "rnn.weight_ih_l1": 6},
        "learned": {"rnn.weight_ih_l0": 6},
        "computed": {"start": 6},
    }[how]
    assert widths(graph, free=True) == free
    for seed in range(2):
        prune_and_check(model, X, graph, random_masks(graph, seed), live=False)
    prune_and_check(model, X, graph, random_masks(graph, 0, 0.5), realisation="graph")


def test_layers_that_cannot_be_replaced_keep_equally_many() -> None:
    model = liven(Net(nn.LSTM, "last", num_layers=2))
    model.rnn.register_forward_hook(lambda module, args, out: None)
    graph = qp.trace(model, X)
    assert list(widths(graph, free=True).values()) == [6]
    small, _ = prune_and_check(model, X, graph, random_masks(graph, 0, 0.5))
    assert type(small.rnn) is nn.LSTM


def test_a_network_that_is_one_recurrent_layer() -> None:
    model = liven(nn.GRU(4, 6))
    assert set(reasons(qp.trace(model, X)).values()) == {"network output", "network input"}


def test_a_sequence_without_a_batch() -> None:
    model = liven(Net(nn.LSTM, "outputs", num_layers=2, bidirectional=True))
    graph = qp.trace(model, X)
    small = qp.shrink(model, graph, keep(graph, rnn_weight_ih_l0=[0, 1, 3])).eval()
    one, (h, c) = small.rnn(X[0])
    many, (hs, cs) = small.rnn(X)
    torch.testing.assert_close(one, many[0])
    for a, b in zip((*h, *c), (*hs, *cs), strict=True):
        torch.testing.assert_close(a, b[0])


def test_an_uneven_layer_takes_states_and_says_what_it_wants() -> None:
    model = liven(Net(nn.LSTM, "outputs", num_layers=2))
    graph = qp.trace(model, X)
    small = qp.shrink(model, graph, keep(graph, rnn_weight_ih_l0=[0, 1])).eval()
    out, _ = small.rnn(X)
    first, middle = small.rnn(X[:, :3])
    rest, _ = small.rnn(X[:, 3:], middle)
    torch.testing.assert_close(torch.cat([first, rest], 1), out)
    with pytest.raises(ValueError, match=r"give None, or these"):
        small.rnn(X, (torch.zeros(2, 2, 6), torch.zeros(2, 2, 6)))
    with pytest.raises(UnsupportedOpError, match="pad it"):
        small.rnn(pack_padded_sequence(X, torch.tensor([5, 3]), batch_first=True))


def test_pruned_at_half_the_multiply_adds() -> None:
    model = liven(Net(nn.LSTM, "last", num_layers=2))
    graph = qp.trace(model, X)
    problem = qp.PruningProblem.build(graph, qp.Magnitude()(model, graph), {"macs": "50%"})
    report = qp.solve(problem, "highs")
    _, checked = prune_and_check(model, X, graph, report.masks)
    dense = uses(graph, all_kept(graph))["macs"]
    assert 0.3 * dense < {c.resource: c.measured for c in checked.counts}["macs"] <= dense // 2


class Steps(nn.Module):
    """x(4) -> one step of six units after another, from zeros or from a state that a layer makes -> linear(3)."""

    def __init__(self, kind: str, start: str) -> None:
        super().__init__()
        self.cell, self.start = getattr(nn, kind)(4, 6), start
        self.first, self.head = nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        is_lstm = isinstance(self.cell, nn.LSTMCell)
        state = None if self.start == "none" else x.new_zeros(x.shape[0], 6)
        state = self.first(x[:, 0]) if self.start == "layer" else state
        state = (state, state) if is_lstm and state is not None else state
        for k in range(3):
            state = self.cell(x[:, k], state)
        return self.head(state[0] if is_lstm else state)


@pytest.mark.parametrize("start", ["none", "zeros", "layer"])
@pytest.mark.parametrize(("kind", "gates"), [("LSTMCell", 4), ("GRUCell", 3), ("RNNCell", 1)])
def test_cells_that_a_loop_calls(kind: str, gates: int, start: str) -> None:
    model = liven(Steps(kind, start))
    graph = qp.trace(model, X)
    assert widths(graph, free=True) == {"first" if start == "layer" else "cell.weight_ih": 6}
    assert uses(graph)["macs"] == 3 * gates * 6 * (4 + 6) + 6 * 3 + (4 * 6 if start == "layer" else 0)
    _, checked = prune_and_check(model, X, graph, random_masks(graph, 0, 0.5))
    assert checked.realisation == ("graph" if start == "zeros" else "modules")  # a width written into forward
    prune_and_check(model, X, graph, random_masks(graph, 1), realisation="graph", live=False)
