"""Small networks that importances are tested on, and sums over their single weights."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import qcqp_prune as qp
from tests.networks import entries_kept, liven


class Dense(nn.Module):
    """Two convolutions: units are coupled through the second."""

    shape = (2, 5, 5)

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(2, 4, 3)
        self.b = nn.Conv2d(4, 3, 2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.relu(self.a(x))).mean((2, 3))


class Depthwise(nn.Module):
    """A depthwise convolution with two outputs for each input."""

    shape = (2, 6, 6)

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(2, 4, 1)
        self.d = nn.Conv2d(4, 8, 3, groups=4)
        self.b = nn.Conv2d(8, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.relu(self.d(self.a(x)))).mean((2, 3))


class Grouped(nn.Module):
    """A convolution in two groups."""

    shape = (2, 4, 4)

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(2, 6, 1)
        self.g = nn.Conv2d(6, 4, 3, groups=2)
        self.b = nn.Conv2d(4, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.relu(self.g(torch.relu(self.a(x))))).mean((2, 3))


class Transposed(nn.Module):
    """A transposed convolution, whose weight has inputs first, and one in two groups."""

    shape = (2, 3, 3)

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(2, 4, 1)
        self.u = nn.ConvTranspose2d(4, 6, 2, stride=2)
        self.v = nn.ConvTranspose2d(6, 4, 2, groups=2)
        self.b = nn.Conv2d(4, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.relu(self.v(torch.relu(self.u(self.a(x)))))).mean((2, 3))


class Flattened(nn.Module):
    """A linear layer that reads each channel at four positions."""

    shape = (2, 4, 4)

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(2, 5, 3)
        self.b = nn.Linear(5 * 2 * 2, 4)
        self.c = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(torch.relu(self.b(torch.relu(self.a(x)).flatten(1))))


class Tied(nn.Module):
    """One weight in two layers: its entries score once for each layer."""

    shape = (5,)

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(5, 6)
        self.b = nn.Linear(6, 6, bias=False)
        self.c = nn.Linear(6, 6, bias=False)
        self.c.weight = self.b.weight
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.a(x))
        return self.head(x + self.c(torch.relu(self.b(x))))


NETWORKS = [Dense, Depthwise, Grouped, Transposed, Flattened, Tied]
Kind = type[nn.Module]


def traced(kind: Kind, seed: int = 0) -> tuple[nn.Module, qp.ChannelGraph]:
    model = liven(kind(), seed)
    return model, qp.trace(model, torch.zeros(1, *kind.shape))


def layers(model: nn.Module) -> list[nn.Module]:
    return [m for m in model.modules() if isinstance(m, nn.Conv2d | nn.ConvTranspose2d | nn.Linear)]


def sum_over_kept(
    model: nn.Module,
    graph: qp.ChannelGraph,
    masks: qp.Masks,
    score: Callable[[Tensor], Tensor],
) -> float:
    """Scores of single (first, second) kernels, added up where both of its dimensions stay.

    Args:
        score: from a weight to one score for each entry of its first two dimensions.
    """
    specs = {spec.name: spec for spec in graph.tensors}
    first_names = {id(p): name for name, p in model.named_parameters()}
    total = 0.0
    for module in layers(model):
        spec = specs[first_names[id(module.weight)]]
        stays = entries_kept(graph, spec, masks.flat(graph))
        scores = score(module.weight)
        for i, j in itertools.product(range(spec.shape[0]), range(spec.shape[1])):
            if stays[i, j].all():
                total += float(scores[i, j])
    return total


def kernel_loop(weight: Tensor, value: Callable[[list[float]], float]) -> list[list[float]]:
    """``value`` of the entries of each kernel, as Python numbers."""
    rows, cols = weight.shape[:2]
    kernels = weight.detach().double().reshape(rows, cols, -1).tolist()
    return [[value(kernels[i][j]) for j in range(cols)] for i in range(rows)]


def batches_for(kind: Kind, count: int = 3) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(5)
    return [
        (
            torch.randn(4, *kind.shape, generator=generator),
            torch.randint(3, (4,), generator=generator),
        )
        for _ in range(count)
    ]


class Normed(nn.Module):
    """Batch norms on a residual sum: two scales count for one unit."""

    shape = (2, 3, 3)

    def __init__(self, *, affine: bool = True) -> None:
        super().__init__()
        self.a = nn.Conv2d(2, 4, 1)
        self.bn_a = nn.BatchNorm2d(4, affine=affine)
        self.b = nn.Conv2d(4, 4, 1)
        self.bn_b = nn.BatchNorm2d(4, affine=affine)
        self.head = nn.Conv2d(4, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.bn_a(self.a(x)))
        return self.head(x + self.bn_b(self.b(x))).mean((2, 3))


def by_columns(kind: Kind) -> tuple[nn.Module, qp.ChannelGraph]:
    model = liven(kind(), 0)
    return model, qp.trace(model, torch.zeros(1, *kind.shape), columns=True)


class Packed(nn.Module):
    """Two linear maps that share one weight and one bias, a half each, and a transformer's attention."""

    shape = (5, 4)

    def __init__(self) -> None:
        super().__init__()
        self.in_weight = nn.Parameter(torch.randn(10, 4))
        self.in_bias = nn.Parameter(torch.randn(10))
        self.attention = nn.MultiheadAttention(6, 3, batch_first=True)
        self.head = nn.Linear(10, 3)

    def forward(self, x: Tensor) -> Tensor:
        low = F.linear(x, self.in_weight[:6], self.in_bias[:6])
        high = F.linear(x, self.in_weight[6:], self.in_bias[6:])
        low = self.attention(torch.tanh(low), torch.tanh(low), torch.tanh(low))[0]
        return self.head(torch.cat([low, torch.tanh(high)], -1)).mean(1)


class Recurrent(nn.Module):
    """A recurrent layer, whose operator hides what it multiplies."""

    shape = (4, 3)

    def __init__(self) -> None:
        super().__init__()
        self.memory = nn.LSTM(3, 5, batch_first=True)
        self.head = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.memory(x)[0].mean(1))


class Overwriting(nn.Module):
    """A convolution whose output is written over, and one that a batch norm follows."""

    shape = (2, 4, 4)

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(2, 4, 3, padding=1)
        self.act = nn.ReLU(inplace=True)
        self.b = nn.Conv2d(4, 5, 1, bias=False)
        self.bn = nn.BatchNorm2d(5)
        self.head = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.act(self.bn(self.b(self.act(self.a(x))))).mean((2, 3)))


class Residual(nn.Module):
    """A branch that may be removed, between two convolutions; sums may be shared freely."""

    shape = (2, 4, 4)

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(2, 4, 3, padding=1)
        self.a = nn.Conv2d(4, 3, 3, padding=1)
        self.b = nn.Conv2d(3, 4, 1)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        return self.head((x + self.b(torch.relu(self.a(x)))).mean((2, 3)))
