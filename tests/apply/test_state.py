"""What pruning must leave as it was, however a model holds its tensors."""

from __future__ import annotations

from typing import Self

import pytest
import torch
from torch import Tensor, nn

from qcqp_prune.graph.trace import trace
from tests.networks import liven, prune_and_check, random_masks, widths

X = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(0))


def test_a_module_at_three_paths_keeps_its_tensors() -> None:
    class Thrice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.head = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 4, 1)
            self.a, self.b, self.c = (nn.Sequential(shared) for shared in [nn.Conv2d(8, 8, 3, padding=1)] * 3)

        def forward(self, x: Tensor) -> Tensor:
            y = self.first(x)
            return self.head(self.c(self.b(self.a(y).relu()).relu()).mean((2, 3), keepdim=True))

    model = liven(Thrice())
    graph = trace(model, X)
    assert model.a[0].weight is model.c[0].weight
    for realisation in ("modules", "graph"):
        prune_and_check(model, X, graph, random_masks(graph, 0, 0.5), realisation=realisation)
        assert model.a[0].weight.dtype == torch.float32
        assert isinstance(model.a[0].bias, nn.Parameter)


class Caching(nn.Module):
    """Gathers a bias for each channel and place once, and keeps it until the mode changes, as LeViT does."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 4, 1)
        self.table = nn.Parameter(torch.zeros(8, 5))
        self.register_buffer("index", torch.arange(36).reshape(6, 6) % 5)
        self.kept: dict[str, Tensor] = {}

    def train(self, mode: bool = True) -> Self:
        self.kept = {}
        return super().train(mode)

    def forward(self, x: Tensor) -> Tensor:
        if self.training or "bias" not in self.kept:
            self.kept["bias"] = self.table[:, self.index]
        return self.b(torch.tanh(self.a(x) + self.kept["bias"]))


@pytest.mark.parametrize("ran", [False, True])
def test_what_a_forward_keeps_is_traced_anew(*, ran: bool) -> None:
    model = liven(Caching()).eval()
    if ran:
        model(X)
    kept = dict(model.kept)
    graph = trace(model, X)
    assert widths(graph, free=True) == {"a": 8}
    small, checked = prune_and_check(model, X, graph, random_masks(graph, 0, 0.5))
    assert checked.realisation == "modules"
    assert model.kept.keys() == kept.keys()
    assert all(model.kept[name] is tensor for name, tensor in kept.items())
    assert small.eval()(X).shape == (2, 4, 6, 6)
