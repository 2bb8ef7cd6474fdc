"""A convolution that has only some of its kernel columns, stores only these, and multiplies with nothing else."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qcqp_prune.graph.channels import BoolArray


class ShapeConv2d(nn.Module):
    """A 2-d convolution, zero padded, each of whose filters has its own set of kernel positions.

    ``y[j] = bias[j] + sum over columns k of filter j of weight[k] . x shifted to the kernel position of k``. It takes
    exactly ``H_out W_out in_channels |columns|`` multiply-adds, as 1 x 1 convolutions: where input and output are of
    one size, of the input with all columns at once, shifted afterwards; else of the shifted input for each kernel
    position. A filter without a column gives its bias.

    Args:
        conv: gives channels, strides, padding, dilation, bias, mode; its weight is not used.
        weight: ``(|columns|, in_channels)``, kernel position after kernel position, filters ascending within each.
        kept: ``(out_channels, kernel height * kernel width) bool``: which columns there are.

    Attributes:
        weight: as given.
        bias: ``(out_channels,)`` or None.
        columns: buffer, ``(|columns|,) int64``: ``position * out_channels + filter`` of each row of the weight.
        in_channels, out_channels, kernel_size, stride, padding, dilation: as of ``nn.Conv2d``.

    References:
        Jeong et al., "Optimal channel selection with discrete QCQP" (AISTATS 2022), section 2.3: shape columns.
    """

    counts_as_one_layer = True
    """Memory counts the output of the layer, as that of any convolution, not what its parts return. See ``dense``."""

    weight: nn.Parameter
    bias: nn.Parameter | None
    columns: Tensor

    def __init__(self, conv: nn.Conv2d, weight: nn.Parameter, kept: BoolArray) -> None:
        super().__init__()
        self.in_channels, self.out_channels = conv.in_channels, conv.out_channels
        self.kernel_size, self.stride, self.dilation = conv.kernel_size, conv.stride, conv.dilation
        self.padding = conv.padding
        self._pads = [int(n) for n in conv._reversed_padding_repeated_twice]
        self.weight = weight
        self.register_parameter("bias", cast("nn.Parameter | None", conv.bias))
        self.register_buffer("columns", torch.from_numpy(column_index(kept)).to(weight.device))
        self._per_position = tuple(int(n) for n in kept.sum(0))
        self.train(conv.training)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(N, in_channels, H, W)``, or one image without N, to what the convolution gives."""
        if x.ndim == 3:
            return self.forward(x[None])[0]
        out = self._shifted_outputs(x) if self._keeps_size() else self._shifted_inputs(x)
        return out if self.bias is None else out + self.bias[:, None, None]

    def _keeps_size(self) -> bool:
        """Whether the output has a position for each of the input, so that either may be shifted."""
        spans = [d * (k - 1) for d, k in zip(self.dilation, self.kernel_size, strict=True)]
        left, right, top, bottom = self._pads
        return self.stride == (1, 1) and [top + bottom, left + right] == spans

    def _positions(self) -> Iterator[tuple[int, int, slice]]:
        """Row and column, in pixels, of each kernel position that has columns, and their rows of the weight."""
        first = 0
        for position, count in enumerate(self._per_position):
            if count:
                a, b = divmod(position, self.kernel_size[1])
                yield a * self.dilation[0], b * self.dilation[1], slice(first, first + count)
            first += count

    def _shifted_outputs(self, x: Tensor) -> Tensor:
        """All columns in one product; what each kernel position gives is added where it falls. The faster way."""
        height, width = x.shape[2:]
        parts = F.conv2d(x, self.weight[:, :, None, None])
        out = parts.new_zeros((x.shape[0], self.out_channels, height, width))
        filters = self.columns % self.out_channels
        for a, b, rows in self._positions():
            down, right = a - self._pads[2], b - self._pads[0]
            if abs(down) >= height or abs(right) >= width:
                continue  # falls on padding everywhere
            ys, xs = (max(0, -down), max(0, down)), (max(0, -right), max(0, right))
            seen = parts[:, rows, ys[1] : height - ys[0], xs[1] : width - xs[0]]
            place = out[:, :, ys[0] : height - ys[1], xs[0] : width - xs[1]]
            place.index_add_(1, filters[rows], seen)
        return out

    def _shifted_inputs(self, x: Tensor) -> Tensor:
        """One product for each kernel position, with the pixels that it sees."""
        padded = F.pad(x, self._pads) if any(self._pads) else x
        height, width = (
            (padded.shape[d + 2] - self.dilation[d] * (self.kernel_size[d] - 1) - 1) // self.stride[d] + 1
            for d in (0, 1)
        )
        out: Tensor | None = None
        filters = self.columns % self.out_channels
        for a, b, rows in self._positions():
            seen = padded[
                :,
                :,
                a : a + (height - 1) * self.stride[0] + 1 : self.stride[0],
                b : b + (width - 1) * self.stride[1] + 1 : self.stride[1],
            ]
            part = F.conv2d(seen, self.weight[rows, :, None, None])
            if out is None:
                out = part.new_zeros((x.shape[0], self.out_channels, height, width))
            out.index_add_(1, filters[rows], part)
        assert out is not None, "a layer keeps at least one column"
        return out

    def dense(self) -> nn.Conv2d:
        """A new convolution that computes the same, with zeros where there is no column."""
        conv = nn.Conv2d(
            self.in_channels,
            self.out_channels,
            cast("tuple[int, int]", self.kernel_size),
            cast("tuple[int, int]", self.stride),
            cast("str | tuple[int, int]", self.padding),
            cast("tuple[int, int]", self.dilation),
            bias=self.bias is not None,
            device=self.weight.device,
            dtype=self.weight.dtype,
        )
        positions = len(self._per_position)
        with torch.no_grad():
            rows = torch.zeros_like(conv.weight).flatten(2).permute(2, 0, 1).flatten(0, 1).contiguous()
            rows[self.columns] = self.weight
            matrix = rows.reshape(positions, self.out_channels, self.in_channels).permute(1, 2, 0)
            conv.weight.copy_(matrix.reshape(conv.weight.shape))
            if conv.bias is not None and self.bias is not None:
                conv.bias.copy_(self.bias)
        return conv.train(self.training)

    def take(self, conv: nn.Conv2d) -> None:
        """Take over the values of a convolution such as ``dense`` makes; of its weight those of the columns here."""
        with torch.no_grad():
            rows = conv.weight.flatten(2).permute(2, 0, 1).flatten(0, 1)
            self.weight.copy_(rows[self.columns])
            if conv.bias is not None and self.bias is not None:
                self.bias.copy_(conv.bias)

    def kept(self) -> Tensor:
        """Which columns there are, ``(out_channels, kernel height * kernel width) bool``."""
        flat = torch.zeros(
            len(self._per_position) * self.out_channels, dtype=torch.bool, device=self.columns.device
        )
        flat[self.columns] = True
        return flat.reshape(-1, self.out_channels).T

    def extra_repr(self) -> str:
        """Channels, columns and geometry."""
        dense = self.out_channels * len(self._per_position)
        return (
            f"{self.in_channels}, {self.out_channels}, columns={len(self.columns)}/{dense}, "
            f"kernel_size={self.kernel_size}, stride={self.stride}, padding={self.padding}, "
            f"dilation={self.dilation}, bias={self.bias is not None}"
        )

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        """Refuse the weights of other columns: equal shapes do not make them fit."""
        columns = state_dict.get(f"{prefix}columns")
        if columns is not None and not torch.equal(columns.to(self.columns.device), self.columns):
            args[-1].append(
                f"{prefix}columns are other kernel columns than this layer has: cut it with the same masks"
            )
            return
        super()._load_from_state_dict(state_dict, prefix, *args)


def column_index(kept: BoolArray) -> np.ndarray[Any, np.dtype[np.int64]]:
    """``position * filters + filter`` of each kept column, ascending.

    Args:
        kept: ``(filters, kernel positions) bool``.
    """
    return np.flatnonzero(kept.T).astype(np.int64)
