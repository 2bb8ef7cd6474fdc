"""torchvision's models: all for classification, all for segmentation, and the backbones of its detectors."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import nn

from benchmarks.zoo.case import Case, image
from tests.zoo import torchvision_models

SIDES = {"inception_v3": 96, "maxvit_t": 224, "vit_h_14": 56}
"""Where 64 x 64 is not taken: too small for the last pooling, written into the network, or no multiple of a patch."""

WINDOWED = 112
"""Swin: with less, no window of the last stages would be whole."""

DETECTORS = {"ssd300_vgg16": 300, "ssdlite320_mobilenet_v3_large": 128}
"""Sides of the images; 128 x 128 where nothing else is said. SSD's last layers leave nothing of a smaller one."""


def classification() -> list[Case]:
    """All that ``torchvision.models.list_models`` names in its own module."""
    models = torchvision_models()
    return [
        _case(name, _side(name), partial(_classifier, name)) for name in models.list_models(module=models)
    ]


def segmentation() -> list[Case]:
    """FCN, DeepLabV3 and LR-ASPP, with their classifiers."""
    module = torchvision_models().segmentation
    return [_case(n, 64, partial(_built, module, n)) for n in torchvision_models().list_models(module=module)]


def detection() -> list[Case]:
    """The feature extractors of detectors, pyramids included: what comes after is bookkeeping on boxes."""
    module = torchvision_models().detection
    names = torchvision_models().list_models(module=module)
    return [
        _case(f"{name}.backbone", DETECTORS.get(name, 128), partial(_backbone, module, name))
        for name in names
    ]


def _case(name: str, side: int, build: Any) -> Case:
    return Case(name, build, image(side), f"3 x {side} x {side}", "torchvision")


def _side(name: str) -> int:
    return SIDES.get(name, WINDOWED if name.startswith("swin") else 64)


def _classifier(name: str) -> nn.Module:
    options: dict[str, Any] = {}
    if name in ("googlenet", "inception_v3"):
        options["init_weights"] = False  # theirs takes minutes, and is made anew anyway
    if name.startswith("vit_"):
        options["image_size"] = _side(name)
    return getattr(torchvision_models(), name)(weights=None, **options)


def _built(module: Any, name: str) -> nn.Module:
    return getattr(module, name)(weights=None, weights_backbone=None)


def _backbone(module: Any, name: str) -> nn.Module:
    return _built(module, name).backbone
