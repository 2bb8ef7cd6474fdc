"""A network, its data and its loss of your own, for `own_data.toml`: how diabetes went on, from ten values.

qcqp-prune run examples/own_data.toml
"""

from __future__ import annotations

import torch
from sklearn.datasets import load_diabetes
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset


class Net(nn.Module):
    """10 values, two hidden layers, one number."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.first = nn.Linear(10, width)
        self.second = nn.Linear(width, width)
        self.last = nn.Linear(width, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.relu(self.second(torch.relu(self.first(x)))))


def loaders(
    batch_size: int = 32,
) -> tuple[DataLoader[tuple[Tensor, ...]], DataLoader[tuple[Tensor, ...]]]:
    """Batches of training and of validation, pairs of inputs and targets."""
    values, targets = load_diabetes(return_X_y=True)
    x = torch.tensor(values * len(values) ** 0.5, dtype=torch.float32)
    y = torch.tensor((targets - targets.mean()) / targets.std(), dtype=torch.float32)[:, None]
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    train, held = order[:342], order[342:]
    return (
        DataLoader(TensorDataset(x[train], y[train]), batch_size, shuffle=True),
        DataLoader(TensorDataset(x[held], y[held]), 100),
    )
