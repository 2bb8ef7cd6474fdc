"""Training under a regulariser until units vanish, and what its relaxed masks say of the selection to solve for."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from torch import nn

from qcqp_prune.analyse import RelaxedMasks
from qcqp_prune.errors import InvalidOptionError
from qcqp_prune.graph.channels import BoolArray, ChannelGraph
from qcqp_prune.importance.losses import Loss
from qcqp_prune.program.forms import PairwiseForm
from qcqp_prune.program.problem import Budgets, PruningProblem, Resource
from qcqp_prune.program.relaxed import marginal_prices, rounding_worth
from qcqp_prune.report import Regularised
from qcqp_prune.train import (
    PSP,
    SPR,
    BudgetController,
    Control,
    FinetuneConfig,
    PSPConfig,
    SPRConfig,
    finetune,
)
from qcqp_prune.train.batches import Loader
from qcqp_prune.train.entities import by_unit
from qcqp_prune.train.loop import require_unsmoothed
from qcqp_prune.train.spr import Bounds

_UNFINISHED = 0.05
"""By how much of its limit the relaxed use may exceed a budget without a note."""


@dataclass(frozen=True)
class Training:
    """Training under a regulariser, before anything is cut.

    Attributes:
        loader: yields ``(inputs, targets)``.
        epochs: passes over it.
        method: ``SPRConfig(...)``, or ``PSPConfig("channel", spread=None)``; the published start of PSP, which is its
            default, silences most structures of a network that is trained already.
        control: how prices follow the budgets, in place of the strength of the method; None trains as published, with
            the method's strength.
        bounds: for SPR, ``M`` of each layer, as for ``SPR``.
        layers: names or globs of the layers that are regularised; the method's own choice where None.
        config: the recipe. With ``distillation`` the network that was handed in is the teacher.
        checkpoint: a file from which a killed training goes on.
        loss: as for ``finetune``.

    Raises:
        InvalidOptionError: epochs is not positive, weights are averaged, structures of PSP are no units, bounds are
            given for PSP, or labels are smoothed for a loss of one's own.
    """

    loader: Loader = field(repr=False)
    epochs: int
    method: SPRConfig | PSPConfig = field(default_factory=lambda: SPRConfig(structure="units"))
    control: Control | None = field(default_factory=Control)
    bounds: Bounds = "running"
    layers: Sequence[str] | None = None
    config: FinetuneConfig = field(default_factory=FinetuneConfig)
    checkpoint: str | os.PathLike[str] | None = None
    loss: Loss | None = None

    def __post_init__(self) -> None:
        if self.epochs < 1:
            raise InvalidOptionError(f"epochs is {self.epochs}: give a positive number")
        require_unsmoothed(self.config, self.loss)
        if self.config.ema:
            raise InvalidOptionError(
                f"ema is {self.config.ema}: in an average nothing has vanished; average in the finetuning after the cut"
            )
        if isinstance(self.method, PSPConfig):
            if self.method.structure != "channel":
                raise InvalidOptionError(
                    f'structure={self.method.structure!r} are no units of the graph: take PSPConfig("channel"), or use '
                    "PSP and finetune by themselves"
                )
            if self.bounds != "running":
                raise InvalidOptionError("bounds are for SPR: leave them out")
        elif not isinstance(self.method, SPRConfig):
            raise InvalidOptionError(f"method is {self.method!r}: give an SPRConfig or a PSPConfig")

    @property
    def name(self) -> str:
        """The method in words."""
        if isinstance(self.method, PSPConfig):
            return f"PSP({self.method.structure})"
        return f"SPR({self.method.variant}, {self.method.structure})"


@dataclass(frozen=True, eq=False)
class Trained:
    """What a training ended with.

    Attributes:
        relaxed: the relaxed mask of each unit.
        kept: ``(units,) bool``, what the published rule keeps.
        record: for the report.
    """

    relaxed: RelaxedMasks
    kept: BoolArray
    record: Regularised


def train_regularised(
    model: nn.Module,
    graph: ChannelGraph,
    training: Training,
    budgets: Budgets | None,
    resources: Sequence[Resource] = (),
    *,
    teacher: nn.Module | None = None,
) -> Trained:
    """Train a network in place under a regulariser, with prices that follow the budgets where it says so.

    Args:
        model: the traced network; plain weights come back.
        graph: its channel graph.
        training: what to do.
        budgets: what ``control`` follows.
        resources: further resources.
        teacher: for ``config.distillation``.

    Raises:
        QcqpPruneError: see ``SPR``, ``PSP``, ``BudgetController`` and ``finetune``.
    """
    method: SPR | PSP
    if isinstance(training.method, PSPConfig):
        method = PSP(model, training.method, layers=training.layers, graph=graph)
    else:
        method = SPR(model, graph, training.method, bounds=training.bounds, layers=training.layers)
    control = None
    if training.control is not None and budgets is not None:
        control = BudgetController(method, graph, budgets, training.control, resources=resources)
    history = finetune(
        model,
        training.loader,
        epochs=training.epochs,
        config=training.config,
        checkpoint=training.checkpoint,
        regularizer=method if control is None else control,
        teacher=teacher if training.config.distillation else None,
        loss=training.loss,
    )
    own = by_unit(graph, method.unit_of, method.indicators())
    values = own if control is None else control.presence()
    relaxed = RelaxedMasks.of(graph, values, by=training.name)
    kept = method.kept_units()
    if isinstance(method, PSP):
        method.fold()
    trace = () if control is None else tuple(control.trace)
    return Trained(relaxed, kept, Regularised(training.name, history.to_dict(), trace))


@dataclass(frozen=True, eq=False)
class Indicators:
    """An importance: what units are worth after a training under a regulariser.

    A selection is worth how near it is to the relaxed masks, as in ``rounded``. By the rule, each unit is worth its
    relaxed mask times its marginal cost, and units that count as zero are worth less than nothing; without budgets the
    best selection is then the rule itself, unless floors, multiples, ties or links forbid it, and else differs from it
    in units of little marginal cost.

    Attributes:
        problem: whose budgets the selection is to meet.
        trained: the training.
        by_rule: whether what the published rule calls zero is to go even where the budgets leave room for it.
    """

    problem: PruningProblem
    trained: Trained
    by_rule: bool

    @property
    def variant(self) -> str:
        """The training in words."""
        return self.trained.record.method

    def __call__(self, model: nn.Module, graph: ChannelGraph) -> PairwiseForm:
        """The worth of the units of the graph that was trained."""
        values = self.trained.relaxed.values
        if not self.by_rule:
            return rounding_worth(self.problem, values)
        gain = values if self.problem.budgeted else 1.0 + values
        signed = np.where(self.trained.kept, gain, values - 1.0)
        return PairwiseForm(signed * marginal_prices(self.problem, values))


def unscored(graph: ChannelGraph, budgets: Budgets | None, resources: Sequence[Resource]) -> PruningProblem:
    """The problem before anything is known of its units: whether budgets can be read, and met, shows here."""
    worthless = PairwiseForm(np.zeros(graph.unit_count))
    if budgets is not None:
        return PruningProblem.build(graph, worthless, budgets, resources=resources)
    problem = PruningProblem.build(graph, worthless, "100%", resources=resources)
    return replace(problem, rows=tuple(replace(row, limit=None) for row in problem.rows))


def unfinished(trained: Trained | None) -> tuple[str, ...]:
    """A note where units had not vanished by the end of a training that follows budgets."""
    trace = () if trained is None else trained.record.trace
    if not trace or trace[-1].violation <= _UNFINISHED:
        return ()
    return (
        f"training: at its end the network still exceeded its budgets by {trace[-1].violation:.0%}, so the cut removed "
        "units that were alive: train longer, let the learning rate fall, or raise rate",
    )
