"""What a training run may add to its loss."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from torch import Tensor


class Regularizer(Protocol):
    """A penalty on the weights of the network that is trained. It is bound to that network when it is made."""

    def __call__(self) -> Tensor:
        """The penalty at the present weights, a scalar with a gradient."""

    def after_step(self) -> None:
        """Run after each step of the optimiser."""

    def describe(self) -> Mapping[str, Any]:
        """What it is, as plain data: a run goes on from a checkpoint of the same only."""

    def state_dict(self) -> dict[str, Tensor]:
        """What it holds beside the weights, for a checkpoint."""

    def load_state_dict(self, state: Mapping[str, Any], /) -> None:
        """Go on from ``state_dict``."""
