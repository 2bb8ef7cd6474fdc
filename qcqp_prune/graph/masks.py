"""Masks: which units of a graph are kept. Plain data that can be written to a file and sent elsewhere."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from qcqp_prune.errors import MaskMismatchError, PlanError
from qcqp_prune.graph.channels import BoolArray, ChannelGraph

SCHEMA_VERSION = 1


@dataclass(frozen=True, eq=False)
class Masks:
    """The kept units of each group, bound to the graph they belong to.

    Attributes:
        fingerprint: ``ChannelGraph.fingerprint`` of that graph.
        keep: for each group id a ``(width,) bool`` array, True = kept; read-only.
    """

    fingerprint: str
    keep: Mapping[str, BoolArray]

    def __post_init__(self) -> None:
        copies = {}
        for name, array in self.keep.items():
            copy = np.array(array, dtype=np.bool_)
            copy.flags.writeable = False
            copies[name] = copy
        object.__setattr__(self, "keep", copies)

    @classmethod
    def from_flat(cls, graph: ChannelGraph, flat: npt.ArrayLike) -> Masks:
        """Cut a mask over all units of a graph, ``(unit_count,) bool``, into groups.

        Raises:
            MaskMismatchError: the mask has another length.
        """
        mask = np.asarray(flat)
        if mask.shape != (graph.unit_count,) or mask.dtype != np.bool_:
            raise MaskMismatchError(
                f"a flat mask of this graph is a bool array of shape ({graph.unit_count},), not {mask.dtype} of "
                f"shape {mask.shape}: make it from this graph"
            )
        return cls(graph.fingerprint, {g.id: mask[graph.units(k)] for k, g in enumerate(graph.groups)})

    def flat(self, graph: ChannelGraph) -> BoolArray:
        """The mask over all units of the graph, ``(unit_count,) bool``.

        Raises:
            MaskMismatchError: these masks belong to another graph.
        """
        if graph.fingerprint != self.fingerprint:
            raise MaskMismatchError(
                f"the masks were made for a graph with fingerprint {self.fingerprint[:12]}, this one has "
                f"{graph.fingerprint[:12]}: use the graph that the problem was built from"
            )
        shapes = {g.id: (g.width,) for g in graph.groups}
        if shapes != {name: mask.shape for name, mask in self.keep.items()}:
            raise MaskMismatchError(
                "the masks do not have one entry for each group with one value for each of its units: "
                "make them with Masks.from_flat or read them from an unchanged file"
            )
        return np.concatenate([np.zeros(0, np.bool_), *(self.keep[g.id] for g in graph.groups)])

    def counts(self) -> dict[str, int]:
        """How many units of each group are kept."""
        return {name: int(mask.sum()) for name, mask in self.keep.items()}

    def to_json(self) -> dict[str, Any]:
        """Plain data for ``json.dump``; ``from_json`` gives the masks back."""
        keep = {name: {"width": len(m), "kept": np.flatnonzero(m).tolist()} for name, m in self.keep.items()}
        return {"schema": SCHEMA_VERSION, "fingerprint": self.fingerprint, "keep": keep}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Masks:
        """The inverse of ``to_json``.

        Raises:
            PlanError: the data is of another schema, incomplete or inconsistent.
        """
        try:
            if data["schema"] != SCHEMA_VERSION:
                raise PlanError(
                    f"mask data has schema {data['schema']}, this version reads {SCHEMA_VERSION}: solve again"
                )
            keep = {str(name): _mask(entry["width"], entry["kept"]) for name, entry in data["keep"].items()}
            return cls(str(data["fingerprint"]), keep)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            if isinstance(error, PlanError):
                raise
            raise PlanError(f"not mask data ({error!r}): save the masks again") from error

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Masks):
            return NotImplemented
        return (
            self.fingerprint == other.fingerprint
            and self.keep.keys() == other.keep.keys()
            and all(np.array_equal(mask, other.keep[name]) for name, mask in self.keep.items())
        )

    def __hash__(self) -> int:
        return hash((self.fingerprint, tuple((name, mask.tobytes()) for name, mask in self.keep.items())))


def _mask(width: int, kept: list[int]) -> BoolArray:
    if any(not 0 <= k < width for k in kept) or len(set(kept)) != len(kept):
        raise PlanError("mask data names a unit twice or one that does not exist: save the masks again")
    mask = np.zeros(width, np.bool_)
    mask[np.asarray(kept, dtype=np.int64)] = True
    return mask
