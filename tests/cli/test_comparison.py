"""``compare`` through its files."""

from __future__ import annotations

import json
from pathlib import Path


def test_compare(run, traced: Path, tmp_path: Path) -> None:
    masks, values, out = tmp_path / "masks.json", tmp_path / "values.json", tmp_path / "comparison.json"
    assert run("solve", traced, "-b", "macs=50%", "-o", masks, "--solver", "block_coordinate").code == 0
    units = sum(g["width"] for g in json.loads(masks.read_text())["masks"]["keep"].values())
    values.write_text(json.dumps({"values": [0.5] * units, "by": "nothing"}))
    words = ["compare", traced, "-b", "macs=50%", "-o", out, f"search={masks}", f"flat={values}"]
    done = run(*words, "--solver", "highs", "--relaxation", "mccormick", "--rounding", "block_coordinate")
    assert done.code == 0, done.err
    data = json.loads(out.read_text())
    found = {o["name"]: o for o in data["origins"]}
    assert set(found) == {"search", "flat", "highs", "mccormick", "top-k"}
    assert data["proved"]
    assert all(o["feasible"] and o["used"]["macs"] <= data["limits"]["macs"] for o in found.values())
    assert data["bound"] == min(o["bound"] for o in found.values() if o["bound"] is not None)
    assert found["mccormick"]["bound_gap"] >= 0
    assert "is proved best" in done.out
    for name in found:
        assert name in done.out


def test_bad_words(run, traced: Path, tmp_path: Path) -> None:
    words = ["compare", traced, "-b", "50%", "-o", tmp_path / "c.json"]
    assert "write NAME=FILE" in run(*words, "masks.json").err
    assert "there is no file" in run(*words, "a=nowhere.json").err
    assert "no reduction 'best'" in run(*words, "--relaxation", "best").err
    assert not (tmp_path / "c.json").exists()
