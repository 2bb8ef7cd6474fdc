"""Budgets as targets of training: multipliers rise while a budget is exceeded, prices are marginal costs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import qcqp_prune as qp
from qcqp_prune.data import digits
from qcqp_prune.errors import InfeasibleError, InvalidOptionError, TrainingError
from qcqp_prune.models import DigitsNet
from qcqp_prune.train import Callback, FinetuneConfig, TrainingState, finetune
from qcqp_prune.train.budget import BudgetController, Control
from qcqp_prune.train.entities import by_unit, of_entities
from qcqp_prune.train.psp import PSP, PSPConfig
from qcqp_prune.train.spr import SPR, SPRConfig


def chain() -> tuple[nn.Sequential, qp.ChannelGraph]:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(3, 4, bias=False), nn.Linear(4, 5, bias=False), nn.Linear(5, 2, bias=False)
    )
    return model, qp.trace(model, torch.zeros(1, 3))


def test_prices_are_marginal_costs_of_what_is_to_go() -> None:
    """By hand: MACs 3a + ab + 2b of relaxed counts a and b; both groups' entities are rows of one layer each."""
    model, graph = chain()
    spr = SPR(model, graph, SPRConfig(alpha=0.3), bounds="fixed")
    control = BudgetController(spr, graph, {"macs": "25%"}, Control(rate=0.1, damping=2.0, every=1))
    selected = control.state_dict()["selected"].numpy()[spr.unit_of]
    kept_a, kept_b = selected[:4].sum(), selected[4:].sum()
    limit = (12 + 20 + 10) // 4
    assert 0 < 3 * kept_a + kept_a * kept_b + 2 * kept_b <= limit
    norms = [model[k].weight.detach().norm(dim=1).numpy() for k in (0, 1)]
    beside = [n / n[chosen].max() for n, chosen in zip(norms, (selected[:4], selected[4:]), strict=True)]
    left = np.where(selected, 1.0, np.sqrt(np.minimum(1.0, np.concatenate(beside))))
    a, b = left[:4].sum(), left[4:].sum()
    used = 3 * a + a * b + 2 * b
    assert control.trace[0].used["macs"] == pytest.approx(used / limit)
    over = (used - (3 * kept_a + kept_a * kept_b + 2 * kept_b)) / limit
    assert over > 0
    expected = 2.0 * over * np.asarray([3 + b] * 4 + [a + 2] * 5) / limit * ~selected
    np.testing.assert_allclose(spr.state_dict()["prices"].numpy(), expected, rtol=1e-5)
    control.after_step()
    control.after_step()
    first = 0.1 * over
    assert control.trace[-1].multipliers["macs"] == pytest.approx(first + 0.1 * over * (1 + first))


def test_weights_that_all_shrink_meet_no_budget() -> None:
    """A norm would undo it. What counts is what is left beside the largest; where that returns, the price falls."""
    model, graph = chain()
    spr = SPR(model, graph, SPRConfig(alpha=0.3), bounds="fixed")
    control = BudgetController(spr, graph, {"macs": "25%"}, Control(every=1))
    selected = control.state_dict()["selected"][spr.unit_of]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1e-3)
    control.after_step()
    assert control.trace[-1].used["macs"] == pytest.approx(control.trace[0].used["macs"], rel=1e-5)
    whole = [model[0].weight.detach().clone(), model[1].weight.detach().clone()]
    with torch.no_grad():
        model[0].weight[~selected[:4]] = 0.0
        model[1].weight[~selected[4:]] = 0.0
    control.after_step()
    assert control.trace[-1].violation == 0
    before = control.trace[-1].multipliers["macs"]
    assert 0 < before <= control.trace[-2].multipliers["macs"]
    with torch.no_grad():
        model[0].weight.copy_(whole[0])
        model[1].weight.copy_(whole[1])
    control.after_step()
    assert control.trace[-1].violation > 0
    assert control.trace[-1].multipliers["macs"] == pytest.approx(before / 2)


def test_entities_of_one_unit_share_its_price() -> None:
    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.a(x)
            return self.c(y + self.b(y))  # type: ignore[no-any-return]

    model = Residual()
    graph = qp.trace(model, torch.zeros(1, 3))
    prices = {}
    for structure in ("filters", "units"):
        spr = SPR(model, graph, SPRConfig(structure=structure), bounds="fixed")  # type: ignore[arg-type]
        spr_prices = BudgetController(spr, graph, {"params": "30%"}).regularizer.state_dict()["prices"]  # type: ignore[attr-defined]
        prices[structure] = spr_prices
    assert len(prices["filters"]) == 8
    assert len(prices["units"]) == 4
    torch.testing.assert_close(prices["filters"][:4], prices["filters"][4:])
    for entity in prices.values():
        assert entity.max() > 0


def test_channels_that_only_links_speak_of_vanish_with_their_parts() -> None:
    """With free sharing nothing writes a whole: what reads it is paid for by its parts, and goes with them."""
    torch.manual_seed(0)
    model = DigitsNet()
    graph = qp.trace(model, torch.zeros(1, 1, 8, 8), sharing="free")
    spr = SPR(model, graph, SPRConfig(structure="units"))
    wholes, parts = graph.links.wholes, graph.links.parts
    assert not np.isin(wholes, spr.unit_of).any()

    def scaled(units: np.ndarray, factor: float) -> None:  # type: ignore[type-arg]
        with torch.no_grad():
            for block, weight in zip(spr.entities.blocks, spr._tensors, strict=True):
                rows = spr.entities.units[block.first : block.first + block.rows]
                weight[np.isin(rows, units)] *= factor

    spr()  # bounds before anything is small
    scaled(parts[np.isin(wholes, np.unique(wholes)[::3])], 1e-3)
    control = BudgetController(spr, graph, {"macs": "50%"}, Control(every=1))
    selected = control.state_dict()["selected"].numpy()
    assert not selected[wholes].all()
    scaled(np.flatnonzero(~selected), 0.0)
    control.after_step()
    presence = control.presence()
    assert not presence[~selected].any()
    assert control.trace[-1].violation == 0


def test_a_group_that_goes_with_its_block_vanishes() -> None:
    """Its largest unit vanishes too, so that it is no measure of the others."""
    torch.manual_seed(0)
    model = DigitsNet()
    graph = qp.trace(model, torch.zeros(1, 1, 8, 8), blocks=True)
    spr = SPR(model, graph, SPRConfig(structure="units"))
    control = BudgetController(spr, graph, {"macs": "10%"}, Control(every=1))
    units = graph.units([g.id for g in graph.groups].index("block1.conv1"))
    assert not control.state_dict()["selected"][units].any()
    assert control.presence()[units].max() == 1
    with torch.no_grad():
        for parameter in (*model.block1.conv1.parameters(), *model.block1.bn1.parameters()):
            parameter *= 1e-3
    assert (control.presence()[units] < 0.04).all()  # the root of a thousandth


def test_parts_pay_for_their_whole() -> None:
    class Add(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = (nn.Linear(n, k, bias=False) for n, k in ((3, 4), (3, 4), (4, 7)))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.c(self.a(x) + self.b(x))  # type: ignore[no-any-return]

    graph = qp.trace(Add(), torch.zeros(1, 3), sharing="free")
    assert len(graph.links) == 8
    wholes = np.unique(graph.links.wholes)
    unit_of = np.unique(graph.links.parts)
    costs = np.full(graph.unit_count, 3.0)
    costs[wholes] = 7.0
    assert of_entities(graph, unit_of, costs).tolist() == [3.0 + 7.0 / 2] * 8
    values = np.where(unit_of == graph.links.parts[0], 0.75, 0.25)
    found = by_unit(graph, unit_of, values)
    assert sorted(found[wholes].tolist()) == [0.25, 0.25, 0.25, 0.75]
    read = by_unit(graph, wholes, [0.1, 0.2, 0.3, 0.4])  # the other way round, as PSP's channels are
    np.testing.assert_array_equal(read[graph.links.parts], read[graph.links.wholes])
    assert sorted(read[unit_of].tolist()) == [0.1, 0.1, 0.2, 0.2, 0.3, 0.3, 0.4, 0.4]


class Kill(Callback):
    def on_epoch_start(self, state: TrainingState, /) -> None:
        if state.epoch == 2:
            raise KeyboardInterrupt


def digits_run(seed: int = 0) -> tuple[DigitsNet, BudgetController]:
    torch.manual_seed(seed)
    model = DigitsNet()
    graph = qp.trace(model, torch.zeros(1, 1, 8, 8))
    spr = SPR(model, graph, SPRConfig(alpha=0.3, structure="units"))
    return model, BudgetController(spr, graph, {"params": "50%"}, Control(every=2, rate=0.5, reselect=3))


def test_a_killed_run_with_a_budget_resumes_bit_for_bit(tmp_path: Path) -> None:
    loader = digits().train.select(range(400)).loader(64, shuffle=True, seed=1)
    config = FinetuneConfig(lr=0.05, schedule="constant", device="cpu")
    whole, control = digits_run()
    history = finetune(whole, loader, epochs=4, config=config, regularizer=control)
    assert all(r.penalty is not None and r.penalty > 0 for r in history.epochs[:1])
    assert control.trace[-1].multipliers["params"] > 0
    first, first_control = digits_run()
    path = tmp_path / "c"
    with pytest.raises(KeyboardInterrupt):
        finetune(
            first,
            loader,
            epochs=4,
            config=config,
            regularizer=first_control,
            checkpoint=path,
            callbacks=[Kill()],
        )
    second, second_control = digits_run(seed=5)
    resumed = finetune(second, loader, epochs=4, config=config, regularizer=second_control, checkpoint=path)
    assert resumed.resumed_at == 2
    for name, value in whole.state_dict().items():
        assert torch.equal(value, second.state_dict()[name]), name
    with pytest.raises(TrainingError, match="regularizer"):
        finetune(whole, loader, epochs=4, config=config, checkpoint=path)


def test_channels_of_psp_can_be_driven_and_columns_cannot() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 6, 3), nn.ReLU(), nn.Conv2d(6, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 1))
    graph = qp.trace(model, torch.zeros(1, 2, 8, 8))
    psp = PSP(model, PSPConfig("channel", spread=None), layers=["2", "4"], graph=graph)
    control = BudgetController(psp, graph, {"macs": "40%"})
    assert control.presence().tolist() == [1.0] * graph.unit_count  # nothing vanished yet
    penalty = control()
    torch.autograd.backward(penalty)
    gradient = psp.scales["2"].alpha.grad
    assert gradient is not None
    charged = ~control.state_dict()["selected"].numpy()[psp.unit_of]
    assert charged.any()
    np.testing.assert_array_equal(gradient.flatten().numpy() > 0, charged[:6])
    columns = PSP(nn.Sequential(nn.Conv2d(2, 3, 3)), layers=["0"])
    with pytest.raises(InvalidOptionError, match='structure="channel"'):
        BudgetController(columns, graph, {"macs": "40%"})


def test_bad_budgets_are_refused_before_training() -> None:
    model, graph = chain()
    spr = SPR(model, graph)
    with pytest.raises(InfeasibleError):
        BudgetController(spr, graph, {"macs": "1%"})
    with pytest.raises(InvalidOptionError, match="every"):
        BudgetController(spr, graph, {"macs": "50%"}, Control(every=0))
