"""Rotary positions, in the ways that they are written in: heads stay units, with more dimensions than heads."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import qcqp_prune as qp
from tests.networks import liven, prune_and_check, random_masks, uses, widths

TOKENS, WIDTH, HEADS, SIZE = 5, 16, 2, 8
X = torch.randn(2, TOKENS, WIDTH, generator=torch.Generator().manual_seed(0))


def _angles(size: int) -> Tensor:
    return torch.arange(TOKENS)[:, None] / 10 ** (torch.arange(0, size, 2) / size)


NUMBERS = torch.polar(torch.ones(TOKENS, 1, SIZE // 2), _angles(SIZE)[:, None])


def _turned(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    angles = _angles(2 * a.shape[-1])
    return a * angles.cos() - b * angles.sin(), a * angles.sin() + b * angles.cos()


def _halves(x: Tensor) -> Tensor:
    return torch.cat(_turned(*x.chunk(2, -1)), -1)


def _neighbours(x: Tensor) -> Tensor:
    return torch.stack(_turned(x[..., ::2], x[..., 1::2]), -1).flatten(-2)


def _unbound(x: Tensor) -> Tensor:
    return torch.stack(_turned(*x.unflatten(-1, (-1, 2)).unbind(-1)), dim=-1).reshape(x.shape)


def _written(x: Tensor) -> Tensor:
    out = torch.empty_like(x)
    out[..., ::2], out[..., 1::2] = _turned(x[..., ::2], x[..., 1::2])
    return out


def _complex(x: Tensor) -> Tensor:
    """Tokens before heads, as Meta's Llama has them."""
    pairs = torch.view_as_complex(x.transpose(1, 2).reshape(*x.transpose(1, 2).shape[:-1], -1, 2))
    y = torch.view_as_real(pairs * NUMBERS).flatten(3)
    return y.type_as(x).transpose(1, 2)


class Rotary(nn.Module):
    """x(16) -> q, k, v (2 heads x 8) -> q and k turned by their places -> attention -> proj(16)."""

    def __init__(self, rotate: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.rotate = rotate
        self.q, self.k, self.v, self.proj = (nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (f(x).unflatten(-1, (-1, SIZE)).transpose(1, 2) for f in (self.q, self.k, self.v))
        y = F.scaled_dot_product_attention(self.rotate(q), self.rotate(k), v)
        turned: Tensor = self.proj(y.transpose(1, 2).flatten(2))
        return turned


@pytest.mark.parametrize("rotate", [_halves, _neighbours, _unbound, _written, _complex])
def test_heads_with_rotary_positions_are_units(rotate: Callable[[Tensor], Tensor]) -> None:
    model = liven(Rotary(rotate))
    graph = qp.trace(model, X)
    assert widths(graph, free=True) == {"q": HEADS}
    assert graph.notes == ()
    assert uses(graph)["macs"] == TOKENS * 4 * WIDTH * WIDTH + 2 * TOKENS * TOKENS * WIDTH
    for seed, realisation in enumerate(("auto", "graph", "graph")):
        prune_and_check(model, X, graph, random_masks(graph, seed, 0.5), realisation=realisation, live=False)
