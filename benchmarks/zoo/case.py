"""What a case of the compatibility matrix is."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from tests.zoo import lively

SEED = 0


@dataclass(frozen=True)
class Case:
    """A network and what it is called with.

    Attributes:
        name: unique within its source.
        build: the network with random weights; called with torch's seed set.
        inputs: example inputs as ``qp.trace`` takes them (a tensor, a tuple, a dict); called with torch's seed set.
        shown: the inputs in words, such as ``3 x 64 x 64``.
        package: whose version is written into the row.
        options: of ``qp.trace``.
        note: what a reader should know of the case, such as an input smaller than the usual one.
    """

    name: str
    build: Callable[[], nn.Module]
    inputs: Callable[[], Any]
    shown: str
    package: str
    options: Mapping[str, Any] = field(default_factory=dict)
    note: str = ""

    def built(self) -> tuple[nn.Module, Any]:
        """The network, with random weights through which signals reach the outputs, and its inputs."""
        torch.manual_seed(SEED)
        model = self.build()
        torch.manual_seed(SEED + 1)
        inputs = self.inputs()
        return lively(model, inputs, seed=SEED), inputs


def image(side: int, channels: int = 3) -> Callable[[], torch.Tensor]:
    """One random square image."""
    return lambda: torch.randn(1, channels, side, side)
