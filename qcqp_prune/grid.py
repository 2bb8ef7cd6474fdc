"""The published way to a size: a training for each pair of strength and alpha, side by side."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from qcqp_prune.continuous import Training
from qcqp_prune.errors import InvalidOptionError, PlanError
from qcqp_prune.graph.inputs import ExampleInputs
from qcqp_prune.identity import settings_of
from qcqp_prune.pipeline import prune
from qcqp_prune.recovery import Recovery
from qcqp_prune.report import Accuracy, PruneReport
from qcqp_prune.storage import StrPath, read_json, require_file_place, write_json
from qcqp_prune.train import SPRConfig
from qcqp_prune.train.checkpoint import state_digest

SCHEMA_VERSION = 1
FORMAT = "qcqp-prune sweep"


@dataclass(frozen=True)
class SweepRow:
    """One pair.

    Attributes:
        strength, alpha: of SPR.
        removed: share of the units that may go that vanished, in [0, 1].
        used: by resource, what is left of it.
        accuracy: at each step; ``regularised`` is before the cut, ``finetuned`` after everything.
        seconds: wall clock.
    """

    strength: float
    alpha: float
    removed: float
    used: Mapping[str, int]
    accuracy: Accuracy
    seconds: float


def sweep(
    model: nn.Module,
    example_inputs: ExampleInputs,
    training: Training,
    *,
    strengths: Sequence[float],
    alphas: Sequence[float],
    recovery: Recovery | None = None,
    results: StrPath | None = None,
    **options: Any,
) -> Iterator[SweepRow]:
    """Train, prune by the published rule, and finetune for each pair of strength and alpha.

    Every pair starts from the same weights and sees the same data in the same order.

    Args:
        model: as for ``prune``; it is not changed.
        example_inputs: as for ``prune``.
        training: whose strength and alpha are replaced; its ``control`` is left out.
        strengths: of the grid.
        alphas: of the grid; all of them for the first strength come first.
        recovery: as for ``prune``.
        results: a JSON file that gets each row when it is done; pairs that are there already are not repeated.
        options: further arguments of ``prune``, such as ``min_keep``.

    Returns:
        The rows in the order of the grid, each as soon as it is there.

    Raises:
        InvalidOptionError: the grid is empty or a value outside its domain, the method is not SPR, or there are
            checkpoints.
        PlanError: the file is of another sweep, or cannot be written.
    """
    if not isinstance(training.method, SPRConfig):
        raise InvalidOptionError(
            "a sweep is over strength and alpha of SPR: give Training(method=SPRConfig(...))"
        )
    recovery = recovery or Recovery()
    if training.checkpoint is not None or recovery.checkpoint is not None:
        raise InvalidOptionError(
            "a checkpoint belongs to one pair: leave it out; with results= a sweep goes on after the last pair done"
        )
    grid = [replace(training.method, strength=s, alpha=a) for s in strengths for a in alphas]
    if not grid:
        raise InvalidOptionError("there is no pair to train: give strengths and alphas")
    path = None if results is None else Path(results)
    identity = _identity(model, training, recovery, options)
    done = {} if path is None else _read(path, identity)
    return _rows(model, example_inputs, training, grid, recovery, options, path, identity, done)


def _rows(
    model: nn.Module,
    example_inputs: ExampleInputs,
    training: Training,
    grid: Sequence[SPRConfig],
    recovery: Recovery,
    options: Mapping[str, Any],
    path: Path | None,
    identity: Mapping[str, Any],
    done: dict[tuple[float, float], SweepRow],
) -> Iterator[SweepRow]:
    for method in grid:
        pair = method.strength, method.alpha
        if pair not in done:
            start = time.perf_counter()
            one = replace(training, method=method, control=None)
            _, report = prune(model, example_inputs, training=one, recovery=recovery, **options)
            done[pair] = _row(method, report, time.perf_counter() - start)
            if path is not None:
                rows = [asdict(row) for row in done.values()]
                stored = {"format": FORMAT, "schema": SCHEMA_VERSION, "of": identity, "rows": rows}
                write_json(path, stored)
        yield done[pair]


def _row(method: SPRConfig, report: PruneReport, seconds: float) -> SweepRow:
    assert report.graph is not None  # prune() always sets it
    free = ~report.graph.stays
    removed = 1.0 - float(report.masks.flat(report.graph)[free].mean())
    used = {line.resource: line.used for line in report.budgets}
    return SweepRow(method.strength, method.alpha, removed, used, report.accuracy, seconds)


def _identity(
    model: nn.Module, training: Training, recovery: Recovery, options: Mapping[str, Any]
) -> dict[str, Any]:
    """What two sweeps must share for one to go on from the other's rows."""
    said = settings_of(replace(training, control=None))
    for name in ("strength", "alpha"):
        del said["method"][name]
    recovered = {**settings_of(recovery), "config": settings_of(recovery.recipe(model))}
    return {"weights": state_digest(model), **said, "recovery": recovered, "options": settings_of(options)}


def _read(path: Path, identity: Mapping[str, Any]) -> dict[tuple[float, float], SweepRow]:
    """The rows of a file, none where there is no file yet."""
    require_file_place(path)
    if not path.exists():
        return {}
    data = read_json(path, "the results of a sweep")
    if data.get("format") != FORMAT or data.get("schema") != SCHEMA_VERSION:
        raise PlanError(f"{path} holds something else than the results of a sweep: give another path")
    different = [name for name in identity if data.get("of", {}).get(name) != identity[name]]
    if different:
        raise PlanError(
            f"{path} is of another sweep, which differs in {', '.join(different)}: go on with the settings of that "
            "one, or give another path"
        )
    rows = [SweepRow(**{**row, "accuracy": Accuracy(**row["accuracy"])}) for row in data["rows"]]
    return {(row.strength, row.alpha): row for row in rows}
