"""DenseNet-40 (growth 12, no bottleneck) for 32 x 32 images: the network of the field for concatenations."""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qcqp_prune.models.resnet import initialise


class DenseLayer(nn.Module):
    """`cat(x, conv(relu(bn(x))))`: adds `growth` channels to the `in_planes` that it reads."""

    def __init__(self, in_planes: int, growth: int) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(in_planes)
        self.conv = nn.Conv2d(in_planes, growth, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, in_planes, H, W) to (N, in_planes + growth, H, W)."""
        return torch.cat([x, self.conv(F.relu(self.bn(x)))], dim=1)


class Transition(nn.Module):
    """`avg_pool(conv(relu(bn(x))))`: halves the image and keeps the number of channels."""

    def __init__(self, planes: int) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(planes)
        self.conv = nn.Conv2d(planes, planes, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, planes, H, W) to (N, planes, H / 2, W / 2)."""
        return F.avg_pool2d(self.conv(F.relu(self.bn(x))), 2)


class DenseNetCifar(nn.Module):
    """Three dense blocks for 32 x 32 RGB images, without bottleneck or compression; depth `3 * layers + 4`.

    Args:
        layers: dense layers in each block.
        growth: channels that each of them adds.
        num_classes: outputs.

    References:
        Huang, Liu, van der Maaten, Weinberger: Densely connected convolutional networks, CVPR 2017, arXiv 1608.06993.
    """

    def __init__(self, layers: int = 12, growth: int = 12, num_classes: int = 10) -> None:
        super().__init__()
        planes = 16
        self.conv1 = nn.Conv2d(3, planes, 3, padding=1, bias=False)
        stages: list[nn.Module] = []
        for block in range(3):
            stages.append(nn.Sequential(*(DenseLayer(planes + i * growth, growth) for i in range(layers))))
            planes += layers * growth
            if block < 2:
                stages.append(Transition(planes))
        self.features = nn.Sequential(*stages)
        self.bn = nn.BatchNorm2d(planes)
        self.linear = nn.Linear(planes, num_classes)
        initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        """Map images (N, 3, 32, 32) to logits (N, num_classes)."""
        out = F.relu(self.bn(self.features(self.conv1(x))))
        out = torch.flatten(F.adaptive_avg_pool2d(out, 1), 1)
        return cast(Tensor, self.linear(out))


def densenet40(num_classes: int = 10) -> DenseNetCifar:
    """Build DenseNet-40 with growth 12."""
    return DenseNetCifar(12, 12, num_classes)
