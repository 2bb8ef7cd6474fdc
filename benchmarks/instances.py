"""The networks that benchmarks run on, by name: published weights where they are at hand, else torchvision's shapes."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

import qcqp_prune as qp
from qcqp_prune import models

ROOT = Path(__file__).resolve().parent.parent
PRETRAINED = Path(os.environ.get("QCQP_PRUNE_PRETRAINED") or ROOT.parent / "shared" / "data" / "pretrained")
DATA = Path(os.environ.get("QCQP_PRUNE_DATA") or ROOT / ".cache" / "data")
"""Where data sets lie unpacked."""

WEIGHTS = {
    "resnet20": "resnet20-12fca82f.th",
    "resnet32": "resnet32-d509ac18.th",
    "resnet56": "resnet56-4bfd9763.th",
}


class MissingWeights(RuntimeError):
    """The published weights are not at hand."""


@dataclass(frozen=True)
class Instance:
    """A network, the input that it is traced with, and the options of the trace."""

    name: str
    build: Callable[[], nn.Module]
    shape: tuple[int, ...]
    options: Mapping[str, Any] = field(default_factory=dict)

    def example(self) -> torch.Tensor:
        return torch.zeros(self.shape)

    def traced(self) -> tuple[nn.Module, qp.ChannelGraph]:
        """The network and its channel graph."""
        model = self.build()
        return model, qp.trace(model, self.example(), **self.options)


def pretrained(name: str) -> nn.Module:
    """A CIFAR ResNet with its published weights."""
    path = PRETRAINED / WEIGHTS[name]
    if not path.is_file():
        raise MissingWeights(
            f"{path} is missing: set QCQP_PRUNE_PRETRAINED to the folder that holds {path.name}"
        )
    return getattr(models, name)(pretrained=path)


def torchvision_model(name: str) -> nn.Module:
    """A torchvision model with random weights of a fixed seed."""
    from tests.zoo import torchvision_models

    torch.manual_seed(0)
    return getattr(torchvision_models(), name)(weights=None)


TORCHVISION = (
    "resnet50",
    "mobilenet_v2",
    "vgg16_bn",
    "densenet121",
    "efficientnet_b0",
    "convnext_tiny",
    "vit_b_16",
)

INSTANCES = {
    **{name: Instance(name, partial(pretrained, name), (1, 3, 32, 32)) for name in WEIGHTS},
    "resnet20_columns": Instance(
        "resnet20_columns", partial(pretrained, "resnet20"), (1, 3, 32, 32), {"columns": True}
    ),
    **{
        f"tv_{name}": Instance(f"tv_{name}", partial(torchvision_model, name), (1, 3, 224, 224))
        for name in TORCHVISION
    },
    "tv_resnet50_free": Instance(
        "tv_resnet50_free", partial(torchvision_model, "resnet50"), (1, 3, 224, 224), {"sharing": "free"}
    ),
}
