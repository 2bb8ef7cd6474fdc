"""Every error that the library raises on purpose. Each message ends with what to do about it."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from qcqp_prune.program.infeasible import Cause, Conflict


class QcqpPruneError(Exception):
    """Base of all errors of this library: catch it to catch them all."""


class TraceError(QcqpPruneError, RuntimeError):
    """The model could not be exported with the example inputs given."""


class UnsupportedOpError(QcqpPruneError, NotImplementedError):
    """An operator has no handler where one is indispensable."""


class UnknownLayerError(QcqpPruneError, ValueError):
    """A layer name or glob matches nothing in the network."""


class NothingToPruneError(QcqpPruneError, ValueError):
    """Every unit of the network is frozen, or there are no units."""


class InvalidScoreError(QcqpPruneError, ValueError):
    """An importance score or a weight is NaN or infinite, or does not fit the graph."""


class InvalidBudgetError(QcqpPruneError, ValueError):
    """A budget cannot be read, is out of range, or names an unknown resource."""


class InvalidOptionError(QcqpPruneError, ValueError):
    """An option has a value outside its domain."""


def require_kind(name: str, value: object, kind: type, wanted: str) -> None:
    """Refuse an argument of another kind before anything is done with it.

    Args:
        name: of the argument.
        value: what was given.
        kind: of which it has to be; a whole number is ``numbers.Integral``.
        wanted: what to give instead, in words.

    Raises:
        InvalidOptionError: it is of another kind.
    """
    if not isinstance(value, kind):
        shown = repr(value) if isinstance(value, str | int | float | bool | None) else type(value).__name__
        raise InvalidOptionError(f"{name} is {shown}: give {wanted}")


class InfeasibleError(QcqpPruneError, RuntimeError):
    """No selection meets every budget: names the tightest budget and the smallest attainable value.

    Attributes:
        resource: name of the tightest budget's resource.
        limit: the limit asked for, in the resource's unit.
        smallest: the smallest use of that resource that any selection can reach: the nearest feasible budget.
        causes: what holds that use up (frozen layers, min_keep, round_to, ties), largest contribution first.
        conflicts: every budget that cannot be met, the tightest first, each with its own causes.
    """

    def __init__(
        self,
        message: str,
        *,
        resource: str,
        limit: int,
        smallest: int,
        causes: tuple[Cause, ...] = (),
        conflicts: tuple[Conflict, ...] = (),
    ) -> None:
        super().__init__(message)
        self.resource = resource
        self.limit = limit
        self.smallest = smallest
        self.causes = causes
        self.conflicts = conflicts


class SolverUnavailableError(QcqpPruneError, ImportError):
    """The solver's package is not installed, or the solver's name is not known."""


class SolverIncapableError(QcqpPruneError, ValueError):
    """The solver does not take problems of this class or size."""


class NoIncumbentError(QcqpPruneError, RuntimeError):
    """The solver stopped at a limit before it held any feasible selection."""


class NoCertificateError(QcqpPruneError, RuntimeError):
    """No multipliers stand behind a bound, so that there is nothing to write for the checker."""


class CertificateError(QcqpPruneError, RuntimeError):
    """A certificate does not prove what it claims, or speaks of another problem."""


class BackendError(QcqpPruneError, RuntimeError):
    """A backend's answer failed the independent check, or the backend itself failed."""


class MaskMismatchError(QcqpPruneError, ValueError):
    """Masks, graph and model do not belong together."""


class VerificationError(QcqpPruneError, RuntimeError):
    """The smaller network does not compute, or does not cost, what the masks say."""


class PlanError(QcqpPruneError, ValueError):
    """A saved file is corrupt, of another version, or does not match the model."""


class ConfigError(QcqpPruneError, ValueError):
    """A configuration file cannot be read or holds an unknown or invalid entry."""


class ModelLoadError(QcqpPruneError, ValueError):
    """A model file is missing or does not fit the architecture."""


class DataError(QcqpPruneError, ValueError):
    """A data file is missing, truncated or corrupt."""


class MissingDependencyError(QcqpPruneError, ImportError):
    """A package that this needs is not installed here."""


class TrainingError(QcqpPruneError, RuntimeError):
    """Training diverged or cannot start."""
