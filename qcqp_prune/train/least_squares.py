"""Sums that the weight of a layer is fitted from, and the fit."""

from __future__ import annotations

import torch
from torch import Tensor

from qcqp_prune.importance.moments import moments, ridge_size


class Sums:
    """Sums over rows of what a layer reads (x) and of what its result lacks (r): x x^T, x r^T, x, r, by segments."""

    def __init__(self, segments: int) -> None:
        self._segments = segments
        self._second = self._cross = self._read = self._lacking = torch.zeros((), dtype=torch.float64)
        self._rows = 0

    def add(self, read: Tensor, lacking: Tensor) -> None:
        """Rows of the same positions: ``(rows, columns of all segments)`` and ``(rows, outputs)``."""
        wide = torch.promote_types(read.dtype, torch.float32)
        x, r = (t.to(wide).reshape(len(t), self._segments, -1).transpose(0, 1) for t in (read, lacking))
        products, sums = moments(x, r)
        before = self._second, self._cross, self._read, self._lacking
        self._second, self._cross, self._read, self._lacking = (
            a.to(b.device) + b for a, b in zip(before, (*products, *sums), strict=True)
        )
        self._rows += len(read)

    def finite(self) -> bool:
        """Whether all of them are."""
        sums = (self._second, self._cross, self._read, self._lacking)
        return all(bool(t.isfinite().all()) for t in sums)

    def change(self, ridge: float, *, centred: bool, free: Tensor | None = None) -> Tensor:
        """The change of the weight that makes up for most of what lacks, ``(outputs, columns of one segment)``.

        Args:
            ridge: as a share of the mean second moment of what is read.
            centred: whether means are made up for elsewhere.
            free: ``(outputs, columns) bool``, what of the weight of a single segment may change; all where None.
        """
        second, cross = self._second, self._cross
        if centred:
            second = second - self._read[:, :, None] * self._read[:, None] / self._rows
            cross = cross - self._read[:, :, None] * self._lacking[:, None] / self._rows
        variance, square = (float(t.diagonal(dim1=1, dim2=2).mean()) for t in (second, self._second))
        size = ridge_size(ridge, variance, square)
        second = second + size * torch.eye(second.shape[1]).to(second)
        if free is None:
            best: Tensor = torch.linalg.solve(second, cross)
            return best.mT.flatten(0, 1)
        return _within(second[0], cross[0], free.to(second.device))

    def mean_left(self, change: Tensor) -> Tensor:
        """The mean that lacks after a change of the weight, ``(outputs,)``."""
        by_segment = change.reshape(self._segments, -1, change.shape[1])
        made_up: Tensor = (by_segment @ self._read[:, :, None]).flatten()
        return (self._lacking.flatten() - made_up) / self._rows


def _within(second: Tensor, cross: Tensor, free: Tensor) -> Tensor:
    """The least squares solution of each output over its own columns, ``(outputs, columns)``; zero elsewhere."""
    change = torch.zeros_like(cross.T)
    patterns, which = torch.unique(free, dim=0, return_inverse=True)
    for k, pattern in enumerate(patterns):
        columns = torch.nonzero(pattern).flatten()
        outputs = torch.nonzero(which == k).flatten()
        found = torch.linalg.solve(second[columns][:, columns], cross[columns][:, outputs])
        change[outputs[:, None], columns] = found.T
    return change
