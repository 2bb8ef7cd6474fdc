"""What the documentation says was measured is what the committed results files say."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from benchmarks.tables import page

ROOT = Path(__file__).resolve().parent.parent


def test_results_page_is_made_from_the_results_files() -> None:
    assert (ROOT / "docs" / "results.md").read_text() == page()


@pytest.mark.parametrize("name", sorted(p.stem for p in (ROOT / "benchmarks" / "results").glob("*.json")))
def test_a_results_file_names_its_command(name: str) -> None:
    data = json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text())
    assert re.fullmatch(r"python -m benchmarks\.\w+( \S+)*", data["command"])
    assert data["rows"]


def test_every_recorded_run_met_its_budgets_to_the_last_unit() -> None:
    rows = json.loads((ROOT / "benchmarks" / "results" / "pretrained_resnets.json").read_text())["rows"]
    for row in rows:
        assert row["counts_equal"]
        assert row["bound"] >= row["objective"]
        for use in row["used"].values():
            assert use["limit"] is None or use["used"] <= use["limit"]
