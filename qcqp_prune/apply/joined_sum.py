"""A sum of tensors that keep different channels, as a module of the smaller network."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from qcqp_prune.graph.channels import BoolArray


class JoinedSum(nn.Module):
    """``a + scale * b``, where each operand has some of the result's channels.

    An operand that has all of them is added to; of two that have some, the larger is first spread over zeros.

    Args:
        dim: the dimension of the channels, counted from the end.
        places: for each operand the place in the result of each of its channels, ``(k,)`` ascending; None where it has
            all of them, or is broadcast.
        size: channels of the result.
        scale: of the second operand.
    """

    spread: Tensor | None
    index: Tensor | None

    def __init__(
        self, dim: int, places: Sequence[Tensor | None], size: int, *, scale: float | int = 1
    ) -> None:
        super().__init__()
        self.dim, self.size, self.scale = dim, size, scale
        self.swap = places[0] is not None and (places[1] is None or len(places[1]) > len(places[0]))
        base, other = (places[1], places[0]) if self.swap else (places[0], places[1])
        self.register_buffer("spread", None if base is None else _gather(base, size))
        self.register_buffer("index", None if other is None else other.clone())

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """Add two tensors that broadcast along all dimensions but ``dim``."""
        kind = torch.promote_types(a.dtype, b.dtype)
        a = a.to(kind)
        b = (b if self.scale == 1 else b * self.scale).to(kind)
        base, other = (b, a) if self.swap else (a, b)
        if self.spread is not None:
            padded = nn.functional.pad(base, [0, 0] * (-self.dim - 1) + [0, 1])
            base = padded.index_select(self.dim, self.spread)
        if self.index is None:
            return base + other
        base, other = self._of_one_shape(base, other)
        return base.index_add(self.dim, self.index, other)

    def _of_one_shape(self, base: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
        """Both broadcast to each other along all dimensions but that of the channels."""
        shapes = [list(base.shape), list(other.shape)]
        sizes = [shape[self.dim] for shape in shapes]
        for shape in shapes:
            shape[self.dim] = 1
        if shapes[0] == shapes[1]:
            return base, other
        common = list(torch.broadcast_shapes(*shapes))  # type: ignore[no-untyped-call]
        rest = len(common) + self.dim
        first, second = ([*common[:rest], size, *common[rest + 1 :]] for size in sizes)
        return base.expand(first), other.expand(second)

    def extra_repr(self) -> str:
        """Sizes, for ``print(model)``."""
        return f"dim={self.dim}, size={self.size}"


def _gather(places: Tensor, size: int) -> Tensor:
    """For each channel of the result where it stands among an operand's, the zero behind them where it does not."""
    index = torch.full((size,), len(places), dtype=torch.int64, device=places.device)
    index[places] = torch.arange(len(places), device=places.device)
    return index


def places_in(result: BoolArray, operand: BoolArray) -> Tensor | None:
    """Where the kept positions of an operand stand among those of the result; None where they are all of them."""
    if (result == operand).all():
        return None
    return torch.from_numpy(np.flatnonzero(operand[result]))
