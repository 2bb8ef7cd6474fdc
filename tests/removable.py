"""Small networks with residual branches that can, or cannot, be removed. All take (N, 3, 4, 4)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

X = torch.zeros(2, 3, 4, 4)


def conv(a: int, b: int, k: int = 3, groups: int = 1, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(a, b, k, padding=k // 2, groups=groups, stride=stride, bias=False)


class Net(nn.Module):
    """x(3) -> stem(6) -> norm -> relu -> block -> mean -> head(5)"""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm, self.head = conv(3, 6), nn.BatchNorm2d(6), nn.Linear(6, 5)
        self.block: nn.Module = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.block(F.relu(self.norm(self.stem(x)))).mean((2, 3)))


class PlainBlock(nn.Module):
    """a(4) -> norm -> relu -> b(6) -> norm -> + -> relu"""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm_a, self.b, self.norm_b = (
            conv(6, 4),
            nn.BatchNorm2d(4),
            conv(4, 6),
            nn.BatchNorm2d(6),
        )

    def forward(self, x: Tensor) -> Tensor:
        out = self.norm_b(self.b(F.relu(self.norm_a(self.a(x)))))
        out += x
        return F.relu(out)


class Plain(Net):
    def __init__(self) -> None:
        super().__init__()
        self.block = PlainBlock()


class BottleneckBlock(nn.Module):
    """a(4) -> b(3) -> c(6) with biases, the last one behind a sigmoid, which is no zero at zero."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(6, 4, 1), nn.Conv2d(4, 3, 3, padding=1), nn.Conv2d(3, 6, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.sigmoid(self.c(F.relu(self.b(F.relu(self.a(x))))))


class Bottleneck(Net):
    def __init__(self) -> None:
        super().__init__()
        self.block = BottleneckBlock()


class SqueezedBlock(nn.Module):
    """expand(8) -> depthwise -> times a gate of its own mean, through squeeze(2) -> project(6)"""

    def __init__(self) -> None:
        super().__init__()
        self.expand, self.deep, self.norm = conv(6, 8, 1), conv(8, 8, groups=8), nn.BatchNorm2d(8)
        self.squeeze, self.excite = nn.Conv2d(8, 2, 1), nn.Conv2d(2, 8, 1)
        self.project, self.last = conv(8, 6, 1), nn.BatchNorm2d(6)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm(self.deep(self.expand(x))))
        gate = torch.sigmoid(self.excite(F.relu(self.squeeze(y.mean((2, 3), keepdim=True)))))
        return x + self.last(self.project(y * gate))


class Squeezed(Net):
    def __init__(self) -> None:
        super().__init__()
        self.block = SqueezedBlock()


class DepthwiseBlock(nn.Module):
    """A depthwise convolution and a norm on the stream, wide(12) -> narrow(6), scaled: as in ConvNeXt."""

    def __init__(self) -> None:
        super().__init__()
        self.deep, self.norm = nn.Conv2d(6, 6, 3, padding=1, groups=6), nn.LayerNorm(6)
        self.wide, self.narrow = nn.Linear(6, 12), nn.Linear(12, 6)
        self.scale = nn.Parameter(torch.ones(6, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.deep(x).permute(0, 2, 3, 1))
        return x + self.scale * self.narrow(F.gelu(self.wide(y))).permute(0, 3, 1, 2)


class Depthwise(Net):
    def __init__(self) -> None:
        super().__init__()
        self.block = DepthwiseBlock()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.block(self.stem(x)).mean((2, 3)))


class GroupedBlock(nn.Module):
    """a(8) -> b(8) in two groups -> c(6)"""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = conv(6, 8, 1), conv(8, 8, groups=2), conv(8, 6, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.c(F.relu(self.b(F.relu(self.a(x)))))


class Grouped(Net):
    def __init__(self) -> None:
        super().__init__()
        self.block = GroupedBlock()


class Subtracted(Plain):
    """x - f(x)"""

    def forward(self, x: Tensor) -> Tensor:
        y, b = F.relu(self.norm(self.stem(x))), self.block
        return self.head((y - b.norm_b(b.b(F.relu(b.norm_a(b.a(y)))))).mean((2, 3)))


class SubtractedFrom(Plain):
    """f(x) - x"""

    def forward(self, x: Tensor) -> Tensor:
        y, b = F.relu(self.norm(self.stem(x))), self.block
        return self.head((b.norm_b(b.b(F.relu(b.norm_a(b.a(y))))) - y).mean((2, 3)))


class Projected(Plain):
    """The shortcut has a convolution of its own, and both sides half the plane."""

    def __init__(self) -> None:
        super().__init__()
        self.block.a = conv(6, 4, stride=2)
        self.shortcut = conv(6, 6, 1, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        y, b = F.relu(self.norm(self.stem(x))), self.block
        out = b.norm_b(b.b(F.relu(b.norm_a(b.a(y)))))
        return self.head(F.relu(out + self.shortcut(y)).mean((2, 3)))


class ReadElsewhere(Plain):
    """The result of the branch is an output too."""

    def forward(self, x: Tensor) -> Tensor:
        y, b = F.relu(self.norm(self.stem(x))), self.block
        out = b.norm_b(b.b(F.relu(b.norm_a(b.a(y)))))
        return self.head(F.relu(out + y).mean((2, 3))) + out.mean()


class InPlaceInput(Plain):
    """The branch starts with an activation in place of a view of what it is added to, and changes that, too."""

    def forward(self, x: Tensor) -> Tensor:
        y, b = self.norm(self.stem(x)), self.block
        out = b.norm_b(b.b(F.relu(b.norm_a(b.a(F.relu(y.view(y.shape), inplace=True))))))
        return self.head(F.relu(out + y).mean((2, 3)))


class InPlaceBefore(Plain):
    """An activation in place before the branch: the sum reads its result."""

    def forward(self, x: Tensor) -> Tensor:
        y, b = self.norm(self.stem(x)), self.block
        out = b.norm_b(b.b(F.relu(b.norm_a(b.a(F.relu(y, inplace=True))))))
        return self.head(F.relu_(out + y).mean((2, 3)))


class DenseBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = conv(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.a(x)


class Dense(Net):
    """x + a(x): inputs and outputs of ``a`` are the stream."""

    def __init__(self) -> None:
        super().__init__()
        self.block = DenseBlock()


class InnerBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(4, 3, 3, padding=1), nn.Conv2d(3, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.b(F.relu(self.a(x)))


class OuterBlock(nn.Module):
    """enter(4) -> a block on these four -> leave(6), around it a residual sum"""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.inner, self.leave = nn.Conv2d(6, 4, 1), InnerBlock(), nn.Conv2d(4, 6, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.leave(self.inner(F.relu(self.enter(x))))


class Nested(Net):
    def __init__(self) -> None:
        super().__init__()
        self.outer = OuterBlock()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.outer(F.relu(self.norm(self.stem(x)))).mean((2, 3)))


EVERY = (Plain, Bottleneck, Squeezed, Depthwise, Grouped, Subtracted, InPlaceBefore, Nested)
