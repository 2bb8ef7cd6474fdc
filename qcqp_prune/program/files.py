"""A traced network as files: everything that solving needs, so that it can be done on a machine without torch.

``NAME.json`` holds the channel graph and describes the objective, ``NAME.scores.safetensors`` beside it holds the
numbers. The JSON carries the checksum of the scores, so that the two cannot be mixed up.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
from safetensors import SafetensorError

from qcqp_prune.errors import PlanError, QcqpPruneError
from qcqp_prune.graph.channels import ChannelGraph
from qcqp_prune.program.coefficients import Coefficient, LowRank
from qcqp_prune.program.forms import PairTerm, PairwiseForm
from qcqp_prune.storage import StrPath, library_version, read_json, sha256, write_bytes, write_json

SCHEMA_VERSION = 1
FORMAT = "qcqp-prune traced network"

Arrays = dict[str, np.ndarray[Any, Any]]


@dataclass(frozen=True, eq=False)
class TracedNetwork:
    """What ``qcqp-prune trace`` writes and ``qcqp-prune solve`` reads.

    Attributes:
        graph: the channel graph.
        objective: what its units are worth.
        origin: where the network came from (constructor, arguments, weights), for ``shrink``; plain data.
    """

    graph: ChannelGraph
    objective: PairwiseForm
    origin: Mapping[str, Any] = field(default_factory=dict)


def write_traced(path: StrPath, traced: TracedNetwork) -> tuple[Path, Path]:
    """Write both files; the scores first, because the JSON vouches for them.

    Returns:
        The JSON file and the scores file.
    """
    target = Path(path)
    terms, arrays = _described(traced.objective)
    content = safetensors.numpy.save(arrays)
    scores = write_bytes(target.with_name(target.name.removesuffix(".json") + ".scores.safetensors"), content)
    data = {
        "format": FORMAT,
        "schema": SCHEMA_VERSION,
        "library": library_version(),
        "origin": dict(traced.origin),
        "objective": {
            "file": scores.name,
            "sha256": sha256(content),
            "constant": traced.objective.constant,
            "unit": traced.objective.unit,
            "pairs": terms,
        },
        "graph": traced.graph.to_json(),
    }
    return write_json(target, data), scores


def read_traced(path: StrPath) -> TracedNetwork:
    """The inverse of ``write_traced``.

    Raises:
        PlanError: a file is missing, corrupt, of another schema, or the two do not belong together.
    """
    source = Path(path)
    data = read_json(source, "a file that `qcqp-prune trace` wrote")
    if data.get("format") != FORMAT:
        raise PlanError(f"{source} is not a traced network: give the file that `qcqp-prune trace` wrote")
    if data.get("schema") != SCHEMA_VERSION:
        raise PlanError(
            f"{source} has schema {data.get('schema')}, this version reads {SCHEMA_VERSION}: trace the network again"
        )
    try:
        graph = ChannelGraph.from_json(data["graph"])
        about = data["objective"]
        arrays = _read_scores(source.with_name(Path(about["file"]).name), about["sha256"])
        objective = PairwiseForm(
            unary=arrays["unary"],
            pairs=tuple(_term(k, kind, arrays) for k, kind in enumerate(about["pairs"])),
            constant=float(about["constant"]),
            unit=str(about["unit"]),
        )
        return TracedNetwork(graph, objective, dict(data["origin"]))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        if isinstance(error, QcqpPruneError):
            raise
        raise PlanError(f"{source} is incomplete ({error!r}): trace the network again") from error


def _described(objective: PairwiseForm) -> tuple[list[Any], Arrays]:
    """A scalar coefficient as itself and an array one by its kind; the arrays by name."""
    arrays: Arrays = {"unary": np.ascontiguousarray(objective.unary)}
    kinds: list[Any] = []
    for k, term in enumerate(objective.pairs):
        arrays[f"pairs.{k}.rows"] = np.ascontiguousarray(term.rows)
        arrays[f"pairs.{k}.cols"] = np.ascontiguousarray(term.cols)
        if isinstance(term.coef, LowRank):
            kinds.append("low_rank")
            arrays[f"pairs.{k}.left"] = np.ascontiguousarray(term.coef.left)
            arrays[f"pairs.{k}.right"] = np.ascontiguousarray(term.coef.right)
        elif isinstance(term.coef, np.ndarray):
            kinds.append("dense")
            arrays[f"pairs.{k}.coef"] = np.ascontiguousarray(term.coef)
        else:
            kinds.append(float(term.coef))
    return kinds, arrays


def _read_scores(path: Path, expected: str) -> Arrays:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise PlanError(
            f"the scores {path} cannot be read ({error.strerror}): keep them beside the graph file"
        ) from error
    if sha256(content) != expected:
        raise PlanError(f"the scores {path} are damaged or of another run: trace the network again")
    try:
        return dict(safetensors.numpy.load(content))
    except SafetensorError as error:
        raise PlanError(f"the scores {path} are no safetensors file ({error}): trace again") from error


def _term(k: int, kind: str | float, arrays: Arrays) -> PairTerm:
    coef: Coefficient
    if kind == "low_rank":
        coef = LowRank(arrays[f"pairs.{k}.left"], arrays[f"pairs.{k}.right"])
    elif kind == "dense":
        coef = arrays[f"pairs.{k}.coef"]
    else:
        coef = float(kind)
    return PairTerm(arrays[f"pairs.{k}.rows"], arrays[f"pairs.{k}.cols"], coef)
