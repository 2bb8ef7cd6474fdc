"""Which kinds of units may go is a choice: heads, dimensions of heads, widths, the stream of a transformer."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import qcqp_prune as qp
from qcqp_prune.graph.units import REASONS
from tests.graph.test_attention import HEAD_ONLY, HEADS, SIZE, TOKENS, WIDTH, Grouped, X, transformer
from tests.networks import keep, liven, prune_and_check, random_masks, reasons, uses, widths

IN_PLACE = {"matmul", "einsum", "bmm", "packed", "packed, weights", "packed, tokens first"}
"""Their own forward has a scale that stays, and asks nothing else for the size of a head."""


@pytest.mark.parametrize("name", HEAD_ONLY)
def test_dimensions_of_heads_are_units(name: str) -> None:
    """One unit for each of 4 dimensions, of all three heads at once, and of q, k and v where one reshape holds them.

    Against plain slicing of the weights by hand, dimension 1 of (q, k, v) x 3 heads x 4 goes everywhere; outputs are
    compared with those of the full-size network with zeros, whose scale is 1/sqrt(4).
    """
    model, left = liven(HEAD_ONLY[name]()), [0, 2, 3]
    graph = qp.trace(model, X, units="head_dim")
    groups = widths(graph, free=True)
    assert list(groups.values()) == ([SIZE, SIZE] if name == "chunk" else [SIZE])
    masks = keep(graph, **{group.replace(".", "_"): left for group in groups})
    small, checked = prune_and_check(model, X, graph, masks)
    assert checked.realisation == ("modules" if name in IN_PLACE else "graph")
    old, new = dict(model.named_parameters()), dict(small.named_parameters())
    for key, tensor in old.items():
        want = tensor.detach()
        if tensor.shape[0] == 3 * HEADS * SIZE:
            want = want.reshape(3, HEADS, SIZE, *tensor.shape[1:])[:, :, left].flatten(0, 2)
        elif tensor.ndim == 2:
            want = want.reshape(WIDTH, HEADS, SIZE)[:, :, left].flatten(1)
        assert torch.equal(new[key], want), key


def test_the_scale_of_the_rewritten_graph_is_the_dense_one() -> None:
    model = liven(HEAD_ONLY["sdpa"]())
    graph = qp.trace(model, X, units="head_dim")
    small = qp.shrink(model, graph, keep(graph, qkv=[3]))
    (call,) = [n for n in small.graph.nodes if "scaled_dot_product" in str(n.target)]
    assert call.kwargs["scale"] == 0.5


class Llama(nn.Module):
    """Four heads of queries, two of keys and values, rotated by position; one module attribute for the size of a head.

    x(12) -> q(4 x 6), k(2 x 6), v(2 x 6); dimensions d and d + 3 of q and k are turned by one angle -> o(12)
    """

    def __init__(self, *, norms: bool = False) -> None:
        super().__init__()
        self.head_dim = 6
        self.q, self.k, self.v = (nn.Linear(WIDTH, n * 6, bias=False) for n in (4, 2, 2))
        self.o, self.scaling = nn.Linear(24, WIDTH, bias=False), 6**-0.5
        self.q_norm, self.k_norm = (nn.RMSNorm(6) if norms else nn.Identity() for _ in range(2))
        self.register_buffer("frequencies", 10.0 ** -torch.linspace(0, 1, 3))

    def forward(self, x: Tensor) -> Tensor:
        n, t, _ = x.shape
        q, k, v = (f(x).view(n, t, -1, self.head_dim).transpose(1, 2) for f in (self.q, self.k, self.v))
        angles = torch.arange(t, device=x.device, dtype=x.dtype)[:, None] * self.frequencies
        angles = torch.cat([angles, angles], -1)
        q, k = (self.turned(norm(z), angles) for norm, z in ((self.q_norm, q), (self.k_norm, k)))
        k, v = (z[:, :, None].expand(-1, -1, 2, -1, -1).reshape(n, 4, t, -1) for z in (k, v))
        y = ((q @ k.transpose(2, 3)) * self.scaling).softmax(-1) @ v
        return self.o(y.transpose(1, 2).reshape(n, t, -1))

    def turned(self, x: Tensor, angles: Tensor) -> Tensor:
        a, b = x[..., : x.shape[-1] // 2], x[..., x.shape[-1] // 2 :]
        return x * angles.cos() + torch.cat([-b, a], -1) * angles.sin()


@pytest.mark.parametrize("norms", [False, True])
def test_rotated_dimensions_go_in_pairs(norms: bool) -> None:
    model = liven(Llama(norms=norms))
    graph = qp.trace(model, X, units=["head_dim"])
    assert widths(graph, free=True) == {"q": 3, "v": 3}  # the module holds one size for both
    assert len({g.tie for g in graph.groups if g.frozen_reason is None}) == 1
    by_hand = TOKENS * WIDTH * 6 * (4 + 2 + 2 + 4) + 2 * TOKENS * TOKENS * 24
    assert uses(graph)["macs"] == by_hand
    fewer = keep(graph, q=[0, 2], v=[1, 2])
    small, checked = prune_and_check(model, X, graph, fewer, mixes=norms)
    assert checked.realisation == "modules"
    assert small.head_dim == 4
    assert torch.equal(small.k.weight, model.k.weight.view(2, 6, WIDTH)[:, [0, 2, 3, 5]].flatten(0, 1))
    assert torch.equal(small.v.weight, model.v.weight.view(2, 6, WIDTH)[:, [1, 2, 4, 5]].flatten(0, 1))
    assert torch.equal(small.frequencies, model.frequencies[[0, 2]])


class Separate(nn.Module):
    """q, k and v of their own, three heads of 4 each, with the numbers of both held by the module."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads, self.head_dim = HEADS, SIZE
        self.q, self.k, self.v = (nn.Linear(WIDTH, HEADS * SIZE) for _ in range(3))
        self.proj, self.scale = nn.Linear(HEADS * SIZE, WIDTH), SIZE**-0.5

    def forward(self, x: Tensor) -> Tensor:
        n, t, _ = x.shape
        shape = n, t, self.num_heads, self.head_dim
        q, k, v = (f(x).view(shape).transpose(1, 2) for f in (self.q, self.k, self.v))
        y = ((q @ k.transpose(2, 3)) * self.scale).softmax(-1) @ v
        return self.proj(y.transpose(1, 2).reshape(n, t, self.num_heads * self.head_dim))


def test_one_size_of_heads_is_kept_for_queries_and_values() -> None:
    """Values lose other dimensions than queries and keys, but as many: the module holds one number for all."""
    model = liven(Separate())
    graph = qp.trace(model, X, units={"*": "head_dim"})
    assert widths(graph, free=True) == {"q": SIZE, "v": SIZE}
    assert len({g.tie for g in graph.groups if g.frozen_reason is None}) == 1
    small, checked = prune_and_check(model, X, graph, keep(graph, q=[0, 3], v=[1, 2]))
    assert checked.realisation == "modules"
    assert small.head_dim == 2
    heads = qp.trace(model, X)
    assert widths(heads, free=True) == {"q": HEADS}
    small, checked = prune_and_check(model, X, heads, keep(heads, q=[1]))
    assert checked.realisation == "modules"
    assert (small.num_heads, small.head_dim) == (1, SIZE)


@pytest.mark.parametrize("how", ["expand", "repeat", "sdpa"])
def test_dimensions_of_grouped_queries(how: str) -> None:
    model = liven(Grouped(how))
    graph = qp.trace(model, X, units="head_dim")
    assert widths(graph, free=True) == {"q": 3, "v": 3}
    prune_and_check(model, X, graph, random_masks(graph, 0, 0.5))


def test_one_head_with_its_scale_worked_out_shrinks_on_request() -> None:
    """(N, T, C) attention without a reshape: its width counts as the size of its one head."""

    class Single(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k, self.v = (nn.Linear(WIDTH, 8) for _ in range(3))
            self.proj = nn.Linear(8, WIDTH)

        def forward(self, x: Tensor) -> Tensor:
            return self.proj(F.scaled_dot_product_attention(self.q(x), self.k(x), self.v(x)))

    model = liven(Single())
    assert widths(qp.trace(model, X), free=True) == {"v": 8}
    graph = qp.trace(model, X, units=["widths", "head_dim"])
    assert widths(graph, free=True) == {"q": 8, "v": 8}
    prune_and_check(model, X, graph, random_masks(graph, 0, 0.5))


ATTENTION, FEED_FORWARD = [HEADS, HEADS], [10, 10]
CHOICES: dict[str, tuple[Any, list[int]]] = {
    "default": (None, [3, 10, 3, 10]),
    "widths": ("widths", FEED_FORWARD),
    "heads": (("heads",), ATTENTION),
    "head_dim and widths": ({"head_dim", "widths"}, [SIZE, 10, SIZE, 10]),
    "stream": (["stream"], [WIDTH]),
    "nothing": ([], []),
    "all": (["heads", "widths", "stream", "experts"], [WIDTH, 3, 10, 3, 10]),
    "a block of its own": ({"*": ["widths"], "blocks.1.*": ["head_dim"]}, [10, SIZE]),
    "only one named": ({"blocks.0.attention": "head_dim"}, [SIZE, 10, 3, 10]),
    "by layer": ({"*.qkv": []}, FEED_FORWARD),
}


@pytest.mark.parametrize("name", CHOICES)
def test_what_is_asked_for_may_go_and_nothing_else(name: str) -> None:
    units, free = CHOICES[name]
    model, x, graph = transformer(units=units)
    assert list(widths(graph, free=True).values()) == free
    prune_and_check(model, x, graph, random_masks(graph, 1, 0.6), mixes="stream" in (units or ()), live=False)


def test_what_stays_says_how_to_free_it() -> None:
    graph = transformer(units=["heads"])[2]
    assert reasons(graph)["blocks.0.up"] == REASONS["widths"]
    assert reasons(graph)["embed"] == REASONS["stream"]
    texts = [note.text for note in graph.notes if note.where == "units"]
    assert any("'stream'" in t and "embed" in t for t in texts)
    assert any("'widths'" in t and "blocks.0.up" in t for t in texts)


def test_convolutions_have_no_stream() -> None:
    """conv(3, 8) -> + conv(8, 8) -> conv(8, 4): the sum of two convolutions is a width like any other."""

    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
            self.c = nn.Conv2d(8, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            x = self.a(x)
            return self.c(x + self.b(x).relu())

    model, x = Residual(), torch.randn(1, 3, 6, 6)
    assert widths(qp.trace(model, x), free=True) == {"a": 8}
    assert widths(qp.trace(model, x, units=["heads", "stream"]), free=True) == {}


@pytest.mark.parametrize(
    ("units", "says"),
    [
        ("head", "units holds 'head': choose from widths, heads, head_dim, experts, stream"),
        (["heads", 3], "units holds 3"),
        (3, "units holds 3"),
        (["heads", "head_dim"], "choose one, or one for each layer glob"),
        ({"*": ["heads", "head_dim"]}, "choose one, or one for each layer glob"),
        ({3: ["heads"]}, "names or globs of layers"),
    ],
)
def test_units_that_cannot_be(units: Any, says: str) -> None:
    with pytest.raises(qp.InvalidOptionError, match=says.replace("(", r"\(")):
        transformer(units=units)


def test_a_glob_that_matches_nothing() -> None:
    with pytest.raises(qp.UnknownLayerError, match="no layer is called"):
        transformer(units={"blok*": ["heads"]})


def test_budgets_count_what_dimensions_cost() -> None:
    """Half of the dimensions of each head is half of the four projections and of both products."""
    model = liven(Separate())
    graph = qp.trace(model, X, units="head_dim")
    flat = np.ones(graph.unit_count, np.bool_)
    for g, group in enumerate(graph.groups):
        if group.frozen_reason is None:
            flat[graph.units(g)] = np.arange(group.width) < SIZE // 2
    half = uses(graph, qp.Masks.from_flat(graph, flat))["macs"]
    assert 2 * half == uses(graph)["macs"] == TOKENS * WIDTH * WIDTH * 4 + 2 * TOKENS * TOKENS * WIDTH
