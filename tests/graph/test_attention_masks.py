"""Masks of attention: whatever says which tokens are looked at follows the heads, and ties none of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import qcqp_prune as qp
from tests.networks import liven, prune_and_check, random_masks, run, widths

TOKENS, WIDTH, HEADS, SIZE = 5, 12, 3, 4
X = torch.randn(2, TOKENS, WIDTH, generator=torch.Generator().manual_seed(0))
PADDED = torch.tensor([[False, False, False, False, True], [False, False, False, True, True]])


class Packed(nn.Module):
    """``nn.MultiheadAttention`` with a mask of padded keys, which it repeats for each head."""

    def __init__(self, *, need_weights: bool) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)
        self.need_weights = need_weights

    def forward(self, x: Tensor, padded: Tensor) -> Tensor:
        # What PyTorch makes of a mask of booleans is of a dtype that an export writes down.
        mask = torch.where(padded, -50.0, 0 * x[..., 0]) if self.need_weights else padded
        y: Tensor = self.attention(x, x, x, key_padding_mask=mask, need_weights=self.need_weights)[0]
        return y


class Encoder(nn.Module):
    """Two encoder layers that get one mask."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 16, batch_first=True)
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, x: Tensor, padded: Tensor) -> Tensor:
        y: Tensor = self.layers(x, src_key_padding_mask=padded)
        return y


class Written(nn.Module):
    """Two layers of attention written by hand; ``mask`` makes one mask for both, and ``masked`` applies it to scores.

    x(12) -> qkv(36) -> 3 heads x 4 -> scores, masked -> softmax -> (3 heads x 4) -> proj(12) -> the same once more
    """

    def __init__(self, mask: Callable[[Tensor], Tensor], masked: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.mask, self.masked = mask, masked
        self.qkv = nn.ModuleList(nn.Linear(WIDTH, 3 * WIDTH) for _ in range(2))
        self.proj = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(2))

    def forward(self, x: Tensor, padded: Tensor) -> Tensor:
        mask = self.mask(padded)
        for qkv, proj in zip(self.qkv, self.proj, strict=True):
            q, k, v = (z.unflatten(-1, (HEADS, SIZE)).transpose(1, 2) for z in qkv(x).chunk(3, -1))
            y = self.masked(q @ k.transpose(-2, -1) / 2, mask).softmax(-1) @ v
            x = x + proj(y.transpose(1, 2).flatten(2))
        return x


def _low(padded: Tensor) -> Tensor:
    return padded.float() * -50


def _merged(scores: Tensor, mask: Tensor) -> Tensor:
    return (scores.flatten(0, 1) + mask).unflatten(0, (-1, HEADS))


def _set(scores: Tensor, where: Any) -> Tensor:
    scores[where] = -1e9
    return scores


MASKS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor, Tensor], Tensor]]] = {
    "expanded": (
        lambda p: _low(p)[:, None, None].expand(-1, HEADS, TOKENS, -1),
        torch.add,
    ),
    "expanded, copied and turned": (
        lambda p: _low(p)[:, None, :, None].expand(-1, HEADS, -1, TOKENS).contiguous().to(torch.float32).mT,
        torch.add,
    ),
    "repeated": (
        lambda p: p[:, None, None].repeat(1, HEADS, TOKENS, 1),
        lambda scores, mask: scores.masked_fill(mask, -1e9),
    ),
    "filled in place": (
        lambda p: torch.ones(TOKENS, TOKENS).tril() == 0,
        lambda scores, mask: scores.masked_fill_(mask, float("-inf")),
    ),
    "filled where it is expanded": (
        lambda p: p[:, None, None],
        lambda scores, mask: _set(scores, mask.expand_as(scores)),
    ),
    "filled where it is repeated": (
        lambda p: p[:, None, None].repeat(1, HEADS, TOKENS, 1),
        _set,
    ),
    "filled over the tokens": (
        lambda p: torch.ones(TOKENS, TOKENS).tril() == 0,
        lambda scores, mask: _set(scores, (slice(None), slice(None), mask)),
    ),
    "tiled": (
        lambda p: p[:, None, None].tile(HEADS, 1, 1),
        lambda scores, mask: torch.where(mask, -1e9, scores),
    ),
    "merged with samples": (lambda p: _low(p).repeat_interleave(HEADS, 0)[:, None], _merged),
    "merged, and split again": (
        lambda p: (
            _low(p)[:, None, None].expand(-1, HEADS, -1, -1).reshape(-1, 1, TOKENS).view(-1, HEADS, 1, TOKENS)
        ),
        torch.add,
    ),
    "samples of a head together": (
        lambda p: _low(p).repeat(HEADS, 1)[:, None],
        lambda scores, mask: (
            (scores.transpose(0, 1).flatten(0, 1) + mask).unflatten(0, (HEADS, -1)).transpose(0, 1)
        ),
    ),
    "compared on the way": (
        lambda p: (_low(p)[:, None, None].expand(-1, HEADS, -1, -1).flatten(0, 1) < 0).float() * -50,
        _merged,
    ),
}
NETWORKS: dict[str, tuple[Callable[[], nn.Module], set[str]]] = {
    "weights": (lambda: Packed(need_weights=True), {"attention"}),
    "no weights": (lambda: Packed(need_weights=False), {"attention"}),
    "encoder": (Encoder, {f"layers.layers.{k}.self_attn" for k in range(2)}),
    **{name: (lambda how=how: Written(*how), {f"qkv.{k}" for k in range(2)}) for name, how in MASKS.items()},
}


ONE_SAMPLE = ("weights", "no weights", "encoder", "merged with samples")


@pytest.mark.parametrize(("name", "samples"), [*((n, 2) for n in NETWORKS), *((n, 1) for n in ONE_SAMPLE)])
def test_heads_are_units_under_a_mask_of_padding(name: str, samples: int) -> None:
    """In both realisations; layers with one mask keep heads of their own."""
    make, heads = NETWORKS[name]
    model, call = liven(make()), (X[:samples], PADDED[:samples])
    graph = qp.trace(model, call)
    free = widths(graph, free=True)
    assert heads <= free.keys()
    assert {free[name] for name in heads} == {HEADS}
    checked = prune_and_check(model, call, graph, random_masks(graph, 0, 0.5), live=False)[1]
    if checked.realisation == "modules":
        prune_and_check(model, call, graph, random_masks(graph, 1, 0.5), realisation="graph", live=False)


@pytest.mark.parametrize("sharing", ["strict", "free"])
def test_what_is_repeated_beside_other_positions_goes_in_sets(sharing: Any) -> None:
    #  x(3) -> sums up to each -> each twice -> (6) ─┐
    #  x(3) -> a(6) ────────────────────────────────(+)─> head(2)
    #  positions 0, 2 and 4 are first copies, 1, 3 and 5 second ones: three that are not pruned stand side by side
    class Beside(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.head = nn.Linear(3, 6), nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.head(self.a(x) + x.cumsum(1)[:, :, None].expand(-1, -1, 2).flatten(1))
            return y

    model, x = liven(Beside()), torch.randn(2, 3)
    graph = qp.trace(model, x, sharing=sharing)
    assert widths(graph, free=True) == {"a": 2}
    assert (
        graph.axes[graph.layers[0].out_axis].tolist() == graph.axes[graph.layers[0].out_axis].tolist()[:2] * 3
    )
    for seed in range(2):
        _, checked = prune_and_check(model, x, graph, random_masks(graph, seed, 0.5))
        assert checked.realisation == "graph"


def test_one_key_for_all_queries() -> None:
    """Multi-query attention: a single head of keys, broadcast over those of queries, ties them no more than a mask."""

    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k, self.proj = (
                nn.Linear(WIDTH, WIDTH),
                nn.Linear(WIDTH, SIZE),
                nn.Linear(WIDTH, WIDTH),
            )

        def forward(self, x: Tensor) -> Tensor:
            q, k = (f(x).unflatten(-1, (-1, SIZE)).transpose(1, 2) for f in (self.q, self.k))
            k = k.repeat(1, HEADS, 1, 1)
            y: Tensor = self.proj(((q @ k.mT).softmax(-1) @ k).transpose(1, 2).flatten(2))
            return y

    model = liven(Shared())
    graph = qp.trace(model, X)
    assert widths(graph, free=True) == {"q": HEADS}
    for seed in range(2):
        prune_and_check(model, X, graph, random_masks(graph, seed, 0.5), live=False)


def test_a_smaller_network_takes_other_masks() -> None:
    """What was rewritten for one mask computes the smaller network with another, for any number of samples."""
    model = liven(Written(*MASKS["merged with samples"]))
    graph = qp.trace(model, (X, PADDED))
    masks = random_masks(graph, 1, 0.5)
    small = qp.shrink(model, graph, masks)
    call = torch.cat([X, X.flip(0), X]), PADDED.repeat(3, 1).flip(1)
    torch.testing.assert_close(run(small, call), run(qp.masked(model, graph, masks), call))
