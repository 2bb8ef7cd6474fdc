"""What is learned from a teacher: the loss by hand, and a teacher that nothing happens to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from qcqp_prune.errors import InvalidOptionError, TrainingError
from qcqp_prune.train import Callback, FinetuneConfig, TrainingState, finetune
from qcqp_prune.train.distill import distillation_loss

ONE_STEP = {
    "lr": 1.0,
    "momentum": 0.0,
    "nesterov": False,
    "weight_decay": 0.0,
    "schedule": "constant",
    "device": "cpu",
}


def batches(count: int = 3) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(3)
    return [
        (torch.randn(8, 5, generator=generator), torch.randint(0, 3, (8,), generator=generator))
        for _ in range(count)
    ]


def net(seed: int = 0, classes: int = 3) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Linear(5, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Dropout(0.5), nn.Linear(6, classes)
    )


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max(1, keepdims=True))
    return e / e.sum(1, keepdims=True)


@pytest.mark.parametrize("smoothing", [0.0, 0.3])
@pytest.mark.parametrize("weight", [0.0, 0.7])
def test_the_step_is_that_of_the_formula(weight: float, smoothing: float) -> None:
    """d/dz of (1 - w) CE + w T^2 KL(teacher || student) is (1 - w) (p - y) + w T (p_T - t_T).

    Smoothed labels y are (1 - s) of the class and s / 3 of each class.
    """
    temperature = 3.0
    torch.manual_seed(0)
    student, teacher = nn.Linear(5, 3, bias=False).double(), nn.Linear(5, 3, bias=False).double()
    x, y = batches(1)[0]
    start, taught = (m.weight.detach().numpy().copy() for m in (student, teacher))
    inputs = x.double().numpy()
    z, v = inputs @ start.T, inputs @ taught.T
    labels = (1 - smoothing) * np.eye(3)[y.numpy()] + smoothing / 3
    slope = (1 - weight) * (softmax(z) - labels)
    slope += weight * temperature * (softmax(z / temperature) - softmax(v / temperature))
    expected = start - slope.T @ inputs / len(inputs)
    config = FinetuneConfig(
        distillation=weight, temperature=temperature, label_smoothing=smoothing, **ONE_STEP
    )
    finetune(student, [(x.double(), y)], epochs=1, config=config, teacher=teacher if weight else None)
    np.testing.assert_allclose(
        student.weight.detach().numpy(), expected, rtol=0, atol=1e-6
    )  # losses are float32


def test_the_loss_is_that_of_the_formula_at_every_position() -> None:
    torch.manual_seed(0)
    z, v = torch.randn(2, 4, 3, dtype=torch.float64), torch.randn(2, 4, 3, dtype=torch.float64)
    rows = [(n, k) for n in range(2) for k in range(3)]
    pairs = [[softmax(x[n, :, k][None].numpy() / 2) for x in (v, z)] for n, k in rows]
    expected = 4 * np.mean([(t * (np.log(t) - np.log(s))).sum() for t, s in pairs])
    assert distillation_loss(z, v, 2.0).item() == pytest.approx(expected, rel=1e-12)


def test_with_weight_one_the_targets_do_not_matter() -> None:
    first, second = net(), net()
    for model, shift in ((first, 0), (second, 1)):
        data = [(x, (y + shift) % 3) for x, y in batches()]
        finetune(model, data, epochs=1, config=FinetuneConfig(distillation=1.0), teacher=net(1))
    assert torch.equal(first[4].weight, second[4].weight)
    assert not torch.equal(first[4].weight, net()[4].weight)


def test_nothing_happens_to_the_teacher() -> None:
    teacher = net(1).train()
    teacher[1].eval()
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    seen: list[tuple[bool, bool]] = []
    teacher[3].register_forward_hook(
        lambda module, _inputs, out: seen.append((module.training, out.requires_grad))
    )
    finetune(net(), batches(), epochs=2, config=FinetuneConfig(distillation=0.5), teacher=teacher)
    assert seen == [(False, False)] * 6
    assert all(torch.equal(before[name], value) for name, value in teacher.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in teacher.parameters())
    assert [m.training for m in teacher] == [True, False, True, True, True]


def test_the_modes_of_the_teacher_come_back_after_an_error() -> None:
    teacher = net(1, classes=4).train()
    with pytest.raises(TrainingError, match=r"teacher gives outputs of shape \(8, 4\), the network \(8, 3\)"):
        finetune(net(), batches(), epochs=1, config=FinetuneConfig(distillation=0.5), teacher=teacher)
    assert all(m.training for m in teacher.modules())


@pytest.mark.parametrize(
    ("config", "teacher", "message"),
    [
        (FinetuneConfig(distillation=0.5), None, "no teacher: give one"),
        (FinetuneConfig(), net(1), "does nothing"),
    ],
)
def test_one_without_the_other_is_refused(config: FinetuneConfig, teacher: Any, message: str) -> None:
    with pytest.raises(InvalidOptionError, match=message):
        finetune(net(), batches(), epochs=1, config=config, teacher=teacher)


def test_a_network_is_not_its_own_teacher() -> None:
    model = net()
    with pytest.raises(InvalidOptionError, match="the network that is trained"):
        finetune(model, batches(), epochs=1, config=FinetuneConfig(distillation=0.5), teacher=model)


def test_a_run_goes_on_with_its_own_teacher_only(tmp_path: Path) -> None:
    class Kill(Callback):
        def on_batch_end(self, state: TrainingState, /) -> None:
            if (state.epoch, state.batch) == (1, 1):
                raise KeyboardInterrupt

    config = FinetuneConfig(distillation=0.5, device="cpu")
    whole, again = net(), net(5)
    finetune(whole, batches(), epochs=2, config=config, teacher=net(1))
    with pytest.raises(KeyboardInterrupt):
        finetune(
            net(),
            batches(),
            epochs=2,
            config=config,
            teacher=net(1),
            checkpoint=tmp_path / "c",
            callbacks=[Kill()],
        )
    with pytest.raises(TrainingError, match="the teacher is another one"):
        finetune(net(), batches(), epochs=2, config=config, teacher=net(2), checkpoint=tmp_path / "c")
    finetune(again, batches(), epochs=2, config=config, teacher=net(1), checkpoint=tmp_path / "c")
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), again.parameters(), strict=True))
