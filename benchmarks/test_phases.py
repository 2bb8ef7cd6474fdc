"""Each phase by itself: trace, build, reduce, solve, shrink. Run by ``make bench``."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import pytest

import qcqp_prune as qp
from benchmarks.instances import INSTANCES, Instance, MissingWeights
from qcqp_prune.program.program import Program

NAMES = ["resnet20", "resnet56", "tv_resnet50", "tv_mobilenet_v2"]


@lru_cache(maxsize=4)
def prepared(name: str) -> dict[str, Any]:
    instance = INSTANCES[name]
    try:
        model = instance.build()
    except MissingWeights as error:
        pytest.skip(str(error))
    graph = qp.trace(model, instance.example())
    problem = qp.PruningProblem.build(graph, qp.Magnitude()(model, graph), "50%")
    return {"instance": instance, "model": model, "graph": graph, "problem": problem}


@pytest.fixture(params=NAMES)
def at(request: pytest.FixtureRequest) -> dict[str, Any]:
    return prepared(request.param)


def test_trace(benchmark: Any, at: dict[str, Any]) -> None:
    instance: Instance = at["instance"]
    graph = benchmark.pedantic(qp.trace, (at["model"], instance.example()), rounds=3)
    assert graph.fingerprint == at["graph"].fingerprint


def test_build(benchmark: Any, at: dict[str, Any]) -> None:
    def build() -> qp.PruningProblem:
        return qp.PruningProblem.build(at["graph"], qp.Magnitude()(at["model"], at["graph"]), "50%")

    assert benchmark.pedantic(build, rounds=3).rows[0].dense == at["problem"].rows[0].dense


def test_reduce(benchmark: Any, at: dict[str, Any]) -> None:
    program = benchmark.pedantic(Program.from_problem, (at["problem"],), rounds=3)
    assert program.size == at["graph"].prunable_count


def test_solve(benchmark: Any, at: dict[str, Any]) -> None:
    report = benchmark.pedantic(qp.solve, (at["problem"], "block_coordinate"), rounds=1)
    assert report.usage["macs"].used <= report.usage["macs"].limit


def test_shrink(benchmark: Any, at: dict[str, Any]) -> None:
    masks = qp.solve(at["problem"], "block_coordinate").masks
    small = benchmark.pedantic(qp.shrink, (at["model"], at["graph"], masks), rounds=1)
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in at["model"].parameters())
