"""Norms and largest entries of the rows of many weights in a few tensor operations, and gradients back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from qcqp_prune.graph.channels import IntArray
from qcqp_prune.train.entities import Entities


class RowValues(NamedTuple):
    """What the rows of all blocks have, in the order of ``RowSums``.

    Attributes:
        square: ``(rows,)`` sum of squares.
        largest: ``(rows,)`` largest absolute value.
        stacked: for each shape the matrices ``(blocks, rows of one, k)``.
        where: for each shape the place of the largest entry, ``(blocks, rows of one, 1)``.
    """

    square: Tensor
    largest: Tensor
    stacked: list[Tensor]
    where: list[Tensor]


class RowSums:
    """Stacks the blocks of one shape, so that the number of operations follows the number of shapes.

    Attributes:
        owner: ``(rows,)`` entity of each row in stacked order; ``count`` for rows without one.
        block: ``(rows,)`` block of each row in stacked order.
        sizes: ``(count,)`` weights in each entity.
    """

    def __init__(self, entities: Entities, tensors: Sequence[Tensor]) -> None:
        self.entities = entities
        shapes: dict[tuple[int, ...], list[int]] = {}
        for k, (block, tensor) in enumerate(zip(entities.blocks, tensors, strict=True)):
            shapes.setdefault(tuple(block.view(tensor).shape), []).append(k)
        self._stacks = list(shapes.values())
        order, block_of, width = [], [], []
        for (rows, k), members in shapes.items():
            for member in members:
                first = entities.blocks[member].first
                order.append(np.arange(first, first + rows))
                block_of.append(np.full(rows, member))
                width.append(np.full(rows, k))
        self._order = np.concatenate(order)
        owner = entities.owner[self._order]
        self.sizes: IntArray = np.zeros(entities.count + 1, np.int64)
        np.add.at(self.sizes, owner, np.concatenate(width))
        self.sizes = self.sizes[:-1]
        self.owner = torch.from_numpy(np.where(owner < 0, entities.count, owner))
        self.block = torch.from_numpy(np.concatenate(block_of))

    def values(self, tensors: Sequence[Tensor]) -> RowValues:
        """Sums of squares and largest entries of all rows."""
        self._follow(tensors[0].device)
        squares, largest, stacked, where = [], [], [], []
        for members in self._stacks:
            matrices = torch.stack([self.entities.blocks[k].view(tensors[k]) for k in members])
            most, at = matrices.abs().max(dim=-1, keepdim=True)
            squares.append(torch.linalg.vecdot(matrices, matrices).flatten())
            largest.append(most.flatten())
            stacked.append(matrices)
            where.append(at)
        return RowValues(torch.cat(squares), torch.cat(largest), stacked, where)

    def counted(self, tensors: Sequence[Tensor], small: float) -> Tensor:
        """How many entries of each row are below ``small`` in absolute value, ``(rows,)``."""
        self._follow(tensors[0].device)
        found = [
            (torch.stack([self.entities.blocks[k].view(tensors[k]) for k in members]).abs() < small)
            .sum(-1)
            .flatten()
            for members in self._stacks
        ]
        return torch.cat(found)

    def gradients(self, values: RowValues, scale: Tensor, tip: Tensor) -> list[Tensor]:
        """``scale * w`` for each row, and ``tip * sign(w_k)`` at its largest entry ``k``, in the weights' shapes.

        Args:
            values: from ``values``.
            scale: ``(rows,)``.
            tip: ``(rows,)``.
        """
        out: list[Tensor] = [torch.empty(0)] * len(self.entities.blocks)
        start = 0
        for members, matrices, at in zip(self._stacks, values.stacked, values.where, strict=True):
            rows = matrices.shape[0] * matrices.shape[1]
            shape = (*matrices.shape[:2], 1)
            gradient = matrices * scale[start : start + rows].reshape(shape)
            tips = tip[start : start + rows].reshape(shape) * matrices.gather(-1, at).sign()
            gradient.scatter_add_(-1, at, tips)
            start += rows
            for k, matrix in zip(members, gradient.unbind(), strict=True):
                out[k] = self.entities.blocks[k].unview(matrix)
        return out

    def _follow(self, device: torch.device) -> None:
        """The network may have moved since."""
        if self.owner.device != device:
            self.owner, self.block = self.owner.to(device), self.block.to(device)
