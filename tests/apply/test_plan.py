"""Saving and loading: what comes back computes the same bits, and what does not match is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from qcqp_prune.apply import plan as plan_module
from qcqp_prune.apply.plan import load, save
from qcqp_prune.apply.plan_data import PLAN, WEIGHTS, read_plan
from qcqp_prune.apply.shrink import shrink_and_verify
from qcqp_prune.errors import MaskMismatchError, PlanError
from qcqp_prune.graph.channels import ChannelGraph
from qcqp_prune.graph.masks import Masks
from qcqp_prune.graph.trace import trace
from qcqp_prune.storage import digest_of


class Chain(nn.Module):
    """Two convolutions with a batch norm, a flatten and a classifier; one buffer stays out of the state dict."""

    def __init__(
        self, classes: int = 3, width: int = 6, activation: Callable[[Tensor], Tensor] = torch.relu
    ) -> None:
        super().__init__()
        self.a = nn.Conv2d(2, width, 3, padding=1)
        self.bn = nn.BatchNorm2d(width)
        self.b = nn.Conv2d(width, 4, 1, bias=False)
        self.head = nn.Linear(4 * 5 * 5, classes)
        self.register_buffer("scale", torch.rand(width, 1, 1) + 0.5, persistent=False)
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        x = self.activation(self.bn(self.a(x)) * self.scale)
        return self.head(torch.flatten(self.b(x), 1))


class Sliced(nn.Module):
    """Channel numbers are written into ``forward``, so that only a rewritten graph can be smaller."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(2, 8, 3, padding=1)
        self.left = nn.Conv2d(4, 4, 1)
        self.right = nn.Conv2d(4, 4, 1)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        y = torch.cat([self.left(x[:, :4]), self.right(x[:, 4:])], 1)
        return self.head(torch.relu(y).mean((2, 3)))


class Tied(nn.Module):
    """Two layers share one weight."""

    def __init__(self, *, tied: bool = True) -> None:
        super().__init__()
        self.a = nn.Linear(5, 6)
        self.b = nn.Linear(6, 6, bias=False)
        self.c = nn.Linear(6, 6, bias=False)
        if tied:
            self.c.weight = self.b.weight
        self.head = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.a(x))
        return self.head(x + self.c(torch.relu(self.b(x))))


INPUTS = {Chain: torch.zeros(2, 2, 5, 5), Sliced: torch.zeros(2, 2, 5, 5), Tied: torch.zeros(2, 5)}


def every_second(graph: ChannelGraph) -> Masks:
    """Keep units 0, 2, 4, ... of each group that may shrink."""
    flat = np.ones(graph.unit_count, np.bool_)
    for k, group in enumerate(graph.groups):
        if group.frozen_reason is None:
            flat[graph.units(k)] = np.arange(group.width) % 2 == 0
    return Masks.from_flat(graph, flat)


def cut(kind: type[nn.Module], realisation: str = "auto") -> tuple[nn.Module, ChannelGraph, Masks]:
    torch.manual_seed(0)
    model = kind()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2.0)
    graph = trace(model, INPUTS[kind])
    masks = every_second(graph)
    small, checked = shrink_and_verify(model, graph, masks, realisation=realisation)
    assert checked.realisation == ("modules" if realisation == "auto" and kind is not Sliced else "graph")
    return small, graph, masks


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    small, graph, masks = cut(Chain)
    return save(small, tmp_path / "small", graph=graph, masks=masks)


@pytest.mark.parametrize("kind", [Chain, Sliced, Tied])
@pytest.mark.parametrize("realisation", ["auto", "graph"])
def test_a_loaded_network_computes_the_same_bits(
    tmp_path: Path, kind: type[nn.Module], realisation: str
) -> None:
    small, graph, masks = cut(kind, realisation)
    with (
        torch.no_grad()
    ):  # stands for finetuning: the weights to be stored are not those of the dense network
        for parameter in small.parameters():
            parameter.add_(0.01)
    save(small, tmp_path / "small", graph=graph, masks=masks)
    torch.manual_seed(99)  # the constructor draws other weights
    again = load(tmp_path / "small", kind)
    x = torch.randn(7, *INPUTS[kind].shape[1:])
    assert torch.equal(again.eval()(x), small.eval()(x))
    assert {n: p.shape for n, p in again.named_parameters()} == {
        n: p.shape for n, p in small.named_parameters()
    }


def test_loading_leaves_a_given_model_alone_and_keeps_the_mode(saved: Path) -> None:
    dense = Chain()
    before = {name: value.clone() for name, value in dense.state_dict().items()}
    small = load(saved, dense)
    assert all(torch.equal(value, before[name]) for name, value in dense.state_dict().items())
    assert dense.a.out_channels == 6
    assert small.a.out_channels == 3
    assert small.training  # as the one that was saved


def test_eval_mode_is_stored(tmp_path: Path) -> None:
    small, graph, masks = cut(Chain)
    small.eval()
    assert not load(save(small, tmp_path / "s", graph=graph, masks=masks), Chain).training


def test_tied_weights_are_stored_once_and_stay_tied(tmp_path: Path) -> None:
    small, graph, masks = cut(Tied)
    folder = save(small, tmp_path / "small", graph=graph, masks=masks)
    stored = {t.name: t.aliases for t in read_plan(folder).tensors}
    assert stored["b.weight"] == ("c.weight",)
    again = load(folder, Tied)
    assert again.b.weight is again.c.weight
    assert again.b.weight.shape == (3, 3)


def test_a_cast_network_comes_back_in_its_dtype(tmp_path: Path) -> None:
    small, graph, masks = cut(Chain)
    small.to(torch.bfloat16)
    again = load(save(small, tmp_path / "small", graph=graph, masks=masks), Chain)
    x = torch.randn(3, 2, 5, 5, dtype=torch.bfloat16)
    assert again.a.weight.dtype == torch.bfloat16
    assert torch.equal(again.eval()(x), small.eval()(x))


def test_files_hold_no_pickle(saved: Path) -> None:
    assert sorted(p.name for p in saved.iterdir()) == [PLAN, WEIGHTS]
    data = json.loads((saved / PLAN).read_text())
    assert data["schema"] == 1
    assert data["model"] == "Chain"
    assert {t["name"]: tuple(t["shape"]) for t in data["tensors"]}["a.weight"] == (3, 2, 3, 3)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Chain(classes=4), r"head\.weight in shape \(4, 100\), not \(3, 100\)"),
        (lambda: Chain(width=8), r"a\.weight in shape \(8, 2, 3, 3\)"),
        (Sliced, r"lacks bn\.weight"),
        (lambda: nn.Sequential(Chain()), r"has 0\.a\.weight, which the plan does not know"),
        (lambda: Chain(activation=torch.tanh), "computes something else"),
        (lambda: "a text", "made a str"),
    ],
)
def test_another_model_is_refused(saved: Path, make: Callable[[], nn.Module], words: str) -> None:
    with pytest.raises(PlanError, match=words):
        load(saved, make)


def test_a_model_that_is_not_tied_is_refused(tmp_path: Path) -> None:
    small, graph, masks = cut(Tied)
    folder = save(small, tmp_path / "small", graph=graph, masks=masks)
    with pytest.raises(PlanError, match=r"c\.weight not tied to b\.weight"):
        load(folder, lambda: Tied(tied=False))


def _truncate(folder: Path) -> None:
    text = (folder / PLAN).read_text()
    (folder / PLAN).write_text(text[: len(text) // 2])


def _edit(folder: Path, change: Callable[[dict], None], *, sign: bool = False) -> None:
    data = json.loads((folder / PLAN).read_text())
    change(data)
    if sign:
        data["digest"] = digest_of({k: v for k, v in data.items() if k != "digest"})
    (folder / PLAN).write_text(json.dumps(data))


def _flip(folder: Path) -> None:
    content = bytearray((folder / WEIGHTS).read_bytes())
    content[-1] ^= 1
    (folder / WEIGHTS).write_bytes(bytes(content))


def _keep_another_unit(data: dict) -> None:
    entry = next(e for e in data["masks"]["keep"].values() if 1 < len(e["kept"]) < e["width"])
    entry["kept"][0] = 1


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (_truncate, "no valid JSON"),
        (lambda f: (f / PLAN).write_text("[1, 2]"), "JSON list"),
        (lambda f: (f / PLAN).write_bytes(b"\xff\xfe\x00"), "no valid JSON"),
        (lambda f: (f / PLAN).unlink(), "no file"),
        (lambda f: (f / WEIGHTS).unlink(), "cannot be read"),
        (_flip, "checksum"),
        (lambda f: (f / WEIGHTS).write_bytes(b""), "checksum"),
        (lambda f: _edit(f, _keep_another_unit), "changed after it was written"),
        (lambda f: _edit(f, lambda d: d.update(realisation="graph")), "changed after it was written"),
        (lambda f: _edit(f, lambda d: d.update(schema=99)), "schema 99"),
        (lambda f: _edit(f, lambda d: d.update(format="x")), "no plan"),
        (lambda f: _edit(f, lambda d: d.pop("masks"), sign=True), "incomplete"),
        (lambda f: _edit(f, lambda d: d["graph"].update(fingerprint="0"), sign=True), "fingerprint"),
        (lambda f: _edit(f, lambda d: d["masks"].update(fingerprint="0"), sign=True), "fingerprint"),
    ],
)
def test_damage_is_refused(saved: Path, damage: Callable[[Path], None], words: str) -> None:
    damage(saved)
    with pytest.raises(PlanError, match=words):
        load(saved, Chain)


def test_a_missing_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="no file"):
        load(tmp_path / "nothing", Chain)


def test_a_network_is_not_saved_under_masks_it_was_not_cut_with(tmp_path: Path) -> None:
    small, graph, masks = cut(Chain)
    whole = Masks.from_flat(graph, np.ones(graph.unit_count, np.bool_))
    with pytest.raises(PlanError, match="the masks say"):
        save(small, tmp_path / "small", graph=graph, masks=whole)
    with pytest.raises(MaskMismatchError, match="fingerprint"):
        save(small, tmp_path / "small", graph=trace(Tied(), INPUTS[Tied]), masks=masks)
    assert list(tmp_path.iterdir()) == []


def test_a_saved_network_may_be_replaced_and_nothing_else(saved: Path) -> None:
    small, graph, masks = cut(Chain)
    with torch.no_grad():
        small.head.bias.fill_(7.0)
    save(small, saved, graph=graph, masks=masks)
    assert torch.equal(load(saved, Chain).head.bias, torch.full((3,), 7.0))
    (saved / "notes.txt").write_text("mine")
    with pytest.raises(PlanError, match="holds something else"):
        save(small, saved, graph=graph, masks=masks)
    assert (saved / "notes.txt").read_text() == "mine"


def test_a_failure_while_writing_leaves_the_old_folder_whole(
    saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    before = {p.name: p.read_bytes() for p in saved.iterdir()}
    small, graph, masks = cut(Chain)
    monkeypatch.setattr(plan_module, "write_json", full)
    with pytest.raises(OSError, match="No space"):
        save(small, saved, graph=graph, masks=masks)
    assert {p.name: p.read_bytes() for p in saved.iterdir()} == before
    assert [p.name for p in saved.parent.iterdir()] == [saved.name]
