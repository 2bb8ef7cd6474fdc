"""The names that users import, and the one-liner."""

from __future__ import annotations

import ast
import importlib
import inspect
import io
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from rich.console import Console
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import qcqp_prune as qp
from qcqp_prune import errors
from qcqp_prune.errors import InvalidOptionError, TrainingError
from qcqp_prune.pipeline import describe
from qcqp_prune.report.terminal import report_view
from qcqp_prune.watch import Watcher

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


@pytest.mark.parametrize("name", qp.__all__)
def test_every_public_name_is_there_and_documented(name: str) -> None:
    value = getattr(qp, name)
    assert inspect.getdoc(value)
    assert name in dir(qp)


def test_every_error_is_public() -> None:
    kinds = {n for n, e in vars(errors).items() if inspect.isclass(e) and issubclass(e, qp.QcqpPruneError)}
    assert kinds <= set(qp.__all__)


def test_functions_are_not_shadowed_by_subpackages() -> None:
    module = importlib.import_module("qcqp_prune.solve.run")
    assert inspect.isfunction(qp.solve)
    assert qp.solve is module.solve


def test_an_unknown_name() -> None:
    with pytest.raises(AttributeError, match="prun"):
        _ = qp.prun


def test_importing_does_not_import_torch() -> None:
    code = "import sys, qcqp_prune; assert 'torch' not in sys.modules; qcqp_prune.trace; assert 'torch' in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_type_checkers_see_the_lazy_names() -> None:
    """Each name that is imported on first use has an import that a static checker reads, from the same module."""
    tree = ast.parse(Path(qp.__file__).read_text())
    (block,) = (n for n in tree.body if isinstance(n, ast.If) and ast.unparse(n.test) == "TYPE_CHECKING")
    found = {
        (alias.name, str(statement.module).removeprefix("qcqp_prune."))
        for statement in block.body
        if isinstance(statement, ast.ImportFrom)
        for alias in statement.names
    }
    assert found == set(qp._LAZY.items())


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(8, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 2)
    )


def batches(count: int = 4) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(count, 32, 8, generator=generator)
    return [(b, (b.sum(1) > 0).long()) for b in x]


def test_the_one_liner() -> None:
    dense = model()
    before = {k: v.clone() for k, v in dense.state_dict().items()}
    small, report = qp.prune(dense, torch.zeros(1, 8), budgets={"macs": "50%"})
    macs = 8 * 12 + 12 * 8 + 8 * 2
    assert report.budgets[0].limit == macs // 2
    widths = (small[0].out_features, small[3].out_features)
    assert 8 * widths[0] + widths[0] * widths[1] + widths[1] * 2 == report.budgets[0].used <= macs // 2
    assert report.verification.max_relative_error <= report.verification.tolerance
    assert report.solve.gap is not None
    assert all(torch.equal(v, before[k]) for k, v in dense.state_dict().items())
    assert report.accuracy.dense is None
    assert set(report.seconds) == {"trace", "score", "solve", "shrink"}


def test_with_data_accuracy_is_measured_at_each_step() -> None:
    data = batches()
    seen: list[str] = []

    class Listener(Watcher):
        def phase(self, name: str) -> None:
            seen.append(name)

        def evaluated(self, step: str, result) -> None:
            seen.append(f"{step}: {result.samples}")

    recovery = qp.Recovery(validation=data, train=data, epochs=2)
    _, report = qp.prune(
        model(), torch.zeros(1, 8), budgets="60%", recovery=recovery, watch=Listener(), seed=3
    )
    accuracy = report.accuracy
    assert accuracy.samples == 128
    assert all(0 <= a <= 1 for a in (accuracy.dense, accuracy.pruned, accuracy.repaired, accuracy.finetuned))
    assert len(report.training["epochs"]) == 2
    assert report.solve.seed == 3
    assert [s for s in seen if ":" in s] == [
        "dense: 128",
        "pruned: 128",
        "repaired: 128",
        "finetuned: 128",
    ]
    assert [s for s in seen if ":" not in s and s != "evaluate"] == [
        "trace",
        "score",
        "solve",
        "shrink",
        "repair",
        "finetune",
    ]


def test_a_regression_is_pruned_trained_and_measured_by_its_loss() -> None:
    data = [(x, torch.stack([x.sum(1), x[:, 0]], 1)) for x, _ in batches()]
    recovery = qp.Recovery(validation=data, train=data, epochs=3, loss=F.mse_loss)
    dense = model()
    small, report = qp.prune(dense, torch.zeros(1, 8), budgets="60%", recovery=recovery)
    accuracy = report.accuracy
    assert list(accuracy.losses) == ["dense", "pruned", "repaired", "finetuned"]
    assert accuracy.losses["dense"] == qp.evaluate(dense, data, loss=F.mse_loss).loss
    assert accuracy.losses["finetuned"] == qp.evaluate(small, data, loss=F.mse_loss).loss
    assert accuracy.losses["finetuned"] < accuracy.losses["repaired"]
    assert (accuracy.dense, accuracy.finetuned, accuracy.samples) == (None, None, 128)
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(report_view(report))
    text = console.export_text()
    assert "loss on 128 samples" in text
    assert f"{accuracy.losses['finetuned']:.4g}" in text
    assert qp.PruneReport.from_json(report.to_json()).accuracy == accuracy
    with pytest.raises(qp.InvalidOptionError, match="label_smoothing"):
        qp.Recovery(loss=F.mse_loss, config=qp.FinetuneConfig(label_smoothing=0.1))


def test_a_repair_is_what_was_asked_for() -> None:
    data = batches()
    plain = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 2))

    def repaired(repair: str | None, network: nn.Module = plain) -> tuple[float | None, str]:
        recovery = qp.Recovery(validation=data, train=data, repair=repair)
        _, report = qp.prune(
            network, torch.zeros(1, 8), budgets="60%", importance=qp.Magnitude(), recovery=recovery
        )
        assert report.accuracy.pruned is not None
        assert report.accuracy.finetuned is None
        return report.accuracy.repaired, report.repair

    fitted, words = repaired("reconstruct")
    assert fitted is not None
    assert words == "least squares: 2 layers on 128 samples"
    assert repaired("means")[1] == "their means: 2 layers on 128 samples"
    assert repaired("batch_norm") == (None, "")  # there is none
    assert repaired("batch_norm", model())[1].endswith("batch norms on 128 samples")
    assert repaired(None) == (None, "")
    with pytest.raises(qp.InvalidOptionError, match="reconstruct, means, batch_norm"):
        qp.Recovery(repair="bn")


def test_the_default_objective_looks_at_data_where_there_is_some() -> None:
    data = batches()
    _, report = qp.prune(model(), torch.zeros(1, 8), budgets="60%", recovery=qp.Recovery(train=data))
    assert report.importance == "Calibrated"
    assert qp.PruneReport.from_json(report.to_json()).repair == report.repair != ""
    _, report = qp.prune(model(), torch.zeros(1, 8), budgets="60%")
    assert report.importance == "Magnitude(paper)"
    assert report.repair == ""


def test_finetuning_without_data_is_refused() -> None:
    with pytest.raises(qp.InvalidOptionError, match="no train loader"):
        qp.Recovery(epochs=3)


@pytest.mark.parametrize("where", ["train", "validation"])
@pytest.mark.parametrize("make", [iter, lambda data: (b for b in data)])
def test_loaders_that_run_dry_are_refused(where: str, make: Callable[[object], object]) -> None:
    data = batches()
    with pytest.raises(
        qp.InvalidOptionError, match=rf"{where} is a .*once only.*: give the loader itself, or a list"
    ):
        qp.Recovery(**{where: make(data)})
    state = torch.get_rng_state()
    qp.Recovery(**{where: DataLoader(TensorDataset(torch.zeros(4, 8)))})  # is not iterated to find out
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("options", [{"samples": 0}, {"samples": -1}, {"batches": 0}])
def test_numbers_of_a_recovery_are_positive(options: dict[str, int]) -> None:
    ((name, value),) = options.items()
    with pytest.raises(qp.InvalidOptionError, match=f"{name} is {value}: give a positive number"):
        qp.Recovery(train=batches(), **options)


def test_a_recovery_does_not_print_its_data() -> None:
    data = batches()
    things = (
        qp.Recovery(train=data, validation=data),
        qp.Taylor(data),
        qp.Fisher(data),
        qp.Training(data, 1),
    )
    assert not any("tensor" in repr(thing) for thing in things)


def test_what_is_given_for_no_finetuning_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    recipe, file = qp.FinetuneConfig(ema=0.9), tmp_path / "run"
    given = qp.Recovery(train=batches(), repair=None, config=recipe, checkpoint=file)
    _, report = qp.prune(model(), torch.zeros(1, 8), budgets="60%", importance=qp.Magnitude(), recovery=given)
    said = [note for note in report.notes if "epochs is 0" in note]
    assert [note.partition("epochs is 0: ")[2] for note in said] == [
        "of the recipe only seed and device count",
        f"{file} is not written",
    ]
    assert all(note in caplog.text for note in said)
    assert not file.exists()
    once, rounds = qp.Rounds(1, 0), qp.Rounds(2, 1)
    dense = model()
    assert given.unused(dense, rounds) == ()
    assert replace(given, epochs=1).unused(dense, once) == ()
    assert (
        replace(given, config=qp.FinetuneConfig(device="cpu", seed=3), checkpoint=None).unused(dense, once)
        == ()
    )
    assert given.unused(dense, qp.Rounds(2, 0)) == (said[0],)  # the selections of rounds lie beside the file


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"rounds": 3}, r"rounds is 3: give Rounds\(count, epochs\)"),
        ({"recovery": batches()}, r"recovery is list: give Recovery\(train=...\)"),
        ({"training": 5}, r"training is 5: give Training"),
    ],
)
def test_an_argument_of_another_kind_is_refused(asked: dict[str, Any], said: str) -> None:
    with pytest.raises(InvalidOptionError, match=said):
        qp.prune(model(), torch.zeros(1, 8), budgets="60%", **asked)


@pytest.mark.parametrize(
    ("build", "given", "options", "said"),
    [
        (qp.Rounds, (2.5, 1), {}, "Rounds: count is 2.5: give a whole number"),
        (qp.Rounds, (2, 1.5), {}, "Rounds: epochs is 1.5"),
        (qp.Recovery, (), {"train": batches(), "epochs": 1.5}, "epochs is 1.5"),
        (qp.Recovery, (), {"train": batches(), "batches": "all"}, "batches is 'all'"),
        (qp.Recovery, (), {"train": 3}, "train was given int for data"),
        (qp.Recovery, (), {"config": {"lr": 1}}, r"config is dict: give FinetuneConfig\("),
        (qp.finetune, (model(), batches()), {"config": {"lr": 1}}, "config is dict"),
        (qp.finetune, (model(), batches()), {"epochs": 1.5}, "epochs is 1.5"),
        (qp.finetune, (model(), batches()), {"teacher": "dense"}, "teacher is 'dense'"),
        (qp.FinetuneConfig, (), {"warmup": "a"}, "FinetuneConfig: warmup is 'a': give a number"),
        (qp.Calibrated, (batches(),), {"ratios": 0.5}, "ratios is 0.5: give shares"),
        (qp.Concave, (qp.Magnitude(), "a"), {}, "power is 'a'"),
        (qp.Random, ("a",), {}, "seed is 'a'"),
    ],
)
def test_so_is_one_in_what_is_made_for_it(
    build: Callable[..., object], given: tuple[Any, ...], options: dict[str, Any], said: str
) -> None:
    with pytest.raises(InvalidOptionError, match=said):
        build(*given, **options)


@pytest.mark.parametrize(
    "score",
    [
        qp.Taylor,
        partial(qp.Taylor, form="gate"),
        qp.Fisher,
        qp.Calibrated,
        qp.Activation,
        qp.NeuronSensitivity,
        qp.OutputChange,
    ],
)
def test_no_data_single_samples_and_data_of_another_network_are_refused_by_every_importance(
    score: Any,
) -> None:
    dense, example = model(), torch.zeros(1, 8)
    graph = qp.trace(dense, example)
    samples = TensorDataset(torch.zeros(4, 8), torch.zeros(4, dtype=torch.int64))
    for data, said in (
        (None, "was given None for data: give a loader"),
        (samples, "a single sample, as a Dataset yields them"),
        (wider(), r"inputs of shape \((4|1), 5\)|does not run on a batch of the data"),
    ):
        with pytest.raises(qp.QcqpPruneError, match=said):
            score(data)(dense, graph)


def wider() -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Inputs that the network does not take."""
    return [(torch.zeros(4, 5), torch.zeros(4, dtype=torch.int64))]


def test_data_of_another_network_is_refused_by_whatever_runs_on_it() -> None:
    dense = torch.nn.Sequential(torch.nn.Linear(8, 4), torch.nn.BatchNorm1d(4))
    said = r"the network fails on a batch with inputs of shape \(4, 5\) \(RuntimeError: "
    for run in (qp.evaluate, qp.finetune, qp.recalibrate_batch_norm):
        with pytest.raises(TrainingError, match=f"{run.__name__}: {said}"):
            run(dense, wider())


def test_options_of_a_recovery_that_do_nothing_are_said() -> None:
    dense, once = model(), qp.Rounds(1, 0)

    def said(rounds: qp.Rounds = once, **options: Any) -> str:
        return " ".join(qp.Recovery(**options).unused(dense, rounds))

    data = batches()
    assert said(validation=data) == said(train=data) == said(train=data, repair=None) == ""
    assert said(train=data, repair="batch_norm", batches=2) == said(train=data, samples=9) == ""
    assert "nothing is repaired by batch_norm" in said(validation=data, repair="batch_norm")
    assert "batches does nothing" in said(train=data, batches=2)
    assert "samples does nothing" in said(train=data, repair="batch_norm", samples=9)
    assert "samples does nothing" in said(samples=9)
    hot = qp.FinetuneConfig(temperature=9)
    assert "temperature does nothing without" in said(train=data, epochs=1, config=hot)
    assert said(train=data, epochs=1, config=replace(hot, distillation=0.5)) == ""
    assert said(qp.Rounds(1, 5), train=data, epochs=5) == ""
    assert "5 epochs of a single round do nothing" in said(qp.Rounds(1, 5), train=data)


def test_the_caller_hears_of_the_solvers_progress_too() -> None:
    points: list[object] = []
    options = qp.SolveOptions(on_event=points.append, seed=7)
    _, report = qp.prune(model(), torch.zeros(1, 8), budgets="50%", options=options)
    assert tuple(points) == report.solve.trace != ()
    assert report.solve.seed == 7


def test_the_report_and_the_plan_belong_together(tmp_path: Path) -> None:
    small, report = qp.prune(model(), torch.zeros(1, 8), budgets="50%")
    qp.save(small, tmp_path / "small", graph=report.graph, masks=report.masks)
    x = torch.randn(5, 8)
    assert torch.equal(qp.load(tmp_path / "small", model).eval()(x), small.eval()(x))


@pytest.mark.parametrize("importance", ["magnitude", qp.Magnitude])
def test_an_importance_that_is_none_is_refused(importance: object) -> None:
    with pytest.raises(qp.InvalidOptionError, match=r"such as Magnitude\(\)"):
        qp.prune(model(), torch.zeros(1, 8), budgets="50%", importance=importance)


def test_what_can_be_refused_is_refused_before_accuracy_is_measured() -> None:
    class Unread(list):
        def __iter__(self):
            raise AssertionError("the loader was read")

    with pytest.raises(qp.InfeasibleError):
        qp.prune(
            model(),
            torch.zeros(1, 8),
            budgets={"macs": 1},
            recovery=qp.Recovery(validation=Unread(batches())),
        )


class Pair(nn.Module):
    """Two outputs, of which nobody knows which are the logits."""

    def __init__(self) -> None:
        super().__init__()
        self.net = model()

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        y = self.net(x)
        return y, y.square()


@pytest.mark.parametrize("how", ["validation", "epochs", "rounds"])
def test_what_cannot_be_trained_or_measured_is_refused_before_units_are_scored(how: str) -> None:
    def unreached(_: nn.Module, __: qp.ChannelGraph) -> qp.PairwiseForm:
        raise AssertionError("units were scored")

    data = batches()
    options = {
        "validation": {"recovery": qp.Recovery(validation=data)},
        "epochs": {"recovery": qp.Recovery(train=data, epochs=1)},
        "rounds": {"recovery": qp.Recovery(train=data), "rounds": qp.Rounds(2, 1)},
    }[how]
    with pytest.raises(qp.InvalidOptionError, match="none called logits"):
        qp.prune(Pair(), torch.zeros(1, 8), budgets="60%", importance=unreached, **options)


def test_data_for_calibration_and_repair_alone_may_have_any_outputs() -> None:
    _, report = qp.prune(Pair(), torch.zeros(1, 8), budgets="60%", recovery=qp.Recovery(train=batches()))
    assert report.repair


def test_importances_in_words() -> None:
    assert describe(qp.Magnitude("l2")) == "Magnitude(l2)"
    assert describe(qp.BatchNormScale()) == "BatchNormScale"


def test_importances_of_different_objectives_are_told_apart() -> None:
    assert describe(qp.Calibrated([])) == "Calibrated"
    assert describe(qp.Calibrated([], loss=F.cross_entropy)) == "Calibrated(loss=cross_entropy)"
    assert describe(qp.Calibrated([], ratios=(0.5,))) == "Calibrated(ratios=(0.5,))"
    assert describe(qp.Taylor([], F.mse_loss, "gate")) == "Taylor(gate, loss=mse_loss)"
    assert describe(qp.Fisher((1, 2), nn.MSELoss())) == "Fisher(loss=MSELoss)"  # data are never shown
    assert describe(qp.OutputChange([], centred=True)) == "OutputChange(samples=2500, centred=True, seed=0)"


def test_the_example_runs() -> None:
    command = [sys.executable, str(EXAMPLES / "custom_model.py")]
    result = subprocess.run(command, capture_output=True, text=True, timeout=200, check=True)
    assert "loaded network computes the same: True" in result.stdout
