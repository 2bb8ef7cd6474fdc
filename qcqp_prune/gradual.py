"""Rounds of scoring, solving, cutting and recovering; one round is pruning at once."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from qcqp_prune.apply.surgery import copied, put_back
from qcqp_prune.apply.verification import Verification
from qcqp_prune.errors import PlanError
from qcqp_prune.graph.channels import BoolArray
from qcqp_prune.graph.masks import Masks
from qcqp_prune.identity import settings_of
from qcqp_prune.importance import Importance
from qcqp_prune.program.problem import PruningProblem
from qcqp_prune.program.rounds import Rounds, left_to_choose, with_limits
from qcqp_prune.recovery import Before, Recovery, recover
from qcqp_prune.report import Round
from qcqp_prune.solve.report import SolveReport
from qcqp_prune.storage import read_json, require_file_place, write_json
from qcqp_prune.watch import Clock, Watcher

FORMAT = "qcqp-prune round"


@dataclass(frozen=True)
class Steps:
    """How each round scores, selects and cuts.

    Attributes:
        scores: the importance.
        select: solves a problem.
        cut: from the network at its full size and masks of its graph to the smaller one, verified.
        identity: what two runs must share for one to go on with the selections of the other, as plain data.
    """

    scores: Importance
    select: Callable[[PruningProblem], SolveReport]
    cut: Callable[[nn.Module, Masks], tuple[nn.Module, Verification]]
    identity: dict[str, Any]


def prune_in_rounds(
    model: nn.Module,
    dense: nn.Module,
    problem: PruningProblem,
    rounds: Rounds,
    steps: Steps,
    recovery: Recovery,
    watch: Watcher,
    clock: Clock,
) -> tuple[nn.Module, SolveReport, list[Round]]:
    """Prune step by step to the budgets of a problem.

    Each round cuts the network at its full size by masks of its own graph, with the weights put back that the round
    before has trained. So whatever a forward needs to run at a smaller size is made once, and what is verified, and can
    be saved, is a cut of the network that was traced. What is left is scored on the smaller network.

    Args:
        model: the network to cut; it is not changed.
        dense: the network that was handed in, the teacher where there is one.
        problem: of the whole network, scored.
        rounds: how many, and how far apart.
        steps: how each selects and cuts.
        recovery: what follows the last cut.
        watch: told what happens.
        clock: adds up seconds.

    Returns:
        The smaller network, the last selection with masks and counts of the whole network, and what each round did.
    """
    graph = problem.graph
    small, flat = model, np.ones(graph.unit_count, np.bool_)
    done: list[Round] = []
    for number in range(1, rounds.count + 1):
        todo, left = problem, None
        if rounds.count > 1:
            watch.round(number, rounds.count)
        if number > 1:
            model = copied(model) if number == 2 else model
            put_back(model, small, graph, flat)
            with clock("score"):
                todo, left = left_to_choose(problem, flat)
                todo = todo.with_objective(steps.scores(small, left.graph))
        limits, after = rounds.limits(number, problem), recovery.after_round(number, rounds)
        with clock("solve"):
            file = recovery.selection_file(number, rounds)
            solved = _selected(with_limits(todo, limits), steps, file, after.checkpoint, flat)
        before = Before(small, graph if left is None else left.graph, solved.masks)
        if left is not None:
            whole = left.widened(solved.masks.flat(left.graph), graph.unit_count)
            solved = replace(solved, masks=Masks.from_flat(graph, whole))
        flat = solved.masks.flat(graph)
        watch.solved(solved)
        with clock("shrink"):
            small, checked = steps.cut(model, solved.masks)
        watch.verified(checked)
        found = recover(
            small, dense, before, after, watch=watch, clock=clock, first_epoch=(number - 1) * rounds.epochs
        )
        done.append(
            Round(
                limits=limits,
                used={name: use.used for name, use in solved.usage.items()},
                kept=int(flat.sum()),
                solver=solved.solver,
                objective=solved.objective,
                bound=solved.bound,
                verification=checked,
                accuracy=found.accuracy,
                repair=found.repair,
                training=found.training,
            )
        )
    return small, solved, done


def _selected(
    problem: PruningProblem,
    steps: Steps,
    file: Path | None,
    checkpoint: str | os.PathLike[str] | None,
    flat: BoolArray,
) -> SolveReport:
    """Solve, or read the selection that an interrupted run goes on from: under a time limit a second may differ.

    Raises:
        PlanError: the file is of another run, or there is a checkpoint without one.
    """
    if file is None:
        return steps.select(problem)
    identity = {
        **steps.identity,
        "budgets": settings_of({r.resource: [r.least, r.limit, r.smallest, r.dense] for r in problem.rows}),
        # The fingerprint is without the floors of groups.
        "network": problem.graph.fingerprint,
        "groups": settings_of(problem.graph.groups),
        "units": hashlib.sha256(flat.tobytes()).hexdigest(),
    }
    require_file_place(file)
    if file.exists():
        data = read_json(file, "the selection of a round")
        if data.get("format") != FORMAT or data.get("of") != identity:
            raise PlanError(
                f"{file} belongs to another run: delete it and the checkpoints beside it to start anew, or give "
                "another path as checkpoint"
            )
        found = SolveReport.from_json(data["solve"])
        return replace(found, notes=(*found.notes, f"read from {file}, not solved again"))
    if checkpoint is not None and os.path.exists(checkpoint):
        raise PlanError(
            f"{os.fspath(checkpoint)} is there, and {file} is not, which says what units its weights are of: delete "
            "the checkpoint to start anew, or give another path"
        )
    solved = steps.select(problem)
    write_json(file, {"format": FORMAT, "of": identity, "solve": solved.to_json()})
    return solved
