"""Small networks of sequences that break other tools, each with its picture: recurrence, attention, gates, words."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from qcqp_prune.apply.shrink import shrink
from tests.micro import Net, same, units, verified
from tests.networks import keep

T, W = 5, 12  # steps, width
X = torch.randn(2, T, W, generator=torch.Generator().manual_seed(0))
HEAD = {"head": "network output"}
SIZE = "a product of matrices that keeps its size"  # queries, keys and values of one head, and the positions


def test_two_layer_lstm() -> None:
    #  x(5,4) -> l0: gates i f g o of 6 -> h0(6) -> l1: gates of 6 -> h1(6) -> last step -> head(2)
    #                      ^── h0 of the step before      ^── h1 of the step before
    #  unit j of l0: four rows of weight_ih and weight_hh, column j of weight_hh, column j of l1's weight_ih
    x = torch.randn(2, 5, 4, generator=torch.Generator().manual_seed(0))
    model = Net(
        lambda m, x: m.head(m.rnn(x)[0][:, -1]), rnn=nn.LSTM(4, 6, 2, batch_first=True), head=nn.Linear(6, 2)
    )
    macs = 5 * (24 * (4 + 6) + 24 * (6 + 6)) + 6 * 2
    free = {"rnn.weight_ih_l0": 6, "rnn.weight_ih_l1": 6}
    graph = verified(model, x, free=free, kept={**HEAD, "rnn.weight_ih_l0.in": "network input"}, macs=macs)
    assert units(graph, "rnn.weight_hh_l0") == [0, 1, 2, 3, 4, 5] * 4
    assert same(graph, ("rnn.weight_ih_l0", "out"), ("rnn.weight_hh_l0", "out"))
    assert same(graph, ("rnn.weight_hh_l0", "in"), ("rnn.weight_ih_l1", "in"))


def test_gru() -> None:
    #  x(5,4) -> embed(7) -> gru: gates r z n of 6 -> last state -> head(2)
    x = torch.randn(2, 5, 4, generator=torch.Generator().manual_seed(0))
    model = Net(
        lambda m, x: m.head(m.rnn(torch.tanh(m.embed(x)))[1][-1]),
        embed=nn.Linear(4, 7),
        rnn=nn.GRU(7, 6, batch_first=True),
        head=nn.Linear(6, 2),
    )
    macs = 5 * (4 * 7 + 18 * (7 + 6)) + 6 * 2
    free = {"embed": 7, "rnn.weight_ih_l0": 6}
    graph = verified(model, x, free=free, kept={**HEAD, "embed.in": "network input"}, macs=macs)
    small = shrink(model, graph, keep(graph, embed=[0, 1, 6], rnn_weight_ih_l0=[2, 4]))
    assert type(small.rnn) is nn.GRU
    assert (small.rnn.input_size, small.rnn.hidden_size) == (3, 2)


def test_einsum_attention() -> None:
    #  x(5,12) ─┬─> q(3 heads x 4) ┐
    #           ├─> k(3 heads x 4) ┴ einsum over 4 -> (3,5,5) -> softmax ┐
    #           └─> v(3 heads x 4) ────────────────────────────────── einsum -> (12) -> proj(12) -> head(2)
    #  a head of q, k and v and its four columns of proj are one unit; the scale is that of 4, so 4 stays
    def forward(m, x):
        q, k, v = (f(x).view(*x.shape[:2], -1, 4) for f in (m.q, m.k, m.v))
        scores = torch.softmax(torch.einsum("nqhd,nkhd->nhqk", q, k) * 0.5, -1)
        y = torch.einsum("nhqk,nkhd->nqhd", scores, v).flatten(2)
        return m.head(torch.tanh(m.proj(y)).mean(1))

    layers = {name: nn.Linear(W, W) for name in ("q", "k", "v", "proj")}
    model = Net(forward, **layers, head=nn.Linear(W, 2))
    macs = 4 * T * W * W + 2 * T * T * W + W * 2
    kept = {**HEAD, "q.in": "network input", "bmm.in": SIZE}
    graph = verified(model, X, free={"q": 3, "proj": 12}, kept=kept, macs=macs)
    for layer in ("k", "v"):
        assert same(graph, ("q", "out"), (layer, "out"))
    assert units(graph, "proj", "in") == [k // 4 for k in range(W)]


def test_multi_head_attention_with_batch_first() -> None:
    #  x(5,12) -> in_proj(q | k | v, each 3 heads x 4) -> attention -> out_proj(12) -> head(2)
    #  head h: rows 4h .. 4h+3 of each third of in_proj, and those columns of out_proj
    model = Net(
        lambda m, x: m.head(torch.tanh(m.mha(x, x, x, need_weights=False)[0]).mean(1)),
        mha=nn.MultiheadAttention(W, 3, batch_first=True),
        head=nn.Linear(W, 2),
    )
    macs = 4 * T * W * W + 2 * T * T * W + W * 2
    kept = {**HEAD, "mha.in": "network input", "mha.attention_scores.in": SIZE}
    graph = verified(model, X, free={"mha": 3, "mha.out_proj": 12}, kept=kept, macs=macs)
    assert units(graph, "mha.out_proj", "in") == [k // 4 for k in range(W)]


def test_cross_attention() -> None:
    #  x(5,12) -> q(3 x 4) ──────────┐
    #  memory(7,10) ─┬─> k(3 x 4) ───┴> scores -> softmax ┐
    #                └─> v(3 x 6) ──────────────────── product -> (3 x 6) -> proj(8) -> head(2)
    #  three heads; values are wider than keys
    def forward(m, x, memory):
        q, k = (f(s).unflatten(-1, (3, -1)).transpose(1, 2) for f, s in ((m.q, x), (m.k, memory)))
        v = m.v(memory).unflatten(-1, (3, -1)).transpose(1, 2)
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return m.head(torch.tanh(m.proj(y)).mean(1))

    memory = torch.randn(2, 7, 10, generator=torch.Generator().manual_seed(1))
    layers = {"q": nn.Linear(W, 12), "k": nn.Linear(10, 12), "v": nn.Linear(10, 18)}
    model = Net(forward, **layers, proj=nn.Linear(18, 8), head=nn.Linear(8, 2))
    macs = T * W * 12 + 7 * 10 * (12 + 18) + T * 7 * (12 + 18) + T * 18 * 8 + 8 * 2
    kept = {**HEAD, "q.in": "network input", "k.in": "network input", "attention_scores.in": SIZE}
    graph = verified(model, (X, memory), free={"q": 3, "proj": 8}, kept=kept, macs=macs)
    assert units(graph, "v") == [k // 6 for k in range(18)]


def test_grouped_queries() -> None:
    #  x(5,12) ─┬─> q(4 heads x 3) ── heads 0, 1 and 2, 3 ┐
    #           ├─> k(2 heads x 3) ── each serves two ────┴> attention -> proj(12) -> head(2)
    #           └─> v(2 heads x 3)
    #  a unit is a whole group: one head of k and v, two of q, six columns of proj
    def forward(m, x):
        q, k, v = (f(x).view(*x.shape[:2], -1, 3).transpose(1, 2) for f in (m.q, m.k, m.v))
        k, v = (s.repeat_interleave(2, 1) for s in (k, v))
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return m.head(torch.tanh(m.proj(y)).mean(1))

    layers = {"q": nn.Linear(W, 12), "k": nn.Linear(W, 6), "v": nn.Linear(W, 6)}
    model = Net(forward, **layers, proj=nn.Linear(12, W), head=nn.Linear(W, 2))
    macs = T * W * (12 + 6 + 6) + 2 * T * T * 12 + T * 12 * W + W * 2
    kept = {**HEAD, "q.in": "network input", "attention_scores.in": SIZE}
    graph = verified(model, X, free={"q": 2, "proj": 12}, kept=kept, macs=macs)
    assert units(graph, "q") == [0] * 6 + [1] * 6
    assert units(graph, "k") == units(graph, "v") == [0] * 3 + [1] * 3


@pytest.mark.parametrize("how", ["glu", "swiglu"])
def test_gated_linear_unit(how: str) -> None:
    #  glu:     x(5,12) -> up(2 x 8) -> first half * sigmoid(second half) -> down(6) -> head(2)
    #  swiglu:  x(5,12) ─┬─> gate(8) -> silu ─(*)─> down(6) -> head(2)
    #                    └─> up(8) ────────────┘
    #  position k of one half and of the other are one unit
    if how == "glu":
        model = Net(
            lambda m, x: m.head(torch.tanh(m.down(F.glu(m.up(x)))).mean(1)),
            up=nn.Linear(W, 16),
            down=nn.Linear(8, 6),
            head=nn.Linear(6, 2),
        )
    else:
        model = Net(
            lambda m, x: m.head(torch.tanh(m.down(F.silu(m.gate(x)) * m.up(x))).mean(1)),
            gate=nn.Linear(W, 8),
            up=nn.Linear(W, 8),
            down=nn.Linear(8, 6),
            head=nn.Linear(6, 2),
        )
    macs = T * (W * 16 + 8 * 6) + 6 * 2
    first = "up" if how == "glu" else "gate"
    kept = {**HEAD, f"{first}.in": "network input"}
    graph = verified(model, X, free={first: 8, "down": 6}, kept=kept, macs=macs)
    assert units(graph, "up") == (list(range(8)) * 2 if how == "glu" else list(range(8)))
    assert same(graph, (first, "out"), ("up", "out"))


def test_embedding_tied_to_the_head() -> None:
    #  tokens(5) -> table(11 words x 8) -> up(6) -> tanh -> down(8) -> head(11), head.weight is the table
    #  the table's columns are what up reads and what down writes: one set of 8 channels; the words stay
    model = Net(
        lambda m, t: m.head(torch.tanh(m.down(torch.tanh(m.up(m.table(t)))))),
        table=nn.Embedding(11, 8),
        up=nn.Linear(8, 6),
        down=nn.Linear(6, 8),
        head=nn.Linear(8, 11, bias=False),
    )
    model.head.weight = model.table.weight
    tokens = torch.tensor([[3, 1, 4, 1, 5], [9, 2, 6, 5, 10]])
    macs = T * (8 * 6 + 6 * 8 + 8 * 11)
    graph = verified(
        model, tokens, free={"up.in": 8, "up": 6}, kept={"head": "indexed by position"}, macs=macs
    )
    assert same(graph, ("up", "in"), ("down", "out"))
    assert same(graph, ("up", "in"), ("head", "in"))
    small = shrink(model, graph, keep(graph, up_in=[0, 3, 7]))
    assert small.head.weight is small.table.weight
    assert small.table.weight.shape == (11, 3)
    assert small.table.embedding_dim == small.head.in_features == 3
