"""The whole job in one call: trace, train or score, solve, cut, verify, and recover accuracy where data is given."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import fields, is_dataclass, replace

from torch import nn

from qcqp_prune.apply.shrink import Realisation, shrink_and_verify
from qcqp_prune.apply.surgery import copied
from qcqp_prune.apply.verification import Verification
from qcqp_prune.continuous import Indicators, Training, train_regularised, unfinished, unscored
from qcqp_prune.errors import InvalidBudgetError, InvalidOptionError, require_kind
from qcqp_prune.gradual import Steps, prune_in_rounds
from qcqp_prune.graph.columns import Columns
from qcqp_prune.graph.grouping import Amount
from qcqp_prune.graph.inputs import ExampleInputs
from qcqp_prune.graph.masks import Masks
from qcqp_prune.graph.removable import Blocks
from qcqp_prune.graph.trace import Ignored, Sharing, trace
from qcqp_prune.graph.uniform import Uniform
from qcqp_prune.graph.units import Units
from qcqp_prune.identity import settings_of
from qcqp_prune.importance import Calibrated, Importance, Magnitude
from qcqp_prune.importance.layerwise import require_importance
from qcqp_prune.program.problem import Budgets, PruningProblem, Resource, all_resources
from qcqp_prune.program.rounds import Rounds
from qcqp_prune.recovery import Recovery, measure, noted, require_usable
from qcqp_prune.report import Accuracy, PruneReport, budget_lines, layer_rows, other_parameters
from qcqp_prune.solve.backend import Backend, get_backend
from qcqp_prune.solve.options import SolveOptions
from qcqp_prune.solve.report import SolveReport
from qcqp_prune.solve.result import TracePoint
from qcqp_prune.solve.run import solve
from qcqp_prune.storage import library_version
from qcqp_prune.train.checkpoint import state_digest
from qcqp_prune.train.modes import placed
from qcqp_prune.watch import Clock, Watcher


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
    rounds: Rounds | None = None,
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
        importance: what units are worth; unless given the relaxed masks of the training, else ``Calibrated`` on
            ``recovery.train``, else ``Magnitude()``.
        solver: as for ``solve``.
        ignored_layers: as for ``trace``.
        round_to: as for ``trace``.
        min_keep: as for ``trace``.
        units: as for ``trace``.
        columns: as for ``trace``.
        sharing: as for ``trace``.
        blocks: as for ``trace``.
        uniform: as for ``trace``.
        rounds: prune step by step, scoring and finetuning in between; at once unless given. Not together with
            ``training`` or ``columns``.
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
    clock = Clock(watch)
    recovery = Recovery() if recovery is None else recovery
    rounds = Rounds(1, 0) if rounds is None else rounds
    require_kind("recovery", recovery, Recovery, "Recovery(train=...), with the loader")
    require_kind("rounds", rounds, Rounds, "Rounds(count, epochs)")
    if training is not None:
        require_kind("training", training, Training, "Training(...)")
    unused = recovery.unused(model, rounds)
    scores = importance or (Magnitude() if recovery.train is None else Calibrated(recovery.train))
    require_importance(scores)
    _require_consistent(budgets, training, recovery)
    if rounds.count > 1:
        _require_gradual(rounds, training, recovery, columns, options)
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
        require_usable(model, recovery, rounds)
        if training is None:
            with nullcontext() if recovery.train is None else placed(model, recovery.recipe(model).device):
                problem = problem.with_objective(scores(model, graph))
    device = recovery.recipe(model).device
    before = measure(model, recovery, device, watch, clock, "dense")  # after all that may be refused
    dense, trained, regularised = model, None, None
    if training is not None:
        model = copied(dense)
        with clock("train"):
            trained = train_regularised(model, graph, training, budgets, resources, teacher=dense)
        watch.trained(trained.record)
        regularised = measure(model, recovery, device, watch, clock, "regularised")
        with clock("score"):
            if importance is None:
                scores = Indicators(problem, trained, by_rule=training.control is None)
            problem = problem.with_objective(scores(model, graph))
    wishes = _watched(options or SolveOptions(), watch)
    counted = _budgeted(problem, resources)

    def select(todo: PruningProblem) -> SolveReport:
        return solve(todo, solver, time_limit=time_limit, seed=seed, options=wishes)

    def cut(whole: nn.Module, masks: Masks) -> tuple[nn.Module, Verification]:
        return shrink_and_verify(whole, graph, masks, realisation=realisation, resources=counted)

    identity = {
        "library": library_version(),
        "weights": "" if recovery.checkpoint is None else state_digest(dense),
        "importance": settings_of(importance if training is not None else scores),
        "training": settings_of(training),
        "solver": solver if isinstance(solver, str) else solver.name,
        "time_limit": wishes.time_limit if time_limit is None else time_limit,
        "gap_limit": wishes.gap_limit,
        "work_limit": wishes.work_limit,
        "seed": wishes.seed if seed is None else seed,
    }
    steps = Steps(scores, select, cut, identity)
    small, solved, done = prune_in_rounds(model, dense, problem, rounds, steps, recovery, watch, clock)
    flat, last = solved.masks.flat(graph), done[-1]
    first = noted(Accuracy(), "dense", before, recovery)
    first = noted(first, "regularised", regularised, recovery)
    report = PruneReport(
        model=graph.model,
        library=library_version(),
        importance=describe(scores),
        solve=solved,
        budgets=budget_lines(problem, budgets, flat),
        layers=layer_rows(graph, flat),
        other=other_parameters(graph, flat),
        verification=last.verification,
        accuracy=replace(
            last.accuracy,
            dense=first.dense,
            regularised=first.regularised,
            samples=first.samples,
            losses={**first.losses, **last.accuracy.losses},
        ),
        training=last.training,
        seconds=clock.seconds,
        notes=(*(f"{note.where}: {note.text}" for note in graph.notes), *unfinished(trained), *unused),
        regularised=None if trained is None else trained.record,
        rounds=tuple(done) if rounds.count > 1 else (),
        repair=last.repair,
        recipe=recovery.describe(dense, rounds),
        graph=graph,
    )
    return small, report


def _require_consistent(budgets: Budgets | None, training: Training | None, recovery: Recovery) -> None:
    """Refuse what cannot go together, before anything is done."""
    if budgets is None and (training is None or training.control is not None):
        raise InvalidBudgetError('no budget given: ask for something such as budgets={"macs": "50%"}')
    files = [None if x is None else x.checkpoint for x in (training, recovery)]
    if None not in files and len({os.path.abspath(file) for file in files if file is not None}) == 1:
        raise InvalidOptionError(
            f"{files[0]} is the checkpoint of two trainings, before the cut and after it: give two files"
        )


def _require_gradual(
    rounds: Rounds,
    training: Training | None,
    recovery: Recovery,
    columns: Columns,
    options: SolveOptions | None,
) -> None:
    """Refuse what cannot be done in several rounds."""
    refused = {
        "a training under a regulariser": training is not None,
        "columns": bool(columns),
        "a warm start": options is not None and options.warm_start is not None,
        "a known bound": options is not None and options.known_bound is not None,
    }
    for what, given in refused.items():
        if given:
            raise InvalidOptionError(f"{rounds.count} rounds and {what} at once: choose one of the two")
    if rounds.epochs and recovery.train is None:
        raise InvalidOptionError(
            f"{rounds.epochs} epochs of finetuning in each round and no train loader: give "
            "recovery=Recovery(train=...), or Rounds(..., epochs=0)"
        )


def describe(importance: Importance) -> str:
    """An importance in words: its name, and what it was made with.

    Words and importances stand as they are; numbers, functions and what is not the default of a list have names.
    """
    name = getattr(importance, "__name__", type(importance).__name__)
    if hasattr(importance, "variant"):
        return f"{name}({importance.variant})"
    words, named = [], []
    for part in (f for f in fields(importance) if f.repr) if is_dataclass(importance) else ():
        value = getattr(importance, part.name)
        if part.name == "importance":
            words.append(describe(value))
        elif isinstance(value, str):
            words.append(value)
        elif isinstance(value, int | float) or (isinstance(value, tuple) and value != part.default):
            named.append(f"{part.name}={value}")
        elif callable(value):
            named.append(f"{part.name}={getattr(value, '__name__', type(value).__name__)}")
    return f"{name}({', '.join(words + named)})" if words or named else name


def _watched(options: SolveOptions, watch: Watcher) -> SolveOptions:
    """The options with the watcher listening, besides whoever listens already."""
    first = options.on_event

    def listen(point: TracePoint) -> None:
        if first is not None:
            first(point)
        watch.progress(point)

    return replace(options, on_event=listen)


def _budgeted(problem: PruningProblem, further: Sequence[Resource]) -> list[Resource]:
    """The resources that the problem counts, those among them that were only registered for requests."""
    counted = {row.resource for row in problem.rows}
    return [r for name, r in all_resources(further).items() if name in counted]
