"""Objectives that benchmarks compare: each makes an importance for a setting, which may read its calibration images."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

import qcqp_prune as qp
from benchmarks.settings import Setting
from qcqp_prune.pipeline import Importance

Objective = Callable[[Setting], Importance]


def plain(importance: Importance) -> Objective:
    """An objective that looks at no data."""
    return lambda setting: importance


def measured(build: Callable[..., Importance], **options: Any) -> Objective:
    """An objective that looks at the calibration images."""
    return lambda setting: build(setting.calibration(), **options)


PAPER, L2 = plain(qp.Magnitude()), plain(qp.Magnitude("l2"))
TAYLOR, CALIBRATED = measured(qp.Taylor), measured(qp.Calibrated)
MEDIAN = plain(qp.Normalised(qp.GeometricMedian()))

PRINTED, DEFAULT, BY_LOSS = "Magnitude paper", "Calibrated", "Calibrated loss"
OBJECTIVES: dict[str, Objective] = {
    PRINTED: PAPER,
    "Magnitude l2": L2,
    "BatchNormScale": plain(qp.BatchNormScale()),
    "GeometricMedian, by layer": MEDIAN,
    "Taylor weight": TAYLOR,
    "Taylor gate": measured(qp.Taylor, form="gate"),
    "Fisher": measured(qp.Fisher),
    "Lamp": plain(qp.Lamp()),
    "Normalised(Magnitude), by group": plain(qp.Normalised(qp.Magnitude(), by="group")),
    "Normalised(Magnitude), by MACs": plain(qp.Normalised(qp.Magnitude(), by="macs")),
    "Concave(Normalised(Magnitude))": plain(qp.Concave(qp.Normalised(qp.Magnitude()))),
    "Activation mean": measured(qp.Activation),
    "Activation APoZ": measured(qp.Activation, statistic="apoz"),
    "NeuronSensitivity": measured(qp.NeuronSensitivity),
    "OutputChange": measured(qp.OutputChange),
    "Random": plain(qp.Random()),
    BY_LOSS: measured(qp.Calibrated, loss=nn.functional.cross_entropy),
    DEFAULT: CALIBRATED,
}
"""By the names that tables have."""
