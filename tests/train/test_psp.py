"""Parameterised structured pruning: forward, gradients by the chain rule, start, folding."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import qcqp_prune as qp
from qcqp_prune.errors import InvalidOptionError, UnknownLayerError
from qcqp_prune.models import resnet20
from qcqp_prune.train.psp import PSP, PSPConfig, PSPStructure

SHAPES: dict[PSPStructure, tuple[int, ...]] = {
    "channel": (5,),
    "column": (5, 3, 3),
    "shape": (3, 3),
    "layer": (),
}


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 5, 1), nn.ReLU(), nn.Conv2d(5, 4, 3), nn.ReLU(), nn.Conv2d(4, 3, 1)
    ).double()


def broadcast(alpha: torch.Tensor, structure: PSPStructure) -> torch.Tensor:
    return {"channel": alpha.reshape(1, -1, 1, 1), "shape": alpha.reshape(1, 1, 3, 3)}.get(structure, alpha)


@pytest.mark.parametrize("structure", list(SHAPES))
def test_forward_and_gradients_follow_the_chain_rule(structure: PSPStructure) -> None:
    """Against the plain layer: ``q = w nu``, ``dE/dw = g nu``, ``dE/dalpha = sum g w`` also where nu is 0."""
    model = network()
    weight = model[2].weight.detach().clone()
    psp = PSP(model, PSPConfig(structure, threshold=0.1, spread=0.3), layers=["2"])
    assert isinstance(model[2], nn.Conv2d)
    assert psp.values()["2"].shape == SHAPES[structure]
    alpha = psp.scales["2"].alpha
    with torch.no_grad():
        alpha.flatten()[0] = 0.05 if structure != "layer" else 0.4
        alpha.flatten()[-1] = -0.1 if structure != "layer" else 0.4
    nu = alpha.detach() * (alpha.detach().abs() >= 0.1)
    x = torch.randn(2, 2, 6, 6, dtype=torch.float64)
    q = (weight * nu).requires_grad_()
    y = model[4](torch.relu(F.conv2d(torch.relu(model[0](x)), q, model[2].bias)))
    torch.testing.assert_close(model(x), y, rtol=0, atol=1e-14)
    (g,) = torch.autograd.grad(y.square().sum(), q)
    torch.autograd.backward(model(x).square().sum())
    torch.testing.assert_close(model[2].parametrizations.weight.original.grad, g * nu)
    torch.testing.assert_close(alpha.grad, (g * weight).sum_to_size(alpha.shape))
    silent = psp.kept()["2"] == 0
    assert silent.any() == (structure != "layer")
    assert (psp.values()["2"][silent] == 0).all()


def test_threshold_itself_is_kept() -> None:
    psp = PSP(network(), PSPConfig("channel", threshold=0.25), layers=["2"])
    with torch.no_grad():
        psp.scales["2"].alpha.copy_(torch.tensor([0.25, -0.25, 0.24, 0.0, 3.0]).reshape(1, -1, 1, 1))
    assert psp.kept()["2"].tolist() == [True, True, False, False, True]


def test_start_is_seeded_and_mostly_below_the_threshold() -> None:
    """N(0, 0.1): about 95 % lie below 0.2 and 68 % below 0.1, as the paper's section 4 says."""
    alphas = [
        PSP(nn.Sequential(nn.Conv2d(400, 2, 5)), PSPConfig(seed=s), layers=["0"]).parameters()[0]
        for s in (3, 3, 4)
    ]
    assert torch.equal(alphas[0], alphas[1])
    assert not torch.equal(alphas[0], alphas[2])
    sizes = alphas[0].detach().abs()
    assert (sizes < 0.2).double().mean().item() == pytest.approx(0.9545, abs=0.01)
    assert (sizes < 0.1).double().mean().item() == pytest.approx(0.6827, abs=0.02)


def test_folding_keeps_the_function_and_gives_plain_weights() -> None:
    model = network()
    x = torch.randn(2, 2, 6, 6, dtype=torch.float64)
    names = list(model.state_dict())
    psp = PSP(model, PSPConfig("column", spread=0.3), layers=["*"])
    y = model(x)
    psp.fold()
    assert list(model.state_dict()) == names
    torch.testing.assert_close(model(x), y, rtol=0, atol=0)
    assert (model[2].weight == 0).all(0).any()


def test_structures_that_are_no_units_of_the_graph_are_refused() -> None:
    model = nn.Sequential(nn.Conv2d(2, 8, 3), nn.Conv2d(8, 8, 3, groups=4), nn.Conv2d(8, 4, 3))
    graph = qp.trace(model, torch.zeros(1, 2, 9, 9))
    with pytest.raises(InvalidOptionError, match="1 is grouped"):
        _ = PSP(model, PSPConfig("channel"), layers=["1", "2"], graph=graph).unit_of
    larger = nn.ModuleDict({"0": nn.Conv2d(2, 8, 3), "elsewhere": nn.Conv2d(8, 8, 3)})
    with pytest.raises(InvalidOptionError, match="elsewhere is grouped, or not in the graph"):
        _ = PSP(larger, PSPConfig("channel"), layers=["elsewhere"], graph=graph).unit_of


def test_prices_follow_the_network_to_another_device_and_half_precision_is_read() -> None:
    model = network().bfloat16()
    graph = qp.trace(model, torch.zeros(1, 2, 6, 6, dtype=torch.bfloat16))
    psp = PSP(model, PSPConfig("channel", spread=None), layers=["2", "4"], graph=graph)
    assert psp.indicators().tolist() == [1.0] * 9
    psp.set_prices(np.arange(9.0))
    psp.load_state_dict(psp.state_dict())
    assert psp().item() == 36
    model.to("meta")  # as to an accelerator
    assert psp().device.type == "meta"


def test_l1_penalty_and_none() -> None:
    psp = PSP(network(), PSPConfig("channel", l1=0.5, spread=0.3), layers=["2", "4"])
    total = sum(a.detach().abs().sum().item() for a in psp.parameters())
    penalty = psp()
    assert penalty.item() == pytest.approx(0.5 * total)
    torch.autograd.backward(penalty)
    torch.testing.assert_close(psp.parameters()[0].grad, 0.5 * psp.parameters()[0].detach().sign())
    assert PSP(network(), layers=["2"])().item() == 0


def test_default_layers_of_a_resnet() -> None:
    """All 3 x 3 convolutions but the first, which reads the image."""
    model = resnet20()
    graph = qp.trace(model, torch.zeros(1, 3, 32, 32))
    psp = PSP(model, graph=graph)
    convolutions = [n for n, m in model.named_modules() if isinstance(m, nn.Conv2d)]
    assert list(psp.scales) == convolutions[1:]


def test_bad_input() -> None:
    with pytest.raises(InvalidOptionError, match="structure='row'"):
        PSPConfig("row")  # type: ignore[arg-type]
    with pytest.raises(InvalidOptionError, match="threshold"):
        PSPConfig(threshold=-1)
    with pytest.raises(UnknownLayerError, match="'nowhere'"):
        PSP(network(), layers=["nowhere"])
    with pytest.raises(InvalidOptionError, match="give the layers"):
        PSP(network())
    model = network()
    PSP(model, layers=["2"])
    with pytest.raises(InvalidOptionError, match="parameterised already"):
        PSP(model, layers=["2"])
