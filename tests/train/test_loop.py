"""The loop: its arithmetic by hand, what it leaves as it was, and what it refuses."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qcqp_prune.errors import InvalidOptionError, TrainingError
from qcqp_prune.train import Callback, FinetuneConfig, TrainingState, evaluate, finetune
from qcqp_prune.train.batches import Loader


def blobs(count: int = 60, seed: int = 0) -> list[tuple[Tensor, Tensor]]:
    """Two well separated classes in the plane, in batches of 20."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 2
    points = torch.randn(count, 2, generator=generator) * 0.3 + (labels[:, None] * 4.0 - 2.0)
    return list(zip(points.split(20), labels.split(20), strict=True))


def small() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(2, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.2), nn.Linear(8, 2))


def test_separable_data_is_learned() -> None:
    history = finetune(small(), blobs(), epochs=20, config=FinetuneConfig(lr=0.1), validation=blobs(seed=1))
    last = history.epochs[-1]
    assert len(history.epochs) == 20
    assert [record.epoch for record in history.epochs] == list(range(1, 21))
    assert last.validation_accuracy == 1.0
    assert last.loss < history.epochs[0].loss
    assert history.resumed_at == 0


def numpy_sgd(
    weight: np.ndarray, x: np.ndarray, y: np.ndarray, config: FinetuneConfig, steps: int
) -> np.ndarray:
    """Nesterov's SGD with l2 on softmax regression, from the textbook formulas."""
    velocity = np.zeros_like(weight)
    for _ in range(steps):
        logits = x @ weight.T
        p = np.exp(logits - logits.max(axis=1, keepdims=True))
        p /= p.sum(axis=1, keepdims=True)
        grad = (p - np.eye(len(weight))[y]).T @ x / len(x) + config.weight_decay * weight
        velocity = config.momentum * velocity + grad
        step = grad + config.momentum * velocity if config.nesterov else velocity
        weight = weight - config.lr * step
    return weight


@pytest.mark.parametrize("nesterov", [True, False])
def test_steps_are_those_of_the_formula(nesterov: bool) -> None:
    config = FinetuneConfig(
        lr=0.3, momentum=0.8, weight_decay=0.1, nesterov=nesterov, schedule="constant", device="cpu"
    )
    model = nn.Linear(3, 4, bias=False).double()
    start = model.weight.detach().numpy().copy()
    x = torch.randn(7, 3, dtype=torch.float64)
    y = torch.tensor([0, 1, 2, 3, 0, 1, 2])
    finetune(model, [(x, y)], epochs=3, config=config)
    expected = numpy_sgd(start, x.numpy(), y.numpy(), config, 3)
    # The loss is taken in float32.
    np.testing.assert_allclose(model.weight.detach().numpy(), expected, rtol=0, atol=1e-6)


def test_gradient_is_clipped_to_its_norm() -> None:
    model = nn.Linear(2, 2, bias=False)
    before = model.weight.detach().clone()
    config = FinetuneConfig(
        lr=1.0, momentum=0.0, nesterov=False, weight_decay=0.0, schedule="constant", grad_clip=0.01
    )
    finetune(model, [(torch.tensor([[1e3, -1e3]]), torch.tensor([0]))], epochs=1, config=config)
    step = (model.weight.detach() - before).norm().item()
    assert step <= 0.01 * 1.001


def test_adamw_trains() -> None:
    config = FinetuneConfig(optimizer="adamw", lr=0.01, schedule="cosine", warmup=0.5)
    assert finetune(small(), blobs(), epochs=20, config=config).epochs[-1].accuracy > 0.9


def test_bfloat16_autocast_runs_the_forward_pass_in_it() -> None:
    seen: list[torch.dtype] = []
    model = small()
    model[0].register_forward_hook(lambda _m, _i, out: seen.append(out.dtype))
    finetune(model, blobs(), epochs=1, config=FinetuneConfig(bfloat16=True))
    assert set(seen) == {torch.bfloat16}
    assert model[0].weight.dtype == torch.float32


# what is left as it was


class Modes(nn.Module):
    """Two halves, to hold different modes."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2), nn.Dropout())

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x))  # type: ignore[no-any-return]


def test_every_module_gets_its_mode_back() -> None:
    model = Modes().eval()
    model.b[1].train()
    finetune(model, blobs(), epochs=1)
    assert [m.training for m in model.modules()] == [False, False, False, False, True]


def test_the_modes_come_back_after_an_error() -> None:
    model = small().eval()
    with pytest.raises(TrainingError):
        finetune(model, [(torch.full((4, 2), torch.nan), torch.zeros(4, dtype=torch.long))])
    assert not any(m.training for m in model.modules())


def test_the_callers_random_state_is_untouched() -> None:
    model = small()
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    finetune(model, blobs(), epochs=1)
    assert torch.equal(torch.rand(3), expected)


def test_frozen_parameters_and_frozen_batch_norms_stay() -> None:
    model = small()
    for module in (model[0], model[1]):
        module.requires_grad_(False)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    finetune(model, blobs(), epochs=2, config=FinetuneConfig(lr=0.5))
    after = model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before if name[0] in "01")
    assert not torch.equal(before["4.weight"], after["4.weight"])
    assert not model[0].weight.requires_grad


def test_batch_norms_that_train_move_their_statistics() -> None:
    model = small().eval()
    finetune(model, blobs(), epochs=1)
    assert model[1].num_batches_tracked == 3


# callbacks


class Log(Callback):
    """Writes down what is called, and checks that gradients are there."""

    def __init__(self, stop_after: int | None = None) -> None:
        self.calls: list[str] = []
        self.stop_after = stop_after

    def on_epoch_start(self, state: TrainingState, /) -> None:
        self.calls.append(f"start {state.epoch}")

    def on_batch_end(self, state: TrainingState, /) -> None:
        assert all(p.grad is not None for p in state.model.parameters())
        self.calls.append(f"batch {state.batch}/{state.batches}")

    def on_epoch_end(self, state: TrainingState, /) -> None:
        self.calls.append(f"end {state.records[-1].epoch}")
        state.stop = state.epoch + 1 == self.stop_after


def test_callbacks_are_called_in_order_and_can_stop_the_run() -> None:
    log = Log(stop_after=2)
    history = finetune(small(), blobs(40), epochs=5, callbacks=[log])
    epoch = ["batch 0/2", "batch 1/2"]
    assert log.calls == ["start 0", *epoch, "end 1", "start 1", *epoch, "end 2"]
    assert len(history.epochs) == 2


def test_a_callback_may_define_one_method_alone() -> None:
    class Ends(Callback):
        seen = 0

        def on_epoch_end(self, state: TrainingState, /) -> None:
            self.seen += 1

    ends = Ends()
    finetune(small(), blobs(), epochs=3, callbacks=[ends])
    assert ends.seen == 3


def test_progress_bar_shows_and_logs_are_written(
    capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, logger="qcqp_prune.train"):
        finetune(small(), blobs(), epochs=2, config=FinetuneConfig(progress=True))
    shown = capsys.readouterr()
    assert "epoch 2/2" in shown.err
    assert "6/6" in shown.err
    assert shown.out == ""
    assert len(caplog.records) == 2


# what is refused


def test_no_parameters_to_train() -> None:
    with pytest.raises(TrainingError, match=r"frozen.*requires_grad_\(True\)"):
        finetune(small().requires_grad_(False), blobs())


def test_a_loss_that_is_not_finite_says_where_and_what_to_do() -> None:
    batches = blobs()
    batches[1] = (batches[1][0] * torch.inf, batches[1][1])
    with pytest.raises(TrainingError, match=r"the loss is nan in epoch 1, batch 2\. Lower lr"):
        finetune(small(), batches)


class InfiniteSlope(nn.Module):
    """The square root of a weight that is 0: a finite loss with an infinite gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sqrt(self.w)


def test_a_weight_that_is_not_finite_after_the_last_batch_is_noticed() -> None:
    with pytest.raises(TrainingError, match="a weight is not finite"):
        finetune(InfiniteSlope(), blobs(20), epochs=1)


@pytest.mark.parametrize(
    ("loader", "message"),
    [
        ([], "yields no batch"),
        ([torch.zeros(2, 2)], "yields a Tensor"),
        ([(torch.zeros(2, 2),)], r"yields a tuple of 1 \(Tensor\)"),
    ],
)
def test_a_bad_loader_is_refused(loader: list[object], message: str) -> None:
    with pytest.raises(TrainingError, match=message):
        finetune(small(), loader)


def test_a_loader_without_length_works() -> None:
    class Stream:
        def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
            return iter(blobs())

    assert len(finetune(small(), Stream(), epochs=2).epochs) == 2


class Rates(Callback):
    """Writes down the learning rate of each step."""

    def __init__(self) -> None:
        self.seen: list[float] = []

    def on_batch_end(self, state: TrainingState, /) -> None:
        self.seen.append(state.optimizer.param_groups[0]["lr"])


class Unsized:
    """A loader without a length."""

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return iter(blobs())


@pytest.mark.parametrize(
    ("loader", "expected"),
    [
        (blobs(), [*(0.1 * k / 4.5 for k in (1, 2, 3, 4)), 0.1, 0.1]),  # 1.5 epochs of 3 steps
        (blobs(20), [0.1 / 1.5, 0.1, 0.1]),
        (Unsized(), [0.1 / 1.5] * 3 + [0.1] * 6),
    ],
)
def test_no_step_of_a_warmup_is_one_of_rate_zero(loader: Loader, expected: list[float]) -> None:
    rates = Rates()
    config = FinetuneConfig(lr=0.1, schedule="constant", warmup=1.5)
    finetune(small(), loader, epochs=3, config=config, callbacks=[rates])
    assert rates.seen[: len(expected)] == pytest.approx(expected)


@pytest.mark.parametrize("loader", [blobs(20), Unsized()])
def test_one_epoch_of_the_recommended_recipe_trains(loader: Loader) -> None:
    model = small()
    before = model[0].weight.detach().clone()
    finetune(model, loader, epochs=1, config=FinetuneConfig.recommended(model))
    assert not torch.equal(model[0].weight, before)


def test_zero_epochs_are_refused() -> None:
    with pytest.raises(InvalidOptionError, match="epochs is 0"):
        finetune(small(), blobs(), epochs=0)


class Answer:
    """Like the outputs of transformers' models, which are no tensors and have no tensor's methods."""

    def __init__(self, logits: Tensor) -> None:
        self.loss, self.hidden, self.logits = None, logits * 2, logits


class Returning(nn.Module):
    """What `small` computes, in a container."""

    def __init__(self, wrap: Callable[[Tensor], object]) -> None:
        super().__init__()
        self.net, self.wrap = small(), wrap

    def forward(self, x: Tensor) -> object:
        return self.wrap(self.net(x))


@pytest.mark.parametrize(
    "wrap",
    [
        Answer,
        lambda y: {"hidden": y * 2, "logits": y},
        lambda y: (y,),
        lambda y: {"out": y, "classes": y.argmax(1)},
    ],
    ids=["attribute", "key", "tuple", "one float"],
)
def test_logits_are_found_among_the_outputs(wrap: Callable[[Tensor], object]) -> None:
    plain, wrapped = small(), Returning(wrap)
    config = FinetuneConfig(lr=0.1, distillation=0.5)
    mine = finetune(wrapped, blobs(), epochs=2, config=config, validation=blobs(), teacher=Returning(wrap))
    theirs = finetune(plain, blobs(), epochs=2, config=config, validation=blobs(), teacher=small())
    assert [replace(r, seconds=0) for r in mine.epochs] == [replace(r, seconds=0) for r in theirs.epochs]
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), wrapped.parameters(), strict=True))


@pytest.mark.parametrize("wrap", [lambda y: (y * 2, y), lambda y: {"classes": y.argmax(1)}])
def test_outputs_that_may_be_logits_or_not_are_refused(wrap: Callable[[Tensor], object]) -> None:
    model = Returning(wrap)
    for run in (finetune, evaluate):
        with pytest.raises(
            InvalidOptionError, match=r"tensors of floating numbers and none called logits: let"
        ):
            run(model, blobs())


# a loss of one's own


def measured(count: int = 3) -> list[tuple[Tensor, Tensor]]:
    """Numbers to be predicted, two for each point."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(count, 20, 2, generator=generator)
    return [(b, torch.stack([b.sum(1), b[:, 0] - 3], 1)) for b in x]


def test_steps_of_a_loss_of_ones_own_are_its_gradients() -> None:
    """d/dW of the mean squared error is 2 (x W^T - t)^T x / (2 N)."""
    model = nn.Linear(2, 2, bias=False)
    start = model.weight.detach().numpy().copy()
    x, t = (part.numpy() for part in measured(1)[0])
    config = FinetuneConfig(
        lr=0.5, momentum=0.0, nesterov=False, weight_decay=0.0, schedule="constant", device="cpu"
    )
    history = finetune(model, measured(1), epochs=1, config=config, loss=F.mse_loss, validation=measured(1))
    errors = x @ start.T - t
    expected = start - 0.5 * errors.T @ x / len(x)
    np.testing.assert_allclose(model.weight.detach().numpy(), expected, atol=1e-6)
    (record,) = history.epochs
    assert record.loss == pytest.approx(np.square(errors).mean(), rel=1e-5)
    assert record.validation_loss == pytest.approx(np.square(x @ expected.T - t).mean(), rel=1e-5)
    assert (record.accuracy, record.validation_accuracy) == (None, None)
    assert finetune(small(), measured(), epochs=20, loss=F.mse_loss).epochs[-1].loss < 4.0


def test_a_loss_of_classes_has_an_accuracy_too() -> None:
    def twice(outputs: Tensor, targets: Tensor) -> Tensor:
        return 2 * F.cross_entropy(outputs, targets)

    model = small()
    plain, doubled = evaluate(model, blobs()), evaluate(model, blobs(), loss=twice)
    assert doubled.accuracy == plain.accuracy
    assert doubled.loss == pytest.approx(2 * plain.loss)
    history = finetune(model, blobs(), epochs=20, config=FinetuneConfig(lr=0.1), loss=twice)
    assert history.epochs[-1].accuracy == 1.0


def test_a_loss_is_a_mean_over_samples_and_not_over_batches() -> None:
    (x, t) = measured(1)[0]
    parts = [(x[:3], t[:3]), (x[3:], t[3:])]
    whole = evaluate(nn.Identity(), [(x, t)], loss=F.mse_loss).loss
    assert evaluate(nn.Identity(), parts, loss=F.mse_loss).loss == pytest.approx(whole)


def test_a_loss_is_given_all_outputs_and_not_those_of_autocast() -> None:
    seen: list[torch.dtype] = []

    def of_both(outputs: dict[str, Tensor], targets: Tensor) -> Tensor:
        seen.extend(x.dtype for x in outputs.values())
        return F.mse_loss(outputs["mean"], targets) + outputs["size"].mean()

    model = Returning(lambda y: {"mean": y, "size": y.square()})
    finetune(model, measured(), epochs=1, config=FinetuneConfig(bfloat16=True), loss=of_both)
    assert set(seen) == {torch.float32}
    assert len(seen) == 6


def test_a_run_goes_on_with_its_own_loss_only(tmp_path: Path) -> None:
    finetune(small(), measured(), epochs=1, loss=F.mse_loss, checkpoint=tmp_path / "run")
    assert (
        finetune(small(), measured(), epochs=1, loss=F.mse_loss, checkpoint=tmp_path / "run").resumed_at == 1
    )
    with pytest.raises(TrainingError, match=r"mse_loss' and is now 'torch\.nn\.functional\.l1_loss'"):
        finetune(small(), measured(), epochs=1, loss=F.l1_loss, checkpoint=tmp_path / "run")


def test_a_loss_that_cannot_be_used_is_refused() -> None:
    with pytest.raises(InvalidOptionError, match=r"label_smoothing is 0\.1 and there is a loss"):
        finetune(small(), measured(), config=FinetuneConfig(label_smoothing=0.1), loss=F.mse_loss)
    for run, name in ((finetune, "finetune"), (evaluate, "evaluate")):
        with pytest.raises(InvalidOptionError, match=f"{name}: the loss cross_entropy does not take"):
            run(small(), [(torch.zeros(4, 2), torch.zeros(4, 3))], loss=F.cross_entropy)
        with pytest.raises(TrainingError, match="or a loss of your own: loss=torch"):
            run(small(), measured())


def test_an_unknown_device_is_refused() -> None:
    with pytest.raises(InvalidOptionError, match='Device "abacus" cannot be used'):
        finetune(small(), blobs(), config=FinetuneConfig(device="abacus"))


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (torch.tensor([0, 2]), "yields the target 2, and the network has 2 classes"),
        (torch.tensor([0, -1]), "yields the target -1, and the network has 2 classes"),
        (torch.tensor([0.0, 1.0]), r"targets are torch.float32. Give class numbers as int64"),
        (torch.tensor([0, 1], dtype=torch.int32), r"targets are torch.int32. Give class numbers as int64"),
        (torch.tensor([0, 1, 1]), r"outputs of shape \(2, 2\) for targets of shape \(3,\)"),
    ],
)
def test_targets_that_are_no_classes_are_refused_before_any_step(targets: Tensor, message: str) -> None:
    model = small()
    before = {name: value.clone() for name, value in model.named_parameters()}
    loader = [(torch.zeros(2, 2), targets)]
    with pytest.raises(TrainingError, match=message):
        finetune(model, loader, epochs=1)
    with pytest.raises(TrainingError, match=message):
        evaluate(model, loader)
    assert all(torch.equal(before[name], value) for name, value in model.named_parameters())
