"""Small networks with sums, drawn and hand-computable, for free sharing. All take (N, 3, 6, 6)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def conv(a: int, b: int, k: int = 3, groups: int = 1) -> nn.Conv2d:
    return nn.Conv2d(a, b, k, padding=k // 2, groups=groups, bias=False)


class Net(nn.Module):
    """A head over the mean of what ``features`` returns."""

    def __init__(self, channels: int, out: int = 4) -> None:
        super().__init__()
        self.head = nn.Linear(channels, out)

    def features(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x).mean((2, 3)))


class Identity(Net):
    """x(3) -> a(6) -+-> b(6) -> + = s -> c(5) -> head
    +-----------^
    """

    def __init__(self) -> None:
        super().__init__(5)
        self.a, self.b, self.c = conv(3, 6), conv(6, 6), conv(6, 5)

    def features(self, x: Tensor) -> Tensor:
        y = torch.tanh(self.a(x))
        return torch.tanh(self.c(y + torch.tanh(self.b(y))))


class InPlace(Identity):
    """The same with ``+=``."""

    def features(self, x: Tensor) -> Tensor:
        y = torch.tanh(self.a(x))
        z = torch.tanh(self.b(y))
        z += y
        return torch.tanh(self.c(z))


class SeenLater(Identity):
    """The same, and ``c`` reads the branch through another view of the memory that the sum overwrites."""

    def features(self, x: Tensor) -> Tensor:
        y = torch.tanh(self.a(x))
        z = torch.tanh(self.b(y))
        old = z.view(z.shape)
        z += y
        return torch.tanh(self.c(old * 0.5))


class Difference(Identity):
    """The same with ``a - 0.5 b``, and the shortcut as second operand."""

    def features(self, x: Tensor) -> Tensor:
        y = torch.tanh(self.a(x))
        return torch.tanh(self.c(torch.sub(torch.tanh(self.b(y)), y, alpha=0.5)))


class Downsample(Net):
    """x -> a(4) -+-> b(6) -> bn -> + -> tanh = s -> head
    +-> p(6) -> bn ---^
    """

    def __init__(self) -> None:
        super().__init__(6)
        self.a, self.b, self.p = conv(3, 4), conv(4, 6), conv(4, 6, 1)
        self.bn_b, self.bn_p = nn.BatchNorm2d(6), nn.BatchNorm2d(6)

    def features(self, x: Tensor) -> Tensor:
        y = torch.tanh(self.a(x))
        return torch.tanh(self.bn_b(self.b(y)) + self.bn_p(self.p(y)))


class PreActivation(Net):
    """x -> a(6) -+-> bn -> relu -> b(6) -> + = s -+-> bn2 -> relu -> c(6) -> + = t -> bn3 -> relu -> head
                  +-------------------------^      +--------------------------^

    A channel of s that goes must not come back as relu(beta) of bn2.
    """

    def __init__(self) -> None:
        super().__init__(6)
        self.a, self.b, self.c = conv(3, 6), conv(6, 6), conv(6, 6)
        self.bn, self.bn2, self.bn3 = nn.BatchNorm2d(6), nn.BatchNorm2d(6), nn.BatchNorm2d(6)

    def features(self, x: Tensor) -> Tensor:
        y = self.a(x)
        s = y + self.b(F.leaky_relu(self.bn(y), 0.1))
        return F.leaky_relu(self.bn3(s + self.c(F.leaky_relu(self.bn2(s), 0.1))), 0.1)


class Padded(Net):
    """x -> a(4) -+-> b(7) -------------> + = s -> head
    +-> 1 zero, 4, 2 zeros -^
    """

    def __init__(self, functional: bool = True) -> None:
        super().__init__(7)
        self.a, self.b = conv(3, 4), conv(4, 7)
        self.pad = None if functional else nn.ConstantPad3d((0, 0, 0, 0, 1, 2), 0.0)

    def features(self, x: Tensor) -> Tensor:
        y = torch.tanh(self.a(x))
        wide = F.pad(y, (0, 0, 0, 0, 1, 2)) if self.pad is None else self.pad(y)
        return torch.tanh(self.b(y)) + wide


class Three(Net):
    """s = (a(x) + b(x)) + c(x) -> head; no layer reads the inner sum."""

    def __init__(self) -> None:
        super().__init__(5)
        self.a, self.b, self.c = conv(3, 5), conv(3, 5), conv(3, 5)

    def features(self, x: Tensor) -> Tensor:
        return self.a(x) + self.b(x) + self.c(x)


class Doubled(Net):
    """a(x) + a(x) -> head: one unit for each channel."""

    def __init__(self) -> None:
        super().__init__(5)
        self.a = conv(3, 5)

    def features(self, x: Tensor) -> Tensor:
        y = torch.tanh(self.a(x))
        return y + y


class Output(nn.Module):
    """x -> a(6) -+-> b(6) -> + = s, an output, which bn and head read as well
    +-----------^
    """

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.bn, self.head = conv(3, 6), conv(6, 6), nn.BatchNorm2d(6), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = torch.tanh(self.a(x))
        s = y + torch.tanh(self.b(y))
        return s, self.head(torch.tanh(self.bn(s)).mean((2, 3)))


class Inverted(Net):
    """MobileNetV2: x -> a(4) -+-> up(8) -> depthwise -> down(4) -> + = s -> head
    +------------------------------------^
    """

    def __init__(self) -> None:
        super().__init__(4)
        self.a, self.up, self.deep, self.down = conv(3, 4), conv(4, 8, 1), conv(8, 8, groups=8), conv(8, 4, 1)
        self.bn = nn.BatchNorm2d(4)

    def features(self, x: Tensor) -> Tensor:
        y = torch.tanh(self.a(x))
        return y + self.bn(self.down(torch.tanh(self.deep(torch.tanh(self.up(y))))))


class Gated(Net):
    """x -> a(6) -+-> b(6) -+-------------------> * -> + = s -> head
    |         +-> mean, r(2), e(6) -^    ^
    +------------------------------------+
    """

    def __init__(self) -> None:
        super().__init__(6)
        self.a, self.b, self.r, self.e = conv(3, 6), conv(6, 6), conv(6, 2, 1), conv(2, 6, 1)

    def features(self, x: Tensor) -> Tensor:
        y = torch.tanh(self.a(x))
        z = torch.tanh(self.b(y))
        return y + z * torch.sigmoid(self.e(torch.tanh(self.r(z.mean((2, 3), keepdim=True)))))


class Context(Net):
    """s = y + g(mean of y), the same at every pixel; then a shift that is a parameter, and one number for all."""

    def __init__(self) -> None:
        super().__init__(6)
        self.a, self.g = conv(3, 6), conv(6, 6, 1)
        self.shift, self.one = nn.Parameter(torch.zeros(6, 1, 1)), nn.Parameter(torch.zeros(1))

    def features(self, x: Tensor) -> Tensor:
        y = torch.tanh(self.a(x))
        s = y + torch.tanh(self.g(y.mean((2, 3), keepdim=True)))
        return torch.tanh(s + self.shift + self.one)


class Branches(Net):
    """a(x) + b(x) -> p(4), a(x) + c(x) -> q(4), concatenated -> head: a is part of two sums."""

    def __init__(self) -> None:
        super().__init__(8)
        self.a, self.b, self.c, self.p, self.q = conv(3, 5), conv(3, 5), conv(3, 5), conv(5, 4), conv(5, 4)

    def features(self, x: Tensor) -> Tensor:
        y = self.a(x)
        return torch.tanh(torch.cat([self.p(y + self.b(x)), self.q(y + self.c(x))], 1))


class Tiled(Net):
    """a(x)(3) twice over + b(x)(6) = s -> c(5) -> head: each channel of a is part of two channels of s."""

    def __init__(self) -> None:
        super().__init__(5)
        self.a, self.b, self.c = conv(3, 3), conv(3, 6), conv(6, 5)

    def features(self, x: Tensor) -> Tensor:
        return torch.tanh(self.c(self.a(x).repeat(1, 2, 1, 1) + self.b(x)))


class TiledOntoPadding(Net):
    """a(x)(3) twice over + b(x)(3) padded = s(6) -> c(5) -> head: the last three have one part each."""

    def __init__(self) -> None:
        super().__init__(5)
        self.a, self.b, self.c = conv(3, 3), conv(3, 3), conv(6, 5)

    def features(self, x: Tensor) -> Tensor:
        return torch.tanh(self.c(self.a(x).repeat(1, 2, 1, 1) + F.pad(self.b(x), (0, 0, 0, 0, 0, 3))))


class TiledOntoItself(Net):
    """y = a(x)(3) twice over + [b(x)(3), y] = s(6) -> c(5) -> head: the operands differ in the first three only."""

    def __init__(self) -> None:
        super().__init__(5)
        self.a, self.b, self.c = conv(3, 3), conv(3, 3), conv(6, 5)

    def features(self, x: Tensor) -> Tensor:
        y = self.a(x)
        return torch.tanh(self.c(y.repeat(1, 2, 1, 1) + torch.cat([self.b(x), y], 1)))


class Spread(Net):
    """a(x)(4) times b(x)(5) at each pair + z(x)(4) at each of the five: along b there is nothing of z."""

    def __init__(self) -> None:
        super().__init__(7)
        self.a, self.b, self.z = conv(3, 4), conv(3, 5), conv(3, 4)
        self.c, self.d = conv(4, 3), conv(5, 4)

    def features(self, x: Tensor) -> Tensor:
        pairs = torch.tanh(self.a(x).unsqueeze(2) * self.b(x).unsqueeze(1) + self.z(x).unsqueeze(2))
        return torch.tanh(torch.cat([self.c(pairs.sum(2)), self.d(pairs.sum(1))], 1))


class GatedByPart(Net):
    """s = a(x) + b(x), then s * a(x): a channel of s would be kept exactly when its part is."""

    def __init__(self) -> None:
        super().__init__(5)
        self.a, self.b = conv(3, 5), conv(3, 5)

    def features(self, x: Tensor) -> Tensor:
        y = torch.tanh(self.a(x))
        return (y + torch.tanh(self.b(x))) * y


class Unrolled(Net):
    """y -> y + f(y), twice with one f: what f reads before and after the sum is one dimension of its weight."""

    def __init__(self) -> None:
        super().__init__(5)
        self.a, self.f = conv(3, 5), conv(5, 5)

    def features(self, x: Tensor) -> Tensor:
        y = torch.tanh(self.a(x))
        for _ in range(2):
            y = y + torch.tanh(self.f(y))
        return y


class GroupNormed(Net):
    """y + b(y) -> group norm of two groups -> head."""

    def __init__(self) -> None:
        super().__init__(6)
        self.a, self.b, self.norm = conv(3, 6), conv(6, 6), nn.GroupNorm(2, 6)

    def features(self, x: Tensor) -> Tensor:
        y = torch.tanh(self.a(x))
        return torch.tanh(self.norm(y + self.b(y)))


class GroupsOfSum(Net):
    """y + b(y) -> convolution of two groups with one output each: the sum's channels go three at a time."""

    def __init__(self) -> None:
        super().__init__(2)
        self.a, self.b = conv(3, 6), conv(6, 6)
        self.g = nn.Conv2d(6, 2, 3, padding=1, groups=2)

    def features(self, x: Tensor) -> Tensor:
        y = torch.tanh(self.a(x))
        return torch.tanh(self.g(y + torch.tanh(self.b(y))))


class ProductOfSums(Net):
    """(a(x) + b(x)) * (c(x) + d(x))."""

    def __init__(self) -> None:
        super().__init__(4)
        self.a, self.b, self.c, self.d = (conv(3, 4) for _ in range(4))

    def features(self, x: Tensor) -> Tensor:
        return (self.a(x) + self.b(x)) * (self.c(x) + self.d(x))


FREE = (Identity, InPlace, Difference, Downsample, PreActivation, Padded, Three, Output, Inverted, Gated)
FREE = (*FREE, Context, Branches, Tiled, TiledOntoPadding, TiledOntoItself)
STRICT = (GatedByPart, Unrolled, GroupNormed, SeenLater, GroupsOfSum, ProductOfSums, Spread)
