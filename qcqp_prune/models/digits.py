"""A residual network small enough that an exact solver proves its pruning optimal, and real enough to be accurate."""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qcqp_prune.models.resnet import BasicBlock, initialise


class DigitsNet(nn.Module):
    """Two residual blocks for 8 x 8 grey images of digits: streams of 12 and 20 channels, inner widths 12 and 20.

        image -> stem -+- conv1, conv2 -(+)-+- conv1 (stride 2), conv2 -(+)- mean - linear
                       +----------------'   +- 1 x 1 conv (stride 2) ---'

    Args:
        num_classes: outputs.
    """

    def __init__(self, num_classes: int = 10) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 12, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(12)
        self.block1 = BasicBlock(12, 12)
        self.block2 = BasicBlock(12, 20, stride=2, shortcut="projection")
        self.linear = nn.Linear(20, num_classes)
        initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        """Map images (N, 1, 8, 8) to logits (N, num_classes)."""
        out = self.block2(self.block1(F.relu(self.bn(self.stem(x)))))
        out = torch.flatten(F.adaptive_avg_pool2d(out, 1), 1)
        return cast(Tensor, self.linear(out))
