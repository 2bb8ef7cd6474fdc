"""The report survives the way through its file, and a damaged one is refused."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch import nn

import qcqp_prune as qp
from qcqp_prune.report import Accuracy, PruneReport
from qcqp_prune.report.terminal import _short, report_view


@pytest.fixture(scope="module")
def report() -> PruneReport:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3))
    return qp.prune(model, torch.zeros(1, 4), budgets={"macs": "50%", "params": 60}, time_limit=10)[1]


def test_round_trip(report: PruneReport, tmp_path: Path) -> None:
    full = replace(report, accuracy=Accuracy(0.9, 0.4, None, 0.875, 40), training={"epochs": [{"loss": 0.5}]})
    full.write(tmp_path / "report.json")
    again = PruneReport.read(tmp_path / "report.json")
    assert again == full
    assert again.masks == report.solve.masks
    assert [p.name for p in tmp_path.iterdir()] == ["report.json"]


def test_printing_it_shows_the_tables(report: PruneReport) -> None:
    shown = str(report)
    assert "scored by Magnitude(paper)" in shown
    assert "identity 3 checked" in shown


def test_kernel_columns_are_shown_and_stored() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 3, (1, 2)), nn.ReLU(), nn.Conv2d(3, 2, 1))
    report = qp.prune(
        model, torch.zeros(1, 1, 3, 3), budgets={"params": 15}, columns=True, solver="highs", time_limit=30
    )[1]
    assert report.verification is not None
    assert report.verification.column_layers == ("0",)
    kept = report.masks.counts()["0.columns"]
    assert f"6→{kept}" in str(report)
    assert "(ShapeConv2d): 0" in str(report)
    assert PruneReport.from_json(json.loads(json.dumps(report.to_json()))) == report


def test_a_caution_stands_at_the_top_and_in_the_file(report: PruneReport) -> None:
    assert report.verification is not None
    assert "CAUTION" not in str(report)
    assert report.to_json()["verification"]["caution"] == ""
    doubtful = replace(report, verification=replace(report.verification, input_dependence=1e-9))
    lines = str(doubtful).splitlines()
    assert lines[1].startswith("CAUTION: outputs vary by only 1.0e-09 of their size")
    assert str(doubtful).count("CAUTION") == 1
    stored = doubtful.to_json()
    assert "proves little" in stored["verification"]["caution"]
    assert PruneReport.from_json(json.loads(json.dumps(stored))) == doubtful


def test_on_a_narrow_terminal_layers_are_rounded_and_budgets_are_not(report: PruneReport) -> None:
    layers = tuple(
        replace(row, name=f"features.{k}.conv", macs=(118_013_952, 1_843_968))
        for k, row in enumerate(report.layers)
    )
    budgets = tuple(replace(b, limit=20_445_921_280, used=20_445_859_520) for b in report.budgets)
    huge = replace(report, layers=layers, budgets=budgets)
    console = Console(width=60, file=io.StringIO())
    with console.capture() as captured:
        console.print(report_view(huge))
    narrow = captured.get()
    assert "numbers rounded" in narrow
    assert "features.0.conv" in narrow
    assert "118M→1.84M" in narrow
    assert "118,013,952" not in narrow
    for number in ("20,445,921,280", "20,445,859,520", "61,760"):
        assert number in narrow
    wide = Console(width=200, file=io.StringIO())
    with wide.capture() as captured:
        wide.print(report_view(huge))
    assert "118,013,952→1,843,968" in captured.get()
    assert "rounded" not in captured.get()


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (999, "999"),
        (1000, "1k"),
        (3136, "3.14k"),
        (999_499, "999k"),
        (999_500, "1M"),
        (2 * 10**15, "2P"),
    ],
)
def test_short_numbers(value: int, text: str) -> None:
    assert _short(value) == text


def test_the_file_says_what_a_reader_wants(report: PruneReport, tmp_path: Path) -> None:
    report.write(tmp_path / "report.json")
    data = json.loads((tmp_path / "report.json").read_text())
    assert data["schema"] == 1
    budget = next(b for b in data["budgets"] if b["resource"] == "macs")
    assert budget["dense"] == 4 * 6 + 6 * 5 + 5 * 3
    assert budget["limit"] == 34
    assert budget["slack"] == budget["limit"] - budget["used"] >= 0
    for key in (
        "objective",
        "bound",
        "gap",
        "solver",
        "version",
        "options",
        "seed",
        "seconds",
        "trace",
        "termination",
    ):
        assert key in data["solve"]
    assert all(c["predicted"] == c["measured"] for c in data["verification"]["counts"])
    assert {"name", "inputs", "outputs", "macs", "params", "why_not"} <= data["layers"][0].keys()


def test_without_data_there_is_no_accuracy(report: PruneReport) -> None:
    assert report.accuracy == Accuracy(None, None, None, None, None)
    assert "accuracy" not in shown(report)


def shown(report: PruneReport) -> str:
    console = Console(file=io.StringIO(), width=120)
    console.print(report_view(report))
    return console.file.getvalue()


def test_tables_show_every_layer_budget_and_check(report: PruneReport) -> None:
    text = shown(replace(report, accuracy=Accuracy(0.9, 0.4, None, 0.875, 40)))
    used = {line.resource: line.used for line in report.budgets}
    for words in (
        "network output",
        "identity 2 checked",
        f"macs {used['macs']} = {used['macs']} MACs",
        "identity 3 checked",
        "90.00%",
        "87.50%",
        report.solve.solver,
    ):
        assert words in text
    for row in report.layers:
        assert row.name in text


def test_no_gap_is_shown_without_a_bound(report: PruneReport) -> None:
    text = shown(replace(report, solve=replace(report.solve, bound=None)))
    assert "no valid bound was proved" in text
    assert ", gap" not in text
    assert ", gap" in shown(report)


def test_names_are_not_taken_for_markup(report: PruneReport) -> None:
    row = replace(report.layers[0], name="layer[red]")
    assert "layer[red]" in shown(replace(report, layers=(row, *report.layers[1:])))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda d: d.update(format="other"), "no report"),
        (lambda d: d.update(schema=2), "schema 2"),
        (lambda d: d.pop("budgets"), "incomplete"),
        (lambda d: d["layers"][0].pop("macs"), "incomplete"),
        (lambda d: d["layers"][0].update(extra=1), "incomplete"),
        (lambda d: d["solve"].pop("masks"), "solve report"),
        (lambda d: d["verification"].pop("counts"), "verification"),
    ],
)
def test_damage_is_refused(report: PruneReport, damage: Callable[[dict], None], words: str) -> None:
    data = json.loads(json.dumps(report.to_json()))
    damage(data)
    with pytest.raises(qp.PlanError, match=words):
        PruneReport.from_json(data)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(qp.PlanError, match="no file"):
        PruneReport.read(tmp_path / "report.json")
