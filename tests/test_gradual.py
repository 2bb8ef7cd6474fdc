"""Pruning in several rounds: every count is of the dense network, and the last round is the budget itself."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import qcqp_prune as qp
from qcqp_prune import pipeline
from qcqp_prune.apply.surgery import copied
from qcqp_prune.report import PruneReport
from qcqp_prune.resources.measure import measured_macs
from qcqp_prune.watch import Watcher
from tests.residuals import Identity

CPU = qp.FinetuneConfig(lr=0.05, schedule="constant", device="cpu")
IMAGE = torch.zeros(1, 3, 6, 6)


class Images:
    """Batches of three classes that differ in brightness; which batches come depends on the epoch.

    With ``kill`` the run is interrupted in that batch of that pass over the loader.
    """

    def __init__(self, kill: tuple[int, int] | None = None) -> None:
        self.kill, self.epoch, self.passes, self.seen = kill, 0, 0, list[int]()

    def __len__(self) -> int:
        return 3

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch
        self.seen.append(epoch)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        generator = torch.Generator().manual_seed(self.epoch)
        self.passes += 1
        for k in range(3):
            if (self.passes, k) == self.kill:
                raise KeyboardInterrupt
            labels = torch.randint(0, 3, (16,), generator=generator)
            yield torch.randn(16, 3, 6, 6, generator=generator) + labels[:, None, None, None], labels


def net(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 12, 3, padding=1), nn.BatchNorm2d(12),
        nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 3),
    )  # fmt: skip


DENSE = 36 * 9 * (3 * 8 + 8 * 12) + 36


class Hears(Watcher):
    """The masks of each round."""

    def __init__(self) -> None:
        self.masks: list[qp.Masks] = []

    def solved(self, report: qp.SolveReport) -> None:
        self.masks.append(report.masks)


def same_weights(a: nn.Module, b: nn.Module) -> bool:
    first, second = a.state_dict(), b.state_dict()
    return first.keys() == second.keys() and all(torch.equal(first[n], second[n]) for n in first)


def test_one_round_is_pruning_at_once() -> None:
    pairs = []
    for rounds in (None, qp.Rounds(1, 5)):
        recovery = qp.Recovery(train=Images(), validation=Images(), epochs=2, config=CPU)
        pairs.append(qp.prune(net(), IMAGE, budgets="50%", rounds=rounds, recovery=recovery, solver="highs"))
    (small, report), (again, other) = pairs
    assert same_weights(small, again)
    assert (report.masks, report.accuracy, report.budgets) == (other.masks, other.accuracy, other.budgets)
    assert other.rounds == ()
    assert len(other.training["epochs"]) == 2


@pytest.mark.parametrize("spacing", ["geometric", "linear"])
def test_each_round_goes_a_part_of_the_way_from_the_dense_use(spacing: Any) -> None:
    hears, dense = Hears(), net()
    small, report = qp.prune(
        dense,
        IMAGE,
        budgets={"macs": "30%"},
        rounds=qp.Rounds(3, 1, spacing),
        recovery=qp.Recovery(train=Images(), epochs=1, config=CPU),
        solver="highs",
        watch=hears,
    )
    shares = {"geometric": [0.3 ** (1 / 3), 0.3 ** (2 / 3), 0.3], "linear": [1 - 0.7 / 3, 1 - 1.4 / 3, 0.3]}
    wanted = [share * DENSE for share in shares[spacing]]
    assert [r.limits["macs"] for r in report.rounds] == pytest.approx(wanted, abs=1)
    assert report.rounds[-1].limits["macs"] == report.budgets[0].limit == DENSE * 3 // 10
    assert report.budgets[0].dense == report.solve.usage["macs"].dense == DENSE
    graph = report.graph
    problem = qp.PruningProblem.build(graph, qp.Magnitude()(dense, graph), {"macs": "30%"})
    before = np.ones(graph.unit_count, np.bool_)
    for one, masks in zip(report.rounds, hears.masks, strict=True):
        flat = masks.flat(graph)
        limit = one.limits["macs"]
        assert problem.usage(flat) == one.used
        assert one.used["macs"] <= limit
        assert one.kept == flat.sum() < before.sum()
        assert not (flat & ~before).any()
        counted = {count.resource: (count.predicted, count.measured) for count in one.verification.counts}
        assert counted["macs"] == (one.used["macs"],) * 2
        for unit in np.flatnonzero(before & ~flat):  # no unit that this round removed would have fitted
            more = flat.copy()
            more[unit] = True
            assert problem.usage(more)["macs"] > limit
        before = flat
    assert report.masks == hears.masks[-1]
    assert measured_macs(small, IMAGE) == report.rounds[-1].used["macs"] == report.budgets[0].used
    assert small[0].out_channels == int(report.masks.keep["0"].sum())


def test_the_smaller_network_is_scored_as_it_was_trained() -> None:
    seen: list[tuple[Tensor, tuple[int, ...]]] = []

    def spy(model: nn.Module, graph: qp.ChannelGraph) -> qp.PairwiseForm:
        seen.append((model[3].weight.detach().clone(), tuple(g.width for g in graph.groups)))
        assert {t.name: t.shape for t in graph.tensors} == {
            name: tuple(value.shape) for name, value in model.state_dict().items()
        }
        return qp.Magnitude()(model, graph)

    dense = net()
    start, hears = copied(dense), Hears()
    recovery = qp.Recovery(train=Images(), config=CPU)
    _, report = qp.prune(
        dense,
        IMAGE,
        budgets="30%",
        importance=spy,
        rounds=qp.Rounds(3, 1),
        recovery=recovery,
        watch=hears,
        solver="highs",
    )
    assert len(seen) == 3
    assert torch.equal(seen[0][0], start[3].weight)
    for (weight, widths), masks in zip(seen[1:], hears.masks, strict=False):
        keep = masks.keep
        assert widths == tuple(n for n in masks.counts().values())
        cut = start[3].weight[torch.from_numpy(keep["3"].copy())][:, torch.from_numpy(keep["0"].copy())]
        assert weight.shape == cut.shape
        assert not torch.equal(weight, cut)  # it was finetuned since
        assert F.cosine_similarity(weight.flatten(), cut.flatten(), dim=0) > 0.5  # and is no other one
    assert same_weights(dense, start)
    assert report.importance == "spy"


def test_what_a_round_cuts_is_what_the_one_before_has_trained() -> None:
    """The last cut has weights and statistics of the network that the first round trained, at what is left."""
    trained: dict[str, Tensor] = {}

    def spy(model: nn.Module, graph: qp.ChannelGraph) -> qp.PairwiseForm:
        trained.update({name: value.clone() for name, value in model.state_dict().items()})
        return qp.Magnitude()(model, graph)

    hears, dense = Hears(), net()
    small, _ = qp.prune(
        dense,
        IMAGE,
        budgets="30%",
        importance=spy,
        rounds=qp.Rounds(2, 2),
        recovery=qp.Recovery(train=Images(), repair=None, config=CPU),
        watch=hears,
        solver="highs",
    )
    (a, c), (b, d) = ([m.keep[name] for m in hears.masks] for name in ("0", "3"))
    rows, cols = torch.from_numpy(d[b]), torch.from_numpy(c[a])
    found = small.state_dict()
    assert torch.equal(found["3.weight"], trained["3.weight"][rows][:, cols])
    assert torch.equal(found["4.running_var"], trained["4.running_var"][rows])
    assert torch.equal(found["1.running_mean"], trained["1.running_mean"][cols])
    assert found["4.num_batches_tracked"] == trained["4.num_batches_tracked"] == 6
    assert dense[4].num_batches_tracked == 0


def test_floors_and_multiples_are_of_the_dense_network() -> None:
    recovery = qp.Recovery(train=Images(), config=CPU)
    call: dict[str, Any] = {"rounds": qp.Rounds(4, 1), "recovery": recovery, "solver": "highs"}
    _, report = qp.prune(net(), IMAGE, budgets={"macs": "40%"}, min_keep=0.5, **call)
    counts = report.masks.counts()
    assert counts["0"] >= 4
    assert counts["3"] >= 6
    _, report = qp.prune(net(), IMAGE, budgets={"macs": "40%"}, round_to=4, **call)
    assert all(report.masks.counts()[name] % 4 == 0 for name in ("0", "3"))
    with pytest.raises(qp.InfeasibleError, match="smallest attainable"):
        qp.prune(net(), IMAGE, budgets={"macs": "10%"}, min_keep=0.5, **call)
    _, report = qp.prune(net(), IMAGE, budgets={"macs": "60%"}, ignored_layers=["0"], **call)
    assert report.masks.keep["0"].all()


def test_a_band_holds_in_the_last_round() -> None:
    _, report = qp.prune(net(), IMAGE, budgets={"macs": "35%..40%"}, rounds=qp.Rounds(3, 0), solver="highs")
    assert 0.35 * DENSE <= report.budgets[0].used <= 0.4 * DENSE


class Written(nn.Module):
    """A forward with a size written into it, so that the smaller network is a rewritten graph."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 6, 3, padding=1)
        self.norm, self.out = nn.BatchNorm2d(8), nn.Linear(6 * 36, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.b(F.relu(self.norm(self.a(x)))))
        return self.out(x.view(-1, 216))


class Attends(nn.Module):
    """Attention between the rows of an image."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.attention = nn.Linear(18, 16), nn.MultiheadAttention(16, 4, batch_first=True)
        self.out = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.up(x.transpose(1, 2).flatten(2))
        return self.out(x + self.attention(x, x, x, need_weights=False)[0]).mean(1)


class Classes(Identity):
    """Two residual branches."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)[:, :3]


@pytest.mark.parametrize(
    ("make", "options", "realisation"),
    [
        (Written, {}, "graph"),
        (net, {"realisation": "graph"}, "graph"),
        (Classes, {"sharing": "free"}, "graph"),
        (Classes, {"blocks": True, "min_keep": 0.5}, None),
        (Attends, {}, "modules"),
    ],
    ids=["written sizes", "asked for", "free sharing", "blocks", "attention"],
)
def test_networks_that_are_rewritten(
    make: Any, options: dict[str, Any], realisation: str | None, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    dense = make()
    recovery = qp.Recovery(train=Images(), epochs=1, config=CPU)
    small, report = qp.prune(
        dense,
        IMAGE,
        budgets={"params": "60%"},
        rounds=qp.Rounds(3, 1),
        recovery=recovery,
        solver="block_coordinate",
        **options,
    )
    assert realisation in (None, report.verification.realisation)
    line = next(line for line in report.budgets if line.resource == "params")
    assert sum(p.numel() for p in small.parameters()) == line.used <= line.limit
    kept = [r.kept for r in report.rounds]
    assert kept == sorted(kept, reverse=True)
    assert kept[0] > kept[-1]
    qp.save(small, tmp_path / "net", graph=report.graph, masks=report.masks)
    again = qp.load(tmp_path / "net", make)
    x = torch.randn(2, 3, 6, 6)
    assert torch.equal(small.eval()(x), again.eval()(x))


def job(loader: Images, folder: Path | None) -> tuple[nn.Module, PruneReport]:
    file = None if folder is None else folder / "run"
    config = qp.FinetuneConfig(lr=0.05, schedule="constant", device="cpu", ema=0.9, distillation=0.5)
    recovery = qp.Recovery(train=loader, epochs=2, config=config, checkpoint=file)
    return qp.prune(net(), IMAGE, budgets="30%", rounds=qp.Rounds(3, 2), recovery=recovery, solver="highs")


@pytest.mark.parametrize("kill", [(3, 0), (7, 1), (10, 2)])
def test_a_killed_run_goes_on_and_does_not_solve_again(
    kill: tuple[int, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each round passes over its data to score, to repair, and twice to train."""
    whole, report = job(Images(), None)
    solved: list[Sequence[str]] = []
    solve = pipeline.solve

    def counted(*args: Any, **kwargs: Any) -> qp.SolveReport:
        solved.append("")
        return solve(*args, **kwargs)

    monkeypatch.setattr(pipeline, "solve", counted)
    with pytest.raises(KeyboardInterrupt):
        job(Images(kill), tmp_path)
    resumed, again = job(Images(), tmp_path)
    assert len(solved) == 3
    assert same_weights(whole, resumed)
    assert again.masks == report.masks
    assert [r.kept for r in again.rounds] == [r.kept for r in report.rounds]


def test_at_once_a_killed_run_goes_on_with_the_units_that_it_chose(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second solve may choose otherwise: here it would, and is not asked."""
    call: dict[str, Any] = {"budgets": "50%", "solver": "highs"}
    whole, report = qp.prune(net(), IMAGE, recovery=qp.Recovery(train=Images(), epochs=2, config=CPU), **call)
    file = tmp_path / "run"
    recovery = qp.Recovery(train=Images((3, 1)), epochs=2, config=CPU, checkpoint=file)
    with pytest.raises(KeyboardInterrupt):
        qp.prune(net(), IMAGE, recovery=recovery, **call)

    def never(*_: Any, **__: Any) -> qp.SolveReport:
        raise AssertionError("solved again")

    monkeypatch.setattr(pipeline, "solve", never)
    recovery = qp.Recovery(train=Images(), epochs=2, config=CPU, checkpoint=file)
    resumed, again = qp.prune(net(), IMAGE, recovery=recovery, **call)
    assert again.masks == report.masks
    assert same_weights(whole, resumed)
    assert any("not solved again" in note for note in again.solve.notes)


@pytest.mark.parametrize(
    "other",
    [
        {"budgets": "40%"},
        {"budgets": "45%..50%"},
        {"min_keep": 0.5},
        {"round_to": 2},
        {"ignored_layers": ["0"]},
        {"importance": qp.Magnitude("l2")},
        {"importance": qp.Calibrated(Images(), ratios=(0.5,))},
        {"time_limit": 3.0},
        {"solver": "block_coordinate"},
        {"model": net(1)},
    ],
    ids=[
        "budget",
        "band",
        "min_keep",
        "round_to",
        "ignored",
        "importance",
        "ratios",
        "time_limit",
        "solver",
        "weights",
    ],
)
def test_at_once_a_selection_of_another_run_is_refused(other: dict[str, Any], tmp_path: Path) -> None:
    recovery = qp.Recovery(train=Images(), epochs=1, config=CPU, checkpoint=tmp_path / "run")
    call: dict[str, Any] = {"model": net(), "solver": "highs", "recovery": recovery, "budgets": "50%"}
    qp.prune(example_inputs=IMAGE, **call)
    with pytest.raises(qp.PlanError, match="belongs to another run"):
        qp.prune(example_inputs=IMAGE, **{**call, **other})


@pytest.mark.parametrize("how", ["lost", "rounds"])
def test_a_checkpoint_without_its_selection_is_refused(how: str, tmp_path: Path) -> None:
    """Its weights may be of other units, of equal numbers."""
    recovery = qp.Recovery(train=Images(), epochs=1, config=CPU, checkpoint=tmp_path / "run")
    call: dict[str, Any] = {"solver": "highs", "recovery": recovery, "budgets": "50%"}
    qp.prune(net(), IMAGE, **call)
    if how == "lost":
        (tmp_path / "run.selection.json").unlink()
    with pytest.raises(qp.PlanError, match="which says what units its weights are of"):
        qp.prune(net(), IMAGE, **call, rounds=qp.Rounds(2, 0) if how == "rounds" else None)


def test_selections_of_another_run_are_refused(tmp_path: Path) -> None:
    call: dict[str, Any] = {"rounds": qp.Rounds(2, 1), "solver": "highs"}
    recovery = qp.Recovery(train=Images(), config=CPU, checkpoint=tmp_path / "run")
    qp.prune(net(), IMAGE, budgets="50%", recovery=recovery, **call)
    with pytest.raises(qp.PlanError, match="belongs to another run"):
        qp.prune(net(), IMAGE, budgets="40%", recovery=recovery, **call)
    with pytest.raises(qp.PlanError, match="belongs to another run"):
        qp.prune(net(), IMAGE, budgets="50%", recovery=recovery, importance=qp.Magnitude("l2"), **call)


def test_rounds_draw_the_epochs_that_one_finetuning_draws() -> None:
    """Statistics are estimated on the order of the epoch that follows."""
    at_once, stepwise = Images(), Images()
    for loader, rounds, epochs in ((at_once, None, 5), (stepwise, qp.Rounds(3, 2), 1)):
        recovery = qp.Recovery(train=loader, epochs=epochs, repair="batch_norm", config=CPU)
        call = {"importance": qp.Magnitude(), "recovery": recovery, "solver": "highs"}
        qp.prune(net(), IMAGE, budgets="50%", rounds=rounds, **call)
    assert at_once.seen == [0, 0, 1, 2, 3, 4]
    assert stepwise.seen == [0, 0, 1, 2, 2, 3, 4, 4]


def test_the_dense_network_teaches_in_every_round() -> None:
    dense = net().train()
    before, calls = copied(dense), list[tuple[bool, bool, int]]()
    config = qp.FinetuneConfig(device="cpu", distillation=1.0)
    recovery = qp.Recovery(train=Images(), epochs=1, repair="batch_norm", config=config)

    def hook(module: nn.Module, _inputs: Any, out: Tensor) -> None:
        if module is dense[3] and len(out) == 16:  # the network itself, not a copy; a batch of training
            calls.append((module.training, out.requires_grad, out.shape[1]))

    dense[3].register_forward_hook(hook)
    _, report = qp.prune(
        dense,
        IMAGE,
        budgets="40%",
        importance=qp.Magnitude(),
        rounds=qp.Rounds(2, 2),
        recovery=recovery,
        solver="highs",
    )
    assert calls == [(False, False, 12)] * 10  # one is the look at a batch before anything is scored
    assert same_weights(dense, before)
    assert dense.training
    assert "distillation 1 at temperature 4" in report.recipe


def test_the_report_says_what_each_round_did() -> None:
    recovery = qp.Recovery(train=Images(), validation=Images(), epochs=1)
    _, report = qp.prune(
        net(), IMAGE, budgets={"macs": "50%"}, rounds=qp.Rounds(2, 1), recovery=recovery, solver="highs"
    )
    assert PruneReport.from_json(json.loads(json.dumps(report.to_json()))) == report
    assert report.recipe.startswith("the recipe recommended for Sequential: sgd")
    assert "cosine" in report.recipe
    shown = str(report)
    for number, one in enumerate(report.rounds, 1):
        assert f"{number} of 2" in shown
        assert f"{one.used['macs']:,} of {one.limits['macs']:,}" in shown
        assert f"{one.accuracy.finetuned:.2%}" in shown
        assert len(one.training["epochs"]) == 1
    assert report.accuracy.finetuned == report.rounds[-1].accuracy.finetuned
    assert report.recipe in " ".join(shown.split())
    given = qp.Recovery(train=Images(), epochs=1, config=CPU)
    _, one = qp.prune(net(), IMAGE, budgets="50%", recovery=given, solver="highs")
    assert one.recipe.startswith("a given recipe: sgd, lr 0.05")
    _, none = qp.prune(net(), IMAGE, budgets="50%", solver="highs")
    assert none.recipe == ""


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"columns": True}, "columns at once"),
        ({"training": qp.Training([], 1)}, "training under a regulariser at once"),
        ({"options": qp.SolveOptions(known_bound=3.0)}, "known bound"),
        ({"options": qp.SolveOptions(warm_start=np.ones(3, np.bool_))}, "warm start"),
        ({"recovery": None}, "no train loader"),
    ],
)
def test_what_cannot_be_done_in_rounds_is_refused(options: dict[str, Any], message: str) -> None:
    call: dict[str, Any] = {"recovery": qp.Recovery(train=Images(), config=CPU), **options}
    with pytest.raises(qp.InvalidOptionError, match=message):
        qp.prune(net(), IMAGE, budgets="50%", rounds=qp.Rounds(2, 1), **call)


def test_bad_rounds() -> None:
    for options in ({"count": 0}, {"epochs": -1}, {"spacing": "cubic"}):
        with pytest.raises(qp.InvalidOptionError, match=f"Rounds: {next(iter(options))} is .*; give"):
            qp.Rounds(**{"count": 2, "epochs": 1, **options})


def images(count: int = 2) -> list[tuple[Tensor, Tensor]]:
    return list(Images())[:count]


@pytest.mark.parametrize(
    "importance",
    [
        qp.Taylor(images(), form="gate"),
        qp.Fisher(images()),
        qp.Activation(images()),
        qp.Concave(qp.Normalised(qp.Magnitude())),
        qp.Calibrated(images()),
    ],
    ids=lambda x: type(x).__name__,
)
@pytest.mark.parametrize(
    ("make", "options"), [(net, {}), (Written, {}), (Classes, {"blocks": True, "min_keep": 0.5})]
)
def test_what_looks_at_data_scores_what_is_left(make: Any, options: dict[str, Any], importance: Any) -> None:
    torch.manual_seed(0)
    _, report = qp.prune(
        make(),
        IMAGE,
        budgets={"params": "60%"},
        importance=importance,
        rounds=qp.Rounds(2, 0),
        solver="block_coordinate",
        **options,
    )
    assert report.rounds[0].kept > report.rounds[1].kept
    assert report.budgets[0].used <= report.budgets[0].limit
