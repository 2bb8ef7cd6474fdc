"""The accuracy benchmark treats methods alike, goes on where it stopped, and its table says what was measured."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import qcqp_prune as qp
from benchmarks import accuracy, accuracy_methods, published_table2, recording
from benchmarks.accuracy_methods import UNIFORM, Solved
from benchmarks.accuracy_tables import Cell, measured, plots, published, standings, table
from benchmarks.importances import L2, PAPER
from benchmarks.rival_heuristics import greedy_filled, greedy_l1, uniform_filled, uniform_l1
from benchmarks.rival_torch_pruning import TorchPruning, nearest
from benchmarks.settings import Setting
from qcqp_prune.data import digits
from qcqp_prune.models import DigitsNet, ResNetCifar
from qcqp_prune.program.program import Program
from qcqp_prune.testing import random_problem
from qcqp_prune.train import Callback, FinetuneConfig


def small_setting() -> Setting:
    torch.manual_seed(0)
    config = FinetuneConfig(lr=0.01)
    return Setting("digits", DigitsNet(), torch.zeros(1, 1, 8, 8), digits(), None, config)


@pytest.fixture(autouse=True)
def selections(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Where selections are kept meanwhile: nothing that was chosen before enters."""
    monkeypatch.setattr(accuracy_methods, "SELECTIONS", tmp_path / "selections")
    return tmp_path / "selections"


Runs = list[list[list[int]]]


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Runs:
    """The benchmark with one small instance and two methods; what finetuning saw: run, batch, labels."""
    seen: Runs = []

    def finetune(model: nn.Module, loader: Any, **options: Any) -> None:
        seen.append([targets.tolist() for _, targets in loader])

    monkeypatch.setattr(recording, "RESULTS", tmp_path)
    monkeypatch.setattr(accuracy, "SETTINGS", {"digits": small_setting})
    monkeypatch.setattr(accuracy, "BUDGETS", {"digits": ("60%",)})
    methods = {"ours": Solved(PAPER, "block_coordinate"), "uniform": Solved(PAPER, UNIFORM)}
    monkeypatch.setattr(accuracy, "METHODS", methods)
    monkeypatch.setattr(accuracy, "OURS", {"ours": methods["ours"]})
    monkeypatch.setattr(qp, "finetune", finetune)
    return seen


def run(*arguments: str) -> list[dict[str, Any]]:
    accuracy.main(["--epochs", "1", "--batches", "2", *arguments])
    return recording.recorded("accuracy")


def test_every_method_is_finetuned_on_the_same_batches(bench: Runs) -> None:
    rows = run("--seeds", "0", "1")
    assert [(r["method"], r["seed"]) for r in rows] == [
        ("ours", 0),
        ("ours", 1),
        ("uniform", 0),
        ("uniform", 1),
    ]
    assert bench[0] == bench[2]
    assert bench[1] == bench[3]
    assert bench[0] != bench[1]
    assert [len(x) for x in bench] == [2] * 4
    for row in rows:
        assert row["macs"]["used"] <= row["macs"]["limit"] == math.floor(0.6 * row["macs"]["dense"])
        assert set(row["accuracy"]) == {"dense", "cut", "before", "finetuned"}
        assert row["ours"] == (row["method"] == "ours")
    assert rows[0]["kept"] != rows[2]["kept"]


def test_it_goes_on_where_it_stopped(bench: Runs) -> None:
    first = run("--seeds", "0", "--methods", "ours")
    both = run("--seeds", "0", "1", "--methods", "ours")
    assert len(bench) == 2
    assert both[0] == first[0]
    run("--seeds", "0", "1", "--methods", "ours")
    assert len(bench) == 2
    run("--seeds", "0", "--methods", "ours", "--again")
    assert len(bench) == 3
    run("--seeds", "0", "--methods", "ours", "--again")
    assert len(bench) == 4


def test_measured_again_is_finetuned_again(bench: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accuracy, "METHODS", {"a": Solved(PAPER, UNIFORM), "b": Solved(PAPER, UNIFORM)})
    run("--seeds", "0")
    rows = run("--seeds", "0", "--again")
    assert len(bench) == 2  # once before and once now, not twice from what was recorded
    assert [row.get("same_network_as") for row in rows] == [None, "a"]


def test_inner_layers_alone_are_cut_where_a_stream_is_written_by_several() -> None:
    torch.manual_seed(0)
    setting = Setting("residual", ResNetCifar(1), torch.zeros(1, 3, 8, 8), digits(), None, FinetuneConfig())
    small, _ = Solved(PAPER, UNIFORM, inner=True)(setting, "60%")
    assert [small.conv1.out_channels, small.layer2[0].conv2.out_channels] == [16, 32]
    assert (
        max(
            block[0].conv1.out_channels / width
            for block, width in zip((small.layer1, small.layer2, small.layer3), (16, 32, 64), strict=True)
        )
        < 1
    )
    whole, _ = Solved(PAPER, UNIFORM)(setting, "60%")
    assert whole.conv1.out_channels < 16
    assert qp.Macs().measure(small, setting.example) <= setting.limit("60%")


def test_rows_that_another_process_wrote_meanwhile_stay(bench: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    other = {"instance": "x", "method": "ours", "budget": "60%", "seed": 0, "schedule": [1, 2]}

    def finetune(*arguments: Any, **options: Any) -> None:
        recording.record("accuracy", [*recording.recorded("accuracy"), other])

    monkeypatch.setattr(qp, "finetune", finetune)
    rows = run("--seeds", "0", "--methods", "ours")
    assert [row["instance"] for row in rows] == ["x", "digits"]


def test_dry_writes_nothing(bench: Runs) -> None:
    assert run("--seeds", "0", "--dry") == []
    assert len(bench) == 2


def test_a_method_that_fails_says_so_and_is_measured_anew(
    bench: Runs, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(setting: Setting, budget: str) -> Any:
        raise IndexError("out of range")

    def greedy(setting: Setting, budget: str) -> Any:
        return setting.model, {}

    methods = {"broken": broken, "greedy": greedy, "uniform": Solved(PAPER, UNIFORM)}
    monkeypatch.setattr(accuracy, "METHODS", methods)
    rows = run("--seeds", "0")
    assert [row.get("error", "") for row in rows[:1]] == ["IndexError: out of range"]
    assert "are allowed" in rows[1]["error"]
    assert "error" not in rows[2]
    monkeypatch.setattr(accuracy, "METHODS", methods | {"broken": Solved(PAPER, "block_coordinate")})
    assert ["error" in row for row in run("--seeds", "0", "--methods", "broken")].count(True) == 1


def test_a_method_under_floors_keeps_a_share_of_every_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accuracy_methods, "library_commit", lambda: "abc")  # selections are kept
    setting = small_setting()
    lowest = {}
    for floor in (None, 0.6):
        masks, _ = Solved(PAPER, "block_coordinate", min_keep=floor).select(setting, "60%")
        counts = masks.counts()
        lowest[floor] = min(counts[g.id] / g.width for g in setting.graph.groups if not g.stays)
    assert lowest[None] < 0.6 <= lowest[0.6]


def test_a_training_that_diverges_is_a_row_that_is_not_measured_again(
    bench: Runs, monkeypatch: pytest.MonkeyPatch
) -> None:
    finetune = qp.finetune

    def diverging(model: nn.Module, loader: Any, *, config: FinetuneConfig, **options: Any) -> None:
        finetune(model, loader, config=config, **options)
        if config.seed == 1:
            raise qp.TrainingError("Training diverged:\nthe loss is nan")

    monkeypatch.setattr(qp, "finetune", diverging)
    rows = run("--seeds", "0", "1", "2", "--methods", "ours")
    assert [row.get("error") for row in rows] == [
        None,
        "TrainingError: Training diverged: the loss is nan",
        None,
    ]
    assert "finetuned" not in rows[1]["accuracy"]
    assert len(bench) == 3
    assert run("--seeds", "0", "1", "2", "--methods", "ours") == rows
    assert len(bench) == 3
    one = measured(rows)
    assert len(one.cells["digits", "60%"]["ours"].finetuned) == 2
    assert one.failed == ["ours on digits at 60%: TrainingError: Training diverged: the loss is nan"]


def test_one_network_is_finetuned_once_for_each_seed(bench: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    methods = {"a": Solved(PAPER, UNIFORM), "b": Solved(PAPER, UNIFORM)}
    monkeypatch.setattr(accuracy, "METHODS", methods)
    rows = run("--seeds", "0", "1")
    assert len(bench) == 2
    assert [row.get("same_network_as") for row in rows] == [None, None, "a", "a"]
    assert [row["accuracy"] for row in rows[:2]] == [row["accuracy"] for row in rows[2:]]


def test_a_selection_is_made_once_for_a_commit_and_a_problem(
    monkeypatch: pytest.MonkeyPatch, selections: Path
) -> None:
    setting, solved = small_setting(), []
    solve = qp.solve

    def counted(problem: qp.PruningProblem, *arguments: Any, **options: Any) -> qp.SolveReport:
        solved.append(problem.limits["macs"])
        return solve(problem, *arguments, **options)

    monkeypatch.setattr(qp, "solve", counted)
    monkeypatch.setattr(accuracy_methods, "library_commit", lambda: "abc")
    method = Solved(PAPER, "block_coordinate")
    first, about = method(setting, "60%")
    second, again = method(setting, "60%")
    assert len(solved) == 1
    assert about == again
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    method(setting, "50%")
    Solved(L2, "block_coordinate")(setting, "60%")
    monkeypatch.setattr(accuracy_methods, "library_commit", lambda: "abd")
    method(setting, "60%")
    assert len(solved) == 4
    monkeypatch.setattr(accuracy_methods, "library_commit", lambda: "abd+")  # the library was edited
    method(setting, "60%")
    assert len(solved) == 5
    assert len(list(selections.iterdir())) == 4


def test_a_method_is_repaired_by_itself_or_else_recalibrated(bench: Runs) -> None:
    def silence(setting: Setting, masks: qp.Masks, small: nn.Module) -> None:
        assert masks.fingerprint == setting.graph.fingerprint
        for parameter in small.linear.parameters():
            nn.init.zeros_(parameter)

    setting = small_setting()
    small, row = accuracy.prepared(setting, Solved(PAPER, UNIFORM, repair=silence), "60%")
    zeros = sum(int(label == 0) for label in setting.data.test.labels) / len(setting.data.test)
    assert row["accuracy"]["before"] == pytest.approx(zeros)  # equal logits: the first class
    assert row["accuracy"]["cut"] != row["accuracy"]["before"]
    assert all(int(m.num_batches_tracked) == 0 for m in small.modules() if isinstance(m, nn.BatchNorm2d))
    assert "masks" not in row
    small, row = accuracy.prepared(setting, Solved(PAPER, UNIFORM), "60%")
    assert all(int(m.num_batches_tracked) > 1 for m in small.modules() if isinstance(m, nn.BatchNorm2d))
    assert row["accuracy"]["before"] != row["accuracy"]["cut"]


@pytest.mark.parametrize("structure", ["chain", "residual", "concat"])
def test_uniform_and_global_selections_leave_nothing_that_would_fit(structure: str) -> None:
    for seed in range(3):
        program = Program.from_problem(random_problem(seed, structure))
        for plain, filled in ((uniform_l1, uniform_filled), (greedy_l1, greedy_filled)):
            before, x = plain(program, 5.0), filled(program, 5.0)
            assert program.is_feasible(x)
            assert (x >= before).all()
            counts = program.counts(x)
            for g, group in enumerate(program.groups):
                more = counts + (np.arange(len(counts)) == g)
                if more[g] in group.counts and counts[g] == program.counts(before)[g]:
                    assert not program.counts_feasible(more)
            if filled is uniform_filled:
                assert (counts - program.counts(before)).max() <= 1


def test_the_nearest_ratio_that_meets_the_limit_also_where_use_rises_again() -> None:
    def at(ratio: float) -> tuple[nn.Module, int]:
        used = int(1000 * (1 - ratio)) if ratio < 0.6 else 900
        return nn.Linear(max(used, 1), 1), used

    model, ratio = nearest(at, 504)
    assert model.in_features == 504
    assert int(1000 * (1 - ratio)) == 504
    with pytest.raises(RuntimeError, match="no ratio"):
        nearest(at, 300)


@pytest.mark.parametrize(
    "method",
    [
        TorchPruning("MagnitudeImportance", {"p": 1}),
        TorchPruning("GroupTaylorImportance", gradients=True, options={"isomorphic": True}),
        TorchPruning("GroupMagnitudeImportance", {"p": 2}, pruner="GroupNormPruner"),
    ],
)
def test_torch_pruning_meets_the_budget_on_all_layers_where_it_can(method: TorchPruning) -> None:
    pytest.importorskip("torch_pruning", reason="torch-pruning is not installed: extra bench")
    setting = small_setting()
    before = {k: v.clone() for k, v in setting.model.state_dict().items()}
    small, about = method(setting, "50%")
    used = qp.Macs().measure(small, setting.example)
    assert 0.42 * setting.macs < used <= setting.limit("50%") == setting.macs // 2
    assert set(about) == {"ratio"}
    assert small.linear.out_features == 10
    assert small.stem.out_channels < 12
    assert all(torch.equal(v, before[k]) for k, v in setting.model.state_dict().items())
    assert all(p.grad is None for p in (*small.parameters(), *setting.model.parameters()))


def test_torch_pruning_gets_the_inner_layers_where_a_stream_is_padded() -> None:
    pytest.importorskip("torch_pruning", reason="torch-pruning is not installed: extra bench")
    torch.manual_seed(0)
    dense, data = ResNetCifar(1), digits()
    setting = Setting("padded", dense, torch.zeros(1, 3, 8, 8), data, None, FinetuneConfig())
    small, about = TorchPruning("MagnitudeImportance", {"p": 1})(setting, "60%")
    assert "inner layers only" in about["note"]
    assert 0.5 * setting.macs < qp.Macs().measure(small, setting.example) <= setting.limit("60%")
    assert small.conv1.out_channels == 16
    assert small.layer3[0].conv2.out_channels == 64
    assert small.layer3[0].conv1.out_channels < 64


def row(
    method: str, budget: str, seed: int, finetuned: float, before: float = 0.5, **more: Any
) -> dict[str, Any]:
    found = {
        "instance": "net",
        "method": method,
        "budget": budget,
        "seed": seed,
        "schedule": [3, 100],
        "ours": method.startswith("ours"),
        "macs": {"share": float(budget.rstrip("%")) / 100 - 0.01},
        "accuracy": {"dense": 0.95, "cut": 0.1, "before": before, "finetuned": finetuned},
    }
    return found | more


ROWS = [
    *(row("rival a", "50%", k, v, 0.6) for k, v in enumerate((0.90, 0.91, 0.92))),
    *(row("rival a", "25%", k, v, 0.2) for k, v in enumerate((0.80, 0.80, 0.80))),
    *(row("rival b", "50%", k, v, 0.3) for k, v in enumerate((0.89, 0.89, 0.89))),
    *(row("rival b", "25%", k, v, 0.4) for k, v in enumerate((0.81, 0.83, 0.85))),
    *(row("ours", "50%", k, v, 0.7) for k, v in enumerate((0.905, 0.905, 0.905))),
    *(row("ours", "25%", k, v, 0.6) for k, v in enumerate((0.84, 0.84, 0.84))),
]


def test_cells_and_standings_by_hand() -> None:
    one = measured(ROWS)
    cell = one.cells["net", "50%"]["rival a"]
    assert cell.mean == pytest.approx(91.0)
    assert cell.error == pytest.approx(1 / math.sqrt(3))  # deviations -1, 0, 1 with two degrees of freedom
    assert cell.share == pytest.approx(49.0)
    assert Cell((90.0,), 50.0, 50.0).error is None
    found = standings(one)
    ours = found["ours"]
    assert ours.cells == 2
    assert ours.mean == pytest.approx((90.5 + 84) / 2)
    # The best rival in mean is b, (89 + 83) / 2 = 86; in the cells a with 91 and b with 83.
    assert ours.ahead == pytest.approx(87.25 - 86)
    assert ours.best_of_each == pytest.approx(((90.5 - 91) + (84 - 83)) / 2)
    # Before finetuning 65 against 40 of a, which has more than b's 35.
    assert ours.before_ahead == pytest.approx(25.0)
    # At 50 % a is 0.5 ahead, within its standard error of 0.58.
    assert ours.level == 2
    assert found["rival b"].ahead == pytest.approx(86 - 85.5)
    assert found["rival b"].level == 1


def test_the_table_says_it_and_names_what_failed() -> None:
    why = "inner layers only, for it does not run (ratio 0.3: x)"
    noted = [row("rival c", "50%", seed, 0.7, note=why, macs={"share": 0.471}) for seed in range(3)]
    failed = row("rival c", "25%", 0, 0.7, error="IndexError: no")
    text = table([*ROWS, *noted, failed, row("trial", "50%", 0, 0.7, schedule=[0, 100])])
    assert "net, finetuned for 3 epochs of 100 batches of 128 images:" in text
    assert "| net, dense 95.00 | 50% MACs | 25% MACs |" in text
    assert "| ours | 90.50 ± 0.00 (70.0) | **84.00** ± 0.00 (60.0) |" in text
    assert "| rival a | **91.00** ± 0.58 (60.0) | 80.00 ± 0.00 (20.0) |" in text
    assert "| rival c | 70.00 ± 0.00 (50.0) | - |" in text
    assert "left unused by: ours 49.0 of 50%, ours 24.0 of 25%, rival a 49.0 of 50%" in text
    assert "rival c 47.1 of 50%" in text
    assert text.index("| ours |") < text.index("| rival a |")
    assert "- rival c on net: inner layers only, for it does not run." in text
    assert "- rival c on net at 25%: IndexError: no" in text
    assert "trial" not in text
    assert "network and budget, 2 in all" in text
    # At 25 % one rival has failed, so that the cell counts for nobody.
    assert "| ours | 1 | 90.50 | -0.50 |" in text


def test_a_method_that_was_not_measured_everywhere_stands_in_its_own_cells() -> None:
    more = [row("ours too", "25%", seed, 0.85) for seed in range(3)]
    found = standings(measured([*ROWS, *more]))
    assert (found["ours"].cells, found["ours too"].cells) == (2, 1)
    assert found["ours too"].ahead == pytest.approx(85 - 83)


def test_cells_of_fewer_seeds_are_not_compared() -> None:
    found = standings(measured([*ROWS, row("ours too", "25%", 0, 0.85), row("ours too", "50%", 0, 0.9)]))
    assert "ours too" not in found
    found = standings(
        measured([r for r in ROWS if (r["method"], r["budget"], r["seed"]) != ("rival b", "25%", 2)])
    )
    assert found["ours"].cells == 1


def test_of_a_network_without_streams_a_method_is_its_own_inner_variant() -> None:
    other = [
        row(name, "50%", seed, value, instance="chain")
        for name, value in (("rival a", 0.7), ("rival b", 0.8), ("ours", 0.9))
        for seed in range(3)
    ]
    inner = [row("rival b, inner", b, seed, 0.92) for b in ("50%", "25%") for seed in range(3)]
    found = standings(measured([*ROWS, *other, *inner]))
    assert (found["ours"].cells, found["rival b, inner"].cells) == (3, 3)
    assert found["rival b, inner"].mean == pytest.approx((92 + 92 + 80) / 3)
    assert found["ours"].ahead == pytest.approx((90.5 + 84 + 90) / 3 - (92 + 92 + 80) / 3)
    assert found["ours"].level == 1
    # Where some of its cells are missing it is not the method without them.
    assert standings(measured([*ROWS, *other, *inner[:3]]))["ours"].cells == 2


def test_no_rows_of_inner_layers_where_there_are_no_others(
    bench: Runs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(accuracy, "shared", lambda graph: set())
    monkeypatch.setattr(accuracy, "METHODS", {"uniform, inner": Solved(PAPER, UNIFORM, inner=True)})
    assert run("--seeds", "0") == []


def test_two_schedules_of_one_instance_are_not_compared() -> None:
    with pytest.raises(ValueError, match="net has rows of two schedules"):
        measured([*ROWS, row("ours", "50%", 3, 0.9, schedule=[3, 50])])


def test_the_plot_has_every_line_with_its_error_bars() -> None:
    ((name, svg),) = plots(ROWS).items()
    assert name == "accuracy-net-3x100.svg"
    assert svg.count('class="line"') == 3
    assert svg.count("<circle") == svg.count('class="bar"') == 6
    assert svg.count("stroke-dasharray") == 4  # two rivals, and their names
    places = {}
    for part in svg.split("<circle ")[1:]:
        x, y = (float(v.split('"')[0]) for v in part.split('="')[1:3])
        places.setdefault(x, []).append(y)
    assert len(places) == 2
    left, right = (places[x] for x in sorted(places))
    assert min(left) > max(right)  # 25 % lies left of 50 % and is less accurate: further down
    bars = [part.split('"')[0] for part in svg.split('class="bar" d="M')[1:]]
    heights = [abs(float(b.split("V")[1]) - float(b.split("V")[0].split()[1])) for b in bars]
    assert sum(h > 1 for h in heights) == 2  # a at 50 % and b at 25 % spread over their seeds
    assert "accuracy-net-3x100.svg" in table(ROWS)


def test_table_2_goes_on_from_its_checkpoint(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(recording, "RESULTS", tmp_path)
    monkeypatch.setattr(published_table2, "CHECKPOINTS", tmp_path / "checkpoints")
    monkeypatch.setattr(published_table2, "SETTINGS", {"resnet20": small_setting})
    whole = qp.finetune

    class Killed(Callback):
        def on_epoch_start(self, state: Any) -> None:
            if state.epoch == 1:
                raise KeyboardInterrupt

    def killed(*arguments: Any, **options: Any) -> Any:
        return whole(*arguments, **options, callbacks=[Killed()])

    wish = ["--networks", "resnet20", "--method", "paper, block_coordinate", "--seconds", "2"]
    wish += ["--epochs", "2", "--batches", "2", "--device", "cpu", "--threads", "1"]
    monkeypatch.setattr(qp, "finetune", killed)
    with pytest.raises(KeyboardInterrupt):
        published_table2.main(wish)
    assert recording.recorded("published_table2") == []
    resumed = []

    def watched(*arguments: Any, **options: Any) -> Any:
        history = whole(*arguments, **options)
        resumed.append(history.resumed_at)
        return history

    monkeypatch.setattr(qp, "finetune", watched)
    published_table2.main(wish)
    assert resumed == [1, 0, 0, 0]
    published_table2.main(wish)
    assert len(resumed) == 4
    rows = recording.recorded("published_table2")
    asked = [(r["units"], r["budget"]) for r in rows]
    assert asked == [("channels", "58.3%"), ("channels", "46.0%"), ("shape", "57.8%"), ("shape", "46.0%")]
    for row in rows:
        assert row["macs"]["used"] <= row["macs"]["limit"] < row["macs"]["dense"]
        assert [epoch["epoch"] for epoch in row["training"]] == [1, 2]
        assert [epoch["lr"] for epoch in row["training"]] == [0.01, pytest.approx(0.01 * 0.2**2)]
    # A filter of 3 x 3 has nine columns, so a layer with columns keeps more of them than it had filters.
    assert rows[0]["kept"]["block1.conv1"] <= 12 < rows[2]["kept"]["block1.conv1"] <= 9 * 12
    text = published(rows)
    assert "| resnet20 | channels | 58.3% |" in text
    assert text.count("| 2 of 2 batches |") == 4
    assert [line.rsplit("|", 2)[1].strip() for line in text.splitlines()[4:]] == [
        "0.47",
        "1.25",
        "-0.05",
        "0.51",
    ]

    def diverged(*arguments: Any, **options: Any) -> Any:
        raise qp.TrainingError("the loss is nan")

    monkeypatch.setattr(qp, "finetune", diverged)
    published_table2.main([*wish, "--units", "channels", "--seeds", "0", "1"])
    rows = recording.recorded("published_table2")
    assert [row["seed"] for row in rows if "error" in row] == [1, 1]
    assert published(rows).count("| 2, 1 diverged | ") == 2
    assert "| 1, 1 diverged | " in (text := published([row for row in rows if "error" in row]))
    assert " | - | - | 0.47 |" in text
