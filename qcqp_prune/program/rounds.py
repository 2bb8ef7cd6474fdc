"""A problem in several steps: what each may still use, and what is left to choose from."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from numbers import Integral
from typing import Literal, get_args

import numpy as np

from qcqp_prune.errors import InvalidOptionError, require_kind
from qcqp_prune.graph.channels import BoolArray
from qcqp_prune.graph.narrowed import Narrowed, narrowed
from qcqp_prune.program.forms import CountForm, PairwiseForm, PeakForm, UseForm
from qcqp_prune.program.problem import PruningProblem, least_counts

Spacing = Literal["geometric", "linear"]


@dataclass(frozen=True)
class Rounds:
    """Gradual pruning: several rounds of scoring, solving, cutting and finetuning, until the budgets are met.

    After round ``k`` of ``n`` a resource may use ``dense (limit / dense)^(k / n)`` where the spacing is geometric, so
    that each round removes an equal share of what is left, and ``dense - (dense - limit) k / n`` where it is linear.
    All of these are counts of the network that pruning began with, and so is the last, which is the budget itself.

    Attributes:
        count: of rounds; 1 prunes at once.
        epochs: of finetuning after each cut but the last, which the epochs of the recovery follow.
        spacing: geometric or linear.

    Raises:
        InvalidOptionError: a value is outside its domain.
    """

    count: int
    epochs: int
    spacing: Spacing = "geometric"

    def __post_init__(self) -> None:
        for name in ("count", "epochs"):
            require_kind(f"Rounds: {name}", getattr(self, name), Integral, "a whole number")
        checks = {
            "count": (self.count >= 1, "a number of rounds from 1 up"),
            "epochs": (self.epochs >= 0, "a number from 0 up"),
            "spacing": (self.spacing in get_args(Spacing), "geometric or linear"),
        }
        for name, (valid, wanted) in checks.items():
            if not valid:
                raise InvalidOptionError(f"Rounds: {name} is {getattr(self, name)!r}; give {wanted}.")

    def limit(self, number: int, dense: int, limit: int) -> int:
        """What may be used after round ``number``, counted from 1; after the last it is ``limit``."""
        if number >= self.count or limit >= dense:
            return limit
        if self.spacing == "linear":
            return dense - (dense - limit) * number // self.count
        return max(limit, math.floor(dense * math.pow(limit / dense, number / self.count)))

    def limits(self, number: int, problem: PruningProblem) -> Mapping[str, int]:
        """By resource, what may be used after round ``number`` of a problem of the dense network."""
        return {
            row.resource: self.limit(number, row.dense, row.limit)
            for row in problem.rows
            if row.limit is not None
        }


def left_to_choose(problem: PruningProblem, flat: BoolArray) -> tuple[PruningProblem, Narrowed]:
    """The same problem over the units that are left, not scored yet; all uses are those of the whole network.

    Args:
        problem: over the graph of the dense network.
        flat: ``(unit_count,) bool``, what is left.

    Returns:
        The problem over the graph of what is left, whose every selection uses what the same selection of the whole
        graph uses; and where its units were.
    """
    left = narrowed(problem.graph, flat)
    new = {int(g): {k: 1} for k, g in enumerate(left.groups)}
    rows = []
    for row in problem.rows:
        form = _substituted(row.form, new)
        rows.append(replace(row, form=form, smallest=form.evaluate(least_counts(left.graph))))
    worthless = PairwiseForm(np.zeros(left.graph.unit_count))
    return PruningProblem(left.graph, worthless, tuple(rows)), left


def with_limits(problem: PruningProblem, limits: Mapping[str, int]) -> PruningProblem:
    """The same problem with other upper limits for the resources that have one.

    Raises:
        InfeasibleError: one is below the smallest attainable use.
    """
    rows = tuple(replace(row, limit=limits.get(row.resource, row.limit)) for row in problem.rows)
    changed = replace(problem, rows=rows)
    changed.require_feasible()
    return changed


def _substituted(form: UseForm, new: Mapping[int, Mapping[int, int]]) -> UseForm:
    if isinstance(form, CountForm):
        return form.substituted(new, len(new))
    return PeakForm.of(part.substituted(new, len(new)) for part in form.parts)
