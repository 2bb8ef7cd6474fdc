"""Structured perspective regularisation: the closed forms against minimisation, gradients against differences."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.optimize import minimize_scalar
from torch import nn

import qcqp_prune as qp
from qcqp_prune.errors import InvalidOptionError, MaskMismatchError, UnknownLayerError
from qcqp_prune.models import resnet20
from qcqp_prune.train.perspective import Variant, perspective
from qcqp_prune.train.spr import SPR, SPRConfig

VARIANTS: tuple[Variant, ...] = ("exact", "paper", "authors")


def two_layers(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Conv2d(6, 4, 3),
        nn.Flatten(),
        nn.Linear(64, 5),
    ).double()


def traced(model: nn.Module) -> qp.ChannelGraph:
    return qp.trace(model, torch.zeros(1, 3, 6, 6, dtype=torch.float64))


def double(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_exact_is_the_minimum_over_the_indicator() -> None:
    """20,000 entities: ``z`` is the least of ``a n^2/y + (1-a) y`` over ``y`` in ``[t, 1]``, ``y~`` attains it."""
    rng = np.random.default_rng(0)
    for alpha in rng.random(40).tolist():
        reach, norm = rng.random(500) ** 2, 10 ** rng.uniform(-3, 1, 500)
        found = perspective(torch.from_numpy(norm), torch.from_numpy(reach), alpha)
        # The function is convex in y: golden sections, all entities at once, in extended precision.
        a, b = reach.astype(np.longdouble), np.ones(500, np.longdouble)
        square = norm.astype(np.longdouble) ** 2

        def value(at: Any, alpha: float = alpha, square: Any = square) -> Any:
            return alpha * square / at + (1 - alpha) * at

        golden = (np.sqrt(np.longdouble(5)) - 1) / 2
        for _ in range(90):
            left, right = b - golden * (b - a), a + golden * (b - a)
            smaller = value(left) < value(right)
            a, b = np.where(smaller, a, left), np.where(smaller, right, b)
        least = np.minimum(np.minimum(value(a), value(b)), np.minimum(value(reach), value(np.ones(500))))
        np.testing.assert_allclose(found.z.numpy(), least.astype(np.float64), rtol=1e-10)
        np.testing.assert_allclose(value(found.y.numpy()).astype(np.float64), found.z.numpy(), rtol=1e-10)


@pytest.mark.parametrize(("norm", "reach"), [(5.0, 0.2), (0.5, 0.2), (0.1, 0.8)])
def test_minimisation_by_scipy_agrees_in_each_case(norm: float, reach: float) -> None:
    best = minimize_scalar(
        lambda y: 0.3 * norm**2 / y + 0.7 * y, bounds=(reach, 1.0), method="bounded", options={"xatol": 1e-12}
    )
    assert perspective(double(norm), double(reach), 0.3).z.item() == pytest.approx(best.fun, rel=1e-7)


@pytest.mark.parametrize("variant", VARIANTS)
def test_beyond_its_bound_an_entity_costs_a_ridge(variant: Variant) -> None:
    found = perspective(double(0.1, 0.1), double(1.0, 1.5), 0.3, variant)
    a = 0.3 if variant == "exact" else 1.0
    assert found.z.tolist() == pytest.approx([a * 0.01 + 0.7] * 2, rel=1e-14)
    assert found.y.tolist() == [1.0, 1.0]


@pytest.mark.parametrize("variant", VARIANTS)
def test_printed_cases(variant: Variant) -> None:
    """By hand, alpha 0.2, so ``s = n / 2``: ridge at n = 4, middle at n = 1, last at n = 0.2 with t = 0.5."""
    z = perspective(double(4.0, 1.0, 0.2, 0.0), double(0.5, 0.25, 0.5, 0.0), 0.2, variant)
    a = 0.2 if variant == "exact" else 1.0
    middle = {"exact": 2 * math.sqrt(0.16), "paper": 1 / 0.5 + 0.8 * 0.5, "authors": 0.5 * 1.2}[variant]
    assert z.z.tolist() == pytest.approx([a * 16 + 0.8, middle, a * 0.04 / 0.5 + 0.8 * 0.5, 0.0], rel=1e-14)
    assert z.y.tolist() == pytest.approx([1.0, 0.5, 0.5, 0.0], rel=1e-14)


def test_cases_meet() -> None:
    """``exact`` and ``paper`` are continuous where s = 1 and s = t; the authors' middle case jumps."""
    step, alpha = 1e-9, 0.2
    for at, reach in ((2.0, 0.3), (0.6, 0.3)):
        norms = double(at - step, at + step)
        for variant in VARIANTS:
            low, high = perspective(norms, torch.full_like(norms, reach), alpha, variant).z.tolist()
            assert (abs(low - high) < 1e-7) == (variant != "authors")


@pytest.mark.parametrize("structure", ["filters", "units"])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("alpha", [0.0, 0.01, 0.3, 0.9, 1.0])
def test_gradient_is_the_derivative(variant: Variant, alpha: float, structure: str) -> None:
    model = two_layers()
    spr = SPR(model, traced(model), SPRConfig(1.7, alpha, variant, structure, clamp=False), bounds="fixed")  # type: ignore[arg-type]
    with torch.no_grad():
        model[0].weight[1] *= 0.01
        model[3].weight[:, 2] *= 10
    torch.autograd.backward(spr())
    rng = np.random.default_rng(1)
    for layer in (model[0], model[3]):
        weight, gradient = layer.weight, layer.weight.grad
        assert gradient is not None
        for flat in rng.choice(weight.numel(), 6, replace=False):
            entry, step = np.unravel_index(flat, weight.shape), 1e-7
            ends = []
            for sign in (1, -1):
                with torch.no_grad():
                    weight[entry] += sign * step
                    ends.append(spr().item())
                    weight[entry] -= sign * step
            assert gradient[entry].item() == pytest.approx((ends[0] - ends[1]) / (2 * step), abs=2e-6)


def test_every_filter_counts_by_its_weights() -> None:
    """The value, entity by entity in plain loops; frozen rows (the head's classes, the output) are no entities."""
    model = two_layers()
    graph = traced(model)
    bounds = {"0": 0.4, "3": 0.3}
    spr = SPR(model, graph, SPRConfig(0.5, 0.3, clamp=False), bounds=bounds)
    total, weights = 0.0, 0.0
    for layer, limit in ((model[0], 0.4), (model[3], 0.3)):
        for row in layer.weight.detach().flatten(1):
            norm, reach = row.norm().reshape(1), row.abs().max().reshape(1) / limit
            total += row.numel() * perspective(norm, reach, 0.3).z.item()
            weights += row.numel()
    assert spr().item() == pytest.approx(0.5 * total / weights, rel=1e-12)
    assert spr.entities.count == 10


def test_a_unit_that_two_layers_write_is_one_entity() -> None:
    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 4, 1, bias=False), nn.Conv2d(4, 4, 1, bias=False)
            self.head = nn.Conv2d(4, 2, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.a(x)
            return self.head(y + self.b(y))

    torch.manual_seed(0)
    model = Residual().double()
    graph = traced(model)
    spr = SPR(model, graph, SPRConfig(1.0, 0.3, structure="units", clamp=False), bounds={"a": 2.0, "b": 3.0})
    assert spr.entities.count == 4
    expected = 0.0
    for k in range(4):
        a, b = model.a.weight.detach()[k].flatten(), model.b.weight.detach()[k].flatten()
        norm = torch.cat([a, b]).norm().reshape(1)
        reach = torch.maximum(a.abs().max() / 2.0, b.abs().max() / 3.0).reshape(1)
        expected += perspective(norm, reach, 0.3).z.item() / 4
    assert spr().item() == pytest.approx(expected, rel=1e-12)


def test_a_unit_owns_its_biases_and_norms() -> None:
    """A batch norm would undo what its filter loses; the value by plain loops."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 1)).double()
    with torch.no_grad():
        model[1].weight.uniform_(0.5, 2)
        model[1].bias.normal_()
    spr = SPR(model, traced(model), SPRConfig(1.0, 0.3, structure="units", clamp=False), bounds="fixed")
    assert spr.entities.count == 4
    owned = [model[0].weight, model[0].bias, model[1].weight, model[1].bias]
    expected = 0.0
    for k in range(4):
        parts = [p.detach()[k].flatten() for p in owned]
        reach = torch.stack(
            [part.abs().max() / p.detach().abs().max() for part, p in zip(parts, owned, strict=True)]
        ).max()
        expected += perspective(torch.cat(parts).norm().reshape(1), reach.reshape(1), 0.3).z.item() / 4
    assert spr().item() == pytest.approx(expected, rel=1e-12)
    assert SPR(model, traced(model), SPRConfig(1.0, 0.3)).entities.blocks[-1].weight == "0.weight"


def test_subgradient_at_zero_and_at_ties() -> None:
    model = two_layers()
    spr = SPR(model, traced(model), SPRConfig(1.0, 0.3, clamp=False), bounds="fixed")
    with torch.no_grad():
        model[0].weight[2] = 0.0
        model[0].weight[3] = 1e-3  # all entries tie; the last case
    torch.autograd.backward(spr())
    gradient = model[0].weight.grad
    assert gradient is not None
    assert torch.isfinite(gradient).all()
    assert (gradient[2] == 0).all()
    # A direction of equal change moves norm and largest entry alike, so its derivative is that of one variable.
    direction = gradient[3].sum().item()
    step, ends = 1e-8, []
    for sign in (1, -1):
        with torch.no_grad():
            model[0].weight[3] += sign * step
            ends.append(spr().item())
            model[0].weight[3] -= sign * step
    assert direction == pytest.approx((ends[0] - ends[1]) / (2 * step), rel=1e-5)


def test_running_bounds_only_grow_and_given_ones_cut_weights() -> None:
    model = two_layers()
    graph = traced(model)
    running = SPR(model, graph)
    running()
    before = running.state_dict()["limit"]
    with torch.no_grad():
        model[0].weight *= 3
        model[3].weight *= 0.1
    running()
    after = running.state_dict()["limit"]
    assert after.tolist() == pytest.approx([3 * before[0].item(), before[1].item()])
    kept = model[0].weight.detach().clone()
    running.after_step()
    assert torch.equal(kept, model[0].weight)
    given = SPR(model, graph, bounds={"0": 0.05, "3": 9.0})
    given.after_step()
    assert model[0].weight.abs().max().item() == pytest.approx(0.05)
    model[0].weight.requires_grad_(False)
    SPR(model, graph, bounds={"0": 0.01, "3": 9.0}).after_step()
    assert model[0].weight.abs().max().item() == pytest.approx(0.05)  # frozen
    model[0].weight.requires_grad_(True)
    resumed = SPR(model, graph)
    resumed.load_state_dict(running.state_dict())
    assert torch.equal(resumed.state_dict()["limit"], after)


def test_penalties_that_differ_describe_themselves_differently() -> None:
    """A checkpoint goes by this: neither other layers nor other kinds of bounds go on from one another."""
    model = two_layers()
    graph = traced(model)
    told = [
        SPR(model, graph, **options).describe()  # type: ignore[arg-type]
        for options in ({}, {"layers": ["0"]}, {"layers": ["3"]}, {"bounds": "fixed"})
    ]
    assert all(a != b for k, a in enumerate(told) for b in told[:k])


def test_rule_that_prunes() -> None:
    """More than 99 % below 1e-4: a filter of 27 weights with one larger one stays, as the paper's rule says."""
    model = two_layers()
    graph = traced(model)
    spr = SPR(model, graph)
    with torch.no_grad():
        model[0].weight[0] = 5e-5
        model[0].weight[1] = 5e-5
        model[0].weight[1, 0, 0, 0] = 1.0
        model[3].weight.zero_()
    assert spr.zeros().tolist() == [True] + [False] * 5 + [True] * 4
    assert spr.masks().counts() == {
        g.id: (5 if g.width == 6 else 1) for g in graph.groups if g.width in (4, 6)
    } | {g.id: g.width for g in graph.groups if g.width not in (4, 6)}


def test_bad_input() -> None:
    model = two_layers()
    graph = traced(model)
    with pytest.raises(InvalidOptionError, match="alpha"):
        SPRConfig(alpha=1.5)
    with pytest.raises(InvalidOptionError, match="strength"):
        SPRConfig(strength=float("nan"))
    with pytest.raises(InvalidOptionError, match="variant='best'"):
        SPRConfig(variant="best")  # type: ignore[arg-type]
    with pytest.raises(InvalidOptionError, match="no columns of these layers"):
        SPR(model, graph, SPRConfig(structure="columns"))
    with pytest.raises(InvalidOptionError, match="bounds lack layer '3'"):
        SPR(model, graph, bounds={"0": 1.0})
    with pytest.raises(InvalidOptionError, match="give one for each of the 10 entities"):
        SPR(model, graph, weights=np.ones(3))
    with pytest.raises(UnknownLayerError, match="'nowhere'"):
        SPR(model, graph, layers=["nowhere"])
    with pytest.raises(MaskMismatchError, match="is no parameter of this model"):
        SPR(nn.Linear(2, 2), graph)


@pytest.mark.data
def test_first_value_of_the_published_runs(pretrained_root: Path) -> None:
    """Their log shows 0.247 for a fresh ResNet-20, lambda 0.2, alpha 0.3, M from a dense network; seeds differ."""
    torch.manual_seed(0)
    net = resnet20()
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight)
    dense = resnet20(pretrained=pretrained_root / "resnet20-12fca82f.th")
    graph = qp.trace(net, torch.zeros(1, 3, 32, 32))
    value = SPR(net, graph, SPRConfig(0.2, 0.3, "authors"), bounds=dense)().item()
    assert value == pytest.approx(0.247, abs=0.002)
