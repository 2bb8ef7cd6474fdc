"""Random small parts of networks of sequences, for property tests. Each maps (N, t, w) to (N, t', w')."""

from __future__ import annotations

import random

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.blocks import Block, Builder, width


def linear(rng: random.Random, w: int, t: int) -> Block:
    out = width(rng)
    return (
        nn.Sequential(nn.Linear(w, out, bias=rng.random() < 0.7), rng.choice([nn.Tanh, nn.SiLU, nn.ELU])()),
        out,
        t,
    )


def normed(rng: random.Random, w: int, t: int) -> Block:
    return rng.choice([nn.LayerNorm, nn.RMSNorm])(rng.choice([w, (t, w)])), w, t


class Gated(nn.Module):
    """A gated linear unit, the halves from one layer or from two."""

    def __init__(self, w: int, inner: int, how: str) -> None:
        super().__init__()
        self.how = how
        self.up = nn.Linear(w, 2 * inner if how in ("glu", "chunk") else inner)
        self.gate = nn.Linear(w, inner) if how == "two" else None
        self.down = nn.Linear(inner, w)

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "glu":
            y = F.glu(self.up(x), -1)
        elif self.how == "chunk":
            a, b = self.up(x).chunk(2, -1)
            y = F.silu(a) * b
        else:
            y = self.up(x) if self.gate is None else self.up(x) * F.gelu(self.gate(x))
        return self.down(torch.tanh(y))


class Added(nn.Module):
    """``x + body(norm(x))``."""

    def __init__(self, norm: nn.Module, body: nn.Module) -> None:
        super().__init__()
        self.norm, self.body = norm, body

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(self.norm(x))


def some_norm(rng: random.Random, w: int) -> nn.Module:
    return rng.choice([nn.Identity, nn.Identity, lambda: nn.LayerNorm(w), lambda: nn.RMSNorm(w)])()


def feed_forward(rng: random.Random, w: int, t: int) -> Block:
    body = Gated(w, width(rng), rng.choice(["glu", "chunk", "two", "plain"]))
    return (Added(some_norm(rng, w), body) if rng.random() < 0.7 else body), w, t


class Attention(nn.Module):
    """Attention of each step to all, written in one of several ways; ``groups`` heads of keys serve all queries."""

    def __init__(self, w: int, heads: int, groups: int, size: int, how: str) -> None:
        super().__init__()
        self.heads, self.groups, self.size, self.how = heads, groups, size, how
        if how == "fused":
            self.qkv = nn.Linear(w, 3 * heads * size)
        else:
            self.q = nn.Linear(w, heads * size)
            self.k, self.v = nn.Linear(w, groups * size), nn.Linear(w, groups * size)
        self.proj = nn.Linear(heads * size, w)

    def parts(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        n, t, _ = x.shape
        if self.how == "fused":
            q, k, v = self.qkv(x).view(n, t, 3, -1, self.size).permute(2, 0, 3, 1, 4).unbind(0)
            return q, k, v
        q, k, v = (f(x).view(n, t, -1, self.size).transpose(1, 2) for f in (self.q, self.k, self.v))
        if self.groups < self.heads:
            k, v = (s.repeat_interleave(self.heads // self.groups, 1) for s in (k, v))
        return q, k, v

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.parts(x)
        if self.how == "sdpa" or self.how == "fused":
            y = F.scaled_dot_product_attention(q, k, v)
        elif self.how == "einsum":
            scores = torch.softmax(torch.einsum("nhqd,nhkd->nhqk", q, k) * self.size**-0.5, -1)
            y = torch.einsum("nhqk,nhkd->nhqd", scores, v)
        else:
            y = torch.softmax(q @ k.transpose(-2, -1) / self.size**0.5, -1) @ v
        return self.proj(y.transpose(1, 2).flatten(2))


class Multihead(nn.Module):
    """PyTorch's own, of each step to all or to the steps of a second layer."""

    def __init__(self, w: int, heads: int, size: int, cross: bool) -> None:
        super().__init__()
        self.into, self.memory = nn.Linear(w, heads * size), nn.Linear(w, 3) if cross else None
        sizes = {"kdim": 3, "vdim": 3} if cross else {}
        self.mha = nn.MultiheadAttention(heads * size, heads, batch_first=True, **sizes)
        self.out = nn.Linear(heads * size, w)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.tanh(self.into(x))
        memory = y if self.memory is None else torch.tanh(self.memory(x))
        return self.out(self.mha(y, memory, memory, need_weights=False)[0])


def attention(rng: random.Random, w: int, t: int) -> Block:
    groups, size = rng.randint(1, 3), rng.randint(1, 3)
    how = rng.choice(["fused", "sdpa", "einsum", "matmul"])
    heads = groups if how == "fused" else groups * rng.randint(1, 2)
    return Added(some_norm(rng, w), Attention(w, heads, groups, size, how)), w, t


def multihead(rng: random.Random, w: int, t: int) -> Block:
    return (
        Added(some_norm(rng, w), Multihead(w, rng.randint(1, 3), rng.randint(1, 3), rng.random() < 0.4)),
        w,
        t,
    )


class Recurrent(nn.Module):
    def __init__(self, rnn: nn.RNNBase, read: str) -> None:
        super().__init__()
        self.rnn, self.read = rnn, read

    def forward(self, x: Tensor) -> Tensor:
        out, last = self.rnn(x)
        if self.read == "outputs":
            return out
        h = last[0] if self.rnn.mode == "LSTM" else last
        return (
            out * torch.sigmoid(torch.cat([h[-1], h[-2]] if self.rnn.bidirectional else [h[-1]], -1))[:, None]
        )


def recurrent(rng: random.Random, w: int, t: int) -> Block:
    hidden, both = rng.randint(2, 5), rng.random() < 0.4
    kind = rng.choice([nn.LSTM, nn.GRU, nn.RNN])
    options = {"proj_size": hidden - 1} if kind is nn.LSTM and rng.random() < 0.2 else {}
    layers = rng.randint(1, 3)
    rnn = kind(w, hidden, layers, bias=rng.random() < 0.8, batch_first=True, bidirectional=both, **options)
    return Recurrent(rnn, rng.choice(["outputs", "states"])), (1 + both) * options.get("proj_size", hidden), t


class OverTime(nn.Module):
    """A convolution along the steps."""

    def __init__(self, conv: nn.Conv1d) -> None:
        super().__init__()
        self.conv = conv

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.conv(x.transpose(1, 2))).transpose(1, 2)


def over_time(rng: random.Random, w: int, t: int) -> Block:
    groups = rng.choice([1, 1, w])
    out = width(rng) if groups == 1 else w * rng.randint(1, 2)
    return OverTime(nn.Conv1d(w, out, 3, padding=1, groups=groups)), out, t


class Parameters(nn.Module):
    """Parameters used raw: a place for each step, a scale for each channel, and a step put in front."""

    def __init__(self, w: int, t: int, how: str) -> None:
        super().__init__()
        self.how = how
        self.places, self.scale = nn.Parameter(torch.ones(1, t, w)), nn.Parameter(torch.ones(w))
        self.first = nn.Parameter(torch.ones(1, 1, w))
        self.register_buffer("offset", torch.linspace(-1, 1, w))

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "places":
            return x + self.places
        if self.how == "scale":
            return x * self.scale + self.offset
        return torch.cat([self.first.expand(x.shape[0], -1, -1), x], 1)


def parameters(rng: random.Random, w: int, t: int) -> Block:
    how = rng.choice(["places", "scale", "first"])
    return Parameters(w, t, how), w, t + (how == "first")


class Rearranged(nn.Module):
    """Steps moved about, channels cut and put together again."""

    def __init__(self, how: str, body: nn.Module) -> None:
        super().__init__()
        self.how, self.body = how, body

    def forward(self, x: Tensor) -> Tensor:
        y = self.body(x)
        if self.how == "flip":
            return y + y.flip(1)
        if self.how == "roll":
            return torch.roll(y, 1, 1) * torch.tanh(y)
        if self.how == "halves":
            a, b = y.chunk(2, -1)
            return torch.cat([torch.tanh(b), a], -1)
        if self.how == "mean":
            return y - y.mean(1, keepdim=True).expand_as(y)
        if self.how == "stack":
            return torch.stack([y, torch.tanh(y), 2 * y], 1).amax(1)
        if self.how == "twice":
            return torch.cat([y, y], -1).unflatten(-1, (2, -1)).sum(-2)
        if self.how == "repeat":
            return y.repeat(1, 1, 2)
        return torch.stack([part.sigmoid() for part in y.unbind(1)], 1)


def rearranged(rng: random.Random, w: int, t: int) -> Block:
    how = rng.choice(["flip", "roll", "halves", "mean", "stack", "twice", "repeat", "unbind"])
    out = 2 * rng.randint(1, 3)
    return Rearranged(how, nn.Linear(w, out)), out * (1 + (how == "repeat")), t


class Weighted(nn.Module):
    """Two branches, weighted by a softmax over them that is made of their sum."""

    def __init__(self, w: int, out: int) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(w, out), nn.Linear(w, out)
        self.squeeze, self.choose = nn.Linear(out, 3), nn.Linear(3, 2 * out)

    def forward(self, x: Tensor) -> Tensor:
        both = torch.stack([self.a(x), self.b(x)], 1)
        z = self.choose(torch.tanh(self.squeeze(both.sum(1).mean(1)))).view(x.shape[0], 2, 1, -1)
        return (both * torch.softmax(z, 1)).sum(1)


def weighted(rng: random.Random, w: int, t: int) -> Block:
    out = width(rng)
    return Weighted(w, out), out, t


class Shared(nn.Module):
    """One linear map, used twice."""

    def __init__(self, w: int, between: nn.Module) -> None:
        super().__init__()
        self.map, self.between = nn.Linear(w, w), between

    def forward(self, x: Tensor) -> Tensor:
        return self.map(self.between(self.map(x)))


def shared(rng: random.Random, w: int, t: int) -> Block:
    return Shared(w, rng.choice([nn.Tanh(), nn.LayerNorm(w)])), w, t


SEQUENCE_BLOCKS: dict[str, Builder] = {
    f.__name__: f
    for f in (
        linear,
        normed,
        feed_forward,
        attention,
        multihead,
        recurrent,
        over_time,
        parameters,
        rearranged,
        weighted,
        shared,
    )
}
