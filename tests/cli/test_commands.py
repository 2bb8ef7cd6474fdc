"""The single steps through their files, and every refusal: one message, no traceback, the right exit code."""

from __future__ import annotations

import errno
import importlib.util
import json
import runpy
from importlib.metadata import EntryPoint, version
from pathlib import Path

import pytest
import torch

import qcqp_prune as qp
from qcqp_prune.program.files import read_traced
from qcqp_prune.solve import backend

# a: 64 pixels * 9 * 1 * 6, b: 64 * 9 * 6 * 8, head: 8 * 10
DENSE_MACS = 3456 + 27648 + 80


def test_version(run) -> None:
    result = run("--version")
    assert (result.code, result.out.strip()) == (0, f"qcqp-prune {version('qcqp-prune')}")


def test_trace_solve_shrink_load(run, net: Path, traced: Path, tmp_path: Path) -> None:
    masks, folder = tmp_path / "masks.json", tmp_path / "small"
    solved = run("solve", traced, "--budget", "macs=50%", "-b", "params=300", "-o", masks)
    assert solved.code == 0, solved.err
    assert f"{DENSE_MACS:,}" in solved.out  # the range is shown before solving
    assert "gap" in solved.out
    record = json.loads(masks.read_text())
    assert record["usage"]["macs"]["limit"] == DENSE_MACS // 2
    assert record["usage"]["macs"]["used"] <= DENSE_MACS // 2
    assert record["usage"]["params"]["used"] <= 300
    assert "identity 2 checked" in (cut := run("shrink", traced, masks, "-o", folder)).out
    assert "identity 3 checked" in cut.out
    small = qp.load(folder, runpy.run_path(str(net))["Net"])
    assert sum(p.numel() for p in small.parameters()) == record["usage"]["params"]["used"]
    shown = run("report", masks)
    assert shown.code == 0
    assert f"{record['usage']['macs']['used']:,}" in shown.out


def test_columns_from_trace_to_load(run, net: Path, tmp_path: Path) -> None:
    graph, masks, folder = tmp_path / "g.json", tmp_path / "m.json", tmp_path / "small"
    traced = run("trace", f"{net}:Net", "--input-shape", "1,1,8,8", "-o", graph, "--columns", "a")
    assert traced.code == 0, traced.err
    assert {x.name for x in read_traced(graph).graph.layers if x.columns is not None} == {"a"}
    solved = run("solve", graph, "-b", "params=260", "-o", masks, "--solver", "highs", "--time-limit", 60)
    assert solved.code == 0, solved.err
    cut = run("shrink", graph, masks, "-o", folder)
    assert cut.code == 0, cut.err
    assert "kernel columns stored and computed alone (ShapeConv2d): a" in cut.out
    small = qp.load(folder, runpy.run_path(str(net))["Net"])
    used = json.loads(masks.read_text())["usage"]["params"]["used"]
    assert sum(p.numel() for p in small.parameters()) == used <= 260


def test_trace_writes_the_scores_that_the_library_computes(traced: Path, net: Path) -> None:
    stored = read_traced(traced)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = runpy.run_path(str(net))["Net"]()
    graph = qp.trace(model, torch.zeros(1, 1, 8, 8))
    assert stored.graph.fingerprint == graph.fingerprint
    expected = qp.Magnitude()(model, graph)
    mask = torch.rand(graph.unit_count).numpy() < 0.5
    assert stored.objective.evaluate(mask) == expected.evaluate(mask)
    assert stored.origin["source"] == f"{net}:Net"


def test_trace_passes_arguments_on(run, net: Path, tmp_path: Path) -> None:
    graph = tmp_path / "g.json"
    words = ["--kwarg", "classes=4", "--kwarg", "act=tanh", "--importance", "magnitude:l2", "--ignore", "a"]
    result = run("trace", f"{net}:Net", "--input-shape", "1x1x8x8", "-o", graph, *words, "--round-to", 4)
    assert result.code == 0, result.err
    stored = read_traced(graph).graph
    assert next(t.shape for t in stored.tensors if t.name == "head.weight") == (4, 8)
    groups = {g.id: g for g in stored.groups}
    assert groups["a"].frozen_reason == "in ignored_layers (a)"
    assert groups["b"].counts() == [4, 8]


def counts_of(run, net: Path, tmp_path: Path, *words: str) -> dict[str, list[int]]:
    graph = tmp_path / "amounts.json"
    result = run("trace", f"{net}:Net", "--input-shape", "1,1,8,8", "-o", graph, *words)
    assert result.code == 0, result.err
    return {g.id: g.counts() for g in read_traced(graph).graph.groups if g.id in ("a", "b")}


def test_amounts_may_be_shares_and_for_single_layers(run, net: Path, tmp_path: Path) -> None:
    def counts(*words: str) -> dict[str, list[int]]:
        return counts_of(run, net, tmp_path, *words)

    assert counts("--min-keep", "0.5") == {"a": [3, 4, 5, 6], "b": [4, 5, 6, 7, 8]}
    assert counts("--min-keep", "1.0", "--min-keep", "b=0.25")["b"] == [2, 3, 4, 5, 6, 7, 8]
    # What is meant for all other layers gives way to a glob, whatever stands first.
    assert counts("--min-keep", "a=5", "--min-keep", "2") == {"a": [5, 6], "b": [2, 3, 4, 5, 6, 7, 8]}
    assert counts("--round-to", "b=4", "--round-to", "3") == {"a": [3, 6], "b": [4, 8]}
    assert counts("--round-to", "b=4") == {"a": [1, 2, 3, 4, 5, 6], "b": [4, 8]}


def test_units_may_be_chosen_for_single_layers(run, net: Path, tmp_path: Path) -> None:
    def free(*words: str) -> set[str]:
        return {name for name, counts in counts_of(run, net, tmp_path, *words).items() if len(counts) > 1}

    assert free("--units", "widths,stream") == {"a", "b"}
    assert free("--units", "heads", "--units", "stream") == set()
    assert free("--units", "a=heads") == {"b"}  # what no glob matches has the default
    assert free("--units", "heads", "--units", "b=widths, heads") == {"b"}
    shown = run(
        "trace", f"{net}:Net", "--input-shape", "1,1,8,8", "-o", tmp_path / "g.json", "--units", "heads"
    )
    assert "widths of layers stay whole unless units holds 'widths'" in " ".join(shown.out.split())


@pytest.mark.parametrize("words", [["--min-keep", "64"], ["--round-to", "16"], ["--min-keep", "1.0"]])
def test_limits_that_leave_nothing_to_prune(run, net: Path, tmp_path: Path, words: list[str]) -> None:
    graph = tmp_path / "g.json"
    shown = run("trace", f"{net}:Net", "--input-shape", "1,1,8,8", "-o", graph, *words)
    assert "kept whole (min_keep or round_to leaves none of 6 free): a" in shown.out
    result = run("solve", graph, "-b", "50%", "-o", tmp_path / "m.json")
    assert (result.code, result.err.count("error: ")) == (2, 1)
    assert "lower min_keep or round_to" in result.err


def test_an_infeasible_budget_is_explained_in_lines(run, net: Path, tmp_path: Path) -> None:
    graph, masks = tmp_path / "g.json", tmp_path / "m.json"
    run("trace", f"{net}:Net", "--input-shape", "1,1,8,8", "--min-keep", "4", "-o", graph)
    result = run("solve", graph, "-b", "macs=10%", "-b", "params=90%", "-o", masks)
    assert result.code == 1
    # 64 * 9 * (a + a b) + 10 b at a = b = 4, and with one of them at 1
    assert "the smallest attainable use is 11,560 of 31,184 MACs (37.08%)" in result.err
    lines = [line.strip() for line in result.err.splitlines()]
    assert lines[2:4] == [
        "8,640  a: at least 4 are kept (min_keep)",
        "6,942  b: at least 4 are kept (min_keep)",
    ]
    assert lines[-1].startswith("What to do: raise macs to 11,560 (37.08%)")
    assert "params" not in result.err
    assert run("solve", graph, "-b", "macs=37.08%", "-o", masks).code == 0


def test_a_share_may_be_written_as_a_number(run, traced: Path, tmp_path: Path) -> None:
    masks = tmp_path / "m.json"
    assert run("solve", traced, "-b", "macs=0.5", "-o", masks).code == 0
    assert json.loads(masks.read_text())["usage"]["macs"]["limit"] == DENSE_MACS // 2


def test_a_budget_that_asks_for_nothing_is_noted(run, traced: Path, tmp_path: Path) -> None:
    result = run("solve", traced, "-b", "macs=1M", "-b", "params=50%", "-o", tmp_path / "m.json")
    assert result.code == 0
    assert f"the budget of macs, 1,000,000 MACs, is not below the {DENSE_MACS:,}" in result.out


def test_weights_that_are_no_weights(run, net: Path, tmp_path: Path) -> None:
    (tmp_path / "text.pth").write_text("these are no weights")
    torch.save(torch.nn.Linear(2, 2), tmp_path / "module.pth")
    for name, why in (
        ("text.pth", "damaged or of another format"),
        ("module.pth", "holds more than tensors"),
    ):
        words = ["--input-shape", "1,1,8,8", "--weights", tmp_path / name, "-o", tmp_path / "g.json"]
        result = run("trace", f"{net}:Net", *words)
        assert (result.code, result.err.count("error: ")) == (2, 1)
        assert why in result.err
        assert "weights_only" not in result.err
        assert "two options" not in result.err


def test_warm_start(run, traced: Path, tmp_path: Path) -> None:
    first, second = tmp_path / "1.json", tmp_path / "2.json"
    run("solve", traced, "-b", "50%", "-o", first)
    result = run(
        "solve", traced, "-b", "50%", "-o", second, "--warm-start", first, "--solver", "block_coordinate"
    )
    assert result.code == 0, result.err
    assert json.loads(second.read_text())["objective"] >= json.loads(first.read_text())["objective"] * (
        1 - 1e-9
    )


def test_solvers(run) -> None:
    result = run("solvers")
    assert result.code == 0
    for info in qp.available_solvers():
        assert info.name in result.out
        assert info.scope.split(":")[0] in ("proves", "bounds", "searches")
        assert info.scope in result.out
        assert info.availability.ok is False or info.availability.version in result.out


def test_no_half_written_files(run, traced: Path, tmp_path: Path) -> None:
    masks = tmp_path / "sub" / "masks.json"
    assert run("solve", traced, "-b", "50%", "-o", masks).code == 0
    assert [p.name for p in masks.parent.iterdir()] == ["masks.json"]


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["-b", "macs=0.001%"], 1, "smallest attainable use"),
        (["-b", "macs=0.001"], 1, "raise macs to"),
        (["-b", "macs=1.5"], 2, "neither a share up to 1 nor a whole amount"),
        (["-b", "50%", "--solver", "pyomo:nope"], 2, "one that runs here"),
        (["-b", "macs=0"], 2, "not positive"),
        (["-b", "macs=101%"], 2, "above 100 %"),
        (["-b", "flops=50%"], 2, "unknown resource 'flops'"),
        (["-b", "macs=half"], 2, "cannot be read"),
        (["-b", "macs="], 2, "write resource=limit"),
        (["-b", "50%", "-b", "macs=40%"], 2, "two budgets for macs"),
        (["-b", "50%", "--solver", "high"], 2, "did you mean 'highs'"),
        (["-b", "50%", "--time-limit", "-1"], 2, "time_limit"),
        (["-b", "50%", "--warm-start", "nothing.json"], 2, "no file nothing.json"),
    ],
)
def test_solve_refuses(run, traced: Path, tmp_path: Path, words: list[str], code: int, message: str) -> None:
    result = run("solve", traced, "-o", tmp_path / "m.json", *words)
    assert (result.code, result.err.count("error: ")) == (code, 1)
    assert message in result.err
    assert "Traceback" not in result.err
    assert not (tmp_path / "m.json").exists()


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["nowhere_at_all:Net"], 2, "cannot be imported"),
        (["{net}:Nett"], 2, "did you mean 'Net'"),
        (["{net}:broken"], 2, "the constructor is ill"),
        (["{net}:number"], 2, "is a int"),
        (["{net}"], 2, "package.module:callable"),
        (["missing.py:Net"], 2, "missing.py: give the path of a Python file"),
        (["{net}:Net", "--kwarg", "depth=3"], 2, "unexpected keyword argument"),
        (["{net}:Net", "--kwarg", "classes"], 2, "name=value"),
        (["{net}:Net", "--weights", "missing.safetensors"], 2, "missing.safetensors"),
        (["{net}:Net", "--ignore", "c"], 2, "no layer is called 'c'"),
        (["{net}:Net", "--importance", "magnitud"], 2, "did you mean 'magnitude'"),
        (["{net}:Net", "--importance", "taylor"], 2, "needs data"),
        (["{net}:Net", "--importance", "activation:apoz"], 2, "needs data"),
        (["{net}:Net", "--importance", "magnitude:l3"], 2, "variants are magnitude:paper, magnitude:authors"),
        (["{net}:Net", "--importance", "lamp:l2"], 2, "leave the variant out"),
        (["{net}:Net", "--importance", "random:x"], 2, "write random:3"),
        (["{net}:Net", "--importance", "random", "--normalise", "layer"], 2, "choose by='group'"),
        (["{net}:Net", "--concave", "1.5"], 2, "give a power from 0"),
        (["{net}:Net", "--input-shape", "1,3,8,8"], 1, "does not run on the example inputs"),
        (["{net}:Net", "--input-shape", "1,,8"], 2, "positive integers"),
        (["{net}:Net", "--input-shape", "1,1,8,8", "--inputs", "{net}:Net"], 2, "give one of the two"),
        (["{net}:Net", "--input-shape", "1,1,8,8", "--input-dtype", "float31"], 2, "no dtype is called"),
        (["{net}:Net", "--input-shape", "1,1,8,8", "--input-below", "0"], 2, "give positive numbers"),
        (["{net}:Net", "--min-keep", "many"], 2, "write a whole number, a share such as 0.1"),
        (["{net}:Net", "--min-keep", "=3"], 2, "or LAYER_GLOB=number"),
        (["{net}:Net", "--min-keep", "1.5"], 2, "min_keep=1.5: give"),
        (["{net}:Net", "--min-keep", "nan"], 2, "write a whole number"),
        (["{net}:Net", "--min-keep", "-1"], 2, "min_keep=-1: give"),
        (["{net}:Net", "--round-to", "0.5"], 2, "round_to=0.5: give a positive integer"),
        (["{net}:Net", "--round-to", "0"], 2, "round_to=0: give a positive integer"),
        (["{net}:Net", "--round-to", "a=2", "--round-to", "a=4"], 2, "--round-to is given twice for a"),
        (["{net}:Net", "--min-keep", "2", "--min-keep", "3"], 2, "--min-keep is given twice for all layers"),
        (["{net}:Net", "--units", "width"], 2, "units holds 'width': choose from widths, heads"),
        (["{net}:Net", "--units", "=heads"], 2, "write kinds, or LAYER_GLOB=kinds once for each glob"),
        (["{net}:Net", "--units", "a=heads", "--units", "a=widths"], 2, "once for each glob"),
        (["{net}:Net", "--min-keep", "c=3"], 2, "no layer is called 'c'"),
    ],
)
def test_trace_refuses(run, net: Path, tmp_path: Path, words: list[str], code: int, message: str) -> None:
    words = [w.format(net=net) for w in words]
    shape = [] if "--input-shape" in words else ["--input-shape", "1,1,8,8"]
    result = run("trace", *words, *shape, "-o", tmp_path / "g.json")
    assert (result.code, result.err.count("error: ")) == (code, 1)
    assert message in result.err
    assert not (tmp_path / "g.json").exists()


def test_a_missing_option_is_a_usage_error(run, traced: Path) -> None:
    result = run("solve", traced)
    assert result.code == 2
    assert "--budget" in result.err


def test_verbose_shows_the_traceback(run, tmp_path: Path) -> None:
    from qcqp_prune.cli import main

    with pytest.raises(qp.PlanError, match="no file"):
        main(["report", str(tmp_path / "none.json"), "--verbose"])


def test_a_solver_that_is_not_installed(
    run, traced: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    absent = EntryPoint("absent", "a_package_that_is_not_there:Backend", backend.SOLVER_ENTRY_POINTS)
    monkeypatch.setattr(backend, "_entry_points", lambda: {"absent": absent})
    result = run("solve", traced, "-b", "50%", "--solver", "absent", "-o", tmp_path / "m.json")
    assert result.code == 2
    assert "a_package_that_is_not_there" in result.err
    assert "reinstall" in result.err
    listed = run("solvers")
    assert listed.code == 0
    assert "no: solver" in listed.out


def test_files_that_do_not_belong_together(run, net: Path, traced: Path, tmp_path: Path) -> None:
    other, masks = tmp_path / "other.json", tmp_path / "m.json"
    run("trace", f"{net}:Net", "--kwarg", "classes=5", "--input-shape", "1,1,8,8", "-o", other)
    run("solve", traced, "-b", "50%", "-o", masks)
    result = run("shrink", other, masks, "-o", tmp_path / "small")
    assert result.code == 2
    assert "fingerprint" in result.err
    wrong = run("shrink", traced, masks, "--kwarg", "classes=5", "-o", tmp_path / "small")
    assert wrong.code == 2
    assert "head.weight" in wrong.err
    assert not (tmp_path / "small").exists()


def test_damaged_files(run, traced: Path, tmp_path: Path) -> None:
    scores = traced.with_name("graph.scores.safetensors")
    whole = scores.read_bytes()
    scores.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    assert "damaged" in run("solve", traced, "-b", "50%", "-o", tmp_path / "m.json").err
    scores.unlink()
    assert (
        "keep them beside the graph file" in run("solve", traced, "-b", "50%", "-o", tmp_path / "m.json").err
    )
    traced.write_text(traced.read_text()[:-20])
    assert "no valid JSON" in run("solve", traced, "-b", "50%", "-o", tmp_path / "m.json").err
    (tmp_path / "x.json").write_text("{}")
    assert "no report" in run("report", tmp_path / "x.json").err


def test_shrink_leaves_a_users_folder_alone(run, traced: Path, tmp_path: Path) -> None:
    masks, mine = tmp_path / "m.json", tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.tex").write_text("years of work")
    run("solve", traced, "-b", "50%", "-o", masks)
    result = run("shrink", traced, masks, "-o", mine)
    assert result.code == 2
    assert "left alone" in result.err
    assert [p.name for p in mine.iterdir()] == ["thesis.tex"]


def test_a_place_that_cannot_be_written_to_is_refused_before_any_work(
    run, net: Path, traced: Path, tmp_path: Path
) -> None:
    (masks := tmp_path / "m.json").write_text("{}")
    for words, message in (
        (("solve", traced, "-b", "50%", "-o", traced / "masks.json"), f"{traced} is a file"),
        (("solve", traced, "-b", "50%", "-o", tmp_path), "is a folder"),
        (("trace", f"{net}:Net", "--input-shape", "1,1,8,8", "-o", tmp_path), "is a folder"),
        (("shrink", traced, masks, "-o", masks), "is a file and is left alone"),
    ):
        result = run(*words)
        assert result.code == 2
        assert message in result.err
        assert result.out == ""
        assert "Traceback" not in result.err


def test_a_disk_that_fails_is_one_message(run, traced: Path, tmp_path: Path, monkeypatch) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(tmp_path / "m.json"))

    monkeypatch.setattr("qcqp_prune.storage.os.fsync", full)
    result = run("solve", traced, "-b", "50%", "-o", tmp_path / "m.json")
    assert result.code == 1
    assert f"error: {tmp_path / 'm.json'}: No space left on device. Check" in result.err


def test_trace_says_what_is_kept_whole_and_why(run, net: Path, tmp_path: Path) -> None:
    words = ["--input-shape", "1,1,8,8", "--ignore", "a", "-o", tmp_path / "g.json"]
    result = run("trace", f"{net}:Net", *words)
    assert "kept whole (in ignored_layers (a)): a" in result.out
    assert "kept whole (network output): head" in result.out


def test_a_file_without_masks_is_named(run, traced: Path, tmp_path: Path) -> None:
    result = run("shrink", traced, traced, "-o", tmp_path / "small")
    assert result.code == 2
    assert f"{traced} holds no masks" in result.err


def test_ctrl_c_says_so(run, traced: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("qcqp_prune.cli.commands.read_traced", interrupted)
    result = run("solve", traced, "-b", "50%", "-o", tmp_path / "m.json")
    assert result.code == 130
    assert result.err.count("interrupted") == 1


def test_the_module_runs_as_a_program() -> None:
    assert importlib.util.find_spec("qcqp_prune.__main__") is not None
    with pytest.raises(SystemExit) as left:
        runpy.run_module("qcqp_prune", run_name="__main__", alter_sys=True)
    assert left.value.code in (0, 2)  # help, or a usage error for the arguments of the tests


def test_latency_cycles_and_peak_memory_can_be_budgeted(run, net: Path, traced: Path, tmp_path: Path) -> None:
    table, masks = tmp_path / "latency.json", tmp_path / "masks.json"
    words = ("--input-shape", "1,1,8,8", "-o", table, "--points", "2", "--repeats", "1")
    assert run("latency", f"{net}:Net", *words).code == 0
    assert json.loads(table.read_text())["unit"] == "ns"
    budgets = ("-b", "latency=100%", "-b", "cycles=60%", "-b", "peak_memory=80%")
    solved = run("solve", traced, *budgets, "--latency-table", table, "--accelerator", "2x2", "-o", masks)
    assert solved.code == 0, solved.err
    usage = json.loads(masks.read_text())["usage"]
    # 64 positions of 1 -> 6 -> 8 channels in blocks of two by two, and the classifier.
    assert usage["cycles"]["dense"] == 64 * 1 * 3 + 64 * 3 * 4 + 4 * 5
    # While the second activation is made, 8 maps of 64 floats and its own 8 are alive.
    assert usage["peak_memory"]["dense"] == 4 * 64 * (8 + 8)
    for name in ("latency", "cycles", "peak_memory"):
        assert usage[name]["used"] <= usage[name]["limit"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--accelerator", "8"), "such as 8x8"),
        (("--latency-table", "missing.json"), "qcqp-prune latency"),
        ((), "unknown resource 'latency'"),
    ],
)
def test_resources_that_cannot_be_made_are_refused(run, traced: Path, tmp_path: Path, words, message) -> None:
    result = run("solve", traced, "-b", "latency=50%", "-o", tmp_path / "m.json", *words)
    assert result.code == 2
    assert message in result.err


def test_a_band_is_kept(run, traced: Path, tmp_path: Path) -> None:
    masks = tmp_path / "masks.json"
    solved = run("solve", traced, "-b", "macs=45%..50%", "-o", masks)
    assert solved.code == 0, solved.err
    usage = json.loads(masks.read_text())["usage"]["macs"]
    assert (usage["least"], usage["limit"]) == (-(-DENSE_MACS * 45 // 100), DENSE_MACS // 2)
    assert usage["least"] <= usage["used"] <= usage["limit"]
