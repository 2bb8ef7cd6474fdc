"""The moving average of a network's weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


class WeightAverage:
    """The exponential moving average of what training changes: trained parameters and buffers.

    After step ``t = 1, 2, ...`` the average is ``m <- m + (1 - d_t) (w - m)`` with ``d_t = min(decay, t / (t + 9))``:
    short at first, so that a run of few steps is not an average of its start. Running statistics of batch norms are
    averaged in the same way; they belong to the networks on the way and so, on average, to one in their middle. Buffers
    that are no floating numbers, such as counts of batches, are those of the last step.

    Args:
        model: the network; its tensors now are the start of the average.
        decay: in (0, 1).

    References:
        Polyak and Juditsky, "Acceleration of stochastic approximation by averaging", SIAM J. Control Optim. 1992; the
        ramp of the decay is that of TensorFlow's ``ExponentialMovingAverage``.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self._decay, self._steps = decay, 0
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self._live: dict[str, Tensor] = {**trained, **dict(model.named_buffers())}
        self._mean = {name: _wide(live.detach().clone()) for name, live in self._live.items()}

    @torch.no_grad()
    def update(self) -> None:
        """Take the network's tensors after a step into the average."""
        self._steps += 1
        weight = 1.0 - min(self._decay, self._steps / (self._steps + 9))
        for name, live in self._live.items():
            if live.is_floating_point():
                self._mean[name].lerp_(_wide(live), weight)
            else:
                self._mean[name].copy_(live)

    @torch.no_grad()
    def put_in(self) -> None:
        """Give the network the average."""
        for name, live in self._live.items():
            live.copy_(self._mean[name])

    @contextmanager
    def shown(self) -> Iterator[None]:
        """The network holds the average while the ``with`` block lasts."""
        before = {name: live.detach().clone() for name, live in self._live.items()}
        self.put_in()
        try:
            yield
        finally:
            with torch.no_grad():
                for name, live in self._live.items():
                    live.copy_(before[name])

    def state_dict(self) -> dict[str, Tensor]:
        """The average and its steps, for a checkpoint."""
        return {"steps": torch.tensor(self._steps), **{f"mean/{n}": m for n, m in self._mean.items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from ``state_dict``."""
        self._steps = int(state["steps"])
        for name, mean in self._mean.items():
            mean.copy_(state[f"mean/{name}"])


def _wide(tensor: Tensor) -> Tensor:
    """In half precision a small step towards the weights would be rounded away."""
    return tensor.float() if tensor.dtype in (torch.bfloat16, torch.float16) else tensor
