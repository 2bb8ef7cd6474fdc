"""The report of a whole pruning job, and its JSON."""

from __future__ import annotations

import io
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from qcqp_prune.apply.verification import Verification
from qcqp_prune.errors import PlanError
from qcqp_prune.graph.channels import ChannelGraph
from qcqp_prune.graph.masks import Masks
from qcqp_prune.report.accuracy import Accuracy
from qcqp_prune.report.budgets import BudgetLine
from qcqp_prune.report.layers import LayerRow, OtherParameters
from qcqp_prune.report.regularised import Regularised
from qcqp_prune.report.rounds import Round
from qcqp_prune.solve.report import SolveReport
from qcqp_prune.storage import StrPath, read_json, write_json

SCHEMA_VERSION = 1
FORMAT = "qcqp-prune report"


@dataclass(frozen=True)
class PruneReport:
    """Everything that one job did.

    Attributes:
        model: class name of the network.
        library: version of this library.
        importance: how units were scored, in words.
        solve: objective, bound, gap, solver, options, trace and masks; in several rounds those of the last, with masks
            and counts of the network that was traced.
        budgets: every resource, requested, limit, used, slack and attainable.
        layers: before and after, and why not.
        other: parameters that belong to no layer's row.
        verification: what was checked on the smaller network, None where nothing was cut.
        accuracy: where data was given.
        training: epochs of the last finetuning, as ``TrainingHistory.to_dict``; None without.
        repair: what followed the cut without training, in words; empty without.
        recipe: of the finetuning, in words; empty without.
        seconds: wall clock of each phase.
        notes: decisions of the extractor and of this job.
        regularised: the training before the cut, None without.
        rounds: one for each of several rounds, the last included; empty where pruning was at once.
        graph: the channel graph, for ``save``; not written to JSON, the plan holds it.
    """

    model: str
    library: str
    importance: str
    solve: SolveReport
    budgets: tuple[BudgetLine, ...]
    layers: tuple[LayerRow, ...]
    other: OtherParameters
    verification: Verification | None = None
    accuracy: Accuracy = field(default_factory=Accuracy)
    training: Mapping[str, Any] | None = None
    seconds: Mapping[str, float] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    regularised: Regularised | None = None
    rounds: tuple[Round, ...] = ()
    repair: str = ""
    recipe: str = ""
    graph: ChannelGraph | None = field(default=None, compare=False, repr=False)

    def __str__(self) -> str:
        """The report as the terminal shows it."""
        # rich is slow to import, and the tables are made from the classes of this module
        from rich.console import Console

        from qcqp_prune.report.terminal import report_view

        console = Console(file=io.StringIO(), width=shutil.get_terminal_size((120, 24)).columns)
        with console.capture() as captured:
            console.print(report_view(self))
        return captured.get()

    @property
    def masks(self) -> Masks:
        """Which units are kept."""
        return self.solve.masks

    def to_json(self) -> dict[str, Any]:
        """Plain data for ``json.dump``; slack is written for readers and recomputed on reading."""
        return {
            "format": FORMAT,
            "schema": SCHEMA_VERSION,
            "model": self.model,
            "library": self.library,
            "importance": self.importance,
            "budgets": [{**asdict(line), "slack": line.slack} for line in self.budgets],
            "solve": self.solve.to_json(),
            "verification": None if self.verification is None else self.verification.to_json(),
            "accuracy": asdict(self.accuracy),
            "layers": [asdict(row) for row in self.layers],
            "other_parameters": asdict(self.other),
            "training": None if self.training is None else dict(self.training),
            "seconds": dict(self.seconds),
            "notes": list(self.notes),
            "regularised": None if self.regularised is None else self.regularised.to_json(),
            "rounds": [entry.to_json() for entry in self.rounds],
            "repair": self.repair,
            "recipe": self.recipe,
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> PruneReport:
        """The inverse of ``to_json``.

        Raises:
            PlanError: the data is no report, of another schema, or incomplete.
        """
        if data.get("format") != FORMAT:
            raise PlanError(
                "this is no report of a pruning job: give a report.json that `qcqp-prune run` wrote"
            )
        if data.get("schema") != SCHEMA_VERSION:
            raise PlanError(
                f"the report has schema {data.get('schema')}, this version reads {SCHEMA_VERSION}: run the job again"
            )
        try:
            checked = data["verification"]
            trained, rounds = data.get("regularised"), data.get("rounds", ())  # older reports lack these
            return cls(
                model=data["model"],
                library=data["library"],
                importance=data["importance"],
                solve=SolveReport.from_json(data["solve"]),
                budgets=tuple(_budget(entry) for entry in data["budgets"]),
                layers=tuple(_layer(entry) for entry in data["layers"]),
                other=OtherParameters(**data["other_parameters"]),
                verification=None if checked is None else Verification.from_json(checked),
                accuracy=Accuracy(**data["accuracy"]),
                training=data["training"],
                seconds=data["seconds"],
                notes=tuple(data["notes"]),
                regularised=None if trained is None else Regularised.from_json(trained),
                rounds=tuple(Round.from_json(entry) for entry in rounds),
                repair=data.get("repair", ""),
                recipe=data.get("recipe", ""),
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            if isinstance(error, PlanError):
                raise
            raise PlanError(f"the report is incomplete ({error!r}): run the job again") from error

    def write(self, path: StrPath) -> None:
        """Write ``report.json``, aside first and then renamed."""
        write_json(path, self.to_json())

    @classmethod
    def read(cls, path: StrPath) -> PruneReport:
        """Read what ``write`` wrote.

        Raises:
            PlanError: the file is missing or no report.
        """
        return cls.from_json(read_json(path, "a report.json that `qcqp-prune run` wrote"))


def _budget(entry: Mapping[str, Any]) -> BudgetLine:
    return BudgetLine(**{key: value for key, value in entry.items() if key != "slack"})


def _layer(entry: Mapping[str, Any]) -> LayerRow:
    pairs: dict[str, Any] = {
        key: (int(entry[key][0]), int(entry[key][1])) for key in ("inputs", "outputs", "macs", "params")
    }
    columns = entry.get("columns")
    pairs["columns"] = None if columns is None else (int(columns[0]), int(columns[1]))
    return LayerRow(**{**entry, **pairs})
