"""What was checked on a smaller network. Plain data, no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from qcqp_prune.errors import PlanError

_FACTOR = 100.0
"""Outputs must vary with the input by this many tolerances for their agreement to mean something."""


@dataclass(frozen=True)
class Count:
    """One resource: what the model of it says, and what an independent counter finds on the smaller network."""

    resource: str
    unit: str
    predicted: int
    measured: int


@dataclass(frozen=True)
class Verification:
    """What was checked on a smaller network.

    Attributes:
        counts: identity 2, equal as integers; one entry for each resource that can be measured.
        max_relative_error: identity 3, ``max |small - masked| / max |masked|`` over all outputs.
        tolerance: largest error accepted.
        dtype: dtype in which outputs were compared.
        realisation: ``modules`` (the user's own classes) or ``graph`` (a rewritten graph module).
        note: why the realisation is not the modules.
        input_dependence: how much the masked network's outputs vary between two random inputs, relative to the
            largest output; None where it was not measured. Close to 0, equal outputs prove little.
        config: what became of the configuration of a model of transformers; empty for all others.
        column_layers: paths of convolutions that are ``ShapeConv2d`` now, because some of their kernel columns went.
        attention_layers: paths of ``nn.MultiheadAttention`` that are ``SlimAttention`` now.
        removed_blocks: names of the residual branches that are gone as a whole.
    """

    counts: tuple[Count, ...]
    max_relative_error: float
    tolerance: float
    dtype: str
    realisation: str = "modules"
    note: str = field(default="")
    input_dependence: float | None = None
    column_layers: tuple[str, ...] = ()
    attention_layers: tuple[str, ...] = ()
    removed_blocks: tuple[str, ...] = ()
    config: str = ""

    @property
    def caution(self) -> str:
        """Why ``max_relative_error`` proves little here; empty where it does prove something."""
        if self.input_dependence is None or self.input_dependence > _FACTOR * self.tolerance:
            return ""
        return (
            f"outputs vary by only {self.input_dependence:.1e} of their size between two random inputs, so that they "
            "agree proves little: verify with trained weights and batch norm statistics"
        )

    def to_json(self) -> dict[str, Any]:
        """Plain data for ``json.dump``; the caution is written for readers and worked out again on reading."""
        return {**asdict(self), "caution": self.caution}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Verification:
        """The inverse of ``to_json``.

        Raises:
            PlanError: the data is incomplete.
        """
        try:
            plain = {key: value for key, value in data.items() if key != "caution"}
            lists = {
                "counts": tuple(Count(**count) for count in data["counts"]),
                "column_layers": tuple(data.get("column_layers", ())),
                "attention_layers": tuple(data.get("attention_layers", ())),
                "removed_blocks": tuple(data.get("removed_blocks", ())),
            }
            return cls(**{**plain, **lists})
        except (KeyError, TypeError) as error:
            raise PlanError(f"not the record of a verification ({error!r}): shrink again") from error
