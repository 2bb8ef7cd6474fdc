"""The graph of what is left says of the smaller network what the whole graph says of the whole one; weights go back."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, Phase, assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import qcqp_prune as qp
from qcqp_prune.apply.surgery import copied, put_back
from qcqp_prune.graph.channels import ChannelGraph, Layer
from qcqp_prune.graph.narrowed import narrowed
from qcqp_prune.importance.layerwise import pair_scores, pairwise_form, weight_tensors
from qcqp_prune.program.rounds import left_to_choose
from tests.checks import CHOICES
from tests.networks import depends_on_input, liven, random_masks
from tests.recipes import Recipe, recipes
from tests.removable import Grouped, Nested, OuterBlock
from tests.residuals import Identity

pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")


def removed(graph: ChannelGraph, name: str) -> qp.Masks:
    """Everything kept but a branch and what is in it."""
    flat = np.ones(graph.unit_count, np.bool_)
    (b,) = (b for b, block in enumerate(graph.blocks) if block.name == name)
    for g in graph.emptied_with(b):
        flat[graph.units(g)] = False
    for k, block in enumerate(graph.blocks):
        flat[block.unit] &= k != b and block.outer != b
    return qp.Masks.from_flat(graph, flat)


def plain_sizes(model: nn.Module, graph: ChannelGraph) -> qp.PairwiseForm:
    """Absolute weights, not scaled by anything: of kept entries only, so the same whatever was cut before."""
    weights = weight_tensors(model, graph)

    def score_of(layer: Layer) -> Any:
        return pair_scores(layer, weights[layer.weight].abs()) if layer.weight else None

    return pairwise_form(graph, score_of)


def tensors(model: nn.Module) -> dict[str, Tensor]:
    return dict(model.named_parameters(remove_duplicate=False)) | dict(
        model.named_buffers(remove_duplicate=False)
    )


def check_twice(model: nn.Module, x: Tensor, seed: int, **options: Any) -> None:
    """Cut by a mask, then by one of what is left: uses, worths and shapes are those of one cut by both."""
    graph = qp.trace(model, x, **options)
    if graph.prunable_count == 0:
        return
    first = random_masks(graph, seed).flat(graph)
    small = qp.shrink(model, graph, qp.Masks.from_flat(graph, first))
    problem = qp.PruningProblem.build(graph, plain_sizes(model, graph), {"macs": "100%"})
    todo, left = left_to_choose(problem, first)
    found = tensors(small)
    assert {t.name: t.shape for t in left.graph.tensors if t.name in found} == {
        t.name: tuple(found[t.name].shape) for t in left.graph.tensors if t.name in found
    }
    scores = plain_sizes(small, left.graph)
    for again in (seed + 1, seed + 2):
        second = random_masks(left.graph, again).flat(left.graph)
        both = left.widened(second, graph.unit_count)
        assert not (both & ~first).any()
        assert scores.evaluate(second) == pytest.approx(problem.objective.evaluate(both), rel=1e-9)
        assert todo.usage(second) == problem.usage(both)
        for resource in (qp.Macs(), qp.Params(), qp.Memory()):  # the narrowed graph itself, counted anew
            counts = np.bincount(left.graph.group_of_unit[second], minlength=len(left.graph.groups))
            assert resource.form(left.graph).evaluate(counts) == problem.usage(both)[resource.name]
    qp.shrink(model, graph, qp.Masks.from_flat(graph, both))  # masks of what is left are masks of the whole
    check_put_back(model, small, graph, first)


def check_put_back(model: nn.Module, small: nn.Module, graph: ChannelGraph, flat: Any) -> None:
    """What was trained comes back by the same cut, and what was cut is left alone."""
    trained = copied(small)
    with torch.no_grad():
        for tensor in tensors(trained).values():
            if tensor.is_floating_point():
                tensor.add_(1.0)
    whole = copied(model)
    put_back(whole, trained, graph, flat)
    again = qp.shrink(whole, graph, qp.Masks.from_flat(graph, flat))
    wanted = tensors(trained)
    assert wanted.keys() == tensors(again).keys()
    assert all(torch.equal(wanted[name], tensor) for name, tensor in tensors(again).items())
    put_back(whole, small, graph, flat)
    assert all(torch.equal(tensor, tensors(model)[name]) for name, tensor in tensors(whole).items())


RANDOM = {
    "derandomize": True,
    "deadline": None,
    "suppress_health_check": list(HealthCheck),
    "phases": [Phase.generate],  # an example takes seconds: to make it smaller would take hundreds of them
}
DRAWN = given(
    recipe=recipes(depth=3),
    seed=st.integers(0, 2**20),
    sharing=st.sampled_from(["strict", "free"]),
    units=st.sampled_from(CHOICES),
)


def check_random(recipe: Recipe, seed: int, sharing: str, units: Any) -> None:
    model, x = liven(recipe.build(), recipe.seed).eval(), recipe.inputs(2, seed)
    assume(depends_on_input(model, x))
    check_twice(model, x, seed, sharing=sharing, units=units)


@settings(max_examples=5, **RANDOM)
@DRAWN
def test_random_networks(recipe: Recipe, seed: int, sharing: str, units: Any) -> None:
    check_random(recipe, seed, sharing, units)


@pytest.mark.slow
@settings(max_examples=100, **RANDOM)
@DRAWN
def test_many_random_networks(recipe: Recipe, seed: int, sharing: str, units: Any) -> None:
    check_random(recipe, seed, sharing, units)


@pytest.mark.parametrize("network", [Identity, Grouped, Nested])
@pytest.mark.parametrize("seed", [0, 1])
def test_residual_branches_that_went(network: Any, seed: int) -> None:
    check_twice(liven(network()).eval(), torch.randn(2, 3, 6, 6), seed, blocks=True)


class Twice(Nested):
    """Two residual branches, in each of them another one."""

    def __init__(self) -> None:
        super().__init__()
        self.outer = nn.Sequential(OuterBlock(), OuterBlock())


def test_what_is_left_of_nested_branches() -> None:
    model = liven(Twice()).eval()
    graph = qp.trace(model, torch.randn(2, 3, 6, 6), blocks=True)
    left = narrowed(graph, removed(graph, "outer.0").flat(graph)).graph
    inner, outer = sorted(left.blocks, key=lambda block: len(block.name), reverse=True)
    assert (outer.name, inner.name) == ("outer.1", "outer.1.inner")
    assert left.blocks[inner.outer] is outer
    assert outer.outer is None
    assert {left.layers[k].name for k in inner.layers} == {"outer.1.inner.a", "outer.1.inner.b"}
    assert {left.groups[g].id for g in outer.groups} == {"outer.1.enter"}
    assert [left.groups[left.group_of_unit[b.unit]].width for b in left.blocks] == [1, 1]


class Crossed(nn.Module):
    """Attention of one sequence to another one: queries, and keys and values, have parts of one packed weight."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.out = nn.Linear(5, 12), nn.Linear(5, 12), nn.Linear(12, 4)
        self.mha = nn.MultiheadAttention(12, 4, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        memory = torch.tanh(self.second(x))
        return self.out(self.mha(torch.tanh(self.first(x)), memory, memory, need_weights=False)[0])


def test_packed_projections_and_heads() -> None:
    """The rows of keys and values lie behind those of the queries that are left."""
    model, x = liven(Crossed()).eval(), torch.randn(2, 6, 5)
    assert any(layer.rows is not None for layer in qp.trace(model, x).layers)
    for seed in range(3):
        check_twice(model, x, seed)


def test_kernel_columns_are_refused() -> None:
    model = nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(), nn.Conv2d(3, 2, 1))
    graph = qp.trace(model, torch.zeros(1, 1, 6, 6), columns=True)
    with pytest.raises(qp.InvalidOptionError, match="trace without columns"):
        narrowed(graph, np.ones(graph.unit_count, np.bool_))


def test_the_network_of_other_masks_is_refused() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    graph = qp.trace(model, torch.zeros(1, 3))
    masks = random_masks(graph, 0, 0.5).flat(graph)
    with pytest.raises(qp.MaskMismatchError, match="has shape"):
        put_back(copied(model), model, graph, masks)
