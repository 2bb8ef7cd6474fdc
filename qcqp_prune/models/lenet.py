"""LeNet-5 and LeNet-300-100 for 28 x 28 grey images, in the variants that the pruning literature reports."""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class LeNet5(nn.Module):
    """The Caffe variant, 20-50-500: 431,080 parameters, two 5 x 5 convolutions without padding, ReLU throughout.

    Args:
        num_classes: outputs.

    References:
        LeCun, Bottou, Bengio, Haffner: Gradient-based learning applied to document recognition, 1998.
        Han, Pool, Tran, Dally: Learning both weights and connections, NeurIPS 2015, arXiv 1506.02626, table 1.
    """

    def __init__(self, num_classes: int = 10) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 20, 5)
        self.conv2 = nn.Conv2d(20, 50, 5)
        self.fc1 = nn.Linear(50 * 4 * 4, 500)
        self.fc2 = nn.Linear(500, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Map images (N, 1, 28, 28) to logits (N, num_classes)."""
        out = F.max_pool2d(F.relu(self.conv1(x)), 2)
        out = F.max_pool2d(F.relu(self.conv2(out)), 2)
        out = F.relu(self.fc1(torch.flatten(out, 1)))
        return cast(Tensor, self.fc2(out))


class LeNet300(nn.Module):
    """LeNet-300-100: three linear layers, 266,610 parameters.

    Args:
        num_classes: outputs.

    References:
        LeCun, Bottou, Bengio, Haffner: Gradient-based learning applied to document recognition, 1998.
    """

    def __init__(self, num_classes: int = 10) -> None:
        super().__init__()
        self.fc1 = nn.Linear(28 * 28, 300)
        self.fc2 = nn.Linear(300, 100)
        self.fc3 = nn.Linear(100, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Map images (N, 1, 28, 28) to logits (N, num_classes)."""
        out = F.relu(self.fc1(torch.flatten(x, 1)))
        return cast(Tensor, self.fc3(F.relu(self.fc2(out))))
