"""The whole job in one call: trace, train or score, solve, cut, verify, and recover accuracy where data is given."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Any

from torch import nn

from qcqp_prune.apply.shrink import Realisation, shrink_and_verify
from qcqp_prune.apply.surgery import copied
from qcqp_prune.apply.verification import Verification
from qcqp_prune.continuous import Indicators, Training, train_regularised, unfinished, unscored
from qcqp_prune.errors import InvalidBudgetError, InvalidOptionError
from qcqp_prune.graph.channels import ChannelGraph
from qcqp_prune.graph.columns import Columns
from qcqp_prune.graph.grouping import Amount
from qcqp_prune.graph.inputs import ExampleInputs
from qcqp_prune.graph.removable import Blocks
from qcqp_prune.graph.trace import Ignored, Sharing, trace
from qcqp_prune.graph.uniform import Uniform
from qcqp_prune.graph.units import Units
from qcqp_prune.importance import Importance, Magnitude
from qcqp_prune.importance.layerwise import require_importance
from qcqp_prune.program.problem import Budgets, PruningProblem, Resource, all_resources
from qcqp_prune.report import Accuracy, PruneReport, Regularised, budget_lines, layer_rows, other_parameters
from qcqp_prune.solve.backend import Backend, get_backend
from qcqp_prune.solve.options import SolveOptions
from qcqp_prune.solve.report import SolveReport
from qcqp_prune.solve.result import TracePoint
from qcqp_prune.solve.run import solve
from qcqp_prune.storage import library_version
from qcqp_prune.train import Evaluation, FinetuneConfig, evaluate, finetune, recalibrate_batch_norm
from qcqp_prune.train.batches import Loader

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Recovery:
    """What is measured, and done after cutting, with data.

    Attributes:
        validation: loader on which accuracy is measured at each step; None measures nothing.
        train: loader for recalibration and finetuning; None does neither.
        recalibrate: whether batch norms get their statistics anew after cutting.
        batches: how many batches recalibration uses at most.
        epochs: of finetuning; 0 for none.
        config: the recipe of the finetuning.
        checkpoint: a file from which a killed finetuning goes on.

    Raises:
        InvalidOptionError: epochs is negative, or asked for without a training loader.
    """

    validation: Loader | None = None
    train: Loader | None = None
    recalibrate: bool = True
    batches: int | None = None
    epochs: int = 0
    config: FinetuneConfig = field(default_factory=FinetuneConfig)
    checkpoint: str | os.PathLike[str] | None = None

    def __post_init__(self) -> None:
        if self.epochs < 0:
            raise InvalidOptionError(f"epochs is {self.epochs}: give a number from 0 up")
        if self.epochs and self.train is None:
            raise InvalidOptionError(
                f"{self.epochs} epochs of finetuning and no train loader: give one, or epochs=0"
            )


class Watcher:
    """Told what happens as it happens. A class that derives from this one defines only what it needs."""

    def phase(self, name: str) -> None:
        """A phase begins: trace, train, score, solve, shrink, recalibrate, finetune or evaluate."""

    def tracing(self, what: str, done: int, total: int) -> None:
        """How far the trace is: what it does, how much of it is done, of how much; 0 of 0 where nobody knows."""

    def traced(self, graph: ChannelGraph) -> None:
        """The graph is there; nothing was asked of it yet."""

    def trained(self, training: Regularised) -> None:
        """The training under a regulariser is over; nothing was cut yet."""

    def progress(self, point: TracePoint) -> None:
        """The solver has a new incumbent or bound."""

    def solved(self, report: SolveReport) -> None:
        """The selection is made and checked."""

    def verified(self, checked: Verification) -> None:
        """The smaller network is there and checked."""

    def evaluated(self, step: str, result: Evaluation) -> None:
        """Accuracy was measured at a step: dense, regularised, pruned, recalibrated or finetuned."""


def prune(
    model: nn.Module,
    example_inputs: ExampleInputs,
    *,
    budgets: Budgets | None = None,
    training: Training | None = None,
    importance: Importance | None = None,
    solver: str | Backend = "auto",
    ignored_layers: Ignored = (),
    round_to: Amount = 1,
    min_keep: Amount = 1,
    units: Units | None = None,
    columns: Columns = False,
    sharing: Sharing = "strict",
    blocks: Blocks = False,
    uniform: Uniform = False,
    resources: Sequence[Resource] = (),
    realisation: Realisation = "auto",
    time_limit: float | None = None,
    seed: int | None = None,
    options: SolveOptions | None = None,
    recovery: Recovery | None = None,
    watch: Watcher | None = None,
) -> tuple[nn.Module, PruneReport]:
    """Prune a network to a budget; the network itself is not changed.

    With ``training`` a copy is first trained under a regulariser, and the solver keeps as much of the relaxed masks
    that this ends with as the budgets hold.

    Args:
        model: any module that ``torch.export`` takes.
        example_inputs: a tensor, a tuple of arguments, or a dict of keyword arguments.
        budgets: as for ``PruningProblem.build``: ``"50%"`` of the MACs, or ``{"macs": "50%", "params": 200_000}``. Only
            a training without ``control`` does without: then what its rule keeps is kept, and its size reported.
        training: training under SPR or PSP before the cut; none unless given.
        importance: what units are worth; unless given ``Magnitude()``, or the relaxed masks of the training.
        solver: as for ``solve``.
        ignored_layers: as for ``trace``.
        round_to: as for ``trace``.
        min_keep: as for ``trace``.
        units: as for ``trace``.
        columns: as for ``trace``.
        sharing: as for ``trace``.
        blocks: as for ``trace``.
        uniform: as for ``trace``.
        resources: further resources to budget and to measure.
        realisation: as for ``shrink_and_verify``.
        time_limit: as for ``solve``.
        seed: as for ``solve``.
        options: as for ``solve``.
        recovery: data to measure accuracy on and to recover it with; none unless given.
        watch: told what happens.

    Returns:
        The smaller network, verified, in the model's train or eval mode, and the report.

    Raises:
        QcqpPruneError: of one kind or another, see ``trace``, ``PruningProblem.build``, ``solve`` and
            ``shrink_and_verify``.
    """
    watch = watch or Watcher()
    clock = _Clock(watch)
    recovery = recovery or Recovery()
    scores: Importance = Magnitude() if importance is None else importance
    require_importance(scores)
    if budgets is None and (training is None or training.control is not None):
        raise InvalidBudgetError('no budget given: ask for something such as budgets={"macs": "50%"}')
    files = [None if x is None else x.checkpoint for x in (training, recovery)]
    if None not in files and len({os.path.abspath(file) for file in files if file is not None}) == 1:
        raise InvalidOptionError(
            f"{files[0]} is the checkpoint of two trainings, before the cut and after it: give two files"
        )
    if training is not None and isinstance(solver, str) and solver != "auto":
        get_backend(solver)  # one that is not there is said before anything is trained
    with clock("trace"):
        graph = trace(
            model,
            example_inputs,
            ignored_layers=ignored_layers,
            round_to=round_to,
            min_keep=min_keep,
            units=units,
            columns=columns,
            sharing=sharing,
            blocks=blocks,
            uniform=uniform,
            progress=watch.tracing,
        )
    watch.traced(graph)
    with clock("score"):
        problem = unscored(graph, budgets, resources)
        if training is None:
            problem = problem.with_objective(scores(model, graph))
    dense = _measure(model, recovery, watch, clock, "dense")  # after all that may be refused
    trained, regularised = None, None
    if training is not None:
        model = copied(model)
        with clock("train"):
            trained = train_regularised(model, graph, training, budgets, resources)
        watch.trained(trained.record)
        regularised = _measure(model, recovery, watch, clock, "regularised")
        with clock("score"):
            if importance is None:
                scores = Indicators(problem, trained, by_rule=training.control is None)
            problem = problem.with_objective(scores(model, graph))
    with clock("solve"):
        wishes = _watched(options or SolveOptions(), watch)
        solved = solve(problem, solver, time_limit=time_limit, seed=seed, options=wishes)
    watch.solved(solved)
    with clock("shrink"):
        small, checked = shrink_and_verify(
            model, graph, solved.masks, realisation=realisation, resources=_budgeted(problem, resources)
        )
    watch.verified(checked)
    accuracy, history = _recover(small, recovery, watch, clock, dense)
    flat = solved.masks.flat(graph)
    report = PruneReport(
        model=graph.model,
        library=library_version(),
        importance=describe(scores),
        solve=solved,
        budgets=budget_lines(problem, budgets, flat),
        layers=layer_rows(graph, flat),
        other=other_parameters(graph, flat),
        verification=checked,
        accuracy=replace(accuracy, regularised=_share(regularised)),
        training=history,
        seconds=clock.seconds,
        notes=(*(f"{note.where}: {note.text}" for note in graph.notes), *unfinished(trained)),
        regularised=None if trained is None else trained.record,
        graph=graph,
    )
    return small, report


def describe(importance: Importance) -> str:
    """An importance in words: its name, and the words, numbers and importances that it was made with."""
    name = getattr(importance, "__name__", type(importance).__name__)
    if hasattr(importance, "variant"):
        return f"{name}({importance.variant})"
    parts = []
    for part in (f for f in fields(importance) if f.repr) if is_dataclass(importance) else ():
        value = getattr(importance, part.name)
        if part.name == "importance":
            parts.append(describe(value))
        elif isinstance(value, str | int | float):
            parts.append(str(value))
    return f"{name}({', '.join(parts)})" if parts else name


def _watched(options: SolveOptions, watch: Watcher) -> SolveOptions:
    """The options with the watcher listening, besides whoever listens already."""
    first = options.on_event

    def listen(point: TracePoint) -> None:
        if first is not None:
            first(point)
        watch.progress(point)

    return replace(options, on_event=listen)


def _recover(
    small: nn.Module, recovery: Recovery, watch: Watcher, clock: _Clock, dense: Evaluation | None
) -> tuple[Accuracy, dict[str, Any] | None]:
    """Recalibrate and finetune in place, and measure after each step."""
    pruned = _measure(small, recovery, watch, clock, "pruned")
    recalibrated = finetuned = None
    training = None
    if recovery.train is not None and recovery.recalibrate:
        with clock("recalibrate"):
            done = recalibrate_batch_norm(
                small, recovery.train, batches=recovery.batches, device=recovery.config.device
            )
        if done.layers:
            recalibrated = _measure(small, recovery, watch, clock, "recalibrated")
    if recovery.train is not None and recovery.epochs:
        with clock("finetune"):
            history = finetune(
                small,
                recovery.train,
                epochs=recovery.epochs,
                config=recovery.config,
                checkpoint=recovery.checkpoint,
            )
        training = history.to_dict()
        finetuned = _measure(small, recovery, watch, clock, "finetuned")
    return (
        Accuracy(
            dense=_share(dense),
            pruned=_share(pruned),
            recalibrated=_share(recalibrated),
            finetuned=_share(finetuned),
            samples=None if dense is None else dense.samples,
        ),
        training,
    )


def _measure(
    model: nn.Module, recovery: Recovery, watch: Watcher, clock: _Clock, step: str
) -> Evaluation | None:
    if recovery.validation is None:
        return None
    with clock("evaluate"):
        result = evaluate(model, recovery.validation, device=recovery.config.device)
    watch.evaluated(step, result)
    return result


def _share(result: Evaluation | None) -> float | None:
    return None if result is None else result.accuracy


def _budgeted(problem: PruningProblem, further: Sequence[Resource]) -> list[Resource]:
    """The resources that the problem counts, those among them that were only registered for requests."""
    counted = {row.resource for row in problem.rows}
    return [r for name, r in all_resources(further).items() if name in counted]


class _Clock:
    """Announces phases and adds up their wall clock."""

    def __init__(self, watch: Watcher) -> None:
        self.seconds: dict[str, float] = {}
        self._watch = watch

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        self._watch.phase(phase)
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - start
