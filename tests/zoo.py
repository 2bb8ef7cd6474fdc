"""Networks of torchvision as test objects: importable beside a CPU build of torch, and alive with random weights."""

from __future__ import annotations

import importlib
import importlib.util
from functools import lru_cache, partial
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils import _pytree as pytree

from qcqp_prune.graph.inputs import as_call

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


def lively(model: nn.Module, example_inputs: Any, *, seed: int = 0) -> nn.Module:
    """Random weights with which signals reach the outputs, in eval mode.

    What starts at one small number everywhere (scales of residual branches) becomes 1, what starts at zero (position
    embeddings, last norms of branches) becomes random, biases are shifted, and the statistics of batch norms are
    those of random inputs like the example.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            first = float(parameter.flatten()[0]) if parameter.numel() else 1.0
            constant = bool((parameter == first).all())
            if name.endswith("bias"):
                parameter.add_(0.1 * noise)
            elif constant and first == 0:
                parameter.copy_(
                    1 + 0.3 * noise if name.endswith("weight") and parameter.ndim == 1 else 0.3 * noise
                )
            elif constant and abs(first) <= 0.5:
                parameter.fill_(1.0)
        norms = [
            m for m in model.eval().modules() if isinstance(m, BATCH_NORMS) and m.running_mean is not None
        ]
        momenta = [m.momentum for m in norms]
        for module in norms:
            module.reset_running_stats()
            module.momentum = None  # a plain mean over the batches that follow
            module.train()
        for _ in range(2 if norms else 0):
            args, kwargs = pytree.tree_map_only(
                torch.Tensor, partial(_like, generator), as_call(example_inputs)
            )
            model(*args, **kwargs)
        for module, momentum in zip(norms, momenta, strict=True):
            module.momentum = momentum
    return model.eval()


def _like(generator: torch.Generator, example: torch.Tensor) -> torch.Tensor:
    """Random numbers in the shape of an example, in a batch of two at least; anything but floats is repeated."""
    shape = (max(2, example.shape[0]), *example.shape[1:]) if example.ndim else ()
    if not example.is_floating_point():
        return example.expand(shape) if example.ndim and example.shape[0] == 1 else example
    return torch.randn(shape, generator=generator).to(example.dtype)
