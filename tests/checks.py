"""One random network under random masks: predicted = counted, smaller = masked = zeroed, sliced, untouched."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal
from unittest import mock

import torch
from hypothesis import assume, event
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.export import ExportedProgram

from qcqp_prune.apply.shrink import shrink_and_verify
from qcqp_prune.apply.verification import Verification
from qcqp_prune.graph.channels import ChannelGraph
from qcqp_prune.graph.export import export
from qcqp_prune.graph.trace import trace
from qcqp_prune.graph.walk import Handler
from qcqp_prune.resources.measure import measured_macs
from tests.networks import (
    all_kept,
    anew,
    assert_slices,
    assert_untouched,
    depends_on_input,
    difference,
    hooked_macs,
    liven,
    random_masks,
    run,
    snapshot,
    uses,
    zeroed,
)
from tests.recipes import Recipe

MASKS = 2
"""Random masks for each network."""

CHOICES = (
    ("widths", "heads", "experts"),
    ("widths", "heads", "stream"),
    ("widths", "head_dim"),
    ("widths", "head_dim", "stream"),
)
"""Kinds of units that are asked for."""

TEXTBOOK = (nn.modules.conv._ConvNd, nn.Linear)
"""Modules whose multiply-adds a hook can count; a network with others is counted by PyTorch alone."""


@dataclass(frozen=True)
class Example:
    """One example: a network, masks, and how it is traced and cut."""

    recipe: Recipe
    seed: int
    batch: int = 2
    realisation: Literal["auto", "graph"] = "auto"
    training: bool = False
    sharing: Literal["strict", "free"] = "strict"
    units: tuple[str, ...] = ("widths", "heads", "experts")
    columns: bool = False


def examples(recipes: st.SearchStrategy[Recipe], *, plain: bool = False) -> st.SearchStrategy[Example]:
    """Hypothesis' examples of given recipes; with default options of ``trace`` where ``plain``."""
    options = {} if plain else {"sharing": st.sampled_from(["strict", "strict", "strict", "free"])}
    return st.builds(
        Example,
        recipe=recipes,
        seed=st.integers(0, 2**20),
        batch=st.integers(1, 3),
        realisation=st.sampled_from(["auto", "auto", "graph"]),
        training=st.booleans(),
        units=st.sampled_from(CHOICES),
        **options,
    )


@contextlib.contextmanager
def exported_once() -> Iterator[None]:
    """Within it a model is exported once for each kind of export: nearly all time goes there."""
    done: dict[tuple[int, str], ExportedProgram] = {}

    def cached(model: nn.Module, call: Any, **options: Any) -> ExportedProgram:
        key = (id(model), str(options))
        if key not in done:
            done[key] = export(model, call, **options)
        return done[key]

    modules = ("qcqp_prune.graph.trace", "qcqp_prune.apply.verify", "qcqp_prune.apply.rewrite_inputs")
    with contextlib.ExitStack() as stack:
        for module in modules:
            stack.enter_context(mock.patch(f"{module}.export", cached))
        yield


def check(
    example: Example, *, handlers: Mapping[str, Handler] | None = None, thorough: bool = False
) -> list[Verification]:
    """Trace, cut by random masks, and compare by other means all that the library promises.

    Args:
        example: what to check.
        handlers: operator handlers with a planted defect.
        thorough: also that keeping everything changes nothing, and that a graph survives its JSON.
    """
    recipe = example.recipe
    model = liven(recipe.build(), recipe.seed).train(example.training)
    x = recipe.inputs(example.batch, example.seed)
    assume(depends_on_input(model, x))
    options = {"columns": example.columns, "sharing": example.sharing, "units": example.units}
    with exported_once():
        graph = trace(model, x, handlers=handlers, **options)  # type: ignore[arg-type]
        if thorough:
            _unchanged(model, x, graph, example)
        checked = [_cut(model, x, graph, example, example.seed + k) for k in range(MASKS)]
    event(f"realised as {checked[0].realisation}")
    return checked


def _cut(model: nn.Module, x: Tensor, graph: ChannelGraph, example: Example, seed: int) -> Verification:
    masks, before = random_masks(graph, seed), snapshot(model)
    small, checked = shrink_and_verify(model, graph, masks, realisation=example.realisation)
    assert_untouched(model, before)
    assert_slices(model, small, graph, masks)
    assert small.training == model.training
    got = run(small, anew(x, 7))
    if example.recipe.mixes(model, free_sums=example.sharing == "free"):
        # Statistics are of the kept part, so only the library's own oracle says what the result is.
        assert checked.max_relative_error <= 1e-8
    else:
        assert difference(got, run(zeroed(model, graph, masks), anew(x, 7))) < 1e-7
    if checked.realisation == "modules" and _is_textbook(model, graph):
        assert {c.resource: c.measured for c in checked.counts}["macs"] == hooked_macs(small, x)
    return checked


def _unchanged(model: nn.Module, x: Tensor, graph: ChannelGraph, example: Example) -> None:
    assert ChannelGraph.from_json(graph.to_json()).fingerprint == graph.fingerprint
    assert uses(graph)["macs"] == (
        hooked_macs(model, x) if _is_textbook(model, graph) else measured_macs(model, x)
    )
    whole, _ = shrink_and_verify(model, graph, all_kept(graph), realisation=example.realisation)
    assert all(torch.equal(a, b) for a, b in zip(run(whole, x), run(model, x), strict=True))


def _is_textbook(model: nn.Module, graph: ChannelGraph) -> bool:
    """Whether hooks on convolutions and linear modules see every product."""
    weighted = [m for m in model.modules() if any(p.ndim > 1 for p in m.parameters(recurse=False))]
    return all(isinstance(m, TEXTBOOK) for m in weighted) and all(layer.weight for layer in graph.layers)
