"""``certify`` and ``pareto`` through their files."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

import qcqp_prune as qp
from qcqp_prune.cli.console import wrote_certificate
from qcqp_prune.program.files import read_traced, write_traced
from qcqp_prune.program.forms import PairwiseForm
from qcqp_prune.testing import chain_problem


def test_solve_certify(run, traced: Path, tmp_path: Path) -> None:
    masks, certificate = tmp_path / "masks.json", tmp_path / "c.json"
    words = ["solve", traced, "-b", "macs=50%", "-o", masks, "--solver", "decomposition"]
    solved = run(*words, "--certificate", certificate)
    assert solved.code == 0, solved.err
    assert "price of macs: 1k more MACs" in solved.out
    record = json.loads(masks.read_text())
    checked = run("certify", certificate, "--network", traced)
    assert checked.code == 0, checked.err
    assert "accepted" in checked.out
    assert f"macs: at most {record['usage']['macs']['limit']:,}" in checked.out
    assert f"worth more than {record['bound']:.9g}" in checked.out
    assert f"the program is that of {traced}" in checked.out
    assert "give --network" in run("certify", certificate).out

    stored = read_traced(traced)
    objective = PairwiseForm(2 * stored.objective.unary + 1, stored.objective.pairs)
    other = tmp_path / "other.json"
    write_traced(other, type(stored)(stored.graph, objective, stored.origin))
    refused = run("certify", certificate, "--network", other)
    assert refused.code == 1
    assert "another program" in refused.err
    assert "linear" in refused.err

    data = json.loads(certificate.read_text())
    data["claim"]["bound"] *= 0.9
    certificate.write_text(json.dumps(data))
    refused = run("certify", certificate)
    assert refused.code == 1
    assert "rejected" in refused.err
    assert "checksum" in refused.err
    assert "Traceback" not in refused.err


def test_certificate_needs_multipliers(run, traced: Path, tmp_path: Path) -> None:
    words = ["solve", traced, "-b", "50%", "-o", tmp_path / "m.json", "--solver", "block_coordinate"]
    result = run(*words, "--certificate", tmp_path / "c.json")
    assert result.code == 1
    assert "no bound was proved" in result.err
    assert (tmp_path / "m.json").is_file()  # the solve itself is not lost
    missing = run("certify", tmp_path / "c.json")
    assert missing.code == 1
    assert "rejected" in missing.err


def test_pareto(run, traced: Path, tmp_path: Path) -> None:
    files = {name: tmp_path / f"curve.{name}" for name in ("json", "csv", "html")}
    words = ["--points", 3, "--bounds", 1, "--from", 0.3, "--to", 0.8, "--time-limit", 3]
    result = run(
        "pareto", traced, "-o", files["json"], "--csv", files["csv"], "--html", files["html"], *words
    )
    assert result.code == 0, result.err
    data = json.loads(files["json"].read_text())
    assert len(data["points"]) == 3
    for point in data["points"]:
        assert point["used"] <= point["limit"]
        assert point["bound"] >= point["objective"]
        assert f"{point['limit']:,}" in result.out
    assert len(files["csv"].read_text().splitlines()) == 4
    assert "<svg" in files["html"].read_text()
    # The selection of a point is one that `shrink` takes.
    assert set(data["points"][0]["masks"]) >= {"keep"}
    wrong = run("pareto", traced, "-o", files["json"], "--from", 0.9, "--to", 0.2)
    assert wrong.code == 2
    assert "from <= to" in wrong.err


def test_a_certificate_that_proves_less_than_the_report_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = qp.solve(chain_problem("tiny"), "decomposition", options=qp.SolveOptions(work_limit=3))
    assert report.bound is not None
    wrote_certificate(report, tmp_path / "same.json")
    assert "proves" not in capsys.readouterr().err
    better = replace(report, bound=report.objective + 0.1 * (report.bound - report.objective))
    wrote_certificate(better, tmp_path / "less.json")
    said = " ".join(capsys.readouterr().err.split())
    assert f"The certificate proves a gap of {report.gap:.3%}" in said
