"""What is measured of one network, in a process of its own; see ``benchmarks.compatibility``."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from torch import nn

import qcqp_prune as qp
from benchmarks.recording import package_version, peak_mb, stage
from benchmarks.zoo import case
from qcqp_prune.graph.export import export
from qcqp_prune.graph.inputs import as_call
from qcqp_prune.report.budgets import feasible_ranges

ASKED = 0.5
"""Share of the multiply-adds that may remain."""

FLOORS = (0.25, 0.2, 0.15, 0.1, 0.05)
"""Share of each layer that stays, the largest with which the budget can be met: random weights are all alike, so that
the best choice may cut a stage to one channel, which a ReLU then silences, and equal outputs would prove nothing."""

WORK = 2
"""Sweeps of the search: enough to meet the budget; how good the choice is does not matter here."""

SHOWN, LENGTH = 6, 160
"""Reasons of parts left alone: how many at most, and how long."""

NOT_VERIFIED = "outputs hardly depend on the input, so that their equality proves little"


def measure(source: str, name: str) -> dict[str, Any]:
    """The row of one case; an error is part of the row."""
    clock = Clock()
    row: dict[str, Any] = {}
    try:
        with clock("build"):
            chosen = case(source, name)
            model, inputs = chosen.built()
        row["version"] = f"{chosen.package} {package_version(chosen.package)}"
        _measure(model, inputs, dict(chosen.options), row, clock)
    except Exception as error:  # noqa: BLE001 - whatever stops a network belongs into the matrix
        row |= {
            "status": "failed",
            "stage": clock.now,
            "error": _shortened(f"{type(error).__name__}: {error}", 400),
        }
    return row | {"seconds": clock.seconds, "peak_mb": peak_mb()}


class Clock:
    """Processor seconds of each part, which do not depend on what else the machine does."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.now = "start"

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Time a block."""
        self.now = name
        stage(name)
        started = time.process_time()
        try:
            yield
        finally:
            self.seconds[name] = round(time.process_time() - started, 2)


def _measure(
    model: nn.Module, inputs: Any, options: dict[str, Any], row: dict[str, Any], clock: Clock
) -> None:
    with clock("export"):
        row["nodes"] = len(export(model, as_call(inputs)).graph.nodes)
    with clock("trace"):
        graph = qp.trace(model, inputs, **options)
    row |= {
        "layers": len(graph.layers),
        "units": graph.prunable_count,
        "groups": sum(not g.stays for g in graph.groups),
        "left_alone": left_alone(graph),
    }
    graph, budget, about = asked(graph)
    row |= about
    with clock("solve"):
        problem = qp.PruningProblem.build(graph, qp.Magnitude()(model, graph), {"macs": budget})
        report = qp.solve(problem, "block_coordinate", options=qp.SolveOptions(work_limit=WORK, seed=0))
    use = report.usage["macs"]
    row["macs"] = {"dense": use.dense, "limit": use.limit, "predicted": use.used}
    with clock("shrink and verify"):
        _, checked = qp.shrink_and_verify(model, graph, report.masks)
    counts = {c.resource: c for c in checked.counts}
    row["macs"]["counted"] = counts["macs"].measured
    row |= {
        "budget_met": use.used <= use.limit,
        "counts": {c.resource: [c.predicted, c.measured] for c in checked.counts},
        "identity_2": all(c.predicted == c.measured for c in checked.counts),
        "max_relative_error": checked.max_relative_error,
        "dtype": checked.dtype,
        "identity_3": checked.max_relative_error <= checked.tolerance,
        "input_dependence": checked.input_dependence,
        "realisation": checked.realisation,
        "why_rewritten": _shortened(checked.note, LENGTH),
    }
    clock.now = "verification"
    if checked.caution:
        row |= {"status": "failed", "stage": "verification", "error": NOT_VERIFIED}
    else:
        row["status"] = "verified"


def asked(graph: qp.ChannelGraph) -> tuple[qp.ChannelGraph, int, dict[str, Any]]:
    """Half of the multiply-adds, with floors where they leave that; else the least that can be reached."""
    macs = _macs_range(graph)
    half = math.floor(ASKED * macs.largest)
    about = {"prunable_share": 1 - macs.smallest / macs.largest, "min_keep": 1, "asked": "50 %"}
    if macs.smallest > half:
        share = f"{math.ceil(1000 * macs.smallest / macs.largest) / 10:g} %"
        return graph, macs.smallest, about | {"asked": f"{share}, the least that can be reached"}
    for floor in FLOORS:
        groups = (replace(g, min_keep=max(g.min_keep, math.ceil(floor * g.width))) for g in graph.groups)
        floored = replace(graph, groups=tuple(groups))
        if _macs_range(floored).smallest <= half:
            return floored, half, about | {"min_keep": floor}
    return graph, half, about


def _macs_range(graph: qp.ChannelGraph) -> Any:
    return next(r for r in feasible_ranges(graph) if r.resource == "macs")


def left_alone(graph: qp.ChannelGraph) -> list[str]:
    """Why layers keep all of their outputs, and the notes of the extractor, most frequent first."""
    reasons = Counter(_shortened(reason, LENGTH) for x in graph.layers if (reason := graph.why_not_pruned(x)))
    notes = Counter(_shortened(note.text, LENGTH) for note in graph.notes)
    found = [f"{text} ({_layers(n)})" for text, n in reasons.most_common()]
    found += [f"{text} ({n} x)" if n > 1 else text for text, n in notes.most_common()]
    rest = len(found) - SHOWN
    return found if rest <= 0 else [*found[:SHOWN], f"and {rest} more"]


def _layers(n: int) -> str:
    return f"{n} layers" if n > 1 else "1 layer"


def _shortened(text: str, length: int) -> str:
    line = " ".join(text.split())
    return line if len(line) <= length else line[: length - 3] + "..."
