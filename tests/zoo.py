"""Networks of torchvision as test objects: importable beside a CPU build of torch, and alive with random weights."""

from __future__ import annotations

import importlib
import importlib.util
from functools import lru_cache
from types import ModuleType

import pytest
import torch
from torch import nn

BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_SIGNATURE = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"


@lru_cache(maxsize=1)
def _declared() -> torch.library.Library:
    """torchvision registers shapes of operators that only its compiled part declares, which may not fit this torch.

    The returned object keeps the declarations alive.
    """
    library = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        try:
            library.define(name + _SIGNATURE)
        except RuntimeError as error:  # somebody imported a torchvision that has its compiled part
            if "multiple times" not in str(error):
                raise
    return library


def torchvision_models() -> ModuleType:
    """``torchvision.models``; a test that asks for it is skipped where torchvision is not installed."""
    if importlib.util.find_spec("torchvision") is None:
        pytest.skip("torchvision is not installed: pip install --no-deps torchvision")
    _declared()
    return importlib.import_module("torchvision.models")


def lively(model: nn.Module, example: torch.Tensor, *, seed: int = 0) -> nn.Module:
    """Random weights with which signals reach the outputs: statistics of batch norms from data, no tiny scales."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
            elif name.endswith("layer_scale"):
                parameter.fill_(1.0)
        norms = [m for m in model.modules() if isinstance(m, BATCH_NORMS)]
        momenta = [m.momentum for m in norms]
        for module in norms:
            module.reset_running_stats()
            module.momentum = None  # a plain mean over the batches that follow
        model.train()
        for _ in range(2 if norms else 0):
            model(torch.randn(max(2, example.shape[0]), *example.shape[1:], generator=generator))
        for module, momentum in zip(norms, momenta, strict=True):
            module.momentum = momentum
    return model.eval()
