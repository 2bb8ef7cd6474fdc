"""Random networks under random masks, and proof that these checks find what is wrong."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch.fx import Node

from qcqp_prune.errors import QcqpPruneError
from qcqp_prune.graph.axes import Axes
from qcqp_prune.graph.ops import HANDLERS
from qcqp_prune.graph.trace import trace
from qcqp_prune.graph.walk import Walk
from tests.blocks import BLOCKS
from tests.checks import Example, check, examples
from tests.networks import liven, prune_and_check, random_masks
from tests.recipes import FAMILIES, HEADS, Recipe, recipes
from tests.sequence_blocks import SEQUENCE_BLOCKS

pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")

RELAXED: dict[str, Any] = {
    "deadline": None,
    "suppress_health_check": list(HealthCheck),
    "print_blob": True,
}


@pytest.mark.timeout(1200)
@settings(max_examples=105, derandomize=True, **RELAXED)
@given(example=examples(recipes(depth=2, starts=("image",))))
def test_random_networks_of_images(example: Example) -> None:
    check(example)


@pytest.mark.timeout(1200)
@settings(max_examples=105, derandomize=True, **RELAXED)
@given(example=examples(recipes(depth=2, starts=("sequence", "words"))))
def test_random_networks_of_sequences(example: Example) -> None:
    check(example)


@pytest.mark.timeout(600)
@settings(max_examples=20, derandomize=True, **RELAXED)
@given(example=examples(recipes()))
def test_deep_random_networks(example: Example) -> None:
    check(example)


@settings(max_examples=20, derandomize=True, **RELAXED)
@given(example=examples(recipes(depth=2), plain=True))
def test_what_is_kept_whole_is_unchanged(example: Example) -> None:
    check(example, thorough=True)


@pytest.mark.slow
@pytest.mark.timeout(7200)
@settings(max_examples=1000, **RELAXED)
@given(example=examples(recipes()))
def test_a_thousand_random_networks(example: Example) -> None:
    check(example, thorough=True)


WITH_COLUMNS = (
    "plain",
    "strided",
    "residual",
    "projection",
    "zero_pad",
    "dense",
    "gate",
    "split_cat",
    "pixel_shuffle",
    "squeeze_excite",
    "depthwise",
    "grouped_middle",
)


@settings(max_examples=25, derandomize=True, **RELAXED)
@given(
    recipe=recipes(WITH_COLUMNS, depth=3, starts=("image",)),
    seed=st.integers(0, 2**20),
    realisation=st.sampled_from(["auto", "auto", "graph"]),
)
def test_random_networks_with_kernel_columns(recipe: Recipe, seed: int, realisation: Any) -> None:
    check(Example(recipe, seed, 1, realisation, columns=True))


@pytest.mark.parametrize("name", FAMILIES)
def test_each_block_is_pruned(name: str) -> None:
    """No block is frozen as a whole, and half of the units of what is free can go."""
    start, last = ("image", "plain") if name in BLOCKS else ("sequence", "linear")
    recipe = Recipe((name, last), "mean", seed=3, start=start)  # type: ignore[arg-type]
    model = liven(recipe.build())
    x = recipe.inputs(2, 0)
    graph = trace(model, x)
    inner = [g for g in graph.groups if g.frozen_reason is None]
    assert inner
    prune_and_check(model, x, graph, random_masks(graph, 0, 0.5), mixes=recipe.mixes(model))


def _backwards(walk: Walk, node: Node) -> Axes:
    """Concatenation in the wrong order."""
    dim = int(walk.arg(node, "dim", 0))
    return [
        a if a is None or d != dim % len(walk.shape(node)) else a[::-1].copy()
        for d, a in enumerate(HANDLERS["aten::cat"](walk, node))
    ]  # type: ignore[union-attr]


def _untied(walk: Walk, node: Node) -> Axes:
    """A product of two tensors that ties nothing."""
    return list(walk.axes(walk.tensor_inputs(node)[0]))


def _tiled(walk: Walk, node: Node) -> Axes:
    """Pixel shuffle that takes channels from afar."""
    source = walk.tensor_inputs(node)[0]
    axes, scale = list(walk.axes(source)), int(walk.arg(node, "upscale_factor")) ** 2
    assert axes[-3] is not None
    return [*axes[:-3], walk.table.merge_columns(axes[-3].reshape(scale, -1)), None, None]


def _counted_once_more(name: str) -> Any:
    def handler(walk: Walk, node: Node) -> Any:
        out = HANDLERS[name](walk, node)
        last = walk.layers.pop()
        walk.layers.append(dataclasses.replace(last, macs_per_pair=last.macs_per_pair + 1))
        return out

    return handler


def _turned(walk: Walk, node: Node) -> Any:
    """Outputs of a recurrent layer, one place off."""
    (first, second, out), *states = HANDLERS["aten::gru"](walk, node)
    return [[first, second, torch.tensor(out).roll(1).numpy()], *states]


DEFECTS = {
    "concatenation": ({"aten::cat": _backwards}, ("split_cat", "chunk_cat")),
    "product": ({"aten::mul": _untied}, ("squeeze_excite", "gate")),
    "pixel shuffle": ({"aten::pixel_shuffle": _tiled}, ("pixel_shuffle",)),
    "count of a convolution": ({"aten::conv2d": _counted_once_more("aten::conv2d")}, ("plain",)),
    "count of an LSTM": ({"aten::lstm": _counted_once_more("aten::lstm")}, ("recurrent",)),
    "recurrence": ({"aten::gru": _turned}, ("recurrent",)),
}


@pytest.mark.parametrize("name", DEFECTS)
def test_a_planted_defect_is_found(name: str) -> None:
    handlers, names = DEFECTS[name]

    @settings(max_examples=40, derandomize=True, database=None, phases=[Phase.generate], **RELAXED)
    @given(example=examples(recipes(names, depth=1, starts=("image",)), plain=True))
    def search(example: Example) -> None:
        check(example, handlers=handlers)

    with pytest.raises((QcqpPruneError, AssertionError, RuntimeError)):
        search()


def test_recipes_reach_every_family_and_start() -> None:
    """Fifty recipes of up to twelve blocks hold every block, head and input, and one is a dozen deep."""
    seen: set[str] = set()
    depths: set[int] = set()

    @settings(max_examples=100, derandomize=True, database=None, phases=[Phase.generate], **RELAXED)
    @given(recipe=recipes())
    def draw(recipe: Recipe) -> None:
        seen.update((*recipe.blocks, recipe.head, recipe.start))
        depths.add(len(recipe.blocks))

    draw()
    assert seen == {*BLOCKS, *SEQUENCE_BLOCKS, *HEADS, "image", "sequence", "words"}
    assert max(depths) == 12
