"""Learning rates by hand, and values outside their domain."""

from __future__ import annotations

import math
from typing import Any

import pytest

from qcqp_prune.errors import InvalidOptionError
from qcqp_prune.models import LeNet5, resnet20
from qcqp_prune.train import FinetuneConfig


def test_the_default_is_the_papers_recipe() -> None:
    config = FinetuneConfig()
    wanted = {0: 0.01, 59.99: 0.01, 60: 0.002, 119.9: 0.002, 120: 4e-4, 160: 8e-5, 199: 8e-5}
    for epoch, lr in wanted.items():
        assert config.learning_rate(epoch, 200) == pytest.approx(lr), epoch
    assert (config.momentum, config.weight_decay, config.nesterov) == (0.9, 5e-4, True)


def test_cosine_falls_from_the_end_of_the_warmup_to_zero() -> None:
    config = FinetuneConfig(lr=0.4, schedule="cosine", warmup=2.0)
    assert config.learning_rate(0, 10) == 0.0
    assert config.learning_rate(0.5, 10) == pytest.approx(0.1)
    assert config.learning_rate(2, 10) == pytest.approx(0.4)
    assert config.learning_rate(6, 10) == pytest.approx(0.2)  # half way
    assert config.learning_rate(4, 10) == pytest.approx(0.4 * (1 + math.cos(math.pi / 4)) / 2)
    assert config.learning_rate(10, 10) == pytest.approx(0.0)


def test_a_step_of_the_warmup_has_the_rate_at_its_end() -> None:
    config = FinetuneConfig(lr=0.4, schedule="cosine", warmup=2.0)
    assert [config.learning_rate(k / 2, 10, 0.5) for k in range(5)] == pytest.approx(
        [0.1, 0.2, 0.3, 0.4, 0.4]
    )
    assert config.learning_rate(6, 10, 0.5) == config.learning_rate(6, 10)  # after it the step does not count
    assert FinetuneConfig(warmup=0.5).learning_rate(0, 1, 1.0) == 0.01  # never above the highest rate


def test_a_warmup_takes_the_whole_run_at_most() -> None:
    config = FinetuneConfig(lr=0.4, schedule="cosine", warmup=50.0)
    assert [config.learning_rate(k / 4, 1, 0.25) for k in range(4)] == pytest.approx([0.1, 0.2, 0.3, 0.4])


@pytest.mark.parametrize("schedule", ["cosine", "multistep", "constant"])
def test_without_a_warmup_the_length_of_a_step_does_not_count(schedule: Any) -> None:
    config = FinetuneConfig(lr=0.4, schedule=schedule)
    for epoch in (0, 0.25, 1, 2.75):
        assert config.learning_rate(epoch, 3, 0.25) == config.learning_rate(epoch, 3)
    if schedule == "cosine":
        assert config.learning_rate(0.75, 3, 0.25) == 0.4 * (1 + math.cos(math.pi * 0.25)) / 2


def test_constant_stays() -> None:
    assert {FinetuneConfig(schedule="constant").learning_rate(e, 5) for e in range(5)} == {0.01}


def test_the_paper_s_recipe_is_for_its_networks_and_a_cosine_for_others() -> None:
    assert FinetuneConfig.recommended(resnet20()) == FinetuneConfig()
    other = FinetuneConfig.recommended(LeNet5())
    assert (other.schedule, other.learning_rate(0, 1)) == ("cosine", 0.0)
    assert max(other.learning_rate(k / 100, 1) for k in range(100)) == other.lr  # also of a single epoch


def test_a_recipe_in_words() -> None:
    words = FinetuneConfig().describe()
    assert words == (
        "sgd, lr 0.01, Nesterov momentum 0.9, weight decay 0.0005, "
        "multistep schedule (times 0.2 at 30%, 60%, 80% of the epochs)"
    )
    changes = {"distillation": 0.5, "ema": 0.99, "label_smoothing": 0.1, "grad_clip": 3.0, "warmup": 2.0}
    told = FinetuneConfig(**changes).describe()
    for number in ("distillation 0.5 at temperature 4", "decay 0.99", "smoothing 0.1", "to 3", "of 2 epochs"):
        assert number in told


@pytest.mark.parametrize(
    "options",
    [
        {"lr": 0.0},
        {"lr": math.nan},
        {"lr": -1.0},
        {"momentum": 1.0},
        {"momentum": 0.0},  # with Nesterov
        {"weight_decay": -1e-4},
        {"optimizer": "lbfgs"},
        {"schedule": "poly"},
        {"milestones": (0.5, 30)},
        {"decay": 0.0},
        {"warmup": -1.0},
        {"label_smoothing": 1.0},
        {"grad_clip": 0.0},
        {"distillation": 1.1},
        {"distillation": -0.1},
        {"temperature": 0.0},
        {"temperature": math.inf},
        {"ema": 1.0},
        {"ema": -0.1},
    ],
)
def test_values_outside_their_domain_are_refused(options: dict[str, Any]) -> None:
    name = "nesterov" if options == {"momentum": 0.0} else next(iter(options))
    with pytest.raises(InvalidOptionError, match=f"FinetuneConfig: {name} is .*; give"):
        FinetuneConfig(**options)
