"""Which units of a group go first, when the weights that read them are refitted to what is left."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from qcqp_prune.errors import InvalidScoreError
from qcqp_prune.graph.channels import IntArray
from qcqp_prune.importance.readers import Reader
from qcqp_prune.program.coefficients import FloatArray

STEPS = 64
"""A group of more units goes in so many steps of several units each."""

_RIDGES = tuple(10.0**k for k in range(-12, 1))
"""What is tried one after another where a covariance cannot be inverted."""


@dataclass(frozen=True, eq=False)
class Elimination:
    """The order in which units of a group go.

    Attributes:
        order: ``(units,)`` positions in the group, first to go first; the last one is never removed.
        costs: ``(units,)`` what each removal adds to the error, given those before it; the last entry repeats the one
            before.
        refits: for each number of removed units that was asked for, the weight of each reader as a matrix, in their
            order.
    """

    order: IntArray
    costs: FloatArray
    refits: dict[int, list[Tensor]]


def eliminate(
    readers: Sequence[tuple[Reader, Tensor]], units: int, snapshots: Collection[int], *, ridge: float
) -> Elimination:
    """Remove units one by one, each time the one that costs the least.

    With C the covariance of what a reader reads, the least squares error of its outputs under weights W of which the
    columns I are held at zero grows by ``sum_o f_o w_o [C^-1]_II^-1 w_o^T / 2`` with ``w_o`` row o of ``W_I``, and the
    best other weights are ``W - W_I [C^-1]_II^-1 [C^-1]_I``: the surgeon of Hassibi and Stork for blocks of columns.
    ``f_o``, the curvature of output o, makes errors of different readers comparable.

    Args:
        readers: each with the columns of each unit, ``(units, columns of one)``.
        units: how many there are.
        snapshots: numbers of removed units for which weights are wanted.
        ridge: as for ``Reader.covariance``.

    Raises:
        InvalidScoreError: a covariance cannot be inverted, whatever the ridge.

    References:
        Hassibi, Stork: "Second order derivatives for network pruning: optimal brain surgeon" (NeurIPS 1992).
        Meng et al.: "OSSCAR: one-shot structured pruning in vision and language models with combinatorial
        optimization" (ICML 2024), for the objective.
    """
    parts = [_Part(reader, columns, ridge) for reader, columns in readers if columns.numel()]
    left = torch.ones(units, dtype=torch.bool)
    order: list[int] = []
    costs: list[float] = []
    refits: dict[int, list[Tensor]] = {}
    step = -(-units // STEPS)
    while len(order) < units - 1:
        cost = sum((part.costs() for part in parts), torch.zeros(units, dtype=torch.float64))
        cost[~left] = torch.inf
        upcoming = min((n for n in snapshots if n > len(order)), default=units)
        many = min(step, units - 1 - len(order), upcoming - len(order))
        going = torch.argsort(cost, stable=True)[:many]
        for part in parts:
            part.remove(going)
        left[going] = False
        order += going.tolist()
        costs += cost[going].clamp(min=0).tolist()
        if len(order) in snapshots:
            refits[len(order)] = [part.weight.clone() for part in parts]
    order += torch.nonzero(left).flatten().tolist()
    costs.append(costs[-1] if costs else 0.0)
    return Elimination(np.asarray(order, np.int64), np.asarray(costs), refits)


class _Part:
    """One reader: its weight and the inverse of its covariance, as units go."""

    def __init__(self, reader: Reader, columns: Tensor, ridge: float) -> None:
        covariance = reader.covariance(ridge)
        self.weight, self.columns = reader.weight.clone(), columns
        self._full = covariance.ndim == 2
        self._inverse = _inverse(reader, ridge) if self._full else covariance
        self._scale = (
            torch.ones(len(reader.weight)).double() if reader.curvature is None else reader.curvature
        )

        if not self._full:  # what goes changes nothing for the others
            by_column = (self._scale @ self.weight.square()) * covariance
            self._fixed = by_column[columns].sum(1) / 2

    def costs(self) -> Tensor:
        """What removing each unit adds to the error, ``(units,)``."""
        if not self._full:
            return self._fixed
        mine = self.weight[:, self.columns]  # (outputs, units, columns of one)
        outer = torch.einsum("o,ouc,oud->ucd", self._scale, mine, mine)
        return (outer * self._blocks(self.columns)).sum((1, 2)) / 2

    def remove(self, units: Tensor) -> None:
        """Hold the columns of some units at zero, and refit the others."""
        gone = self.columns[units].flatten()
        if self._full:
            to_all = torch.linalg.solve(self._inverse[gone][:, gone], self._inverse[gone])
            self.weight -= self.weight[:, gone] @ to_all
            self._inverse -= self._inverse[:, gone] @ to_all
            self._inverse[gone] = 0
            self._inverse[:, gone] = 0
            self._inverse[gone, gone] = 1
        self.weight[:, gone] = 0

    def _blocks(self, columns: Tensor) -> Tensor:
        """The inverse of each unit's block of the inverse, ``(units, columns of one, columns of one)``."""
        blocks: Tensor = torch.linalg.inv(self._inverse[columns[:, :, None], columns[:, None, :]])
        return blocks


def _inverse(reader: Reader, ridge: float) -> Tensor:
    """The inverse of a reader's covariance, with the first ridge for which rounding leaves it positive definite."""
    for share in (ridge, *(larger for larger in _RIDGES if larger > ridge)):
        factor, failed = torch.linalg.cholesky_ex(reader.covariance(share))
        if not failed:
            return torch.cholesky_inverse(factor)
    raise InvalidScoreError(
        "what a layer reads on the calibration data has no covariance that can be inverted: check the data and the "
        "weights for values that are huge or not finite, or choose Magnitude"
    )
