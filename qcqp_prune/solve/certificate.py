"""Certificates: a program, a selection and the multipliers that bound every other one, in two files.

``NAME.json`` describes the program and the multipliers, ``NAME.arrays.safetensors`` beside it holds the numbers.
``qcqp_prune.certify`` reads them and shares no code with this module or any solver.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy

from qcqp_prune.errors import PlanError
from qcqp_prune.program.coefficients import BoolArray, dense
from qcqp_prune.program.problem import PruningProblem
from qcqp_prune.program.program import Program
from qcqp_prune.solve.proof import AnyProof, Branching
from qcqp_prune.storage import StrPath, digest_of, library_version, read_json, sha256, write_bytes, write_json

SCHEMA_VERSION = 1
FORMAT = "qcqp-prune certificate"

Arrays = dict[str, np.ndarray[Any, Any]]


@dataclass(frozen=True, eq=False)
class Certificate:
    """What proves a report's bound.

    Attributes:
        problem: that was solved; the program is made from it again when it is written.
        mask: ``(n,) bool``, the selection, over the program's variables.
        objective: its worth.
        bound: the bound that is claimed; the proof's own or above it.
        proof: the multipliers.
    """

    problem: PruningProblem
    mask: BoolArray
    objective: float
    bound: float
    proof: AnyProof

    def write(self, path: StrPath) -> tuple[Path, Path]:
        """Write both files, aside first and then renamed; the arrays first, because the JSON vouches for them.

        Args:
            path: of the JSON file.

        Returns:
            The JSON file and the file of arrays.
        """
        target = Path(path)
        program = Program.from_problem(self.problem)
        described, arrays = describe(program)
        arrays["mask"] = self.mask.astype(np.uint8)
        tree = _tree(self.proof, arrays)
        content = safetensors.numpy.save({k: np.ascontiguousarray(a) for k, a in arrays.items()})
        name = target.name.removesuffix(".json") + ".arrays.safetensors"
        data: dict[str, Any] = {
            "format": FORMAT,
            "schema": SCHEMA_VERSION,
            "library": library_version(),
            "program": described,
            "selection": {"objective": self.objective},
            "claim": {"bound": self.bound},
            "proof": tree,
            "hints": {key: list(value) for key, value in self.proof.hints.items()},
            "arrays": {"file": name, "sha256": sha256(content)},
        }
        beside = write_bytes(target.with_name(name), content)
        return write_json(target, {**data, "digest": digest_of(data)}), beside


def describe(program: Program) -> tuple[dict[str, Any], Arrays]:
    """A program as plain data and arrays by name; equal programs give equal ones."""
    arrays: Arrays = {
        "linear": program.linear,
        "wholes": program.links.wholes,
        "parts": program.links.parts,
    }
    pairs = []
    for k, pair in enumerate(program.pairs):
        shape = (program.groups[pair.first].width, program.groups[pair.second].width)
        arrays[f"pairs.{k}"] = dense(pair.coef, shape)
        pairs.append([pair.first, pair.second])
    groups = [
        {"name": g.name, "width": g.width, "counts": list(g.counts), "tie": g.tie} for g in program.groups
    ]
    rows = [
        {"kind": "sums", "name": c.name, "unit": c.unit, "limit": c.limit, **c.form.to_json()}
        for c in program.constraints
    ]
    described = {"constant": program.constant, "groups": groups, "pairs": pairs, "constraints": rows}
    if len(program.needs):
        described["needs"] = [list(pair) for pair in program.needs.pairs]
    return described, arrays


def differences(path: StrPath, problem: PruningProblem) -> list[str]:
    """In what a certificate's program differs from a problem's own; empty where it speaks of this very problem.

    Args:
        path: of the JSON file.
        problem: for example from a traced network and its budgets.

    Raises:
        PlanError: a file is missing or damaged.
    """
    source = Path(path)
    data = read_json(source, "a certificate")
    try:
        held = safetensors.numpy.load(source.with_name(Path(data["arrays"]["file"]).name).read_bytes())
        stored = data["program"]
    except (KeyError, TypeError, OSError, safetensors.SafetensorError) as error:
        raise PlanError(f"{source} is no complete certificate ({error}): write it anew") from error
    described, arrays = describe(Program.from_problem(problem))
    plain = _plain(described)
    found = [key for key in plain if stored.get(key) != plain[key]]
    found += [
        name for name, array in arrays.items() if name not in held or not np.array_equal(array, held[name])
    ]
    return found


def stored_limits(path: StrPath) -> dict[str, int]:
    """The limits of a certificate's budgets, by resource.

    Raises:
        PlanError: the file is missing or no certificate.
    """
    data = read_json(path, "a certificate")
    try:
        return {row["name"]: int(row["limit"]) for row in data["program"]["constraints"]}
    except (KeyError, TypeError, ValueError) as error:
        raise PlanError(
            f"{path} is no certificate ({error!r}): give the file that --certificate wrote"
        ) from error


def _tree(proof: AnyProof, arrays: Arrays, name: str = "proof") -> dict[str, Any]:
    """A proof as plain data; its arrays are added to the others by name."""
    if isinstance(proof, Branching):
        return {
            "split": {"group": proof.group, "at_most": proof.at_most},
            "low": _tree(proof.low, arrays, f"{name}.low"),
            "high": _tree(proof.high, arrays, f"{name}.high"),
        }
    kinds = {"diagonal": proof.diagonal, "centre": proof.centre, "prices": proof.prices}
    if proof.link_prices is not None:
        kinds["links"] = proof.link_prices
    arrays[f"{name}.lift"] = np.asarray([value for value, *_ in proof.lift], np.float64)
    arrays.update({f"{name}.{kind}": np.asarray(values, np.float64) for kind, values in kinds.items()})
    lift = {"values": f"{name}.lift", "products": [[first, second] for _, first, second in proof.lift]}
    return {"multipliers": {"lift": lift, **{kind: f"{name}.{kind}" for kind in kinds}}}


def _plain(value: Any) -> Any:
    """As JSON gives it back: lists for tuples, Python's numbers for numpy's."""
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    return value.item() if isinstance(value, np.generic) else value
