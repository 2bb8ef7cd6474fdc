"""A traced network goes through its two files unchanged, with every kind of coefficient."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from qcqp_prune.errors import InvalidScoreError, PlanError
from qcqp_prune.program.coefficients import LowRank
from qcqp_prune.program.files import TracedNetwork, read_traced, write_traced
from qcqp_prune.program.forms import PairTerm, PairwiseForm
from qcqp_prune.testing import random_problem


def network(seed: int = 0) -> TracedNetwork:
    graph = random_problem(seed).graph
    rng = np.random.default_rng(seed)
    units = np.arange(graph.unit_count)
    rows, cols = units[:3], units[1:5]
    terms = (
        PairTerm(rows, cols, 0.25),
        PairTerm(rows, cols, rng.normal(size=(4, 3)).T),  # not contiguous
        PairTerm(rows, cols, LowRank(rng.normal(size=(3, 2)), rng.normal(size=(4, 2)))),
    )
    form = PairwiseForm(rng.normal(size=graph.unit_count), terms, constant=1.5, unit="loss")
    return TracedNetwork(graph, form, {"source": "a:b"})


def test_round_trip(tmp_path: Path) -> None:
    traced = network()
    path, scores = write_traced(tmp_path / "net.v2.json", traced)
    assert scores.name == "net.v2.scores.safetensors"
    again = read_traced(path)
    assert again.graph.fingerprint == traced.graph.fingerprint
    assert again.origin == {"source": "a:b"}
    assert (again.objective.constant, again.objective.unit) == (1.5, "loss")
    np.testing.assert_array_equal(again.objective.unary, traced.objective.unary)
    for a, b in zip(again.objective.pairs, traced.objective.pairs, strict=True):
        np.testing.assert_array_equal(a.rows, b.rows)
        np.testing.assert_array_equal(a.cols, b.cols)
        assert type(a.coef) is type(b.coef)
        np.testing.assert_array_equal(a.dense(), b.dense())


def test_scores_of_another_run_are_refused(tmp_path: Path) -> None:
    path, scores = write_traced(tmp_path / "a.json", network(0))
    _, other = write_traced(tmp_path / "b.json", network(1))
    scores.write_bytes(other.read_bytes())
    with pytest.raises(PlanError, match="another run"):
        read_traced(path)


def test_a_scores_path_cannot_lead_elsewhere(tmp_path: Path) -> None:
    path, scores = write_traced(tmp_path / "in" / "a.json", network())
    scores.rename(tmp_path / scores.name)
    data = json.loads(path.read_text())
    data["objective"]["file"] = f"../{scores.name}"
    path.write_text(json.dumps(data))
    with pytest.raises(PlanError, match="beside the graph file"):
        read_traced(path)


@pytest.mark.parametrize("key", ["graph", "objective", "origin"])
def test_incomplete_files_are_refused(tmp_path: Path, key: str) -> None:
    path, _ = write_traced(tmp_path / "a.json", network())
    data = json.loads(path.read_text())
    del data[key]
    path.write_text(json.dumps(data))
    with pytest.raises(PlanError, match="incomplete"):
        read_traced(path)


def test_another_schema_is_refused(tmp_path: Path) -> None:
    path, _ = write_traced(tmp_path / "a.json", network())
    path.write_text(json.dumps({**json.loads(path.read_text()), "schema": 7}))
    with pytest.raises(PlanError, match="schema 7"):
        read_traced(path)


def test_infinite_scores_are_refused_by_their_own_error(tmp_path: Path) -> None:
    traced = network()
    object.__setattr__(traced.objective, "constant", float("inf"))
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_traced(tmp_path / "a.json", traced)
    traced = network()
    traced.objective.unary[0] = np.nan
    path, _ = write_traced(tmp_path / "a.json", traced)
    with pytest.raises(InvalidScoreError, match="NaN"):
        read_traced(path)
