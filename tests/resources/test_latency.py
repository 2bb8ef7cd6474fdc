"""Latency tables, accelerator cycles and peak memory: by hand, and against what runs."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import qcqp_prune as qp
from qcqp_prune.errors import InvalidBudgetError, InvalidOptionError, PlanError
from qcqp_prune.graph.channels import ChannelGraph
from qcqp_prune.resources import AcceleratorCycles, LatencyTable, LayerLatency, PeakMemory
from qcqp_prune.resources.latency import layer_signature
from qcqp_prune.resources.timing import measure_latency


def chain() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1, groups=8),
        nn.Conv2d(8, 6, 1),
        nn.Flatten(),
        nn.Linear(6 * 16, 5),
    )


X = torch.zeros(1, 3, 4, 4)


def grid(*points: int) -> np.ndarray:
    return np.asarray(points, np.int64)


def tables() -> dict[str, LayerLatency]:
    return {
        "0": LayerLatency(grid(3), grid(4, 8), grid(100, 180)[None, :]),
        "2": LayerLatency(grid(2, 8), grid(), grid(10, 40)),
        "3": LayerLatency(grid(4, 8), grid(3, 6), np.asarray([[50, 70], [80, 60]], np.int64)),
        "5": LayerLatency(grid(96), grid(5), grid(7)[None, :]),
    }


def counts(graph: ChannelGraph, **kept: int) -> list[int]:
    return [kept.get(f"layer_{g.id}", g.width) for g in graph.groups]


def test_latency_is_looked_up_at_the_next_larger_point() -> None:
    graph = qp.trace(chain(), X)
    table = LatencyTable(tables())
    form = table.form(graph)
    first, second = (next(k for k, g in enumerate(graph.groups) if g.id.startswith(p)) for p in "03")

    def at(a: int, b: int) -> int:
        n = [g.width for g in graph.groups]
        n[first], n[second] = a, b
        return form.evaluate(n)

    # 8 and 6 channels: 180 + 40 + 80 (the measured 60 dips below 80) + 7; then one step down each.
    assert at(8, 6) == 180 + 40 + 80 + 7
    assert at(8, 3) == 180 + 40 + 80 + 7
    assert at(5, 3) == 180 + 40 + 80 + 7
    assert at(4, 4) == 100 + 40 + 70 + 7
    assert at(2, 1) == 100 + 10 + 50 + 7
    assert table.notes == ("3: 1 of 4 times dip and were raised to a running maximum",)


def test_tables_are_found_by_key_and_by_signature() -> None:
    graph = qp.trace(chain(), X)
    by_name = LatencyTable(tables()).form(graph)
    keyed = {f"key {name}": t for name, t in tables().items()}
    by_key = LatencyTable(keyed, {name: f"key {name}" for name in tables()}).form(graph)
    signed = {layer_signature(graph, layer): tables()[layer.name] for layer in graph.layers}
    full = [g.width for g in graph.groups]
    assert by_key.evaluate(full) == by_name.evaluate(full) == LatencyTable(signed).form(graph).evaluate(full)


def test_incomplete_tables_are_refused() -> None:
    graph = qp.trace(chain(), X)
    some = tables()
    del some["3"], some["5"]
    with pytest.raises(InvalidBudgetError, match=r"nothing for 2 of 4 layers \(3, 5\): measure it"):
        LatencyTable(some).form(graph)
    short = {**tables(), "3": LayerLatency(grid(4, 7), grid(6), grid(1, 2)[:, None])}
    with pytest.raises(InvalidBudgetError, match="ends at 7 input channels and the layer has 8"):
        LatencyTable(short).form(graph)
    two = {**tables(), "2": LayerLatency(grid(8), grid(8), grid(1)[None, :])}
    with pytest.raises(InvalidBudgetError, match="one width"):
        LatencyTable(two).form(graph)
    with pytest.raises(InvalidBudgetError, match="one value"):
        LayerLatency(grid(4, 8), grid(3), grid(1)[None, :])
    with pytest.raises(InvalidBudgetError, match="does not ascend"):
        LayerLatency(grid(8, 4), grid(3), grid(1, 2)[:, None])


def test_files_keep_everything(tmp_path: Path) -> None:
    graph = qp.trace(chain(), X)
    table = LatencyTable(tables(), {"alias": "0"}, "a machine")
    again = LatencyTable.load(table.save(tmp_path / "t.json"))
    assert (again.machine, again.layers, again.unit) == ("a machine", {"alias": "0"}, "ns")
    n = [max(1, g.width // 2) for g in graph.groups]
    assert again.form(graph).evaluate(n) == table.form(graph).evaluate(n)
    assert [p.name for p in tmp_path.iterdir()] == ["t.json"]
    data = json.loads((tmp_path / "t.json").read_text())
    del data["tables"]["0"]["in"]
    (tmp_path / "t.json").write_text(json.dumps(data))
    with pytest.raises(PlanError, match="incomplete"):
        LatencyTable.load(tmp_path / "t.json")
    (tmp_path / "t.json").write_text("{}")
    with pytest.raises(PlanError, match="qcqp-prune latency"):
        LatencyTable.load(tmp_path / "t.json")


def test_measured_tables_cover_the_network_and_can_be_budgeted() -> None:
    model = chain()
    graph = qp.trace(model, X)
    before = {name: p.clone() for name, p in model.state_dict().items()}
    table = measure_latency(model, graph, X, points=2, repeats=1)
    assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items())
    conv, depthwise, last = (table.tables[table.layers[name]] for name in ("0", "2", "5"))
    assert (conv.ins.tolist(), conv.outs.tolist()) == ([2, 3], [4, 8])
    assert (depthwise.ins.tolist(), depthwise.outs.tolist()) == ([4, 8], [])
    assert (last.ins.tolist(), last.outs.tolist()) == ([48, 96], [3, 5])
    assert all((t.nanoseconds > 0).all() for t in table.tables.values())
    scores = qp.Magnitude()(model, graph)
    full = table.form(graph).evaluate([g.width for g in graph.groups])
    problem = qp.PruningProblem.build(graph, scores, {"latency": "100%"}, resources=[table])
    assert problem.budgeted[0].limit == full
    with pytest.raises(InvalidOptionError, match="positive"):
        measure_latency(model, graph, X, points=0)


def test_equal_layers_are_timed_once() -> None:
    model = nn.Sequential(nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1))
    x = torch.zeros(1, 4, 2, 2)
    table = measure_latency(model, qp.trace(model, x), x, points=1, repeats=1)
    assert len(table.tables) == 1
    assert sorted(table.layers) == ["0", "1"]


def test_cycles_by_hand() -> None:
    graph = qp.trace(chain(), X)
    form = AcceleratorCycles(cpi=4, cpo=2).form(graph)
    first, second = (next(k for k, g in enumerate(graph.groups) if g.id.startswith(p)) for p in "03")
    for a in range(1, 9):
        for b in range(1, 7):
            n = [g.width for g in graph.groups]
            n[first], n[second] = a, b
            # 16 positions; the depthwise layer takes its channels one by one.
            expected = 16 * -(-3 // 4) * -(-a // 2) + 16 * a + 16 * -(-a // 4) * -(-b // 2)
            assert form.evaluate(n) == expected + -(-16 * b // 4) * -(-5 // 2)
    with pytest.raises(InvalidOptionError, match="positive"):
        AcceleratorCycles(0, 4)


class Fork(nn.Module):
    """Two branches of one stream, joined by a sum; a view, an operator in place, a concatenation."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.stem, self.wide, self.back = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 16, 1), nn.Conv2d(16, 6, 1)
        self.side, self.head = nn.Conv2d(6, 4, 1), nn.Linear(10, 3)
        self.act = nn.ReLU(inplace=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.act(self.stem(x))
        y = x + self.back(self.act(self.wide(x)))
        both = torch.cat([y, self.side(y)], 1)
        return self.head(both.mean((2, 3)).flatten(1))


def test_peak_memory_by_hand() -> None:
    """Maps of 5 x 5 floats; ReLU works in place and takes nothing of its own."""
    graph = qp.trace(Fork(), torch.zeros(2, 3, 7, 7))
    form = PeakMemory().form(graph)
    full = [g.width for g in graph.groups]
    # back runs: stream 6, wide 16, its output 6.
    assert form.evaluate(full) == 4 * 25 * (6 + 16 + 6)
    narrow = [1 if g.id.startswith("wide") else g.width for g in graph.groups]
    # Now the concatenation is the worst moment: the sum (6), the side (4), and both together (10).
    assert form.evaluate(narrow) == 4 * 25 * (6 + 4 + 10)
    again = ChannelGraph.from_json(json.loads(json.dumps(graph.to_json())))
    assert PeakMemory().form(again).evaluate(narrow) == form.evaluate(narrow)
    old = graph.to_json()
    del old["activations"]
    with pytest.raises(InvalidBudgetError, match="trace the network again"):
        PeakMemory().form(ChannelGraph.from_json(old))


@pytest.mark.parametrize("share", ["85%", "60%"])
def test_peak_memory_equals_what_the_smaller_network_holds(share: str) -> None:
    x = torch.randn(2, 3, 7, 7)
    small, report = qp.prune(Fork(), x, budgets={"peak_memory": share, "macs": "80%"}, solver="highs")
    usage = report.solve.usage["peak_memory"]
    assert usage.limit is not None
    assert usage.used <= usage.limit
    assert PeakMemory().measure(small, x) == usage.used
    assert any(c.resource == "peak_memory" and c.measured == usage.used for c in report.verification.counts)


def test_resources_on_request_are_counted_only_where_a_budget_names_them() -> None:
    model = chain()
    graph = qp.trace(model, X)
    scores = qp.Magnitude()(model, graph)
    plain = qp.PruningProblem.build(graph, scores, "50%")
    assert {r.resource for r in plain.rows} == {"macs", "params", "memory"}
    wanted = qp.PruningProblem.build(graph, scores, {"cycles": "50%"})
    assert {r.resource for r in wanted.rows} == {"macs", "params", "memory", "cycles"}
    engine = qp.PruningProblem.build(graph, scores, {"cycles": "50%"}, resources=[AcceleratorCycles(1, 1)])
    # One channel at a time: the multiply-adds, but for the nine taps of two kernels.
    assert engine.budgeted[0].dense == 16 * 3 * 8 + 16 * 8 + 16 * 8 * 6 + 96 * 5
