"""Random small networks, block by block, for property tests. Each block maps (N, c, s, s) to (N, c', s', s')."""

from __future__ import annotations

import random
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Block = tuple[nn.Module, int, int]
"""The module, its output channels, and the side of its output plane."""

Builder = Callable[[random.Random, int, int], Block]


def divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]


def norm(rng: random.Random, c: int, s: int) -> nn.Module:
    kind = rng.choice(["bn", "bn", "bn", "plain_bn", "in", "gn", "gn1", "gnc", "ln", "none"])
    return (
        {
            "bn": lambda: nn.BatchNorm2d(c),
            "plain_bn": lambda: nn.BatchNorm2d(c, affine=False),
            "in": lambda: nn.InstanceNorm2d(c, affine=True, track_running_stats=rng.random() < 0.5),
            "gn": lambda: nn.GroupNorm(rng.choice(divisors(c)), c),
            "gn1": lambda: nn.GroupNorm(1, c),
            "gnc": lambda: nn.GroupNorm(c, c),
            "ln": lambda: nn.LayerNorm((c, s, s)),
            "none": nn.Identity,
        }[kind]()
        if s > 1
        else nn.BatchNorm2d(c)
    )


def act(rng: random.Random, c: int) -> nn.Module:
    kinds: list[Callable[[], nn.Module]] = [
        lambda: nn.LeakyReLU(0.3),
        nn.SiLU,
        nn.GELU,
        nn.Hardswish,
        nn.ELU,
        nn.Tanh,
        nn.Sigmoid,
        nn.Softplus,
        lambda: nn.PReLU(c),
        nn.PReLU,
        lambda: nn.LeakyReLU(0.2, inplace=True),
        nn.Identity,
    ]
    return rng.choice(kinds)()


def conv_of(rng: random.Random, c: int, out: int, *, groups: int = 1, stride: int = 1) -> nn.Conv2d:
    k = rng.choice([1, 3])
    mode = rng.choice(["zeros", "zeros", "zeros", "circular", "replicate"])
    return nn.Conv2d(
        c, out, k, stride, padding=k // 2, groups=groups, bias=rng.random() < 0.5, padding_mode=mode
    )


def unit(rng: random.Random, c: int, out: int, s: int, *, groups: int = 1) -> nn.Sequential:
    return nn.Sequential(conv_of(rng, c, out, groups=groups), norm(rng, out, s), act(rng, out))


def width(rng: random.Random) -> int:
    return rng.choice([2, 3, 4, 5, 6, 8])


def plain(rng: random.Random, c: int, s: int) -> Block:
    out = width(rng)
    return unit(rng, c, out, s), out, s


def strided(rng: random.Random, c: int, s: int) -> Block:
    if s < 4:
        return plain(rng, c, s)
    out, half = width(rng), (s + 1) // 2
    return nn.Sequential(conv_of(rng, c, out, stride=2), norm(rng, out, half), act(rng, out)), out, half


class Residual(nn.Module):
    def __init__(self, body: nn.Module, shortcut: nn.Module, subtract: bool = False) -> None:
        super().__init__()
        self.body, self.shortcut, self.subtract = body, shortcut, subtract

    def forward(self, x: Tensor) -> Tensor:
        y = self.body(x)
        return self.shortcut(x) - y if self.subtract else self.shortcut(x) + y


def residual(rng: random.Random, c: int, s: int) -> Block:
    inner = width(rng)
    body = nn.Sequential(unit(rng, c, inner, s), conv_of(rng, inner, c), norm(rng, c, s))
    return Residual(body, nn.Identity(), rng.random() < 0.3), c, s


def projection(rng: random.Random, c: int, s: int) -> Block:
    out = width(rng)
    return Residual(unit(rng, c, out, s), nn.Sequential(nn.Conv2d(c, out, 1), norm(rng, out, s))), out, s


class PadChannels(nn.Module):
    def __init__(self, front: int, back: int, functional: bool) -> None:
        super().__init__()
        self.front, self.back = front, back
        self.pad = None if functional else nn.ConstantPad3d((0, 0, 0, 0, front, back), 0.0)

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x, (0, 0, 0, 0, self.front, self.back)) if self.pad is None else self.pad(x)


def zero_pad(rng: random.Random, c: int, s: int) -> Block:
    front, back = rng.randint(0, 2), rng.randint(1, 3)
    out = front + c + back
    return Residual(unit(rng, c, out, s), PadChannels(front, back, rng.random() < 0.5)), out, s


class Dense(nn.Module):
    def __init__(self, bodies: list[nn.Module], flip: bool) -> None:
        super().__init__()
        self.bodies, self.flip = nn.ModuleList(bodies), flip

    def forward(self, x: Tensor) -> Tensor:
        for body in self.bodies:
            parts = [x, body(x)]
            x = torch.cat(parts[::-1] if self.flip else parts, 1)
        return x


def dense(rng: random.Random, c: int, s: int) -> Block:
    bodies: list[nn.Module] = []
    total = c
    for _ in range(rng.randint(1, 2)):
        growth = rng.randint(1, 4)
        bodies.append(unit(rng, total, growth, s))
        total += growth
    return Dense(bodies, rng.random() < 0.5), total, s


def depthwise(rng: random.Random, c: int, s: int) -> Block:
    out = c * rng.choice([1, 1, 2, 3])
    return nn.Sequential(unit(rng, c, out, s, groups=c)), out, s


def grouped(rng: random.Random, c: int, s: int) -> Block:
    g = rng.choice(divisors(c))
    out = g * rng.randint(1, 3)
    return unit(rng, c, out, s, groups=g), out, s


def grouped_middle(rng: random.Random, c: int, s: int) -> Block:
    """As in ResNeXt: the grouped convolution reads what a convolution made for it alone."""
    g, a, b, out = rng.randint(2, 3), rng.randint(1, 3), rng.randint(1, 3), width(rng)
    middle = unit(rng, g * a, g * b, s, groups=g)
    return nn.Sequential(unit(rng, c, g * a, s), middle, unit(rng, g * b, out, s)), out, s


class SqueezeExcite(nn.Module):
    def __init__(self, c: int, r: int, linear: bool) -> None:
        super().__init__()
        self.linear = linear
        self.down = nn.Linear(c, r) if linear else nn.Conv2d(c, r, 1)
        self.up = nn.Linear(r, c) if linear else nn.Conv2d(r, c, 1)

    def forward(self, x: Tensor) -> Tensor:
        if not self.linear:
            return x * torch.sigmoid(self.up(F.silu(self.down(F.adaptive_avg_pool2d(x, 1)))))
        y = self.up(F.silu(self.down(x.mean((2, 3)))))
        return x * torch.sigmoid(y)[:, :, None, None]


def squeeze_excite(rng: random.Random, c: int, s: int) -> Block:
    return SqueezeExcite(c, rng.randint(1, 4), rng.random() < 0.5), c, s


class Gate(nn.Module):
    def __init__(self, conv: nn.Module, how: str, c: int) -> None:
        super().__init__()
        self.conv, self.how, self.c = conv, how, c

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        if self.how == "glu":
            return F.glu(y, 1)
        if self.how == "chunk":
            a, b = y.chunk(2, 1)
        elif self.how == "split":
            a, b = torch.split(y, self.c, 1)
        else:
            a, b = y[:, : self.c], y[:, self.c :]
        return a * torch.sigmoid(b)


def gate(rng: random.Random, c: int, s: int) -> Block:
    out = width(rng)
    return Gate(conv_of(rng, c, 2 * out), rng.choice(["glu", "chunk", "split", "slice"]), out), out, s


class SplitCat(nn.Module):
    """``[a | b] -> [f(b) | a]``, cut at any place."""

    def __init__(self, body: nn.Module, at: int, how: str) -> None:
        super().__init__()
        self.body, self.at, self.how = body, at, how

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "split":
            a, b = torch.split(x, [self.at, x.shape[1] - self.at], 1)
        elif self.how == "narrow":
            a, b = x.narrow(1, 0, self.at), x.narrow(1, self.at, x.shape[1] - self.at)
        else:
            a, b = x[:, : self.at], x[:, self.at - x.shape[1] :]
        return torch.cat([self.body(b), a], 1)


def split_cat(rng: random.Random, c: int, s: int) -> Block:
    if c < 2:
        return plain(rng, c, s)
    at, out = rng.randint(1, c - 1), rng.randint(1, 4)
    body = unit(rng, c - at, out, s)
    return SplitCat(body, at, rng.choice(["split", "slice", "narrow"])), at + out, s


class ChunkCat(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        a, b = x.chunk(2, 1)
        return torch.cat([torch.tanh(b), a * 0.5], 1)


def chunk_cat(rng: random.Random, c: int, s: int) -> Block:
    out = 2 * rng.randint(1, 4)
    return nn.Sequential(unit(rng, c, out, s), ChunkCat()), out, s


def pixel_shuffle(rng: random.Random, c: int, s: int) -> Block:
    out = rng.randint(1, 3)
    return nn.Sequential(conv_of(rng, c, 4 * out), nn.PixelShuffle(2), nn.AvgPool2d(2)), out, s


def pixel_unshuffle(rng: random.Random, c: int, s: int) -> Block:
    if s % 2:
        return plain(rng, c, s)
    return nn.PixelUnshuffle(2), 4 * c, s // 2


def transposed(rng: random.Random, c: int, s: int) -> Block:
    g = rng.choice(divisors(c))
    out = g * rng.randint(1, 3)
    kernel = rng.choice([{"kernel_size": 2}, {"kernel_size": 3, "padding": 1, "output_padding": 1}])
    up = nn.ConvTranspose2d(c, out, **kernel, stride=2, groups=g, bias=rng.random() < 0.5)
    return nn.Sequential(up, norm(rng, out, 2 * s), nn.MaxPool2d(2), act(rng, out)), out, s


class Shuffle(nn.Module):
    def __init__(self, groups: int, native: bool) -> None:
        super().__init__()
        self.groups, self.native = groups, native

    def forward(self, x: Tensor) -> Tensor:
        if self.native:
            return F.channel_shuffle(x, self.groups)
        n, c, h, w = x.shape
        return x.view(n, self.groups, c // self.groups, h, w).transpose(1, 2).reshape(n, -1, h, w)


def channel_shuffle(rng: random.Random, c: int, s: int) -> Block:
    return Shuffle(rng.choice(divisors(c)), rng.random() < 0.3), c, s


class ChannelsLast(nn.Module):
    """A ConvNeXt block: depthwise convolution, then norm and linear maps with the channels last."""

    def __init__(self, c: int, inner: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(c, c, 3, padding=1, groups=c)
        self.norm, self.up, self.down = nn.LayerNorm(c), nn.Linear(c, inner), nn.Linear(inner, c)
        self.scale = nn.Parameter(torch.ones(c, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.conv(x).permute(0, 2, 3, 1))
        return x + self.scale * self.down(F.gelu(self.up(y))).permute(0, 3, 1, 2)


def channels_last(rng: random.Random, c: int, s: int) -> Block:
    return ChannelsLast(c, width(rng)), c, s


class SpatialAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 1, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        pooled = torch.cat([x.mean(1, keepdim=True), x.amax(1, keepdim=True)], 1)
        return x * torch.sigmoid(self.conv(pooled))


def spatial_attention(rng: random.Random, c: int, s: int) -> Block:
    return SpatialAttention(), c, s


class Broadcast(nn.Module):
    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x.mean((2, 3), keepdim=True)).expand_as(x)


def broadcast(rng: random.Random, c: int, s: int) -> Block:
    return Broadcast(nn.Conv2d(c, c, 1)), c, s


class Twice(nn.Module):
    def __init__(self, body: nn.Module, other: nn.Module) -> None:
        super().__init__()
        self.body, self.other = body, other

    def forward(self, x: Tensor) -> Tensor:
        return self.body(self.other(self.body(x)))


def twice(rng: random.Random, c: int, s: int) -> Block:
    return Twice(conv_of(rng, c, c), act(rng, c)), c, s


class Tied(nn.Module):
    """Two convolutions with one weight and a bias each."""

    def __init__(self, c: int) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(c, c, 3, padding=1), nn.Conv2d(c, c, 3, padding=1)
        self.b.weight = self.a.weight

    def forward(self, x: Tensor) -> Tensor:
        return F.silu(self.b(F.silu(self.a(x))))


def tied(rng: random.Random, c: int, s: int) -> Block:
    return Tied(c), c, s


def resample(rng: random.Random, c: int, s: int) -> Block:
    mode = rng.choice(["nearest", "bilinear", "bicubic"])
    return nn.Sequential(nn.Upsample(scale_factor=2, mode=mode), nn.MaxPool2d(3, 2, 1)), c, s


class NonLocal(nn.Module):
    """Attention over the positions of the plane, with one head."""

    def __init__(self, c: int, inner: int) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Conv2d(c, inner, 1) for _ in range(3))
        self.out = nn.Conv2d(inner, c, 1)

    def forward(self, x: Tensor) -> Tensor:
        n, _, h, w = x.shape
        q, k, v = (f(x).flatten(2) for f in (self.q, self.k, self.v))
        scores = torch.softmax(q.transpose(1, 2) @ k, -1)
        return x + self.out((v @ scores.transpose(1, 2)).view(n, -1, h, w))


def non_local(rng: random.Random, c: int, s: int) -> Block:
    return NonLocal(c, rng.randint(2, 4)), c, s


class ViewTwice(nn.Module):
    """The planes as one dimension, a 1d convolution, and back."""

    def __init__(self, conv: nn.Conv1d) -> None:
        super().__init__()
        self.conv = conv

    def forward(self, x: Tensor) -> Tensor:
        n, _, h, w = x.shape
        return self.conv(x.flatten(2)).view(n, -1, h, w)


def one_d(rng: random.Random, c: int, s: int) -> Block:
    out = width(rng)
    return ViewTwice(nn.Conv1d(c, out, 3, padding=1)), out, s


BLOCKS: dict[str, Builder] = {
    f.__name__: f
    for f in (
        plain,
        strided,
        residual,
        projection,
        zero_pad,
        dense,
        depthwise,
        grouped,
        grouped_middle,
        squeeze_excite,
        gate,
        split_cat,
        chunk_cat,
        pixel_shuffle,
        pixel_unshuffle,
        transposed,
        channel_shuffle,
        channels_last,
        spatial_attention,
        broadcast,
        twice,
        tied,
        resample,
        one_d,
        non_local,
    )
}

WEIGHTLESS_MIXERS = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, SpatialAttention)
