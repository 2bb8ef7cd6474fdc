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
from qcqp_prune.train.budget import BudgetController
from qcqp_prune.train.psp import PSP, PSPConfig
from qcqp_prune.train.spr import SPR, SPRConfig


def chain() -> tuple[nn.Sequential, qp.ChannelGraph]:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(3, 4, bias=False), nn.Linear(4, 5, bias=False), nn.Linear(5, 2, bias=False)
    )
    return model, qp.trace(model, torch.zeros(1, 3))


def test_prices_are_marginal_costs_at_the_relaxed_counts() -> None:
    """By hand: MACs 3a + ab + 2b of relaxed counts a and b; both groups' entities are rows of one layer each."""
    model, graph = chain()
    spr = SPR(model, graph, SPRConfig(alpha=0.3), bounds="fixed")
    control = BudgetController(spr, graph, {"macs": "25%"}, rate=0.1, damping=2.0, every=1)
    y = spr.indicators()
    a, b = y[:4].sum(), y[4:].sum()
    used = 3 * a + a * b + 2 * b
    limit = (12 + 20 + 10) // 4
    assert control.trace[0].used["macs"] == pytest.approx(used / limit)
    over = used / limit - 1
    assert over > 0
    expected = 2.0 * over * np.asarray([3 + b] * 4 + [a + 2] * 5) / limit
    np.testing.assert_allclose(spr.state_dict()["prices"].numpy(), expected, rtol=1e-5)
    control.after_step()
    control.after_step()
    assert control.trace[-1].multipliers["macs"] == pytest.approx(0.1 * over * 2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1e-3)
    for _ in range(3):
        control.after_step()
    assert control.trace[-1].multipliers["macs"] < control.trace[-3].multipliers["macs"]
    assert control.trace[-1].violation == 0


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


class Kill(Callback):
    def on_epoch_start(self, state: TrainingState, /) -> None:
        if state.epoch == 2:
            raise KeyboardInterrupt


def digits_run(seed: int = 0) -> tuple[DigitsNet, BudgetController]:
    torch.manual_seed(seed)
    model = DigitsNet()
    graph = qp.trace(model, torch.zeros(1, 1, 8, 8))
    spr = SPR(model, graph, SPRConfig(alpha=0.3))
    return model, BudgetController(spr, graph, {"params": "50%"}, every=4, rate=0.2)


def test_a_killed_run_with_a_budget_resumes_bit_for_bit(tmp_path: Path) -> None:
    loader = digits().train.select(range(400)).loader(64, shuffle=True, seed=1)
    config = FinetuneConfig(lr=0.05, schedule="constant", device="cpu")
    whole, control = digits_run()
    history = finetune(whole, loader, epochs=4, config=config, regularizer=control)
    assert all(r.penalty is not None and r.penalty > 0 for r in history.epochs[:1])
    assert control.trace[-1].used["params"] < control.trace[0].used["params"]
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
    assert control.presence().tolist() == [1.0] * graph.unit_count
    penalty = control()
    torch.autograd.backward(penalty)
    gradient = psp.scales["2"].alpha.grad
    assert gradient is not None
    assert (gradient > 0).all()
    columns = PSP(nn.Sequential(nn.Conv2d(2, 3, 3)), layers=["0"])
    with pytest.raises(InvalidOptionError, match='structure="channel"'):
        BudgetController(columns, graph, {"macs": "40%"})


def test_bad_budgets_are_refused_before_training() -> None:
    model, graph = chain()
    spr = SPR(model, graph)
    with pytest.raises(InfeasibleError):
        BudgetController(spr, graph, {"macs": "1%"})
    with pytest.raises(InvalidOptionError, match="every"):
        BudgetController(spr, graph, {"macs": "50%"}, every=0)
