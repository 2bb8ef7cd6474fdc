"""Attention in small networks: heads and feed-forward widths are units, and both identities hold."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import qcqp_prune as qp
from qcqp_prune.graph.channels import ChannelGraph
from qcqp_prune.graph.units import REASONS
from tests.networks import keep, liven, prune_and_check, random_masks, reasons, run, uses, widths

TOKENS, WIDTH, HEADS, SIZE = 5, 12, 3, 4
X = torch.randn(2, TOKENS, WIDTH, generator=torch.Generator().manual_seed(0))


class Fused(nn.Module):
    """One qkv layer of 3 x 3 heads x 4, reshaped and unbound; ``how`` says how q, k and v meet.

    x(12) -> qkv(36) -> (3, 3 heads, 4) -> unbind -> q, k, v -> attention -> (3 heads x 4) -> proj(12)
    """

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.num_heads = how, HEADS
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * HEADS * SIZE), nn.Linear(HEADS * SIZE, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        n, t, _ = x.shape
        q, k, v = self.qkv(x).reshape(n, t, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        if self.how == "sdpa":
            y = F.scaled_dot_product_attention(q, k, v)
        elif self.how == "causal":
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        elif self.how == "masked":
            allowed = torch.ones(t, t, dtype=torch.bool, device=x.device).tril()
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=allowed)
        elif self.how == "matmul":
            y = (q * SIZE**-0.5 @ k.transpose(-2, -1)).softmax(-1) @ v
        elif self.how == "einsum":
            scores = torch.einsum("nhqd,nhkd->nhqk", q, k) / SIZE**0.5
            y = torch.einsum("nhqk,nhkd->nhqd", scores.softmax(-1), v)
        else:
            q, k, v = (z.reshape(n * self.num_heads, t, -1) for z in (q, k, v))
            scores = torch.baddbmm(q.new_zeros(1), q, k.transpose(1, 2), beta=0, alpha=0.5)
            y = torch.bmm(scores.softmax(-1), v).view(n, self.num_heads, t, -1)
        return self.proj(y.transpose(1, 2).reshape(n, t, -1))


class Chunked(nn.Module):
    """x(12) -> qkv(36) -> chunk -> three of (3 heads, 4) each, head dimension second; a written width at the end."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * HEADS * SIZE), nn.Linear(HEADS * SIZE, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        n, t, width = x.shape
        q, k, v = (z.view(n, t, HEADS, SIZE).transpose(1, 2) for z in self.qkv(x).chunk(3, dim=-1))
        y = F.scaled_dot_product_attention(q, k, v)
        return self.proj(y.transpose(1, 2).reshape(n, t, width))


class Grouped(nn.Module):
    """Four heads of queries share two of keys and values.

    x(12) -> q(4 heads x 3), k(2 x 3), v(2 x 3) -> each key head repeated twice -> attention -> proj(12)
    """

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.q, self.k, self.v = nn.Linear(WIDTH, 12), nn.Linear(WIDTH, 6), nn.Linear(WIDTH, 6)
        self.proj = nn.Linear(12, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        n, t, _ = x.shape
        q, k, v = (f(x).view(n, t, -1, 3).transpose(1, 2) for f in (self.q, self.k, self.v))
        if self.how == "expand":
            k, v = (z[:, :, None].expand(-1, -1, 2, -1, -1).reshape(n, 4, t, 3) for z in (k, v))
        elif self.how == "repeat":
            k, v = (z.repeat_interleave(2, dim=1) for z in (k, v))
        y = F.scaled_dot_product_attention(q, k, v, enable_gqa=self.how == "sdpa")
        return self.proj(y.transpose(1, 2).reshape(n, t, -1))


class Packed(nn.Module):
    """``nn.MultiheadAttention``: one in-projection of (q, k, v) x 3 heads x 4, out-projection, and its weights."""

    def __init__(self, *, batch_first: bool = True, need_weights: bool = False, **options: Any) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, HEADS, batch_first=batch_first, **options)
        self.need_weights, self.cross = need_weights, bool(options)

    def forward(self, x: Tensor) -> Any:
        y, weights = self.attention(x, x, x, need_weights=self.need_weights)
        return (y, weights) if self.need_weights else y


class Cross(nn.Module):
    """Queries from 5 tokens, keys and values from 7 others: the packed in-projection is used in two parts.

    x -> a(12) -> rows 0 to 12, memory -> b(12) -> rows 12 to 36; one matrix, so a and b share its columns
    """

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.attention = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        memory = self.b(memory)
        y: Tensor = self.attention(self.a(x), memory, memory, need_weights=False)[0]
        return y


HALF_MACS = TOKENS * TOKENS * HEADS * SIZE  # of each of the two products
HEAD_ONLY = {
    **{how: (lambda how=how: Fused(how)) for how in ("sdpa", "causal", "masked", "matmul", "einsum", "bmm")},
    "chunk": Chunked,
    "packed": Packed,
    "packed, weights": lambda: Packed(need_weights=True),
    "packed, tokens first": lambda: Packed(batch_first=False),
}
GRAPH = {"chunk"}
"""The number of heads is written into its forward; elsewhere an attribute holds it, and nothing else changes."""


@pytest.mark.parametrize("name", HEAD_ONLY)
def test_heads_are_units(name: str) -> None:
    model = liven(HEAD_ONLY[name]())
    graph = qp.trace(model, X)
    assert list(widths(graph, free=True).values()) == [HEADS]
    assert graph.notes == ()
    tokens, batch = (2, 5) if "first" in name else (5, 2)
    projections = tokens * WIDTH * HEADS * SIZE * 4
    assert uses(graph)["macs"] * 2 == (projections + 2 * tokens * tokens * HEADS * SIZE) * batch
    for seed in range(2):
        masks = random_masks(graph, seed)
        averaged = "weights" in name  # over heads, so that zeroing is not removal
        _, checked = prune_and_check(model, X, graph, masks, live=False, mixes=averaged)
        if not masks.flat(graph).all():
            assert checked.realisation == ("graph" if name in GRAPH else "modules")


@pytest.mark.parametrize("name", HEAD_ONLY)
def test_a_head_takes_its_rows_and_columns_along(name: str) -> None:
    """Against plain slicing of the weights by hand: head 1 of three goes."""
    model = liven(HEAD_ONLY[name]())
    graph = qp.trace(model, X)
    (group,) = widths(graph, free=True)
    small = qp.shrink(model, graph, keep(graph, **{group.replace(".", "_"): [0, 2]}))
    old, new = dict(model.named_parameters()), dict(small.named_parameters())
    for key, tensor in old.items():
        if tensor.shape[0] == 3 * HEADS * SIZE:  # q, k and v, head by head
            want = tensor.detach().reshape(3, HEADS, SIZE, *tensor.shape[1:])[:, [0, 2]].flatten(0, 2)
        elif tensor.ndim == 2:
            want = tensor.detach().reshape(WIDTH, HEADS, SIZE)[:, [0, 2]].flatten(1)
        else:
            want = tensor.detach()
        assert torch.equal(new[key], want), key


@pytest.mark.parametrize("how", ["expand", "repeat", "sdpa"])
def test_grouped_queries_go_with_their_keys(how: str) -> None:
    model = liven(Grouped(how))
    graph = qp.trace(model, X)
    assert list(widths(graph, free=True).values()) == [2]
    assert uses(graph)["macs"] == TOKENS * WIDTH * (12 + 6 + 6 + 12) + 2 * TOKENS * TOKENS * 12
    for seed in range(2):
        prune_and_check(model, X, graph, random_masks(graph, seed), live=False)


def test_cross_attention() -> None:
    model, memory = liven(Cross()), torch.randn(2, 7, WIDTH)
    graph = qp.trace(model, (X, memory))
    layers = {x.name: x for x in graph.layers}
    assert layers["attention"].rows == (0, WIDTH)
    assert layers["attention@2"].rows == (WIDTH, 3 * WIDTH)
    assert widths(graph, free=True) == {"b": WIDTH, "attention": HEADS}
    products = 2 * TOKENS * 7 * WIDTH
    assert uses(graph)["macs"] == WIDTH * WIDTH * (5 + 7 + 5 + 14 + 5) + products
    for seed in range(2):
        prune_and_check(model, (X, memory), graph, random_masks(graph, seed), live=False)


def test_importance_of_a_part_of_a_packed_weight() -> None:
    """The pair of a head and an input scores the head's own rows of q for one layer, of k and v for the other."""
    model = liven(Cross())
    graph = qp.trace(model, (X, torch.randn(2, 7, WIDTH)))
    with torch.no_grad():
        model.attention.in_proj_weight[:WIDTH] = 0  # queries: those layers then score nothing
        model.attention.out_proj.weight.zero_()
        model.attention.in_proj_weight[WIDTH + SIZE : WIDTH + 2 * SIZE] *= 10  # keys of head 1
    form = qp.Magnitude()(model, graph)
    (index,) = [g for g, group in enumerate(graph.groups) if group.id == "attention"]
    heads = graph.units(index)
    kept = torch.ones(graph.unit_count, dtype=torch.bool).numpy()
    without = []
    for head in range(heads.start, heads.stop):
        mask = kept.copy()
        mask[head] = False
        without.append(form.evaluate(kept) - form.evaluate(mask))
    weight = model.attention.in_proj_weight.detach().double()[WIDTH:]
    rows = weight.abs().reshape(2, HEADS, SIZE, WIDTH).sum((0, 2, 3)) / torch.linalg.vector_norm(weight)
    assert without == pytest.approx(rows.tolist(), rel=1e-9)


def test_an_own_bias_for_each_head() -> None:
    """A table (3 heads, 5, 5) is added to the scores, as in relative positions: its rows go with the heads."""

    class Biased(Fused):
        def __init__(self) -> None:
            super().__init__("sdpa")
            self.table = nn.Parameter(torch.zeros(HEADS, TOKENS, TOKENS))

        def forward(self, x: Tensor) -> Tensor:
            n, t, _ = x.shape
            q, k, v = self.qkv(x).reshape(n, t, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=self.table)
            return self.proj(y.transpose(1, 2).reshape(n, t, -1))

    model = liven(Biased())
    graph = qp.trace(model, X)
    assert widths(graph, free=True) == {"qkv": HEADS}
    small = qp.shrink(model, graph, keep(graph, qkv=[2]))
    assert torch.equal(dict(small.named_parameters())["table"], model.table[2:])


def test_a_bias_table_that_is_looked_up() -> None:
    """Swin: a table (9 offsets, 3 heads) is indexed to (5 x 5, 3), and its columns go with the heads."""

    class Looked(Fused):
        def __init__(self) -> None:
            super().__init__("sdpa")
            self.table = nn.Parameter(torch.zeros(2 * TOKENS - 1, HEADS))
            places = torch.arange(TOKENS)
            self.register_buffer("offsets", (places[:, None] - places + TOKENS - 1).flatten())

        def forward(self, x: Tensor) -> Tensor:
            n, t, _ = x.shape
            q, k, v = self.qkv(x).reshape(n, t, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
            bias = self.table[self.offsets].view(t, t, -1).permute(2, 0, 1).unsqueeze(0)
            y = (q @ k.transpose(-2, -1) + bias).softmax(-1) @ v
            return self.proj(y.transpose(1, 2).reshape(n, t, -1))

    model = liven(Looked())
    graph = qp.trace(model, X)
    assert widths(graph, free=True) == {"qkv": HEADS}
    masks = keep(graph, qkv=[0, 2])
    small, _ = prune_and_check(model, X, graph, masks)
    assert torch.equal(dict(small.named_parameters())["table"], model.table[:, [0, 2]])


def test_one_head_keeps_its_width() -> None:
    """(N, T, C) attention has no heads; the scale of sdpa is the width's, one that is written down may shrink."""

    class Single(nn.Module):
        def __init__(self, scale: float | None) -> None:
            super().__init__()
            self.q, self.k, self.v = (nn.Linear(WIDTH, 8) for _ in range(3))
            self.proj, self.scale = nn.Linear(8, WIDTH), scale

        def forward(self, x: Tensor) -> Tensor:
            return self.proj(
                F.scaled_dot_product_attention(self.q(x), self.k(x), self.v(x), scale=self.scale)
            )

    model = liven(Single(None))
    graph = qp.trace(model, X)
    assert "the size of a head" in (reasons(graph)["q"] or "")
    assert widths(graph, free=True) == {"v": 8}
    scaled = qp.trace(liven(Single(0.3)), X)
    assert widths(scaled, free=True) == {"q": 8, "v": 8}
    for seed in range(2):
        prune_and_check(model, X, graph, random_masks(graph, seed), live=False)
        prune_and_check(liven(Single(0.3)), X, scaled, random_masks(scaled, seed), live=False)


def test_a_weight_used_raw() -> None:
    """x(12) @ w1(12, 8) -> relu -> addmm with w2(8, 6) -> head(4): units as in linear layers, scores included."""

    class Raw(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w1, self.w2 = nn.Parameter(torch.zeros(WIDTH, 8)), nn.Parameter(torch.zeros(8, 6))
            self.b, self.head = nn.Parameter(torch.zeros(6)), nn.Linear(6, 4)

        def forward(self, x: Tensor) -> Tensor:
            y = torch.relu(x @ self.w1)
            y = torch.addmm(self.b, y.reshape(-1, y.size(-1)), self.w2).relu()
            return self.head(y).view(x.shape[0], x.shape[1], -1)

    model = liven(Raw())
    graph = qp.trace(model, X)
    assert widths(graph, free=True) == {"w1": 8, "w2": 6}
    assert uses(graph)["macs"] == TOKENS * (WIDTH * 8 + 8 * 6 + 6 * 4)
    scores = qp.Magnitude()(model, graph)
    everything = random_masks(graph, 0, 1.0).flat(graph)
    first, second = (w.detach().double() for w in (model.w1, model.w2))
    total = sum(float(w.abs().sum() / w.norm()) for w in (first, second, model.head.weight.detach().double()))
    assert scores.evaluate(everything) == pytest.approx(total, rel=1e-6)
    for seed in range(2):
        prune_and_check(model, X, graph, random_masks(graph, seed), live=False)


class Block(nn.Module):
    """x + attention(norm(x)), then + swiglu(norm(x)): the stream of 12 is read and added to twice."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.RMSNorm(WIDTH)
        self.attention = Fused("sdpa")
        self.up, self.down = nn.Linear(WIDTH, 2 * 10), nn.Linear(10, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        gate, y = self.up(self.norm2(x)).chunk(2, dim=-1)
        return x + self.down(F.silu(gate) * y)


class Transformer(nn.Module):
    """x(7) -> embed(12) with a class token and positions -> block -> block -> norm -> first token -> head(4)."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm, self.head = nn.Linear(7, WIDTH), nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 4)
        self.token = nn.Parameter(torch.zeros(1, 1, WIDTH))
        self.positions = nn.Parameter(torch.zeros(1, TOKENS + 1, WIDTH))
        self.blocks = nn.Sequential(Block(), Block())

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), self.embed(x)], 1) + self.positions
        return self.head(self.norm(self.blocks(x))[:, 0])


def transformer(**options: Any) -> tuple[nn.Module, Tensor, ChannelGraph]:
    model, x = liven(Transformer()), torch.randn(2, TOKENS, 7)
    return model, x, qp.trace(model, x, **options)


def test_heads_and_widths_of_a_transformer() -> None:
    model, x, graph = transformer()
    assert list(widths(graph, free=True).values()) == [HEADS, 10, HEADS, 10]
    assert reasons(graph)["embed"] == REASONS["stream"]
    for seed in range(2):
        _, checked = prune_and_check(model, x, graph, random_masks(graph, seed), live=False)
        assert checked.realisation == "modules"


def test_the_stream_on_request() -> None:
    model, x, graph = transformer(units=["heads", "widths", "stream"])
    assert list(widths(graph, free=True).values()) == [WIDTH, HEADS, 10, HEADS, 10]
    for seed in range(2):
        prune_and_check(model, x, graph, random_masks(graph, seed), live=False, mixes=True)


def test_limits_count_channels_not_heads() -> None:
    """``round_to=4`` asks for multiples of 4 rows, which heads of 12 rows always give; a gated width of 2 x 10 may keep
    2 x 6, 2 x 8 or all."""
    _, _, graph = transformer(round_to=4, min_keep=0.5)
    assert [g.counts() for g in graph.groups if g.frozen_reason is None] == 2 * [[2, 3], [6, 8, 10]]


@pytest.mark.parametrize("kind", ["encoder", "decoder"])
def test_layers_of_torch(kind: str) -> None:
    torch.manual_seed(0)
    if kind == "encoder":
        model: nn.Module = nn.TransformerEncoderLayer(WIDTH, HEADS, 10, batch_first=True).eval()
        inputs: Any = X
    else:
        model = nn.TransformerDecoderLayer(WIDTH, HEADS, 10, batch_first=True, norm_first=True).eval()
        inputs = (X, torch.randn(2, 7, WIDTH))
    graph = qp.trace(liven(model), inputs)
    assert sorted(widths(graph, free=True).values()) == ([3, 10] if kind == "encoder" else [3, 3, 10])
    for seed in range(2):
        prune_and_check(model, inputs, graph, random_masks(graph, seed), live=False)


def test_the_smaller_network_takes_other_batches() -> None:
    model = liven(Packed())
    graph = qp.trace(model, X)
    small = qp.shrink(model, graph, random_masks(graph, 0, 0.7))
    x = torch.randn(4, TOKENS, WIDTH)
    assert torch.allclose(run(small, x)[0][:2], run(small, x[:2])[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_counted(dtype: torch.dtype) -> None:
    """The plain implementation may hold scores in another dtype; memory is of what is there."""
    model = liven(Fused("sdpa")).to(dtype)
    graph = qp.trace(model, X.to(dtype))
    _, checked = qp.shrink_and_verify(model, graph, random_masks(graph, 1, 0.7))
    assert all(c.predicted == c.measured for c in checked.counts)
