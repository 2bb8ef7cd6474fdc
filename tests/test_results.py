"""What the documentation says was measured is what the committed results files say."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from benchmarks import accuracy, compatibility_page
from benchmarks.accuracy_tables import measured, standings
from benchmarks.growth import exponent
from benchmarks.importances import DEFAULT, OBJECTIVES
from benchmarks.objectives import BUDGETS, FLOORS
from benchmarks.objectives_tables import correlations
from benchmarks.tables import COMPATIBILITY, CONCEPTS, concepts, page, plots

ROOT = Path(__file__).resolve().parent.parent


def test_results_page_is_made_from_the_results_files() -> None:
    assert (ROOT / "docs" / "results.md").read_text() == page()
    assert {path: path.read_text() for path in (ROOT / "docs").glob("*.svg")} == plots()


def test_measured_parts_of_the_concepts_are_made_from_the_results_files() -> None:
    assert CONCEPTS.read_text() == concepts()


@pytest.mark.parametrize("name", sorted(p.stem for p in (ROOT / "benchmarks" / "results").glob("*.json")))
def test_a_results_file_names_its_commands(name: str) -> None:
    data = json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text())
    assert data["commands"]
    for command in data["commands"]:
        assert re.fullmatch(rf"python -m benchmarks\.{name}( \S+)*", command)
    assert data["rows"]


def test_every_recorded_run_met_its_budgets_to_the_last_unit() -> None:
    rows = json.loads((ROOT / "benchmarks" / "results" / "pretrained_resnets.json").read_text())["rows"]
    for row in rows:
        assert row["counts_equal"]
        assert row["bound"] >= row["objective"]
        for use in row["used"].values():
            assert use["limit"] is None or use["used"] <= use["limit"]


def _recorded(name: str) -> list[dict[str, Any]]:
    path = ROOT / "benchmarks" / "results" / f"{name}.json"
    if not path.is_file():
        pytest.skip(f"not measured yet: python -m benchmarks.{name}")
    rows: list[dict[str, Any]] = json.loads(path.read_text())["rows"]
    return rows


def test_ours_are_the_best_of_the_recorded_rivals() -> None:
    """The best selection everywhere, the best bound above 250 units, and a proof below them."""
    rows = _recorded("rivals")
    for key in {(row["network"], row["budgets"]["macs"]) for row in rows}:
        mine = [row for row in rows if (row["network"], row["budgets"]["macs"]) == key]
        ours = [row for row in mine if row["method"] in ("auto", "decomposition")]
        worths = [row["objective"] for row in mine if row.get("objective") is not None]
        bounds = [row["bound"] for row in mine if row.get("bound") is not None]
        assert max(row["objective"] for row in ours) >= max(worths) * (1 - 1e-9), key
        if ours[0]["units"] > 250:
            assert min(row["bound"] for row in ours) <= min(bounds) * (1 + 1e-4), key
        else:
            assert any(row["proved"] for row in mine if row.get("proved") is not None), key
        for row in mine:
            assert row.get("bound") is None or row["bound"] >= max(worths) * (1 - 1e-6), row["method"]


def test_recorded_growth_is_at_most_linear_in_pairs() -> None:
    rows = _recorded("growth")
    pairs = [row["pairs"] for row in rows]
    assert [row["width"] for row in rows] == [0.25, 0.5, 0.75, 1.0, 1.5, 2.0]
    for quantity in ("seconds", "solve_mb"):
        assert exponent(pairs, [row[quantity] for row in rows]) <= 1.0


def test_compatibility_page_is_made_from_the_results_file() -> None:
    assert COMPATIBILITY.read_text() == compatibility_page.page()


def test_every_network_of_the_matrix_is_verified_or_says_why_not() -> None:
    rows = _recorded("compatibility")
    assert len({(row["source"], row["model"]) for row in rows}) == len(rows)
    for row in rows:
        where = row["source"], row["model"]
        if row["status"] != "verified":
            assert row["error"], where
            assert row["stage"], where
            continue
        assert row["identity_2"], where
        assert all(predicted == counted for predicted, counted in row["counts"].values()), where
        assert row["macs"]["predicted"] == row["macs"]["counted"] == row["counts"]["macs"][1], where
        assert row["macs"]["counted"] <= row["macs"]["limit"] <= row["macs"]["dense"], where
        assert row["asked"] != "50 %" or row["macs"]["limit"] == row["macs"]["dense"] // 2, where
        assert row["identity_3"], where
        assert row["max_relative_error"] <= 1e-8 or row["dtype"] != "float64", where
        assert row["input_dependence"] > 100 * row["max_relative_error"], where
        assert row["seconds"]["trace"] <= 60, where
        assert row["commit"], where
        assert row["version"], where


def test_the_objective_that_predicts_and_its_repair_keep_accuracy_without_finetuning() -> None:
    rows = [row for row in _recorded("objectives") if row["part"] == "selections"]
    assert {(row["objective"], row["budget"]) for row in rows} == {
        (o, b) for o in (*OBJECTIVES, *FLOORS) for b in BUDGETS
    }
    reached = {row["budget"]: row["accuracy"]["reconstructed"] for row in rows if row["objective"] == DEFAULT}
    assert reached["75%"] >= 0.90
    assert reached["50%"] >= 0.84
    for row in rows:
        assert row["macs"]["used"] <= row["macs"]["limit"]


@pytest.mark.parametrize("masks", ["random units", f"the best by {DEFAULT}"])
def test_what_is_predicted_ranks_masks_as_measured_loss_does(masks: str) -> None:
    number, found = correlations(_recorded("objectives"))[masks]
    assert number >= 30
    assert found[DEFAULT, "reconstructed"] >= 0.8


def test_the_default_objective_stands_above_every_rival() -> None:
    one = measured(_recorded("accuracy"))
    default = standings(one)["default"]
    assert default.level == default.cells == sum(len(budgets) for budgets in accuracy.BUDGETS.values())
    assert {len(cells["default"].finetuned) for cells in one.cells.values()} == {3}
    assert min(default.ahead, default.best_of_each) >= 0.3
    assert default.before_ahead >= 10
    rivals = len(set(one.methods) - one.ours)
    assert (rivals, default.cells) == (9, 14)  # what README says, beside the average
    assert f"on average {default.best_of_each:.1f} points above" in " ".join(
        (ROOT / "README.md").read_text().split()
    )
