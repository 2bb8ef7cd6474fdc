"""Kept positions in a rewritten graph: found once for each node."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

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
from qcqp_prune.apply.surgery import copied
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
    "reshapes": lambda x: F.pad(x, (4, 9)).flatten(1).unflatten(1, (5, 16)),
    "a whole slice and a part": lambda x: F.pad(x, (4, 9))[0:, :1].select(1, 0)[:, None],
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


class Attention(nn.Module):
    """Causal, as nanoGPT writes it: sizes of heads by division, by hand or by PyTorch's operator."""

    def __init__(self, *, by_hand: bool) -> None:
        super().__init__()
        self.c_attn, self.c_proj, self.n_head, self.by_hand = nn.Linear(16, 48), nn.Linear(16, 16), 4, by_hand
        self.register_buffer("bias", torch.tril(torch.ones(LONGEST, LONGEST)).view(1, 1, LONGEST, LONGEST))

    def forward(self, x: Tensor) -> Tensor:
        b, t, c = x.size()
        q, k, v = (
            part.view(b, t, self.n_head, c // self.n_head).transpose(1, 2)
            for part in self.c_attn(x).split(16, dim=2)
        )
        if self.by_hand:
            weights = (q @ k.transpose(-2, -1)) * (1.0 / k.size(-1) ** 0.5)
            y = weights.masked_fill(self.bias[:, :, :t, :t] == 0, float("-inf")).softmax(-1) @ v
        else:
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.c_proj(y.transpose(1, 2).contiguous().view(b, t, c))


class GPT(nn.Module):
    def __init__(self, *, by_hand: bool) -> None:
        super().__init__()
        self.wte, self.wpe = nn.Embedding(30, 16), nn.Embedding(LONGEST, 16)
        self.norm, self.attention = nn.LayerNorm(16), Attention(by_hand=by_hand)
        self.mlp = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16))
        self.head = nn.Linear(16, 30, bias=False)

    def forward(self, idx: Tensor, targets: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        x = self.wte(idx) + self.wpe(torch.arange(idx.size(1), device=idx.device))
        x = x + self.attention(self.norm(x))
        logits = self.head(x + self.mlp(x))
        loss = None if targets is None else F.cross_entropy(logits.flatten(0, 1), targets.flatten())
        return logits, loss


LONGEST = 24


@pytest.mark.parametrize("by_hand", [True, False])
def test_a_language_model_takes_other_lengths(by_hand: bool) -> None:
    model = liven(GPT(by_hand=by_hand)).eval()
    graph = trace(model, torch.randint(30, (2, 8), generator=torch.Generator().manual_seed(0)))
    masks = random_masks(graph, 1, 0.5)
    small, checked = shrink_and_verify(model, graph, masks)
    assert checked.realisation == "graph"
    assert checked.note.endswith("; it does not take targets")
    assert (f"; it is made for idx of sizes (any, up to {LONGEST}); " in checked.note) == by_hand
    oracle = masked(model, graph, masks)
    for shape in ((2, 8), (3, 9), (1, 23), (2, 5), (1, LONGEST)):
        idx = torch.randint(30, shape)
        torch.testing.assert_close(small(idx)[0], oracle(idx)[0])
    refused = f"a size of input idx is 25, .* up to {LONGEST}: prune again" if by_hand else "out of range"
    with pytest.raises((ValueError, IndexError), match=refused):
        small(torch.zeros(1, LONGEST + 1, dtype=torch.int64))
    compiled = torch.compile(copied(small), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(idx)[0], small(idx)[0])


def decided_by_length(net: Padded, x: Tensor) -> Tensor:
    return net.b(net.a(x)[..., :8].repeat(1, 1, 2) * (2 if x.shape[1] > 6 else 1))


def padded_to_four(net: Padded, x: Tensor) -> Tensor:
    more = -x.shape[1] % 4
    y = net.b(net.a(x)[..., :8].repeat(1, 1, 2))
    return y if not more else F.pad(y, (0, 0, 0, more), value=1.0)


def in_fours(net: Padded, x: Tensor) -> Tensor:
    """What this asks of a length, such as that padding makes it a multiple of four, is so for all lengths."""
    y = F.pad(net.b(net.a(x)[..., :8].repeat(1, 1, 2)), (0, 0, 0, -x.shape[1] % 4))
    return y.reshape(x.shape[0], -1, 4, 4).mean(2)


class Decides(Padded):
    def __init__(self, forward: Callable[[Padded, Tensor], Tensor]) -> None:
        super().__init__("as it is")
        self.decides = forward

    def forward(self, x: Tensor) -> Tensor:
        return self.decides(self, x)


@pytest.mark.parametrize(
    ("forward", "length", "sizes"),
    [
        (decided_by_length, 5, "up to 6"),
        (decided_by_length, 9, "from 7"),
        (padded_to_four, 8, "8"),
        (padded_to_four, 6, "any"),
        (in_fours, 8, "any"),
        (in_fours, 6, "any"),
    ],
)
def test_at_other_lengths_it_computes_the_same_or_refuses(
    forward: Callable[[Padded, Tensor], Tensor], length: int, sizes: str
) -> None:
    """``if more`` is decided once and for all: where the model decides otherwise the graph would be wrong."""
    model = liven(Decides(forward)).eval()
    graph = trace(model, torch.zeros(2, length, 3))
    masks = random_masks(graph, 1, 0.5)
    small, checked = shrink_and_verify(model, graph, masks, realisation="graph")
    assert f"x of sizes (any, {sizes}, 3)" in checked.note
    oracle = masked(model, graph, masks)
    same = 0
    for other in range(2, 14) if sizes != str(length) else [length]:
        x = torch.randn(3, other, 3)
        try:
            got = small(x)
        except ValueError:
            continue
        torch.testing.assert_close(got, oracle(x))
        same += 1
    assert same >= 1


def test_of_images_the_batch_alone_is_free() -> None:
    model = liven(nn.Sequential(nn.Conv2d(3, 8, 3, stride=2), nn.ReLU(), nn.Conv2d(8, 4, 3))).eval()
    graph = trace(model, torch.zeros(2, 3, 16, 16))
    small, checked = shrink_and_verify(model, graph, random_masks(graph, 1, 0.5), realisation="graph")
    assert checked.note == "asked for; it is made for input of sizes (any, 3, 16, 16)"
    assert small(torch.zeros(5, 3, 16, 16)).shape[0] == 5
