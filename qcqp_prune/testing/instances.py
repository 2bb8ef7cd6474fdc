"""Synthetic problems, tiny ones of every structure. No network behind them."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from qcqp_prune.graph.channels import ChannelGraph, Group
from qcqp_prune.graph.links import Links
from qcqp_prune.graph.needs import Block
from qcqp_prune.program.coefficients import Coefficient, FloatArray, IntArray, LowRank
from qcqp_prune.program.forms import CountForm, CountFormBuilder, PairTerm, PairwiseForm, PeakForm
from qcqp_prune.program.problem import BudgetRow, PruningProblem, least_counts
from qcqp_prune.program.tables import steps_of


@dataclass
class Sketch:
    """A problem in the making: groups, the couplings between them, and costs of two resources."""

    rng: np.random.Generator
    groups: list[Group] = field(default_factory=list)
    pairs: list[tuple[int, int, Coefficient]] = field(default_factory=list)
    products: list[tuple[int, int, int]] = field(default_factory=list)
    linear: list[tuple[int, int]] = field(default_factory=list)
    tables: list[tuple[IntArray, Sequence[dict[int, int]], Sequence[IntArray]]] = field(default_factory=list)
    steps: list[dict[int, int]] = field(default_factory=list)
    unary_low: float = 0.0
    fraction: float = 0.5
    two_budgets: bool = False
    links: list[tuple[int, int, Sequence[int]]] = field(default_factory=list)
    blocks: list[tuple[int, tuple[int, ...], int | None]] = field(default_factory=list)

    def group(self, width: int, **kwargs: object) -> int:
        """Add a group; its index."""
        self.groups.append(Group(f"g{len(self.groups)}", width, **kwargs))  # type: ignore[arg-type]
        return len(self.groups) - 1

    def layer(self, first: int, second: int, coef: Coefficient | None = None) -> None:
        """Couple two groups as a convolution does: importance of each pair, and a product of counts."""
        p, q = self.groups[first].width, self.groups[second].width
        self.pairs.append((first, second, self.weights(p, q) if coef is None else coef))
        self.products.append((first, second, int(self.rng.integers(1, 40))))

    def link(self, whole: int, part: int, owners: Sequence[int]) -> None:
        """Make each unit of ``part`` a part of the unit of ``whole`` with the given local index; -1 for none."""
        self.links.append((whole, part, owners))

    def block(self, groups: Sequence[int], stream: int, outer: int | None = None) -> int:
        """Let these groups be empty together, with a unit that costs and earns something on the stream; its index."""
        unit = self.group(1, min_keep=0)
        self.layer(unit, stream)
        self.blocks.append((unit, tuple(groups), outer))
        return len(self.blocks) - 1

    def table(self, *sides: dict[int, int]) -> None:
        """Add a random table of one or two sums to the first resource: flat in places, with jumps."""
        levels = [self._levels(sum(self.groups[g].width * n for g, n in side.items())) for side in sides]
        jumps = self.rng.integers(0, 60, [len(part) for part in levels])
        jumps[self.rng.random(jumps.shape) < 0.4] = 0
        for axis in range(jumps.ndim):
            jumps = np.cumsum(jumps, axis=axis)
        self.tables.append((jumps, sides, levels))

    def _levels(self, largest: int) -> IntArray:
        inner = self.rng.choice(largest, size=int(self.rng.integers(1, largest + 1)), replace=False)
        return np.append(np.sort(inner), largest + int(self.rng.integers(0, 3))).astype(np.int64)

    def staircase(self, first: int, second: int, sizes: tuple[int, int]) -> None:
        """Add ``c ceil(n_first / p) ceil(n_second / q)`` to the first resource."""
        levels = [steps_of(k, self.groups[g].width) for g, k in zip((first, second), sizes, strict=True)]
        cost = int(self.rng.integers(1, 40))
        values = cost * np.multiply.outer(np.arange(len(levels[0])), np.arange(len(levels[1])))
        self.tables.append((values, ({first: 1}, {second: 1}), levels))

    def weights(self, p: int, q: int) -> FloatArray:
        """Importance of the pairs of one layer, as ``normalised_importance``."""
        return normalised_importance(self.rng, p, q)

    def problem(self) -> PruningProblem:
        """The problem, with budgets at ``fraction`` of the way from the smallest to the dense use."""
        graph = ChannelGraph("synthetic", tuple(self.groups), (), (), (), (), 1)
        blocks = [
            Block(f"block {k}", graph.units(z).start, inside, outer)
            for k, (z, inside, outer) in enumerate(self.blocks)
        ]
        graph = replace(graph, links=self._unit_links(graph), blocks=tuple(blocks))
        unary = self.rng.uniform(self.unary_low, 0.2, graph.unit_count)
        unary[self.rng.random(graph.unit_count) < 0.5] = 0.0
        ranges = [np.arange(graph.units(g).start, graph.units(g).stop) for g in range(len(self.groups))]
        terms = tuple(PairTerm(ranges[g], ranges[h], coef) for g, h, coef in self.pairs)
        rows = [self._row("macs", 1, graph, self.fraction)]
        rows.append(self._row("memory", 0, graph, self.fraction + 0.1 if self.two_budgets else None))
        return PruningProblem(graph, PairwiseForm(unary, terms, constant=0.5), tuple(rows))

    def _unit_links(self, graph: ChannelGraph) -> Links:
        return Links.of(
            [
                (graph.units(whole).start + owner, graph.units(part).start + j)
                for whole, part, owners in self.links
                for j, owner in enumerate(owners)
                if owner >= 0
            ]
        )

    def _row(self, name: str, degree: int, graph: ChannelGraph, fraction: float | None) -> BudgetRow:
        form = self._form(degree)
        dense = form.evaluate([g.width for g in graph.groups])
        smallest = form.evaluate(least_counts(graph))
        limit = None if fraction is None else smallest + int(fraction * (dense - smallest))
        return BudgetRow(name, "units", form, dense, smallest, limit)

    def _form(self, degree: int) -> CountForm | PeakForm:
        builder = CountFormBuilder(len(self.groups))
        builder.add_constant(7)
        for g, cost in self.linear if degree else [(g, 3 + g) for g in range(len(self.groups))]:
            builder.add_counts(cost, {g: 1})
        for g, h, cost in self.products:
            builder.add_product(cost if degree else 1, {g: 1}, {h: 1})
        if not degree:
            return builder.build()
        for values, sides, levels in self.tables:
            builder.add_table(values, sides, levels)
        if not self.steps:
            return builder.build()
        return PeakForm.of(self._step(live) for live in self.steps)

    def _step(self, live: dict[int, int]) -> CountForm:
        builder = CountFormBuilder(len(self.groups))
        builder.add_constant(3)
        builder.add_counts(1, live)
        return builder.build()


def normalised_importance(rng: np.random.Generator, p: int, q: int, taps: int = 1) -> FloatArray:
    """``|W| / ||W||_2`` summed over ``taps`` for Gaussian weights with log-normal scales of rows, columns, pairs.

    References:
        Jeong et al., "Optimal channel selection with discrete QCQP" (AISTATS 2022), section 2.2.
    """
    rows, cols = np.exp(0.2 * rng.standard_normal(p)), np.exp(0.35 * rng.standard_normal(q))
    scale = rows[:, None] * cols[None, :] * np.exp(0.35 * rng.standard_normal((p, q)))
    total, square = np.zeros((p, q)), 0.0
    for _ in range(taps):
        weights = np.abs(rng.standard_normal((p, q))) * scale
        total += weights
        square += float((weights**2).sum())
    return np.asarray(total / np.sqrt(square))


def _chain(s: Sketch) -> None:
    ids = [s.group(int(w)) for w in s.rng.integers(2, 5, size=4)]
    for g, h in itertools.pairwise(ids):
        s.layer(g, h)


def _residual(s: Sketch) -> None:
    stream = s.group(4)
    for width in (3, 2):
        inner = s.group(width)
        s.layer(stream, inner)
        s.layer(inner, stream)
    s.layer(stream, s.group(2))


def _depthwise(s: Sketch) -> None:
    ids = [s.group(3), s.group(4), s.group(3)]
    s.layer(ids[0], ids[1])
    s.layer(ids[1], ids[2])
    s.linear += [(ids[1], 25), (ids[2], 4)]


def _concat(s: Sketch) -> None:
    ids = [s.group(3) for _ in range(3)]
    out = s.group(3)
    for g in ids:
        s.layer(g, out)
    s.layer(ids[0], ids[2])


def _ties(s: Sketch) -> None:
    source = s.group(3)
    halves = [s.group(3, tie="grouped") for _ in range(2)]
    for g in halves:
        s.layer(source, g)
    s.layer(halves[0], halves[1])
    s.layer(halves[0], s.group(2))


def _self_pairs(s: Sketch) -> None:
    first, second = s.group(5, multiple_of=2), s.group(4)
    s.layer(first, first)
    s.layer(first, second)
    s.products.append((second, second, 9))


def _within(s: Sketch) -> None:
    """What layers lose without the units that they read: pairs within groups, and across a concatenation.

    As of ``OutputChange``: ``1/2 1^T H 1 - 1/2 (1-x)^T H (1-x)``, with H a Gram matrix of few directions, so that units
    add up or cancel.
    """
    first, second, third = s.group(5), s.group(4), s.group(4, multiple_of=2)
    for read in ((first,), (second, third), (second,), (third,)):
        width = sum(s.groups[g].width for g in read)
        directions = s.rng.normal(0.3, 0.5, (3, width))
        gram = directions.T @ directions
        coef = np.diag(gram.sum(1)) - gram / 2
        ends = np.cumsum([0, *(s.groups[g].width for g in read)])
        for a, g in enumerate(read):
            for b, h in enumerate(read):
                s.pairs.append((g, h, coef[ends[a] : ends[a + 1], ends[b] : ends[b + 1]]))
    s.products += [(first, second, 17), (first, third, 12), (second, third, 5)]


def _multiple_of(s: Sketch) -> None:
    ids = [s.group(5, multiple_of=2), s.group(4, multiple_of=3, min_keep=0), s.group(4, min_keep=2)]
    s.layer(ids[0], ids[1])
    s.layer(ids[1], ids[2])
    s.layer(ids[0], ids[2])


def _two_budgets(s: Sketch) -> None:
    _chain(s)
    s.two_budgets = True


def _negative(s: Sketch) -> None:
    ids = [s.group(3), s.group(4, min_keep=0), s.group(3)]
    for g, h in ((0, 1), (1, 2), (0, 2)):
        s.layer(ids[g], ids[h], s.rng.normal(0.1, 0.5, (s.groups[g].width, s.groups[h].width)))
    s.unary_low = -0.3


def _frozen(s: Sketch) -> None:
    ids = [s.group(3, frozen_reason="input"), s.group(4), s.group(4), s.group(2, frozen_reason="output")]
    for g, h in itertools.pairwise(ids):
        s.layer(g, h)
    s.layer(ids[0], ids[3])


def _factors(s: Sketch) -> None:
    ids = [s.group(3), s.group(4), s.group(3)]
    s.layer(ids[0], ids[1], 0.3)
    left, right = s.rng.uniform(0, 1, (4, 2)), s.rng.uniform(0, 1, (3, 2))
    s.layer(ids[1], ids[2], LowRank(left, right))


def _tables(s: Sketch) -> None:
    """A chain whose costs are looked up only, a table of one sum, a concatenation, and a sum with a frozen group."""
    ids = [s.group(4), s.group(3), s.group(4), s.group(3), s.group(2, frozen_reason="output")]
    for g, h in itertools.pairwise(ids):
        s.layer(g, h)
        s.table({g: 1}, {h: 1})
    s.layer(ids[0], ids[2])
    s.products.clear()
    s.table({ids[1]: 1})
    s.table({ids[0]: 1, ids[2]: 2}, {ids[1]: 1})
    s.table({ids[2]: 1, ids[4]: 3}, {ids[3]: 2})


def _staircases(s: Sketch) -> None:
    """A residual stream with accelerator cycles, products and linear costs at once; two groups are tied."""
    stream = s.group(5)
    inner = [s.group(3, tie="equal") for _ in range(2)]
    for g in inner:
        s.layer(stream, g)
        s.staircase(stream, g, (2, 2))
        s.staircase(g, stream, (2, 3))
    s.staircase(stream, stream, (3, 2))
    s.staircase(inner[0], inner[1], (1, 2))
    out = s.group(3)
    s.layer(stream, out)
    s.linear.append((out, 11))
    s.two_budgets = True


def _peaks(s: Sketch) -> None:
    """The budget is on the largest of several steps; which one that is depends on the selection."""
    ids = [s.group(int(w)) for w in s.rng.integers(2, 5, size=4)]
    for g, h in itertools.pairwise(ids):
        s.layer(g, h)
        s.steps.append({g: int(s.rng.integers(1, 20)), h: int(s.rng.integers(1, 20))})
    s.steps.append({ids[0]: 2, ids[3]: 30})
    s.two_budgets = True


def _free_sharing(s: Sketch) -> None:
    """A stream of three channels that two layers write, read before and after the second; a layer in between."""
    first, early, inner = s.group(3), s.group(3), s.group(2)
    second, late = s.group(3, min_keep=0), s.group(3)
    for whole, part in ((early, first), (late, early), (late, second)):
        s.link(whole, part, range(3))
    for g, h in ((early, inner), (inner, second), (late, s.group(2, frozen_reason="output"))):
        s.layer(g, h)
    s.linear.append((first, 5))


def _columns(s: Sketch) -> None:
    """Two layers whose filters have two kernel columns each; the second one's input is the first one's output."""
    first, second = s.group(3), s.group(3)
    columns = [s.group(6), s.group(4)]
    s.link(first, columns[0], [0, 0, 1, 1, 2, 2])
    s.link(second, columns[1], [0, 0, 1, 2])
    source = s.group(2, frozen_reason="input")
    s.layer(source, columns[0])
    s.layer(first, columns[1])
    s.layer(second, s.group(2, frozen_reason="output"))


def _blocks(s: Sketch) -> None:
    """A stream and two branches that may go: of one group with a floor, and of two groups, one of them in pairs."""
    stream = s.group(3)
    inner = s.group(4, min_keep=2, optional=True)
    first, second = s.group(2, optional=True), s.group(2, multiple_of=2, optional=True)
    for path in ((stream, inner, stream), (stream, first, second, stream)):
        for g, h in itertools.pairwise(path):
            s.layer(g, h)
    s.block([inner], stream)
    s.block([first, second], stream)
    s.layer(stream, s.group(2, frozen_reason="output"))


def _nested_blocks(s: Sketch) -> None:
    """A branch inside of a branch, and groups that keep equally many; two budgets, one of them looked up."""
    stream = s.group(3)
    wide = s.group(3, min_keep=2, optional=True)
    inner = [s.group(2, tie="equal", optional=True) for _ in range(2)]
    for g, h in ((stream, wide), (wide, inner[0]), (inner[1], wide), (wide, stream)):
        s.layer(g, h)
    outer = s.block([wide], stream)
    s.block(inner, wide, outer)
    s.table({wide: 1}, {stream: 1})
    s.layer(stream, s.group(2, frozen_reason="output"))
    s.two_budgets = True


STRUCTURES: dict[str, Callable[[Sketch], None]] = {
    "chain": _chain,
    "residual": _residual,
    "depthwise": _depthwise,
    "concat": _concat,
    "ties": _ties,
    "self_pairs": _self_pairs,
    "within": _within,
    "multiple_of": _multiple_of,
    "two_budgets": _two_budgets,
    "negative": _negative,
    "frozen": _frozen,
    "factors": _factors,
    "tables": _tables,
    "staircases": _staircases,
    "peaks": _peaks,
    "free_sharing": _free_sharing,
    "columns": _columns,
    "blocks": _blocks,
    "nested_blocks": _nested_blocks,
}


LINKED = ("columns", "free_sharing")
"""Structures whose units are linked."""

BLOCKED = ("blocks", "nested_blocks")
"""Structures with groups that may only be empty together."""


def random_problem(seed: int, structure: str = "chain") -> PruningProblem:
    """A problem of at most 16 free units, small enough for ``exhaustive``.

    Args:
        seed: equal seeds give equal problems.
        structure: a key of ``STRUCTURES``.
    """
    sketch = Sketch(np.random.default_rng(seed))
    sketch.fraction = float(sketch.rng.uniform(0.15, 0.8))
    STRUCTURES[structure](sketch)
    return sketch.problem()
