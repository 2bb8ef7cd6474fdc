"""Free sharing, cut: the smaller network scatters where operands differ, and computes what the masked one does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import qcqp_prune as qp
from qcqp_prune.apply import rewrite
from qcqp_prune.apply.joined_sum import JoinedSum
from qcqp_prune.graph.channels import ChannelGraph
from qcqp_prune.graph.masks import Masks
from qcqp_prune.models import resnet20
from tests import residuals
from tests.apply.test_properties import RELAXED
from tests.blocks import BLOCKS, WEIGHTLESS_MIXERS
from tests.networks import all_kept, depends_on_input, keep, liven, prune_and_check, random_masks, run
from tests.recipes import Recipe, recipes

X = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(0))
LEAKY = (nn.Sigmoid, nn.Softplus)
"""Not zero at zero: a channel zeroed before them is not a channel removed, so that `zeroed` is no reference."""


def free(model: nn.Module, x: Tensor = X, **options: Any) -> ChannelGraph:
    return qp.trace(model, x, sharing="free", **options)


def joined(model: nn.Module) -> list[JoinedSum]:
    return [m for m in model.modules() if isinstance(m, JoinedSum)]


@pytest.mark.parametrize("kind", [*residuals.FREE, *residuals.STRICT], ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("seed", [0, 1, pytest.param(2, marks=pytest.mark.slow)])
def test_random_masks(kind: type[nn.Module], seed: int) -> None:
    model = liven(kind(), seed)
    graph = free(model)
    # What is broadcast along a channel goes with it, and zeroing does not take it away.
    mixes = kind in (residuals.GroupNormed, residuals.Spread)
    prune_and_check(
        model, X, graph, random_masks(graph, seed), mixes=mixes, realisation=["auto", "graph"][seed % 2]
    )


@pytest.mark.parametrize("sharing", ["strict", "free"])
def test_a_padding_module_and_a_functional_one(sharing: Any) -> None:
    for functional in (True, False):
        model = liven(residuals.Padded(functional))
        graph = qp.trace(model, X, sharing=sharing)
        for seed in range(2):
            prune_and_check(model, X, graph, random_masks(graph, seed))


@pytest.mark.parametrize("kind", [residuals.Identity, residuals.Padded, residuals.Output])
def test_with_kernel_columns(kind: type[nn.Module]) -> None:
    """A column is part of a filter, which is part of a sum."""
    model = liven(kind())
    graph = free(model, columns=True)
    assert sum(layer.columns is not None for layer in graph.layers) >= 2
    assert set(graph.links.wholes) & set(graph.links.parts)
    for seed in range(2):
        prune_and_check(model, X, graph, random_masks(graph, seed))


def test_operands_side_by_side() -> None:
    """No channel in common: the sum is a concatenation, computed here by hand."""
    model = liven(residuals.Identity())
    graph = free(model)
    masks = keep(graph, a=[0, 4], b=[1, 2, 3], c_in=[0, 1, 2, 3, 4])
    small, checked = prune_and_check(model, X, graph, masks)
    assert checked.realisation == "graph"
    why, takes = checked.note.split("; ")
    assert why == "1 additions join layers that keep different channels"
    assert takes == "it is made for x of sizes (any, 3, 6, 6)"
    (one,) = joined(small)
    assert (one.dim, one.size) == (-3, 5)

    a = torch.tanh(nn.functional.conv2d(X, model.a.weight[[0, 4]], padding=1))
    b = torch.tanh(nn.functional.conv2d(a, model.b.weight[[1, 2, 3]][:, [0, 4]], padding=1))
    s = torch.cat([a, b], 1)[:, [0, 2, 3, 4, 1]]
    c = torch.tanh(nn.functional.conv2d(s, model.c.weight[:, [0, 1, 2, 3, 4]], padding=1))
    with torch.no_grad():
        assert torch.allclose(small(X), model.head(c.mean((2, 3))), atol=1e-5)


class ClassToken(nn.Module):
    """A parameter in front of the steps of a sequence: their channels are its channels.

    ::

        token ----+
                  cat --+-- sum -- mean -- head
        a(x) -----+     |   |
                        +-- b
    """

    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.ones(1, 1, 4))
        self.a, self.b, self.head = nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        steps = torch.cat([self.token.expand(x.shape[0], -1, -1), self.a(x)], 1)
        return self.head((steps + self.b(steps)).tanh().mean(1))  # type: ignore[no-any-return]


def test_a_parameter_in_front_of_a_sequence_decides_with_it() -> None:
    """By hand: the token has the channels that ``a`` has, also where ``b`` has none of them."""
    model, x = liven(ClassToken()), torch.randn(2, 5, 3)
    graph = free(model, x)
    small, _ = prune_and_check(model, x, graph, keep(graph, a=[0, 3], b=[1, 3], head_in=[0, 1, 3]))

    with torch.no_grad():
        steps = torch.cat([model.token.expand(2, -1, -1), model.a(x)], 1)[..., [0, 3]]
        other = nn.functional.linear(steps, model.b.weight[[1, 3]][:, [0, 3]], model.b.bias[[1, 3]])
        zero = torch.zeros_like(steps[..., :1])
        whole = torch.cat([steps[..., :1], zero, steps[..., 1:]], -1) + torch.cat([zero, other], -1)
        expected = nn.functional.linear(
            whole.tanh().mean(1), model.head.weight[:, [0, 1, 3]], model.head.bias
        )
        assert torch.allclose(small(x), expected, atol=1e-5)


@pytest.mark.parametrize("a", [[0, 2], [0, 1, 2]], ids=["some", "all"])
def test_channels_that_are_repeated_decide_as_any_others(a: list[int]) -> None:
    """By hand: what ``a`` keeps is in the sum twice, wherever ``b`` keeps nothing, and none of it follows ``b``."""
    model = liven(residuals.Tiled())
    graph = free(model)
    there = sorted({0, 4, *a, *(3 + k for k in a)})
    small, _ = prune_and_check(model, X, graph, keep(graph, a=a, b=[0, 4], c_in=there))
    with torch.no_grad():
        whole = torch.zeros(len(X), 6, 6, 6)
        whole[:, a] = model.a(X)[:, a]
        whole[:, [3 + k for k in a]] = model.a(X)[:, a]
        whole[:, [0, 4]] += model.b(X)[:, [0, 4]]
        expected = model.head(torch.tanh(nn.functional.conv2d(whole, model.c.weight, padding=1)).mean((2, 3)))
        assert torch.allclose(small(X), expected, atol=1e-5)


def test_where_masks_agree_the_modules_are_cut() -> None:
    model = liven(residuals.Identity())
    graph = free(model)
    small, checked = prune_and_check(model, X, graph, keep(graph, a=[0, 4], b=[0, 4], c_in=[0, 4]))
    assert (checked.realisation, joined(small)) == ("modules", [])
    whole, checked = qp.shrink_and_verify(model, graph, all_kept(graph))
    assert checked.realisation == "modules"
    assert torch.equal(run(whole, X)[0], run(model, X)[0])


def test_equally_many_other_channels_are_not_simply_added() -> None:
    model = liven(residuals.Identity())
    graph = free(model)
    masks = keep(graph, a=[0, 1, 2], b=[3, 4, 5])
    prune_and_check(model, X, graph, masks)
    with pytest.raises(qp.VerificationError, match='realisation="graph"'):
        qp.shrink(model, graph, masks, realisation="modules")


def test_an_output_has_its_full_size() -> None:
    model = liven(residuals.Output())
    graph = free(model)
    masks = keep(graph, a=[0, 1], b=[1, 4])
    small, _ = prune_and_check(model, X, graph, masks)
    with torch.no_grad():
        stream, _ = small(X)
    assert stream.shape[1] == 6
    assert (stream.abs().amax((0, 2, 3)) > 0).tolist() == [True, True, False, False, True, False]


def test_masks_that_leak_are_refused() -> None:
    model = liven(residuals.PreActivation())
    graph = free(model)
    for masks, why in (
        (
            keep(graph, c_in=[0, 1]),
            "belongs to one they remove",
        ),  # its operands still write what the sum drops
        (keep(graph, a=[0], b=[0]), "nothing writes"),  # operands have none of what the sum keeps
    ):
        with pytest.raises(qp.MaskMismatchError, match=why):
            qp.shrink(model, graph, masks)


@pytest.mark.parametrize("kind", [residuals.Identity, residuals.Difference, residuals.Padded])
def test_a_sum_put_together_wrongly_is_caught(kind: type[nn.Module], monkeypatch: pytest.MonkeyPatch) -> None:
    model = liven(kind())
    graph = free(model)
    right = rewrite.places_in

    def shifted(result: np.ndarray, operand: np.ndarray) -> Tensor | None:
        places = right(result, operand)
        return None if places is None else (places + 1) % int(result.sum())

    masks = random_masks(graph, 1)
    prune_and_check(model, X, graph, masks)
    monkeypatch.setattr(rewrite, "places_in", shifted)
    with pytest.raises(qp.VerificationError, match="differ from the masked"):
        qp.shrink(model, graph, masks)


def test_a_norm_that_is_not_cut_with_its_stream_is_caught() -> None:
    """The trap of a dead channel that still emits relu(beta): take bn2 from the graph's books."""
    model = liven(residuals.PreActivation())
    graph = free(model)
    masks = keep(graph, a=[0, 1], b=[1, 2], c_in=[0, 1, 2])
    small, _ = prune_and_check(model, X, graph, masks)
    assert small.bn2.weight.shape == (3,)
    with torch.no_grad():
        small.bn2.bias += 1.0
    assert not torch.allclose(small(X), qp.shrink(model, graph, masks)(X), atol=1e-3)


def test_training_saving_and_exporting(tmp_path: Path) -> None:
    model = liven(residuals.PreActivation()).train()
    graph = free(model)
    masks = keep(graph, a=[0, 1], b=[1, 2, 4], c_in=[0, 1, 2, 4], c=[3, 5], head_in=[0, 1, 2, 3, 4, 5])
    small = qp.shrink(model, graph, masks)
    assert len(joined(small)) == 2
    small(X).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in small.parameters())

    qp.save(small, tmp_path / "small", graph=graph, masks=masks)
    again = qp.load(tmp_path / "small", residuals.PreActivation)
    assert again.training
    assert torch.equal(run(again, X)[0], run(small, X)[0])

    program = torch.export.export(small.eval(), (X,)).module()
    assert torch.equal(program(X), small(X))
    assert small(torch.cat([X, X, X])).shape == (6, 4)


def test_operands_of_two_types_are_promoted() -> None:
    one = JoinedSum(-1, (torch.tensor([0, 2]), torch.tensor([1])), 4, scale=-2)
    out = one(torch.tensor([[1.0, 2.0]], dtype=torch.float16), torch.tensor([[3.0]], dtype=torch.float64))
    assert out.dtype == torch.float64
    assert out.tolist() == [[1.0, -6.0, 2.0, 0.0]]


@pytest.mark.parametrize("seed", range(2))
def test_a_cifar_resnet(seed: int) -> None:
    model = liven(resnet20())
    x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(seed))
    graph = free(model, x)
    assert len(graph.links) == 3 * 2 * 16 + (16 + 16) + 2 * 2 * 32 + (32 + 32) + 2 * 2 * 64
    assert graph.notes == ()
    _, checked = prune_and_check(model, x, graph, random_masks(graph, seed))
    assert checked.realisation == "graph"
    assert checked.caution == ""


def check(recipe: Recipe, seed: int, realisation: str) -> None:
    model = liven(recipe.build(), recipe.seed)
    x = torch.randn(2, 3, recipe.side, recipe.side, generator=torch.Generator().manual_seed(seed))
    assume(depends_on_input(model, x))
    graph = free(model, x)
    assert ChannelGraph.from_json(graph.to_json()).fingerprint == graph.fingerprint
    mixes = any(isinstance(m, (*WEIGHTLESS_MIXERS, *LEAKY)) for m in model.modules())
    masks: Masks = random_masks(graph, seed)
    prune_and_check(model, x, graph, masks, realisation=realisation, mixes=mixes, live=False)


arguments = given(
    recipe=recipes(tuple(BLOCKS), depth=4, starts=("image",)),
    seed=st.integers(0, 2**20),
    realisation=st.sampled_from(["auto", "graph"]),
)


@settings(max_examples=25, derandomize=True, **RELAXED)
@arguments
def test_random_networks(recipe: Recipe, seed: int, realisation: str) -> None:
    check(recipe, seed, realisation)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@settings(max_examples=500, **RELAXED)
@arguments
def test_many_random_networks(recipe: Recipe, seed: int, realisation: str) -> None:
    check(recipe, seed, realisation)
