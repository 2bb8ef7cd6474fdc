"""Random small networks under random masks: predicted = counted, smaller = masked = zeroed, sliced, untouched."""

from __future__ import annotations

from typing import Literal

import pytest
import torch
from hypothesis import HealthCheck, assume, event, given, settings
from hypothesis import strategies as st

from qcqp_prune.apply.shrink import shrink_and_verify
from qcqp_prune.graph.channels import ChannelGraph
from qcqp_prune.graph.trace import trace
from tests.blocks import BLOCKS, HEADS, WEIGHTLESS_MIXERS, Recipe
from tests.networks import (
    all_kept,
    depends_on_input,
    hooked_macs,
    liven,
    prune_and_check,
    random_masks,
    run,
    uses,
)

RECIPES = st.builds(
    Recipe,
    blocks=st.lists(st.sampled_from(sorted(BLOCKS)), min_size=1, max_size=4).map(tuple),
    head=st.sampled_from(HEADS),
    seed=st.integers(0, 2**20),
    side=st.sampled_from([4, 6, 7]),
)
RELAXED = {"deadline": None, "suppress_health_check": list(HealthCheck), "print_blob": True}


def check(
    recipe: Recipe,
    seed: int,
    batch: int,
    realisation: Literal["auto", "graph"],
    training: bool,
    columns: bool = False,
) -> None:
    model = liven(recipe.build(), recipe.seed).train(training)
    x = torch.randn(batch, 3, recipe.side, recipe.side, generator=torch.Generator().manual_seed(seed))
    assume(depends_on_input(model, x))
    graph = trace(model, x, columns=columns)
    assert ChannelGraph.from_json(graph.to_json()).fingerprint == graph.fingerprint
    assert uses(graph)["macs"] == hooked_macs(model, x)
    mixes = any(isinstance(m, WEIGHTLESS_MIXERS) for m in model.modules())
    small, checked = prune_and_check(
        model, x, graph, random_masks(graph, seed), realisation=realisation, mixes=mixes, live=False
    )
    event(f"{len(checked.column_layers)} layers cut by columns")
    event(f"realised as {checked.realisation}{' because ' if checked.note else ''}{checked.note[:20]}")
    if checked.realisation == "modules":
        counts = {c.resource: c.measured for c in checked.counts}
        assert counts["macs"] == hooked_macs(small, x)
    whole, _ = shrink_and_verify(model, graph, all_kept(graph), realisation=realisation)
    assert all(torch.equal(a, b) for a, b in zip(run(whole, x), run(model, x), strict=True))


arguments = given(
    recipe=RECIPES,
    seed=st.integers(0, 2**20),
    batch=st.integers(1, 3),
    realisation=st.sampled_from(["auto", "graph"]),
    training=st.booleans(),
)


@settings(max_examples=100, derandomize=True, **RELAXED)
@arguments
def test_random_networks(recipe: Recipe, seed: int, batch: int, realisation: str, training: bool) -> None:
    check(recipe, seed, batch, realisation, training)  # type: ignore[arg-type]


@pytest.mark.slow
@pytest.mark.timeout(3600)
@settings(max_examples=1000, **RELAXED)
@arguments
def test_a_thousand_random_networks(
    recipe: Recipe, seed: int, batch: int, realisation: str, training: bool
) -> None:
    check(recipe, seed, batch, realisation, training)  # type: ignore[arg-type]


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
    recipe=st.builds(
        Recipe,
        blocks=st.lists(st.sampled_from(WITH_COLUMNS), min_size=2, max_size=3).map(tuple),
        head=st.sampled_from(HEADS),
        seed=st.integers(0, 2**20),
    ),
    seed=st.integers(0, 2**20),
    realisation=st.sampled_from(["auto", "auto", "graph"]),
)
def test_random_networks_with_kernel_columns(recipe: Recipe, seed: int, realisation: str) -> None:
    check(recipe, seed, 1, realisation, False, columns=True)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", sorted(BLOCKS))
def test_each_block_is_pruned(name: str) -> None:
    """No block is frozen as a whole, and half of the units of what is free can go."""
    model = liven(Recipe((name, "plain"), "mean", seed=3).build())
    x = torch.randn(2, 3, 6, 6)
    graph = trace(model, x)
    inner = [g for g in graph.groups if g.frozen_reason is None]
    assert inner
    prune_and_check(
        model,
        x,
        graph,
        random_masks(graph, 0, 0.5),
        mixes=any(isinstance(m, WEIGHTLESS_MIXERS) for m in model.modules()),
    )
