"""A budget as the target of a regulariser: the price of each resource is found while the network trains."""

from __future__ import annotations

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
from qcqp_prune.program.relaxed import relaxed_use
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
class ControlPoint:
    """The controller at one of its updates.

    Attributes:
        step: optimiser steps done.
        used: by resource, its relaxed use as a share of the limit.
        multipliers: by resource, what exceeding the limit by the whole limit costs, in units of the loss.
    """

    step: int
    used: Mapping[str, float]
    multipliers: Mapping[str, float]

    @property
    def violation(self) -> float:
        """By how much the worst budget is exceeded, as a share of its limit; 0 where all are met."""
        return max(0.0, *(use - 1 for use in self.used.values()))


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
        rate, damping: steps of the multipliers.
        every: optimiser steps between updates.

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
        for name, value in (("rate", rate), ("damping", damping), ("every", every)):
            if not value > 0:
                raise InvalidOptionError(f"{name}={value!r}: give a positive number")
        self.regularizer, self.graph = regularizer, graph
        self.rate, self.damping, self.every = rate, damping, int(every)
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
        if self._step % self.every == 0:
            self._update()

    def presence(self) -> FloatArray:
        """The relaxed mask of each unit, ``(units,)``: the largest indicator of its entities, 1 without any."""
        return by_unit(self.graph, self.regularizer.unit_of, self.regularizer.indicators())

    def describe(self) -> dict[str, Any]:
        """The regulariser, and the budgets in whole units."""
        limits = {row.resource: row.limit for row in self._rows}
        steps = {"rate": self.rate, "damping": self.damping, "every": self.every}
        return {"kind": "budget", "limits": limits, **steps, "of": dict(self.regularizer.describe())}

    def state_dict(self) -> dict[str, Tensor]:
        """Multipliers, steps done, and what the regulariser holds."""
        own = {"multipliers": torch.from_numpy(self._multipliers.copy()), "step": torch.tensor(self._step)}
        return own | {f"of/{name}": value for name, value in self.regularizer.state_dict().items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from ``state_dict``."""
        self._multipliers, self._step = state["multipliers"].numpy().copy(), int(state["step"])
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
            self._multipliers = np.maximum(0.0, self._multipliers + self.rate * gap)
        prices = np.maximum(0.0, self._multipliers + self.damping * gap)
        of_unit = (prices @ np.asarray(costs))[self.graph.group_of_unit]
        self.regularizer.set_prices(of_unit[self.regularizer.unit_of] * self._shares)
        names = [row.resource for row in self._rows]
        self.trace.append(
            ControlPoint(
                self._step,
                dict(zip(names, (gap + 1).tolist(), strict=True)),
                dict(zip(names, self._multipliers.tolist(), strict=True)),
            )
        )
