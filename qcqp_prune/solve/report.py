"""The report of one solve: what is kept, what it costs, and how good it is proved to be."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from qcqp_prune.errors import InvalidOptionError, NoCertificateError, PlanError
from qcqp_prune.graph.masks import Masks
from qcqp_prune.solve.certificate import Certificate
from qcqp_prune.solve.curve import BoundCurve
from qcqp_prune.solve.proof import Tangent
from qcqp_prune.solve.result import Reason, Termination, TracePoint, relative_gap
from qcqp_prune.storage import StrPath

SCHEMA_VERSION = 1


@dataclass(frozen=True)
class Usage:
    """Use of one resource, in exact integers.

    Attributes:
        used: by the kept units and everything that cannot be removed.
        limit: largest allowed use, None where the resource is only reported.
        unit: unit of all the numbers.
        dense: use of the whole network.
        smallest: least use that any allowed selection reaches.
        least: smallest allowed use, None where there is none.
    """

    used: int
    limit: int | None
    unit: str
    dense: int
    smallest: int
    least: int | None = None

    @property
    def slack(self) -> int | None:
        """What is left of the budget, None where there is none."""
        return None if self.limit is None else self.limit - self.used

    @property
    def share(self) -> float:
        """Use as a share of the dense network's."""
        return self.used / self.dense if self.dense else 1.0


@dataclass(frozen=True)
class SolveReport:
    """A checked selection with the proof that was obtained for it.

    Objective and usage were recomputed from the problem, not taken from the solver.

    Attributes:
        masks: which units are kept.
        termination: why the solver stopped.
        objective: worth of the kept units, in the objective's unit.
        bound: proved upper bound on the worth of any selection that meets the budgets, None where none was proved.
        usage: for each known resource its exact use.
        solver: name of the backend, or the chain of backends that ``auto`` ran.
        version: of the solver package or packages.
        options: limits and wishes of the run.
        seed: of everything random.
        seconds: wall clock of the solve, checks included.
        trace: incumbents and bounds over time.
        log: text of the solver.
        reductions: reformulations that were solved.
        notes: decisions worth knowing, such as why ``auto`` chose a solver.
        statistics: further numbers from the backend.
        tangents: bounds as functions of the limits, where the backend has multipliers.
        certificate: what proves the bound, for ``write_certificate``; None where the bound came from a backend that
            cannot say, or from a file. It is not written to JSON.
    """

    masks: Masks
    termination: Termination
    objective: float
    bound: float | None
    usage: Mapping[str, Usage]
    solver: str
    version: str
    options: Mapping[str, Any]
    seed: int
    seconds: float
    trace: tuple[TracePoint, ...] = ()
    log: str = ""
    reductions: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    statistics: Mapping[str, float] | None = None
    tangents: tuple[Tangent, ...] = ()
    certificate: Certificate | None = field(default=None, compare=False, repr=False)

    @property
    def gap(self) -> float | None:
        """``(bound - objective) / |objective|``, None where there is no valid bound.

        An objective of exactly 0 has no relative gap: 0 once the bound meets it to within rounding, None before.
        """
        gap = relative_gap(self.objective, self.bound)
        closed = gap is None and self.bound is not None and self.termination.reason is Reason.OPTIMAL
        return 0.0 if closed else gap

    @property
    def prices(self) -> Mapping[str, float]:
        """By resource, what one more unit of it can add at most: the slope of the bound. Empty without multipliers."""
        return min(self.tangents, key=lambda t: t.bound).prices if self.tangents else {}

    def bound_curve(self, resource: str) -> BoundCurve:
        """A valid bound for *every* limit of one resource, the other budgets as they are.

        Args:
            resource: one that has a budget.

        Raises:
            InvalidOptionError: it has none.
        """
        usage = self.usage.get(resource)
        if usage is None or usage.limit is None:
            known = ", ".join(name for name, use in self.usage.items() if use.limit is not None)
            raise InvalidOptionError(f"there is no budget of {resource!r}: choose from {known}")
        lines = tuple((t.bound, t.prices.get(resource, 0.0)) for t in self.tangents)
        return BoundCurve(resource, usage.unit, usage.limit, usage.dense, self.bound, lines)

    def write_certificate(self, path: StrPath) -> tuple[Path, Path]:
        """Write what proves the bound, for ``qcqp-prune certify``.

        Args:
            path: of the JSON file; a file of arrays is written beside it.

        Raises:
            NoCertificateError: there is nothing to write.
        """
        if self.certificate is None:
            why = (
                "no bound was proved"
                if self.bound is None
                else "the bound's solver cannot write down its proof, or the selection is from a file, which has none"
            )
            raise NoCertificateError(
                f"there is no certificate, for {why}: solve, anew, with a solver that gives multipliers, such as the "
                "decomposition"
            )
        return self.certificate.write(path)

    def to_json(self) -> dict[str, Any]:
        """Plain data for ``json.dump``; slack and gap are written for readers and recomputed on reading."""
        return {
            "schema": SCHEMA_VERSION,
            "masks": self.masks.to_json(),
            "termination": self.termination.to_json(),
            "objective": self.objective,
            "bound": self.bound,
            "gap": self.gap,
            "usage": {name: {**asdict(u), "slack": u.slack} for name, u in self.usage.items()},
            "solver": self.solver,
            "version": self.version,
            "options": dict(self.options),
            "seed": self.seed,
            "seconds": self.seconds,
            "trace": [asdict(p) for p in self.trace],
            "log": self.log,
            "reductions": list(self.reductions),
            "notes": list(self.notes),
            "statistics": dict(self.statistics or {}),
            "prices": dict(self.prices),
            "tangents": [{"bound": t.bound, "prices": dict(t.prices)} for t in self.tangents],
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> SolveReport:
        """The inverse of ``to_json``.

        Raises:
            PlanError: the data is of another schema or incomplete.
        """
        try:
            if data["schema"] != SCHEMA_VERSION:
                raise PlanError(
                    f"the report has schema {data['schema']}, this version reads {SCHEMA_VERSION}: solve again"
                )
            plain = (
                "objective",
                "bound",
                "solver",
                "version",
                "options",
                "seed",
                "seconds",
                "log",
                "statistics",
            )
            return cls(
                masks=Masks.from_json(data["masks"]),
                termination=Termination.from_json(data["termination"]),
                usage={name: _usage(entry) for name, entry in data["usage"].items()},
                trace=tuple(TracePoint(**p) for p in data["trace"]),
                reductions=tuple(data["reductions"]),
                notes=tuple(data["notes"]),
                tangents=tuple(Tangent(**t) for t in data.get("tangents", ())),
                **{key: data[key] for key in plain},
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            if isinstance(error, PlanError):
                raise
            raise PlanError(f"not a solve report ({error!r}): solve again") from error


def _usage(entry: Mapping[str, Any]) -> Usage:
    return Usage(**{key: value for key, value in entry.items() if key != "slack"})
