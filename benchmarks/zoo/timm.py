"""timm's models, the smallest of each architecture family.

A family is one line of ``MODELS``: the name, the side of the image, and options of ``timm.create_model`` where the
network has to be told of that side.
"""

from __future__ import annotations

import importlib
from functools import partial
from typing import Any

from torch import nn

from benchmarks.zoo.case import Case, image
from tests.zoo import torchvision_models

MODELS: dict[str, tuple[int, dict[str, Any]]] = {
    "deit_tiny_distilled_patch16_224": (64, {"img_size": 64}),
    "vit_tiny_patch16_224": (64, {"img_size": 64}),
}


def cases() -> list[Case]:
    """One case for each line of ``MODELS``."""
    return [
        Case(name, partial(_built, name, options), image(side), f"3 x {side} x {side}", "timm")
        for name, (side, options) in MODELS.items()
    ]


def _built(name: str, options: dict[str, Any]) -> nn.Module:
    torchvision_models()  # timm imports torchvision, whose operators must be declared first
    return importlib.import_module("timm").create_model(name, **options)
