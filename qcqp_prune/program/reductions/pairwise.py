"""What the linear reductions share: they differ only in how they model a pair of groups."""

from __future__ import annotations

from abc import ABC, abstractmethod

from qcqp_prune.program.coefficients import Coefficient, FloatArray
from qcqp_prune.program.program import GroupPair, Program
from qcqp_prune.program.reductions.counts import CountModel
from qcqp_prune.program.reductions.linear_model import LinearModel


class PairwiseReduction(ABC):
    """Exact mixed-integer linear model of a program.

    Attributes:
        name: what a user calls it by.
        largest: matrix entries beyond which the model is not built.
    """

    name: str
    largest: int

    @abstractmethod
    def nonzeros(self, program: Program) -> int:
        """About how many matrix entries the model has."""

    @abstractmethod
    def add_pair(self, model: CountModel, pair: GroupPair) -> None:
        """Add a pair of groups, or a group with itself, whose coefficient is a matrix."""

    def accepts(self, program: Program) -> bool:
        """Whether the model stays within a gigabyte or a few."""
        return self.nonzeros(program) <= self.largest

    def apply(self, program: Program) -> LinearModel:
        """The model; its maximum over integer points is the program's."""
        model = CountModel(program)
        for pair in program.pairs:
            if is_scalar(pair.coef):
                _add_count_product(model, pair.first, pair.second, float(pair.coef))  # type: ignore[arg-type]
            else:
                self.add_pair(model, pair)
        model.add_budgets()
        return model.builder.build()

    def invert(self, program: Program, values: FloatArray) -> FloatArray:
        """The program's variables: the first columns."""
        return values[: program.size]


def is_scalar(coef: Coefficient) -> bool:
    """Whether a coefficient stands for a constant matrix: ``c n_g n_h``, no product of units is needed."""
    return isinstance(coef, float | int)


def _add_count_product(model: CountModel, g: int, h: int, coefficient: float) -> None:
    """Add ``coefficient * n_g n_h`` to the objective through a column of its own."""
    if coefficient == 0.0:
        return
    product, first, second = model.product(g, h), model.count_of(g), model.count_of(h)
    top = float(model.high[g] * model.high[h])
    copy = model.builder.columns(1, top, lambda x: first(x) * second(x), objective=coefficient)
    model.builder.rows(1, (copy, 1.0), (product, -1.0), lower=0.0, upper=0.0)
