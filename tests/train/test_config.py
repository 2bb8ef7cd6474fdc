"""Learning rates by hand, and values outside their domain."""

from __future__ import annotations

import math
from typing import Any

import pytest

from qcqp_prune.errors import InvalidOptionError
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


def test_constant_stays() -> None:
    assert {FinetuneConfig(schedule="constant").learning_rate(e, 5) for e in range(5)} == {0.01}


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
    ],
)
def test_values_outside_their_domain_are_refused(options: dict[str, Any]) -> None:
    name = "nesterov" if options == {"momentum": 0.0} else next(iter(options))
    with pytest.raises(InvalidOptionError, match=f"FinetuneConfig: {name} is .*; give"):
        FinetuneConfig(**options)
