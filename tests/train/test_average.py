"""The moving average of weights: its arithmetic by hand, batch norms included, and its way through a checkpoint."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from qcqp_prune.errors import InvalidOptionError
from qcqp_prune.graph.trace import trace
from qcqp_prune.train import SPR, Callback, FinetuneConfig, TrainingState, evaluate, finetune
from qcqp_prune.train.average import WeightAverage

CONFIG = FinetuneConfig(lr=0.2, schedule="constant", ema=0.75, device="cpu")


def batches(seed: int = 3) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(16, 5, generator=generator) + k, torch.randint(0, 3, (16,), generator=generator))
        for k in range(4)
    ]


def net(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Dropout(0.3), nn.Linear(6, 3))


class Watch(Callback):
    """The network's own tensors after each step, as double."""

    def __init__(self, model: nn.Module) -> None:
        self.states = [{n: v.detach().double().clone() for n, v in model.state_dict().items()}]

    def on_batch_end(self, state: TrainingState, /) -> None:
        self.states.append({n: v.detach().double().clone() for n, v in state.model.state_dict().items()})


class Kill(Callback):
    """Ends the run in the third batch of the second epoch."""

    def on_batch_end(self, state: TrainingState, /) -> None:
        if (state.epoch, state.batch) == (1, 2):
            raise KeyboardInterrupt


def same(a: nn.Module, b: nn.Module) -> bool:
    first, second = a.state_dict(), b.state_dict()
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_the_network_ends_with_the_average_of_weights_and_statistics() -> None:
    model = net()
    watch = Watch(model)
    finetune(model, batches(), epochs=8, config=CONFIG, callbacks=[watch])
    mean = watch.states[0]
    for step, state in enumerate(watch.states[1:], 1):
        decay = min(0.75, step / (step + 9))
        mean = {name: decay * mean[name] + (1 - decay) * state[name] for name in mean}
    assert len(watch.states) == 33
    for name, value in model.state_dict().items():
        expected = torch.tensor(32.0) if name == "1.num_batches_tracked" else mean[name]
        torch.testing.assert_close(value.double(), expected.double(), rtol=1e-5, atol=1e-6)
    assert not torch.allclose(
        model[4].weight.double(), watch.states[-1]["4.weight"], atol=1e-4
    )  # not the last ones
    assert not torch.allclose(model[1].running_mean.double(), watch.states[-1]["1.running_mean"], atol=1e-4)


def test_training_itself_is_the_same_with_an_average_and_without() -> None:
    plain, averaged = net(), net()
    watch = Watch(averaged)
    finetune(plain, batches(), epochs=2, config=FinetuneConfig(lr=0.2, schedule="constant", device="cpu"))
    finetune(averaged, batches(), epochs=2, config=CONFIG, validation=batches(4), callbacks=[watch])
    assert all(
        torch.equal(value.double(), watch.states[-1][name]) for name, value in plain.state_dict().items()
    )


def test_validation_is_of_the_average() -> None:
    model = net()
    history = finetune(model, batches(), epochs=2, config=CONFIG, validation=batches(4))
    assert history.epochs[-1].validation_loss == evaluate(model, batches(4), device="cpu").loss


def test_what_is_frozen_is_not_touched() -> None:
    model = net()
    for module in (model[0], model[1]):
        module.requires_grad_(False)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    finetune(model, batches(), epochs=2, config=CONFIG)
    assert all(torch.equal(before[n], v) for n, v in model.state_dict().items() if n[0] in "01")
    assert not torch.equal(before["4.weight"], model[4].weight)


def test_killed_and_resumed_equals_uninterrupted(tmp_path: Path) -> None:
    whole, resumed, loaded = net(), net(1), net(2)
    finetune(whole, batches(), epochs=3, config=CONFIG)
    with pytest.raises(KeyboardInterrupt):
        finetune(net(), batches(), epochs=3, config=CONFIG, checkpoint=tmp_path / "c", callbacks=[Kill()])
    history = finetune(resumed, batches(), epochs=3, config=CONFIG, checkpoint=tmp_path / "c")
    assert history.resumed_at == 1
    assert same(whole, resumed)
    finetune(loaded, [], epochs=3, config=CONFIG, checkpoint=tmp_path / "c")  # complete: an average as well
    assert same(whole, loaded)


def test_small_steps_are_not_lost_in_half_precision() -> None:
    model = nn.Linear(1, 1, bias=False).to(torch.bfloat16)
    nn.init.ones_(model.weight)
    average = WeightAverage(model, 0.99)
    for _ in range(1000):
        average.update()
    nn.init.constant_(model.weight, 2.0)
    for _ in range(300):
        average.update()
    average.put_in()
    assert model.weight.item() == pytest.approx(2 - 0.99**300, abs=0.01)


def test_an_average_of_what_is_to_vanish_is_refused() -> None:
    model = net()
    graph = trace(model, torch.zeros(2, 5))
    with pytest.raises(InvalidOptionError, match="nothing has vanished"):
        finetune(model, batches(), epochs=1, config=CONFIG, regularizer=SPR(model, graph))
