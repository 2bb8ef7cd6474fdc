"""Evaluation and batch-norm recalibration against hand computation."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from qcqp_prune.errors import InvalidOptionError, TrainingError
from qcqp_prune.train import evaluate, recalibrate_batch_norm
from qcqp_prune.train.batches import first_batch


def test_evaluation_by_hand() -> None:
    logits = torch.tensor([[2.0, 0.0], [0.0, 2.0], [2.0, 0.0]])
    loader = [(logits[:2], torch.tensor([0, 1])), (logits[2:], torch.tensor([1]))]
    result = evaluate(nn.Identity(), loader, device="cpu")
    assert result.samples == 3
    assert result.accuracy == pytest.approx(2 / 3)
    right, wrong = math.log(1 + math.exp(-2)), math.log(1 + math.exp(2))
    assert result.loss == pytest.approx((2 * right + wrong) / 3)  # not the mean of the batches' means


def test_evaluation_runs_in_eval_mode_and_restores_the_modes() -> None:
    model = nn.Sequential(nn.Dropout(0.99), nn.Identity())
    model[1].eval()
    x = torch.eye(4)
    assert evaluate(model, [(x, torch.arange(4))]).accuracy == 1.0
    assert [m.training for m in model.modules()] == [True, True, False]


def test_evaluation_of_nothing_is_refused() -> None:
    with pytest.raises(TrainingError, match="nothing to evaluate"):
        evaluate(nn.Identity(), [])


class Counted:
    """A loader that counts its passes, as those do whose order changes from one to the next."""

    epoch = 0

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        self.epoch += 1
        yield from batches()


def test_a_look_at_the_first_batch_leaves_no_trace() -> None:
    dataset = TensorDataset(torch.arange(64.0), torch.arange(64))
    own = DataLoader(dataset, 16, shuffle=True, generator=torch.Generator().manual_seed(3))
    counted = Counted()
    state, its_state = torch.get_rng_state(), own.generator.get_state()
    for loader in (own, DataLoader(dataset, 16, shuffle=True), counted):
        assert len(first_batch(loader)) == 1
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(own.generator.get_state(), its_state)
    assert counted.epoch == 0
    assert first_batch([]) == []


# batch norm


def batches(sizes: tuple[int, ...] = (6, 6, 6)) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [
        (torch.randn(n, 3, 4, 4, generator=generator) * 3 + 5, torch.zeros(n, dtype=torch.long))
        for n in sizes
    ]


def test_statistics_are_the_averages_over_batches() -> None:
    model = nn.Sequential(
        nn.Dropout(0.9), nn.BatchNorm2d(3, momentum=0.3), nn.BatchNorm2d(3, momentum=None)
    ).eval()
    model[1].running_mean.fill_(-100.0)  # what it knew is forgotten
    model[2].train()
    data = batches()
    result = recalibrate_batch_norm(model, data)
    # In numpy; the unbiased variance is what torch keeps.
    planes = [x.numpy().transpose(1, 0, 2, 3).reshape(3, -1).astype(np.float64) for x, _ in data]
    mean = np.mean([p.mean(axis=1) for p in planes], axis=0)
    var = np.mean([p.var(axis=1, ddof=1) for p in planes], axis=0)
    np.testing.assert_allclose(model[1].running_mean.numpy(), mean, rtol=1e-5)
    np.testing.assert_allclose(model[1].running_var.numpy(), var, rtol=1e-5)
    # The second reads what the first has normalised by each batch's own statistics.
    np.testing.assert_allclose(model[2].running_mean.numpy(), 0.0, atol=1e-6)
    assert result.layers == ("1", "2")
    assert (result.batches, result.samples) == (3, 18)
    assert (model[1].momentum, model[2].momentum) == (0.3, None)
    assert [m.training for m in model] == [False, False, True]


def test_the_number_of_batches_is_limited() -> None:
    model, short = nn.BatchNorm2d(3), nn.BatchNorm2d(3)
    assert recalibrate_batch_norm(model, batches(), batches=2).batches == 2
    recalibrate_batch_norm(short, batches()[:2])
    assert torch.equal(model.running_mean, short.running_mean)


def test_no_weight_changes() -> None:
    model = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))
    before = {name: p.clone() for name, p in model.named_parameters()}
    recalibrate_batch_norm(model, batches())
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())
    assert all(p.grad is None for p in model.parameters())


def test_a_model_without_batch_norm_is_left_alone_and_said_so() -> None:
    result = recalibrate_batch_norm(nn.Conv2d(3, 3, 1), batches())
    assert result.layers == ()
    assert result.batches == 0
    untracked = nn.BatchNorm2d(3, track_running_stats=False)
    assert recalibrate_batch_norm(untracked, batches()).layers == ()


@pytest.mark.parametrize("loader", [[], [(torch.zeros(2, 99, 4, 4), torch.zeros(2))]])
def test_statistics_come_back_after_an_error(loader: list[tuple[Tensor, Tensor]]) -> None:
    model = nn.BatchNorm2d(3, momentum=0.2)
    recalibrate_batch_norm(model, batches())
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises((TrainingError, RuntimeError)):
        recalibrate_batch_norm(model, loader)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert model.momentum == 0.2


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_statistics_that_are_not_finite_are_refused(value: float) -> None:
    """One broken sample in the second of three batches: averages would carry it on."""
    model = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.ReLU(), nn.BatchNorm2d(3))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    data = batches()
    data[1][0][2, 1, 0, 0] = value
    with pytest.raises(TrainingError, match=r"statistics of 1 .* Check the data"):
        recalibrate_batch_norm(model, data)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_zero_batches_are_refused() -> None:
    with pytest.raises(InvalidOptionError, match="batches is 0"):
        recalibrate_batch_norm(nn.BatchNorm2d(3), batches(), batches=0)
