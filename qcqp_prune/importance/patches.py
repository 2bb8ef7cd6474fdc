"""What a layer's weight is multiplied with, as rows of a matrix: windows of images, vectors of sequences."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import Node

from qcqp_prune.graph.channels import Layer
from qcqp_prune.graph.walk import argument
from qcqp_prune.importance.layerwise import own_rows


@dataclass(frozen=True)
class Patches:
    """How a convolution or linear map reads its input.

    A row holds everything that one output position is made of: for each input channel the kernel's positions. So with
    ``as_matrix(layer, weight)`` of shape ``(outputs, columns)`` the layer is ``rows @ matrix.T`` and a bias.

    Attributes:
        kernel, stride, padding, dilation: one number for each dimension of the image; all empty for a linear map.
    """

    kernel: tuple[int, ...] = ()
    stride: tuple[int, ...] = ()
    padding: tuple[int, ...] = ()
    dilation: tuple[int, ...] = ()

    @classmethod
    def of(cls, layer: Layer, node: Node, weight: Tensor) -> Patches | None:
        """How the operator of a layer reads; None for transposed convolutions and inputs without a batch."""
        if layer.op.startswith("linear"):
            return cls() if node.meta["val"].ndim > 1 else None
        dims = weight.ndim - 2
        if "transpose" in layer.op or not dims or node.meta["val"].ndim != dims + 2:
            return None
        kernel, dilation = tuple(weight.shape[2:]), _each(argument(node, "dilation"), dims)
        padding = argument(node, "padding")
        if isinstance(padding, str):
            spans = [d * (k - 1) for k, d in zip(kernel, dilation, strict=True)]
            if padding == "same" and any(span % 2 for span in spans):
                return None
            padding = [span // 2 if padding == "same" else 0 for span in spans]
        return cls(kernel, _each(argument(node, "stride"), dims), _each(padding, dims), dilation)

    def draw(self, made: Tensor, rows: int, generator: torch.Generator) -> Tensor:
        """Positions of a layer's result, at random and the same in each sample, so that there are about ``rows`` rows.

        Args:
            made: the result, ``(samples, channels, *image)`` or ``(samples, ..., features)``.
            rows: how many at least, where there are as many.
            generator: draws.
        """
        places = math.prod(made.shape[2:] if self.kernel else made.shape[1:-1])
        wanted = min(places, -(-rows // max(made.shape[0], 1)))
        if wanted == places:
            return torch.arange(places)
        return torch.randperm(places, generator=generator)[:wanted].sort().values

    def read(self, x: Tensor, positions: Tensor) -> Tensor:
        """Rows for positions from ``draw``, ``(samples * positions, columns)``, sample after sample."""
        if not self.kernel:
            return x.reshape(x.shape[0], -1, x.shape[-1])[:, positions].reshape(-1, x.shape[-1])
        pad = [p for size in reversed(self.padding) for p in (size, size)]
        windows = F.pad(x, pad)
        for dim, (k, s, d) in enumerate(zip(self.kernel, self.stride, self.dilation, strict=True)):
            windows = windows.unfold(2 + dim, d * (k - 1) + 1, s)[..., ::d]
        image = windows.shape[2 : 2 + len(self.kernel)]
        at: tuple[Any, ...] = (slice(None), slice(None), *torch.unravel_index(positions, image))
        chosen = windows[at].transpose(1, 2)
        return chosen.reshape(x.shape[0] * len(positions), -1)

    def made(self, y: Tensor, positions: Tensor) -> Tensor:
        """The layer's result at the same places, ``(samples * positions, outputs)``."""
        if not self.kernel:
            return y.reshape(y.shape[0], -1, y.shape[-1])[:, positions].reshape(-1, y.shape[-1])
        return y.flatten(2)[:, :, positions].transpose(1, 2).reshape(-1, y.shape[1])


def own_matrix(layer: Layer, weight: Tensor) -> Tensor:
    """A layer's own rows of a weight, ``(outputs, columns of one segment) float64``."""
    if layer.op == "linear_transposed":
        return weight.double().T
    return own_rows(layer, weight).double().flatten(1)


def with_own_matrix(layer: Layer, weight: Tensor, matrix: Tensor) -> Tensor:
    """The whole weight with other rows of a layer: the inverse of ``own_matrix``."""
    new = weight.clone()
    if layer.op == "linear_transposed":
        return new.copy_(matrix.T)
    own = own_rows(layer, new)
    own.copy_(matrix.reshape(own.shape))
    return new


def as_matrix(layer: Layer, weight: Tensor) -> Tensor:
    """As ``own_matrix`` over the columns of all segments, ``(outputs, columns)``; zero between segments."""
    own = own_matrix(layer, weight)
    whole = own.new_zeros(layer.segments, len(own) // layer.segments, layer.segments, own.shape[1])
    for s, part in enumerate(own.chunk(layer.segments)):
        whole[s, :, s] = part
    return whole.reshape(len(own), -1)


def write_matrix(layer: Layer, weight: Tensor, matrix: Tensor) -> Tensor:
    """The whole weight with a layer's own rows taken from a matrix: the inverse of ``as_matrix``."""
    parts = matrix.reshape(layer.segments, len(matrix) // layer.segments, layer.segments, -1)
    own = torch.cat([parts[s, :, s] for s in range(layer.segments)])
    return with_own_matrix(layer, weight, own)


def _each(value: object, dims: int) -> tuple[int, ...]:
    """One number for each dimension."""
    numbers = [int(v) for v in value] if isinstance(value, list | tuple) else [int(value)]  # type: ignore[call-overload]
    return tuple(numbers if len(numbers) == dims else numbers * dims)
