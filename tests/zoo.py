"""torchvision's models as test networks, beside a CPU build of torch that lacks torchvision's compiled operators."""

from __future__ import annotations

from functools import lru_cache
from types import ModuleType

import torch
from torch import nn

_SIGNATURE = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"


@lru_cache(maxsize=1)
def _declared() -> torch.library.Library:
    """Operators that torchvision's import looks for; kept alive by the cache."""
    library = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        library.define(name + _SIGNATURE)
    return library


def torchvision_models() -> ModuleType:
    """``torchvision.models``.

    Raises:
        ImportError: torchvision is not installed.
    """
    try:
        torch._C._dispatch_find_schema_or_throw("torchvision::nms", "")
    except RuntimeError:
        _declared()
    from torchvision import models

    return models


def build(name: str) -> nn.Module:
    """A model by name, random weights of a fixed seed."""
    torch.manual_seed(0)
    options = {"init_weights": False} if name == "googlenet" else {}
    model: nn.Module = getattr(torchvision_models(), name)(weights=None, **options)
    return model


def lively(model: nn.Module, example: torch.Tensor) -> nn.Module:
    """Statistics and scales with which signals of a network with random weights do not die on the way."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("layer_scale"):
                parameter.fill_(1.0)
            elif name.endswith("bias"):
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
        norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        momenta = [m.momentum for m in norms]
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None
        model.train()
        model(torch.randn((4, *example.shape[1:]), generator=generator))
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
    return model.eval()
