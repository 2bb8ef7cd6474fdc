"""A budget as the target of a regulariser: the price of each resource is found while the network trains."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from qcqp_prune.errors import InvalidOptionError
from qcqp_prune.graph.channels import BoolArray, ChannelGraph, IntArray
from qcqp_prune.graph.idle import idle
from qcqp_prune.program.coefficients import FloatArray
from qcqp_prune.program.forms import PairwiseForm
from qcqp_prune.program.problem import Budgets, PruningProblem
from qcqp_prune.program.relaxed import ControlPoint, balanced_worth, relaxed_use
from qcqp_prune.solve.run import solve
from qcqp_prune.train.entities import by_unit, of_entities
from qcqp_prune.train.regularizer import Regularizer

_SEARCH = "block_coordinate"
"""Selects during training, where a good selection at once is worth more than the best one later."""

_NOISE = 0.01
"""A share of the limit by which the use may rise between two updates without meaning anything."""


class PricedRegularizer(Regularizer, Protocol):
    """A regulariser of entities that belong to units, whose strength can be set for each: SPR, or PSP on channels."""

    @property
    def unit_of(self) -> IntArray:
        """The unit of each entity, ``(entities,)``."""

    def sizes(self) -> FloatArray:
        """How large each entity is, ``(entities,)``, in units of its own layer; 0 for one that vanished."""

    def set_prices(self, prices: FloatArray, /) -> None:
        """Set the strength of each entity's penalty, ``(entities,)``."""


@dataclass(frozen=True)
class Control:
    """How prices follow budgets.

    Attributes:
        rate: step of the multipliers.
        damping: weight of the present violation beside its sum over time.
        every: optimiser steps between updates.
        reselect: updates between two selections of what is to go.

    Raises:
        InvalidOptionError: one is not positive.
    """

    rate: float = 0.2
    damping: float = 1.0
    every: int = 5
    reselect: int = 10

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if not (math.isfinite(value) and value > 0):
                raise InvalidOptionError(f"{name}={value!r}: give a positive number")


class BudgetController:
    """A regulariser whose strengths follow budgets, so that no strength is searched for.

    Now and then a solver selects units ``S`` that meet the budgets and retain the most of the sizes of entities, each
    beside the largest of its group (``balanced_worth``). Units of S are not charged. Of any other the root of that is
    left, and ``n_g`` are the units of S and what is left of the others. With ``v_k = (form_k(n) - form_k(S)) /
    limit_k``, every few steps

        ``mu_k <- max(0, mu_k + rate v_k (1 + mu_k))``,   ``price_k = max(0, mu_k + damping v_k)``

    and each entity of a unit outside of S is charged what that costs, ``sum_k price_k (d form_k / d n_g) / limit_k``,
    shared among the entities of one unit (``of_entities``), in place of ``lambda u_i / sum u``. This is the augmented
    Lagrangian of "minimise the loss where w = 0 outside of S". A multiplier finds the scale of the loss in few steps
    whatever that is; where the use rises under it, it throws weights about zero instead of pressing them there, and is
    halved.

    The indicators ``y~`` are no measure here: their sum may be a quarter of the units in a dense network, and falls
    with all weights together, which a norm behind them undoes, so that budgets would be met that nothing was removed
    for; and they are all 1 where norms are as they were made.

    Args:
        regularizer: SPR, or PSP with ``structure="channel"``, of the network.
        graph: its channel graph.
        budgets: as for ``PruningProblem.build``.
        control: how prices follow the budgets; ``Control()`` where None.
        resources: further resources.

    Attributes:
        trace: one point for each update.

    Raises:
        InvalidOptionError: the budgets ask for units that the regulariser does not act on.
        InvalidBudgetError, InfeasibleError: the budgets cannot be read, or met.

    References:
        Nocedal and Wright, "Numerical Optimization" (2006), section 17.3, for the augmented Lagrangian.
    """

    def __init__(
        self,
        regularizer: PricedRegularizer,
        graph: ChannelGraph,
        budgets: Budgets,
        control: Control | None = None,
        *,
        resources: Sequence[Any] = (),
    ) -> None:
        self.regularizer, self.graph = regularizer, graph
        self.steps = Control() if control is None else control
        # The problem knows how budgets are read, and whether they can be met at all.
        worthless = PairwiseForm(np.zeros(graph.unit_count))
        self._problem = PruningProblem.build(graph, worthless, budgets, resources=resources)
        self._selected = np.ones(graph.unit_count, np.bool_)
        self._multipliers = np.zeros(len(self._problem.limits))
        self._step = 0
        self._idle = idle(graph, regularizer.unit_of)
        # The largest size of each group, for those of which S has none.
        self._start = self._largest(self._own_sizes(), self._selected)
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
        """How much of each unit is left, ``(units,)`` in [0, 1]; 1 for those that are to stay."""
        return np.where(self._selected, 1.0, np.sqrt(self._sizes()))

    def describe(self) -> dict[str, Any]:
        """The regulariser, and the budgets in whole units."""
        of = dict(self.regularizer.describe())
        return {"kind": "budget", "limits": self._problem.limits, **asdict(self.steps), "of": of}

    def state_dict(self) -> dict[str, Tensor]:
        """Multipliers, selection, steps done, the trace, and what the regulariser holds."""
        trace = [[p.step, *p.used.values(), *p.multipliers.values()] for p in self.trace]
        own = {
            "multipliers": torch.from_numpy(self._multipliers.copy()),
            "selected": torch.from_numpy(self._selected.copy()),
            "start": torch.from_numpy(self._start.copy()),
            "step": torch.tensor(self._step),
            "trace": torch.tensor(trace, dtype=torch.float64),
        }
        return own | {f"of/{name}": value for name, value in self.regularizer.state_dict().items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from ``state_dict``."""
        self._multipliers, self._step = state["multipliers"].numpy().copy(), int(state["step"])
        self._selected, self._start = state["selected"].numpy().copy(), state["start"].numpy().copy()
        self.trace = [self._point(*row) for row in state["trace"].tolist()]
        inner = {name.removeprefix("of/"): v for name, v in state.items() if name.startswith("of/")}
        self.regularizer.load_state_dict(inner)

    def _update(self) -> None:
        anew = len(self.trace) % self.steps.reselect == 0
        if anew:
            self._select()
        counts, chosen = (
            np.bincount(self.graph.group_of_unit, weights=masks, minlength=len(self.graph.groups))
            for masks in (self.presence(), self._selected)
        )
        used, excess, costs = [], [], []
        for row in self._problem.budgeted:
            assert row.limit is not None
            use, slopes = relaxed_use(row.form, counts)
            used.append(use / row.limit)
            excess.append((use - relaxed_use(row.form, chosen)[0]) / row.limit)
            costs.append(slopes / row.limit)
        gap = np.asarray(excess)
        if self._step:
            growth = self.steps.rate * gap * (1 + self._multipliers)
            risen = np.asarray(used) > np.asarray(list(self.trace[-1].used.values())) + _NOISE
            self._multipliers = np.where(
                risen & ~anew, self._multipliers / 2, np.maximum(0.0, self._multipliers + growth)
            )
        prices = np.maximum(0.0, self._multipliers + self.steps.damping * gap)
        of_unit = np.where(self._selected, 0.0, (prices @ np.asarray(costs))[self.graph.group_of_unit])
        self.regularizer.set_prices(of_entities(self.graph, self.regularizer.unit_of, of_unit))
        self.trace.append(self._point(self._step, *used, *self._multipliers.tolist()))

    def _select(self) -> None:
        """Choose S. Units that the regulariser does not act on are worth more than all others together."""
        worth = balanced_worth(self._problem, self._sizes()).unary
        worth = worth + self._idle * worth.sum()
        self._selected = solve(self._problem.with_objective(PairwiseForm(worth)), _SEARCH).masks.flat(
            self.graph
        )
        if (lost := np.flatnonzero(self._idle & ~self._selected)).size:
            group = self.graph.groups[self.graph.group_of_unit[lost[0]]].id
            raise InvalidOptionError(
                f"these budgets ask for units of {group}, on which the regulariser does not act (its weights are "
                "frozen, left out by layers, or of a kind that it leaves alone): let it act on more, or ask for less"
            )

    def _sizes(self) -> FloatArray:
        """The size of each unit beside the largest of its group that is selected, ``(units,)`` in [0, 1]."""
        sizes = self._own_sizes()
        largest = self._largest(sizes, self._selected)
        beside = np.where(largest > 0, largest, self._start)
        return np.minimum(1.0, sizes / beside[self.graph.group_of_unit])

    def _own_sizes(self) -> FloatArray:
        return by_unit(self.graph, self.regularizer.unit_of, self.regularizer.sizes())

    def _largest(self, sizes: FloatArray, among: BoolArray) -> FloatArray:
        """The largest size in each group among some units, ``(groups,)``; 0 without any."""
        largest = np.zeros(len(self.graph.groups))
        np.maximum.at(largest, self.graph.group_of_unit[among], sizes[among])
        return largest

    def _point(self, step: float, *numbers: float) -> ControlPoint:
        """A point of the trace from its step, uses and multipliers."""
        names = list(self._problem.limits)
        used, multipliers = numbers[: len(names)], numbers[len(names) :]
        return ControlPoint(
            int(step), dict(zip(names, used, strict=True)), dict(zip(names, multipliers, strict=True))
        )
