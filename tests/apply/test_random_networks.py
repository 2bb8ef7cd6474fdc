"""Identities 2 and 3 on random networks of all families and random masks, and what must hold besides."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qcqp_prune.graph.trace import trace
from tests.blocks import BLOCKS, HEADS, WEIGHTLESS_MIXERS, Recipe
from tests.networks import all_kept, difference, hooked_macs, liven, prune_and_check, random_masks, run, uses

RECIPES = st.builds(
    Recipe,
    blocks=st.lists(st.sampled_from(sorted(BLOCKS)), min_size=1, max_size=4).map(tuple),
    head=st.sampled_from(HEADS),
    seed=st.integers(0, 2**16),
)
SEEDS = st.integers(0, 2**16)
COMMON = settings(
    deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large]
)


def check(recipe: Recipe, seed: int, batch: int) -> None:
    model = liven(recipe.build(), recipe.seed)
    inputs = torch.randn((batch, 3, recipe.side, recipe.side), generator=torch.Generator().manual_seed(seed))
    graph = trace(model, inputs)
    assert uses(graph)["macs"] == hooked_macs(model, inputs)
    mixes = any(isinstance(m, WEIGHTLESS_MIXERS) for m in model.modules())
    # Masks may cut every path to the output, so what was removed need not show.
    prune_and_check(model, inputs, graph, random_masks(graph, seed), mixes=mixes, live=False)
    small, _ = prune_and_check(model, inputs, graph, all_kept(graph), mixes=mixes, live=False)
    assert difference(run(small, inputs), run(model, inputs)) < 1e-9


@given(recipe=RECIPES, seed=SEEDS, batch=st.integers(1, 3))
@settings(COMMON, max_examples=120)
def test_random_networks_and_masks(recipe: Recipe, seed: int, batch: int) -> None:
    check(recipe, seed, batch)


@pytest.mark.slow
@given(recipe=RECIPES, seed=SEEDS, batch=st.integers(1, 3))
@settings(COMMON, max_examples=1000)
def test_a_thousand_random_networks_and_masks(recipe: Recipe, seed: int, batch: int) -> None:
    check(recipe, seed, batch)
