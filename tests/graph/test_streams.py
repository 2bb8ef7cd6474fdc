"""What counts as the residual stream of a transformer, and what does not."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import qcqp_prune as qp
from qcqp_prune.graph.units import REASONS
from tests.graph.test_attention import HEADS, TOKENS, WIDTH, Block
from tests.networks import liven, prune_and_check, random_masks, reasons, widths


class LookedUp(nn.Module):
    """x(7) -> embed(12) + positions -> block -> head(4); positions are rows of a table, taken by a product.

    The product is of no two activations, so it tells nothing about heads.
    """

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(7, WIDTH), nn.Linear(WIDTH, 4)
        self.table = nn.Parameter(torch.zeros(TOKENS + 3, WIDTH))
        self.register_buffer("places", torch.eye(TOKENS + 3)[1 : TOKENS + 1])
        self.block = Block()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.block(self.embed(x) + self.places @ self.table).mean(1))


def test_a_table_looked_up_by_a_product_makes_no_heads() -> None:
    model, x = liven(LookedUp()), torch.randn(2, TOKENS, 7)
    graph = qp.trace(model, x)
    assert list(widths(graph, free=True).values()) == [HEADS, 10]
    assert reasons(graph)["embed"] == REASONS["stream"]
    whole = qp.trace(model, x, units=["heads", "widths", "stream"])
    assert sorted(widths(whole, free=True).values()) == [HEADS, 10, WIDTH]
    for seed, traced in enumerate((graph, whole)):
        prune_and_check(model, x, traced, random_masks(traced, seed), live=False, mixes=True)
