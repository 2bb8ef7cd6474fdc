"""Training under a regulariser, exact rounding, cutting and finetuning in one call."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import qcqp_prune as qp
from qcqp_prune.data import digits
from qcqp_prune.models import DigitsNet
from qcqp_prune.report import PruneReport, Regularised
from qcqp_prune.train import PSP
from qcqp_prune.watch import Watcher

IMAGE = torch.zeros(1, 1, 8, 8)
CPU = qp.FinetuneConfig(lr=0.05, schedule="constant", device="cpu")
STILL = replace(CPU, lr=1e-12, weight_decay=0.0)
"""A training that changes nothing, so that what vanishes is known beforehand."""


def net(seed: int = 0) -> DigitsNet:
    torch.manual_seed(seed)
    return DigitsNet()


def loader(samples: int = 320) -> Any:
    return digits().train.select(range(samples)).loader(64, shuffle=True, seed=1)


def same_weights(a: nn.Module, b: nn.Module) -> bool:
    first, second = a.state_dict(), b.state_dict()
    return first.keys() == second.keys() and all(torch.equal(first[n], second[n]) for n in first)


def test_a_budget_is_followed_met_to_the_last_unit_and_reported() -> None:
    model, before = net(), net()
    seen: list[str] = []

    class Listener(Watcher):
        def phase(self, name: str) -> None:
            seen.append(name)

        def trained(self, training: Regularised) -> None:
            seen.append(training.method)

        def evaluated(self, step: str, result: Any) -> None:
            seen.append(f"{step}: {result.samples}")

    data, test = digits().train.loader(64, shuffle=True, seed=1), digits().test.loader(500)
    qp.finetune(before, data, epochs=4, config=CPU)
    model.load_state_dict(before.state_dict())
    small, report = qp.prune(
        model,
        IMAGE,
        budgets={"params": "30%"},
        training=qp.Training(data, 12, control=qp.Control(every=4), config=replace(CPU, schedule="cosine")),
        recovery=qp.Recovery(validation=test, train=data, epochs=4, config=CPU),
        solver="highs",
        watch=Listener(),
    )
    assert same_weights(model, before)
    params = next(line for line in report.budgets if line.resource == "params")
    assert params.used == sum(p.numel() for p in small.parameters()) <= params.limit
    assert 0 <= params.slack < params.cheapest_step
    assert report.solve.termination.reason.name == "OPTIMAL"
    trained = report.regularised
    assert trained is not None
    assert len(trained.history["epochs"]) == 12
    assert [p.step for p in trained.trace] == list(range(0, 23 * 12 + 1, 4))
    assert trained.trace[0].violation > 0.5
    assert trained.trace[-1].violation < 0.02
    assert max(p.multipliers["params"] for p in trained.trace) > 0
    assert report.importance == "Indicators(SPR(exact, units))"
    order = ["trace", "score", "evaluate", "dense: 355", "train", "SPR(exact, units)", "evaluate"]
    order += ["regularised: 355", "score", "solve", "shrink"]
    assert seen[: len(order)] == order
    assert report.accuracy.regularised > 0.9
    assert report.accuracy.pruned >= report.accuracy.regularised - 0.01  # what goes had vanished
    assert report.accuracy.finetuned > 0.9
    assert PruneReport.from_json(json.loads(json.dumps(report.to_json()))) == report
    old = {k: v for k, v in report.to_json().items() if k != "regularised"}
    old["accuracy"] = {k: v for k, v in old["accuracy"].items() if k != "regularised"}
    assert PruneReport.from_json(old).regularised is None
    shown = str(report)
    assert "relaxed use" in shown
    assert f"{trained.trace[0].violation:.2%}" in shown
    assert f"{trained.trace[-1].used['params']:.1%}" in shown


def test_the_rule_of_spr_without_a_budget() -> None:
    """Filters that are zero go, all others stay; a stream goes where all that writes it is zero."""
    model = net()
    with torch.no_grad():
        model.block1.conv1.weight[[1, 4, 7]] = 5e-5
        model.block2.conv1.weight[3] = 0.0
        model.block2.conv2.weight[[0, 2]] = 0.0
        shortcut = model.block2.shortcut[0]
        shortcut.weight[2] = 0.0
    training = qp.Training(loader(64), 1, qp.SPRConfig(strength=0.0), None, config=STILL)
    _, report = qp.prune(model, IMAGE, training=training, solver="highs")
    graph = qp.trace(model, IMAGE)
    dropped = {g.id: sorted(np.flatnonzero(~report.masks.keep[g.id]).tolist()) for g in graph.groups}
    assert sorted(d for d in dropped.values() if d) == [[1, 4, 7], [2], [3]]
    assert all(line.limit is None for line in report.budgets)
    assert report.regularised is not None
    assert report.regularised.trace == ()
    # With floors the solver raises counts by as few units as it can.
    _, floored = qp.prune(model, IMAGE, training=training, solver="highs", min_keep={"block1.conv1": 11})
    assert report.masks.counts()["block1.conv1"] == 9
    assert floored.masks.counts()["block1.conv1"] == 11


def test_the_rule_of_psp_cuts_what_computes_nothing() -> None:
    """Channels whose every reader has a zero scale go: the folded network and the smaller one compute the same."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 9, 3, padding=1), nn.ReLU(), nn.Conv2d(9, 12, 3, padding=1), nn.ReLU(), nn.Conv2d(12, 8, 3),
        nn.ReLU(), nn.Conv2d(8, 6, 1), nn.ReLU(), nn.Flatten(), nn.Linear(216, 10),
    )  # fmt: skip
    graph = qp.trace(model, IMAGE)
    method = qp.PSPConfig("channel", threshold=0.1, spread=0.15)
    twin = nn.Sequential(*(m for m in model))  # modules shared, parameterised for a moment
    psp = PSP(twin, method, graph=graph)
    expected = {"0": psp.kept()["2"].ravel(), "2": psp.kept()["4"].ravel()}
    psp.fold()
    torch.manual_seed(0)
    for module in model:
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    _, report = qp.prune(
        model,
        IMAGE,
        training=qp.Training(loader(64), 1, method, None, config=STILL),
        recovery=qp.Recovery(validation=digits().test.loader(500)),
        solver="highs",
    )
    keep = report.masks.keep
    np.testing.assert_array_equal(keep["0"], expected["0"])
    np.testing.assert_array_equal(keep["2"], expected["2"])
    assert 0 < expected["0"].sum() < 9
    assert keep["4"].all()  # read by a 1 x 1 convolution, which PSP leaves alone
    assert report.accuracy.pruned == report.accuracy.regularised
    assert report.importance == "Indicators(PSP(channel))"


def test_the_rule_under_a_budget_leaves_room_unused() -> None:
    model = net()
    with torch.no_grad():
        model.block1.conv1.weight[:6] = 0.0
    training = qp.Training(loader(64), 1, qp.SPRConfig(strength=0.0), None, config=STILL)
    loose, tight = (
        qp.prune(model, IMAGE, budgets=b, training=training, solver="highs")[1] for b in ("95%", "50%")
    )
    assert loose.masks.counts()["block1.conv1"] == 6
    assert sum(loose.masks.counts().values()) == sum(g.width for g in loose.graph.groups) - 6
    assert tight.budgets[0].used <= tight.budgets[0].limit
    assert not tight.masks.keep["block1.conv1"][:6].any()


def test_psp_under_a_budget() -> None:
    method = qp.PSPConfig("channel", spread=None)
    training = qp.Training(loader(), 4, method, qp.Control(rate=0.2, every=2), config=CPU)
    small, report = qp.prune(net(), IMAGE, budgets={"macs": "50%"}, training=training, solver="highs")
    assert 0 <= report.budgets[0].slack < report.budgets[0].cheapest_step
    assert report.regularised is not None
    assert report.regularised.trace[0].used["macs"] == pytest.approx(2.0)
    assert not any("parametrizations" in name for name in small.state_dict())


def test_another_importance_scores_the_trained_weights() -> None:
    seen = []

    def spy(model: nn.Module, graph: qp.ChannelGraph) -> qp.PairwiseForm:
        seen.append(model.stem.weight.detach().clone())
        return qp.Magnitude()(model, graph)

    model = net()
    training = qp.Training(loader(64), 1, qp.SPRConfig(strength=1.0), None, config=CPU)
    _, report = qp.prune(model, IMAGE, budgets="50%", training=training, importance=spy, solver="highs")
    assert len(seen) == 1
    assert not torch.equal(seen[0], model.stem.weight)
    assert report.importance == "spy"


class Killed:
    """A loader that is interrupted in the second batch of an epoch."""

    def __init__(self, inner: Any, epoch: int) -> None:
        self.inner, self.last, self.epoch = inner, epoch, 0

    def __len__(self) -> int:
        return len(self.inner)

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch
        self.inner.set_epoch(epoch)

    def __iter__(self) -> Iterator[Any]:
        for k, batch in enumerate(self.inner):
            if (self.epoch, k) == (self.last, 1):
                raise KeyboardInterrupt
            yield batch


@pytest.mark.parametrize("method", [qp.SPRConfig(), qp.PSPConfig("channel", spread=None)])
def test_both_trainings_go_on_after_a_kill(tmp_path: Path, method: Any) -> None:
    def job(first: Any, second: Any, folder: Path | None) -> tuple[nn.Module, PruneReport]:
        files = [None if folder is None else folder / name for name in ("train", "finetune")]
        training = qp.Training(first, 3, method, qp.Control(every=2), config=CPU, checkpoint=files[0])
        recovery = qp.Recovery(train=second, epochs=3, config=CPU, checkpoint=files[1])
        budgets = {"macs": "50%"}
        return qp.prune(net(), IMAGE, budgets=budgets, training=training, recovery=recovery, solver="highs")

    small, report = job(loader(), loader(), None)
    with pytest.raises(KeyboardInterrupt):
        job(Killed(loader(), 2), loader(), tmp_path)
    with pytest.raises(KeyboardInterrupt):
        job(loader(), Killed(loader(), 1), tmp_path)
    again, resumed = job(loader(), loader(), tmp_path)
    assert same_weights(small, again)
    assert (resumed.regularised.history["resumed_at"], resumed.training["resumed_at"]) == (3, 1)
    assert resumed.regularised.trace == report.regularised.trace


def test_the_dense_network_teaches_before_the_cut_and_after_it() -> None:
    model, calls = net(), list[bool]()
    before = net()

    def hook(module: nn.Module, _inputs: Any, out: torch.Tensor) -> None:
        if module is model.stem and len(out) == 64:  # the network itself, not a copy; a batch of training
            calls.append(module.training)

    model.stem.register_forward_hook(hook)
    config = replace(CPU, distillation=0.5)
    training = qp.Training(loader(128), 1, qp.SPRConfig(strength=0.0), None, config=config)
    recovery = qp.Recovery(train=loader(192), epochs=1, config=config)
    qp.prune(model, IMAGE, budgets="50%", training=training, recovery=recovery, solver="block_coordinate")
    assert calls == [False] * 6  # one is the look at a batch before anything is trained
    assert same_weights(model, before)


class Unread(list):
    def __iter__(self) -> Iterator[Any]:
        raise AssertionError("the loader was read")


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"budgets": {"macs": "0.1%"}}, qp.InfeasibleError, "smallest attainable"),
        ({}, qp.InvalidBudgetError, "no budget given"),
        ({"budgets": "50%", "solver": "hihgs"}, qp.SolverUnavailableError, "highs"),
        ({"budgets": "50%", "importance": "taylor"}, qp.InvalidOptionError, "Magnitude"),
    ],
)
def test_what_can_be_refused_is_refused_before_training(options: Any, error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        qp.prune(net(), IMAGE, training=qp.Training(Unread(), 3), **options)


def test_one_glob_is_a_list_of_one() -> None:
    training = qp.Training(loader(64), 1, qp.SPRConfig(strength=0.0), None, layers="block1.*", config=STILL)
    _, report = qp.prune(net(), IMAGE, training=training, solver="highs")
    assert all(line.used == line.dense for line in report.budgets)


def test_bad_trainings() -> None:
    with pytest.raises(qp.InvalidOptionError, match="epochs is 0"):
        qp.Training(Unread(), 0)
    with pytest.raises(qp.InvalidOptionError, match="nothing has vanished"):
        qp.Training(Unread(), 1, config=qp.FinetuneConfig(ema=0.9))
    with pytest.raises(qp.InvalidOptionError, match=r'PSPConfig\("channel"\)'):
        qp.Training(Unread(), 1, qp.PSPConfig("column"))
    with pytest.raises(qp.InvalidOptionError, match="bounds are for SPR"):
        qp.Training(Unread(), 1, qp.PSPConfig("channel"), bounds="fixed")
    with pytest.raises(qp.InvalidOptionError, match="give an SPRConfig"):
        qp.Training(Unread(), 1, "spr")  # type: ignore[arg-type]
    with pytest.raises(qp.InvalidOptionError, match="rate=0"):
        qp.Control(rate=0)
    with pytest.raises(qp.UnknownLayerError, match="nowhere"):
        qp.prune(net(), IMAGE, budgets="50%", training=qp.Training(Unread(), 1, layers=["nowhere"]))


@pytest.mark.parametrize(
    ("share", "options"),
    [
        ("50%", {}),
        ("50%", {"sharing": "free"}),
        ("50%", {"columns": True}),
        pytest.param("60%", {"round_to": 2}, marks=pytest.mark.slow),
        pytest.param("60%", {"units": ("widths", "stream")}, marks=pytest.mark.slow),
    ],
    ids=["plain", "free", "columns", "round_to", "stream"],
)
def test_what_is_cut_had_vanished(share: str, options: dict[str, Any]) -> None:
    """Of every kind of unit, the network computes the same before and after the cut."""
    model = net()
    data, test = digits().train.loader(64, shuffle=True, seed=1), digits().test.loader(500)
    qp.finetune(model, data, epochs=4, config=CPU)
    training = qp.Training(
        data, 12, control=qp.Control(every=4), config=replace(CPU, schedule="cosine", warmup=0.5)
    )
    _, report = qp.prune(
        model,
        IMAGE,
        budgets={"macs": share},
        training=training,
        recovery=qp.Recovery(validation=test),
        solver="block_coordinate",
        **options,
    )
    assert report.regularised.trace[-1].violation < 0.05
    assert not any("still exceeded" in note for note in report.notes)
    assert report.accuracy.pruned >= report.accuracy.regularised - 0.015


def test_a_budget_for_units_that_nothing_presses_is_refused() -> None:
    """Frozen, or left out: what cannot vanish would be cut alive."""
    data = loader()
    for prepare, options in (
        (lambda m: m.block2.requires_grad_(False), {}),
        (lambda m: m, {"layers": ["stem"]}),
    ):
        model = net()
        prepare(model)
        with pytest.raises(qp.InvalidOptionError, match="does not act"):
            qp.prune(
                model, IMAGE, budgets={"params": "20%"}, training=qp.Training(data, 1, config=CPU, **options)
            )


def test_an_unfinished_training_says_so(tmp_path: Path) -> None:
    _, report = qp.prune(
        net(), IMAGE, budgets={"macs": "50%"}, training=qp.Training(loader(), 1, config=STILL)
    )
    assert any("still exceeded its budgets" in note for note in report.notes)
    both = tmp_path / "checkpoint"
    with pytest.raises(qp.InvalidOptionError, match="two files"):
        qp.prune(
            net(),
            IMAGE,
            budgets={"macs": "50%"},
            training=qp.Training(loader(), 1, config=STILL, checkpoint=both),
            recovery=qp.Recovery(train=loader(), epochs=1, checkpoint=str(both)),
        )
    assert not both.exists()
