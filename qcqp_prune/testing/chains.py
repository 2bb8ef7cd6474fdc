"""Synthetic problems of realistic size: chains of convolutions, and a residual stage. No network behind them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from qcqp_prune.graph.channels import ChannelGraph, Group
from qcqp_prune.graph.links import Links
from qcqp_prune.program.coefficients import IntArray
from qcqp_prune.program.forms import CountFormBuilder, PairTerm, PairwiseForm
from qcqp_prune.program.problem import BudgetRow, PruningProblem, least_counts
from qcqp_prune.testing.instances import normalised_importance


@dataclass(frozen=True)
class ChainShape:
    """Widths of a plain chain of convolutions, input and output included, kernel sizes and output pixels."""

    widths: tuple[int, ...]
    kernels: tuple[int, ...]
    pixels: tuple[int, ...]


def _bottlenecks() -> ChainShape:
    widths, kernels, pixels = [3, 64], [7], [112**2]
    for width, blocks, size in ((64, 3, 56**2), (128, 4, 28**2), (256, 6, 14**2), (512, 3, 49)):
        widths += [width, width, 4 * width] * blocks
        kernels += [1, 3, 1] * blocks
        pixels += [size] * 3 * blocks
    return ChainShape((*widths, 1000), (*kernels, 1), (*pixels, 1))


def _cifar_resnet(blocks: int) -> ChainShape:
    n = 2 * blocks
    widths = (3, *[16] * (n + 1), *[32] * n, *[64] * n, 10)
    return ChainShape(widths, (*[3] * (3 * n + 1), 1), (*[1024] * (n + 1), *[256] * n, *[64] * n, 1))


CHAINS: dict[str, ChainShape] = {
    "tiny": ChainShape((3, 6, 6, 8, 8, 10), (3, 3, 3, 3, 1), (64, 64, 16, 16, 1)),
    "small": ChainShape((3, 8, 8, 8, 16, 16, 16, 10), (*[3] * 6, 1), (*[1024] * 3, *[256] * 3, 1)),
    "medium": ChainShape((3, *[16] * 4, *[32] * 4, 10), (*[3] * 8, 1), (*[1024] * 4, *[256] * 4, 1)),
    "resnet20": _cifar_resnet(3),
    "resnet32": _cifar_resnet(5),
    "resnet56": _cifar_resnet(9),
    "resnet50": _bottlenecks(),
}


def chain_problem(
    name: str, *, seed: int = 0, fractions: Sequence[tuple[str, float]] = (("macs", 0.5),)
) -> PruningProblem:
    """A plain chain with the layer sizes of a known network and random weights.

    Args:
        name: a key of ``CHAINS``.
        seed: of the weights.
        fractions: budgets, as pairs of ``macs`` or ``params`` and a share of the dense use.
    """
    shape, rng = CHAINS[name], np.random.default_rng(seed)
    ends = {0: "input", len(shape.widths) - 1: "output"}
    groups = tuple(Group(f"g{k}", w, frozen_reason=ends.get(k)) for k, w in enumerate(shape.widths))
    graph = ChannelGraph(name, groups, (), (), (), (), 1)
    units: list[IntArray] = [np.arange(graph.units(g).start, graph.units(g).stop) for g in range(len(groups))]
    terms, costs = [], {"macs": CountFormBuilder(len(groups)), "params": CountFormBuilder(len(groups))}
    for k, (kernel, pixels) in enumerate(zip(shape.kernels, shape.pixels, strict=True)):
        coef = normalised_importance(rng, shape.widths[k], shape.widths[k + 1], kernel * kernel)
        terms.append(PairTerm(units[k], units[k + 1], coef))
        costs["macs"].add_product(pixels * kernel * kernel, {k: 1}, {k + 1: 1})
        costs["params"].add_product(kernel * kernel, {k: 1}, {k + 1: 1})
    wanted, rows = dict(fractions), []
    for resource, builder in costs.items():
        form = builder.build()
        dense = form.evaluate(list(shape.widths))
        row = BudgetRow(resource, resource, form, dense, form.evaluate(least_counts(graph)))
        rows.append(replace(row, limit=int(wanted[resource] * dense)) if resource in wanted else row)
    return PruningProblem(graph, PairwiseForm(np.zeros(graph.unit_count), tuple(terms)), tuple(rows))


def free_residual_problem(*, width: int = 16, blocks: int = 3, seed: int = 0) -> PruningProblem:
    """A residual stage under free sharing: a stem, and blocks of two 3x3 convolutions whose outputs are added up.

    Half of the multiply-adds may be used.
    """
    rng, groups, links = np.random.default_rng(seed), [Group("input", 3, frozen_reason="input")], []
    layers: list[tuple[int, int]] = []

    def layer(source: int) -> int:
        groups.append(Group(f"g{len(groups)}", width))
        layers.append((source, len(groups) - 1))
        return len(groups) - 1

    stream = layer(0)
    for _ in range(blocks):
        added = layer(layer(stream))
        groups.append(Group(f"g{len(groups)}", width))
        links += [(len(groups) - 1, stream), (len(groups) - 1, added)]
        stream = len(groups) - 1
    graph = ChannelGraph("free residual", tuple(groups), (), (), (), (), 1)
    units = [np.arange(graph.units(g).start, graph.units(g).stop) for g in range(len(groups))]
    pairs = np.concatenate([np.stack([units[w], units[p]], 1) for w, p in links])
    graph = replace(graph, links=Links.of(pairs))
    terms, builder = [], CountFormBuilder(len(groups))
    for g, h in layers:
        terms.append(
            PairTerm(units[g], units[h], normalised_importance(rng, len(units[g]), len(units[h]), 9))
        )
        builder.add_product(9 * 64, {g: 1}, {h: 1})
    form = builder.build()
    dense = form.evaluate([g.width for g in groups])
    row = BudgetRow("macs", "MACs", form, dense, form.evaluate(least_counts(graph)), dense // 2)
    unary = np.zeros(graph.unit_count)
    unary[units[stream]] = rng.uniform(1.0, 2.0, width)
    return PruningProblem(graph, PairwiseForm(unary, tuple(terms)), (row,))
