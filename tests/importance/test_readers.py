"""Second moments against hooks, and curvatures of a network of one output, where a random sign changes nothing."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import qcqp_prune as qp
from qcqp_prune.graph.observe import Observed
from qcqp_prune.importance.readers import curvatures, readers


class One(nn.Module):
    """Works in place behind a layer, calls another one twice, and ends in one number."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.relu, self.b = nn.Linear(4, 6), nn.ReLU(inplace=True), nn.Linear(6, 6)
        self.mix, self.out = nn.Conv1d(6, 4, 1, groups=2, bias=False), nn.Linear(4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.b(self.relu(self.b(self.relu(self.a(x)))))
        return self.out(self.mix(x[:, :, None])[:, :, 0])


def test_moments_and_curvatures() -> None:
    torch.manual_seed(0)
    model = One().eval()
    x = torch.randn(10, 4)
    graph = qp.trace(model, x[:2])
    observed = Observed(model, graph)
    found = readers(observed, list(x.split(5)))
    curvatures(observed, list(x.split(5)), found)
    h = torch.relu(model.a(x))
    h.retain_grad()
    first = model.b(h)
    first.retain_grad()
    second = model.b(torch.relu(first))
    second.retain_grad()
    mixed = model.mix(second[:, :, None])
    mixed.retain_grad()
    model.out(mixed[:, :, 0]).sum().backward()
    b, mix = found["b.weight", None], found["mix.weight", None]
    rows = torch.cat([h, torch.relu(first)]).detach().double()
    torch.testing.assert_close(b.second, rows.T @ rows, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(b.first, rows.sum(0), rtol=1e-5, atol=1e-6)
    assert (b.rows, b.shift, mix.shift) == (20, None, None)  # two calls read one bias
    assert found["a.weight", None].shift == ("a.bias", 1)
    wanted = (first.grad.double().square() + second.grad.double().square()).mean(0)
    torch.testing.assert_close(b.curvature, wanted, rtol=1e-5, atol=1e-9)
    torch.testing.assert_close(
        mix.curvature, mixed.grad.double().square().sum(2).mean(0), rtol=1e-5, atol=1e-9
    )
    within = torch.block_diag(torch.ones(3, 3), torch.ones(3, 3)).bool()
    assert (mix.second[~within] == 0).all()
    assert (mix.covariance(0.1)[~within] == 0).all()
    a = found["a.weight", None]
    torch.testing.assert_close(a.covariance(0.0), torch.cov(x.double().T, correction=0), rtol=1e-5, atol=1e-6)
