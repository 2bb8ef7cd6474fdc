"""A budget as the target of a regulariser: the price of each resource is found while the network trains."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from qcqp_prune.errors import InvalidOptionError
from qcqp_prune.graph.channels import ChannelGraph, IntArray
from qcqp_prune.program.coefficients import FloatArray
from qcqp_prune.program.forms import PairwiseForm
from qcqp_prune.program.problem import Budgets, PruningProblem
from qcqp_prune.program.relaxed import ControlPoint, relaxed_use
from qcqp_prune.train.entities import by_unit
from qcqp_prune.train.regularizer import Regularizer


class PricedRegularizer(Regularizer, Protocol):
    """A regulariser of entities that belong to units, whose strength can be set for each: SPR, or PSP on channels."""

    @property
    def unit_of(self) -> IntArray:
        """The unit of each entity, ``(entities,)``."""

    def indicators(self) -> FloatArray:
        """How far each entity is there, ``(entities,)`` in [0, 1]."""

    def set_prices(self, prices: FloatArray, /) -> None:
        """Set the strength of each entity's penalty, ``(entities,)``."""


@dataclass(frozen=True)
class Control:
    """How fast prices follow budgets.

    Attributes:
        rate: step of the multipliers.
        damping: weight of the present violation beside its sum over time.
        every: optimiser steps between updates.

    Raises:
        InvalidOptionError: one is not positive.
    """

    rate: float = 0.05
    damping: float = 1.0
    every: int = 20

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if not (math.isfinite(value) and value > 0):
                raise InvalidOptionError(f"{name}={value!r}: give a positive number")


class BudgetController:
    """A regulariser whose strengths follow budgets: the dual of ``min loss s.t. form_k(y~) <= limit_k``.

    With ``n_g`` the sum of the relaxed indicators of a group and ``v_k = form_k(n) / limit_k - 1``, every few steps

        ``mu_k <- max(0, mu_k + rate v_k)``,   ``price_k = max(0, mu_k + damping v_k)``

    and each entity is charged what its unit costs there, ``sum_k price_k (d form_k / d n_g) / limit_k``, shared among
    the entities of one unit, in place of ``lambda u_i / sum u``: no strength is searched for.

    Args:
        regularizer: SPR, or PSP with ``structure="channel"``, of the network.
        graph: its channel graph.
        budgets: as for ``PruningProblem.build``.
        resources: further resources.
        rate, damping, every: as in ``Control``.

    Attributes:
        trace: one point for each update.

    Raises:
        InvalidOptionError: a step is not positive.
        InvalidBudgetError, InfeasibleError: the budgets cannot be read, or met.

    References:
        Nocedal and Wright, "Numerical Optimization" (2006), section 17.3, for the augmented Lagrangian.
    """

    def __init__(
        self,
        regularizer: PricedRegularizer,
        graph: ChannelGraph,
        budgets: Budgets,
        *,
        resources: Sequence[Any] = (),
        rate: float = 0.05,
        damping: float = 1.0,
        every: int = 20,
    ) -> None:
        self.regularizer, self.graph = regularizer, graph
        self.steps = Control(rate, damping, every)
        # The problem knows how budgets are read, and whether they can be met at all.
        worthless = PairwiseForm(np.zeros(graph.unit_count))
        problem = PruningProblem.build(graph, worthless, budgets, resources=resources)
        self._rows = problem.budgeted
        self._multipliers = np.zeros(len(self._rows))
        self._step = 0
        self._shares = 1.0 / np.bincount(regularizer.unit_of, minlength=graph.unit_count)[regularizer.unit_of]
        self.trace: list[ControlPoint] = []
        self._update()

    def __call__(self) -> Tensor:
        """The penalty at the present prices."""
        return self.regularizer()

    def after_step(self) -> None:
        """Count the step, and look at the budgets every few of them."""
        self.regularizer.after_step()
        self._step += 1
        if self._step % self.steps.every == 0:
            self._update()

    def presence(self) -> FloatArray:
        """The relaxed mask of each unit, ``(units,)``: the largest indicator of its entities, 1 without any."""
        return by_unit(self.graph, self.regularizer.unit_of, self.regularizer.indicators())

    def describe(self) -> dict[str, Any]:
        """The regulariser, and the budgets in whole units."""
        limits = {row.resource: row.limit for row in self._rows}
        of = dict(self.regularizer.describe())
        return {"kind": "budget", "limits": limits, **asdict(self.steps), "of": of}

    def state_dict(self) -> dict[str, Tensor]:
        """Multipliers, steps done, the trace, and what the regulariser holds."""
        trace = [[p.step, *p.used.values(), *p.multipliers.values()] for p in self.trace]
        own = {
            "multipliers": torch.from_numpy(self._multipliers.copy()),
            "step": torch.tensor(self._step),
            "trace": torch.tensor(trace, dtype=torch.float64),
        }
        return own | {f"of/{name}": value for name, value in self.regularizer.state_dict().items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from ``state_dict``."""
        self._multipliers, self._step = state["multipliers"].numpy().copy(), int(state["step"])
        self.trace = [self._point(*row) for row in state["trace"].tolist()]
        inner = {name.removeprefix("of/"): v for name, v in state.items() if name.startswith("of/")}
        self.regularizer.load_state_dict(inner)

    def _update(self) -> None:
        counts = np.bincount(
            self.graph.group_of_unit, weights=self.presence(), minlength=len(self.graph.groups)
        )
        violations, costs = [], []
        for row in self._rows:
            assert row.limit is not None
            used, slopes = relaxed_use(row.form, counts)
            violations.append(used / row.limit - 1)
            costs.append(slopes / row.limit)
        gap = np.asarray(violations)
        if self._step:
            self._multipliers = np.maximum(0.0, self._multipliers + self.steps.rate * gap)
        prices = np.maximum(0.0, self._multipliers + self.steps.damping * gap)
        of_unit = (prices @ np.asarray(costs))[self.graph.group_of_unit]
        self.regularizer.set_prices(of_unit[self.regularizer.unit_of] * self._shares)
        self.trace.append(self._point(self._step, *(gap + 1).tolist(), *self._multipliers.tolist()))

    def _point(self, step: float, *numbers: float) -> ControlPoint:
        """A point of the trace from its step, uses and multipliers."""
        names = [row.resource for row in self._rows]
        used, multipliers = numbers[: len(names)], numbers[len(names) :]
        return ControlPoint(
            int(step), dict(zip(names, used, strict=True)), dict(zip(names, multipliers, strict=True))
        )
