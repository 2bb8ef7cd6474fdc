"""Kept positions in a rewritten graph: found once for each node."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import Graph

from qcqp_prune import trace
from qcqp_prune.apply import rewrite_joins
from qcqp_prune.apply.masked import masked
from qcqp_prune.apply.rewrite_joins import Positions
from qcqp_prune.apply.shrink import shrink_and_verify
from tests.networks import liven, random_masks

X = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.up, self.down = nn.Linear(8, 12), nn.Linear(12, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.up(self.norm(x)).relu())


def looks(depth: int, monkeypatch: pytest.MonkeyPatch) -> int:
    """How often the rewriting looks at a user of a node."""
    seen: Counter[str] = Counter()
    decides = rewrite_joins._decides

    def counting(*args: object) -> object:
        seen["looks"] += 1
        return decides(*args)  # type: ignore[arg-type]

    model = liven(nn.Sequential(*[Block() for _ in range(depth)], nn.Linear(8, 4)))
    graph = trace(model, X)
    with monkeypatch.context() as patch:
        patch.setattr(rewrite_joins, "_decides", counting)
        shrink_and_verify(model, graph, random_masks(graph, seed=0), realisation="graph")
    return seen["looks"]


def test_a_further_block_of_a_deep_network_costs_what_the_one_before_did(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    three, five, nine = (looks(depth, monkeypatch) for depth in (3, 5, 9))
    assert nine - five == 2 * (five - three) > 0


def test_joins_are_followed_to_the_end_and_not_beyond_an_operator_that_moves_positions() -> None:
    # a -> relu -> + b -> flip -> + c : b decides about a, c does not
    aten = torch.ops.aten
    graph = Graph()
    a, b, c = (graph.placeholder(name) for name in "abc")
    relu = graph.call_function(aten.relu.default, (a,))
    first = graph.call_function(aten.add.Tensor, (relu, b))
    flip = graph.call_function(aten.flip.default, (first, [0]))
    last = graph.call_function(aten.add.Tensor, (flip, c))
    graph.output(last)
    every = np.ones(4, np.bool_)
    b_keeps, c_keeps = np.array([1, 1, 0, 1], np.bool_), np.array([0, 1, 1, 1], np.bool_)
    kept = {a: [every], b: [b_keeps], c: [c_keeps], relu: [every], first: [b_keeps], flip: [every]}
    joined = Positions.of(graph, {**kept, last: [c_keeps]}).joined
    assert joined[a][0].tolist() == joined[relu][0].tolist() == b_keeps.tolist()
    assert joined[flip][0].tolist() == c_keeps.tolist()
    assert joined[first][0].tolist() == b_keeps.tolist()


PADDED = {
    "as it is": lambda x: F.pad(x, (4, 9)),
    "unsqueeze": lambda x: F.pad(x[:, 0], (4, 9)).unsqueeze(1),
    "squeeze": lambda x: F.pad(x[:, :1].unsqueeze(2), (4, 9)).squeeze(2),
    "squeeze of more than one": lambda x: F.pad(x, (4, 9)).squeeze(1),
    "transpose": lambda x: F.pad(x.transpose(1, 2), (0, 0, 4, 9)).transpose(1, 2),
    "permute": lambda x: F.pad(x.permute(2, 0, 1), (0, 0, 0, 0, 4, 9)).permute(1, 2, 0),
}


class Padded(nn.Module):
    """Something padded is added to channels: of its padding there is as much as they need, wherever dimensions go."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.a, self.b, self.how = nn.Linear(3, 16), nn.Linear(16, 4), how

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.relu(self.a(x) + PADDED[self.how](x)))


@pytest.mark.parametrize("how", PADDED)
def test_a_padding_follows_the_channels_that_it_is_added_to(how: str) -> None:
    torch.manual_seed(0)
    model = liven(Padded(how)).eval()
    graph = trace(model, torch.zeros(2, 5, 3))
    masks = random_masks(graph, 1)
    small, checked = shrink_and_verify(model, graph, masks)
    assert checked.realisation == "graph"
    x = torch.randn(2, 5, 3)
    torch.testing.assert_close(small(x), masked(model, graph, masks)(x))


class Several(nn.Module):
    """Any number of inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 8), nn.Linear(4, 2)

    def forward(self, first: Tensor, *more: Tensor) -> Tensor:
        x = self.a(first)
        for other in more:
            x = x + self.a(other).tanh()
        halves = x.view(x.shape[0], 2, 4)  # a fixed batch would be written here
        return self.b(halves[:, 0] * halves[:, 1])


@pytest.mark.parametrize("count", [1, 2, 3])
def test_the_batch_stays_free_however_many_inputs_a_forward_takes(count: int) -> None:
    model = liven(Several()).eval()
    graph = trace(model, tuple(torch.zeros(2, 3) for _ in range(count)))
    masks = random_masks(graph, 1, 0.5)
    small, checked = shrink_and_verify(model, graph, masks)
    assert checked.realisation == "graph"
    inputs = [torch.randn(5, 3) for _ in range(count)]
    torch.testing.assert_close(small(*inputs), masked(model, graph, masks)(*inputs))
