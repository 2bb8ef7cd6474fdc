"""Single operators between two convolutions: followed, taken apart, or kept whole with a reason that names them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qcqp_prune.apply.shrink import shrink_and_verify
from qcqp_prune.graph.axes import Axes
from qcqp_prune.graph.trace import trace
from qcqp_prune.graph.unknown import kept_whole
from qcqp_prune.graph.walk import Walk
from tests.networks import all_kept, liven, prune_and_check, random_masks, reasons, uses, widths

X = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    """x(3) -> a(8) -> an operator -> b(6) -> mean -> head(4)."""

    def __init__(self, operator: Callable[[Any, Tensor], Tensor], after: bool = False) -> None:
        super().__init__()
        self.operator, self.after = operator, after
        self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 6, 3, padding=1)
        self.head = nn.Linear(6, 4)
        self.plane = nn.Linear(6, 6)
        self.square = nn.Conv2d(8, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        y = self.operator(self, self.b(y)) if self.after else self.b(self.operator(self, y))
        return self.head(y.mean((2, 3)))


def chain(*functions: Callable[[Tensor], Tensor]) -> Callable[[Any, Tensor], Tensor]:
    def run(m: Any, y: Tensor) -> Tensor:
        for f in functions:
            y = f(y)
        return y

    return run


def _assigned(y: Tensor, out: Tensor) -> Tensor:
    out[:, :, :4] = y[:, :, :4] * 2
    out[:, :, 4:, 1:] = y[:, :, 4:, :-1] + 1
    return out


def _set(y: Tensor, channels: Any, value: float) -> Tensor:
    y[:, channels] = value
    return y


def _order(y: Tensor) -> Tensor:
    """In which order columns of the plane are, by their means, (samples, 1, 1, columns)."""
    return y.mean((1, 2))[:, None, None].argsort(-1)


def _cast(m: Any, y: Tensor, *, enabled: bool) -> Tensor:
    """Two regions, one within the other."""
    with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
        z = torch.tanh(y)
        with torch.autocast("cpu", enabled=False):
            z = m.square(z)
    return z + y


def _filled(y: Tensor) -> Tensor:
    y.masked_fill_(y[:, :, :1] > 0.5, 0.3)
    y[:, :, 2:4].fill_(0.7)
    y[..., :1].zero_()
    y[(y.mean(1, keepdim=True) > 0.1).expand(-1, y.shape[1], -1, -1)] = -0.4
    y[:, :, torch.eye(6) > 0] = 0.2
    y[y > 0.9] = 0.1
    return y


FOLLOWED: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "activations": chain(F.hardswish, F.mish, F.softsign, F.selu, F.gelu, F.hardsigmoid, F.relu6),
    "more activations": chain(
        F.celu, F.softplus, F.logsigmoid, F.tanhshrink, lambda y: F.threshold(y, -1, 0.3)
    ),
    "in place": lambda m, y: torch.tanh_(y.add_(1)).mul_(y.sigmoid()),
    "arithmetic": lambda m, y: 1 - torch.addcmul(y, y, y, value=0.5) / (2 + y**2),
    "lerp": lambda m, y: torch.lerp(y, y.tanh(), 0.3),
    "where": lambda m, y: torch.where(y > 0, y, 0.1 * y).clamp(-2, 2),
    "masked_fill": lambda m, y: y.masked_fill(y[:, :, :1] > 0, 0.5),
    "filled in place": lambda m, y: _filled(y.tanh()),
    "maximum": lambda m, y: torch.maximum(y, -0.5 * y) + torch.max(y, 2 * y),
    "softmax over channels": lambda m, y: torch.softmax(y, 1),
    "log_softmax": lambda m, y: F.log_softmax(y, 1),
    "softmax over the plane": lambda m, y: torch.softmax(y.flatten(2), -1).view(y.shape[0], -1, 6, 6),
    "normalize": lambda m, y: F.normalize(y, dim=1),
    "norm": lambda m, y: y / y.norm(dim=1, keepdim=True),
    "variance": lambda m, y: y / (1 + y.var(1, keepdim=True)),
    "deviation": lambda m, y: y / (1 + y.std((2, 3), keepdim=True, unbiased=False)),
    "var_mean": lambda m, y: (
        (y - torch.var_mean(y, 1, keepdim=True)[1]) / torch.var_mean(y, 1, keepdim=True)[0]
    ),
    "mean of all": lambda m, y: y - y.mean(),
    "sum": lambda m, y: y * y.sum(1, keepdim=True),
    "product": lambda m, y: y * y.prod(1, keepdim=True),
    "logsumexp": lambda m, y: y - torch.logsumexp(y, 1, keepdim=True),
    "maximum over channels": lambda m, y: y * y.max(1, keepdim=True)[0] * y.amin(1, keepdim=True),
    "cosine": lambda m, y: y * F.cosine_similarity(y, y.tanh(), dim=1)[:, None],
    "einsum": lambda m, y: torch.einsum("nchw,nc->nchw", y, y.mean((2, 3)).sigmoid()),
    "interpolate": lambda m, y: F.interpolate(y, size=(9, 9), mode="bilinear", align_corners=True),
    "interpolate exactly": lambda m, y: F.interpolate(y, scale_factor=2.0, mode="nearest-exact"),
    "interpolate area": lambda m, y: F.interpolate(y, size=(4, 4), mode="area"),
    "interpolate smoothly": lambda m, y: F.interpolate(y, size=(4, 4), mode="bicubic", antialias=True),
    "pooling": lambda m, y: F.lp_pool2d(F.adaptive_max_pool2d(y, 5), 2.0, 2, 1),
    "flip the plane": lambda m, y: y.flip(3).roll(1, 2),
    "cumulate over the plane": lambda m, y: y.cumsum(3),
    "stack": lambda m, y: torch.stack([y, y.tanh()], 1).mean(1) + sum(torch.stack([y, y.cos()]).unbind(0)),
    "selective kernels": lambda m, y: (
        torch.stack([y, y.tanh()], 1)
        * torch.softmax(torch.stack([y.mean((2, 3)), y.amax((2, 3))], 1), 1)[..., None, None]
    ).sum(1),
    "transpose": lambda m, y: y.mT.transpose(2, 3).swapaxes(2, 3).movedim(1, -1).moveaxis(-1, 1),
    "squeeze": lambda m, y: y.unsqueeze(0).squeeze(0).unsqueeze(2).squeeze(),
    "triangle": lambda m, y: y.tril(),
    "expand": lambda m, y: y.mean((2, 3))[:, :, None, None].expand(-1, -1, 6, 6),
    "unfold and fold": lambda m, y: F.fold(F.unfold(y, 3, padding=1), (6, 6), 3, padding=1),
    "windows": lambda m, y: y.unfold(2, 3, 1).unfold(3, 2, 2).mean(-1).amax(-1),
    "pooling of a padded plane": lambda m, y: F.max_pool2d(F.pad(y, (1, 0, 0, 2)), 2, 1),
    "tile the plane": lambda m, y: y * y.mean((2, 3), keepdim=True).tile((6, 6)),
    "assignment": lambda m, y: _assigned(y, torch.zeros_like(y)),
    "assignment in place": lambda m, y: _assigned(y.tanh(), y.sin()),
    "autocast that is off": lambda m, y: _cast(m, y, enabled=False),
    "constants": lambda m, y: (
        y + y.new_full(y.shape, 2.0) * torch.ones(1, 8, 1, 1) - torch.zeros(8, 6, 6).tanh()
    ),
    "look-ups in the plane": lambda m, y: (
        y.index_select(2, torch.arange(5, -1, -1)) + y.gather(3, (y > 0).long())
    ),
    "look-ups by numbers that are repeated": lambda m, y: (
        y.gather(3, _order(y).expand(-1, y.shape[1], 6, -1))
        + y.gather(3, _order(y).repeat(1, 8, 6, 1))
        + y.gather(3, _order(y[:, :, 1:]).expand(-1, 8, 6, -1))
    ),
    "sums by number in the plane": lambda m, y: y.index_add(
        2, torch.tensor([4, 0, 4]), y[:, :, :3].sin(), alpha=2
    ).index_add_(-1, torch.tensor([1, 5]), y[..., 2:4].exp()),
    "sums by number onto zeros": lambda m, y: y.new_zeros(len(y), 8, 3, 6).index_add(
        2, torch.tensor([0, 1, 1, 0, 1, 0]), y
    ),
    "dropout": lambda m, y: F.dropout2d(F.dropout(y, 0.5, m.training), 0.5, m.training),
}


@pytest.mark.parametrize("name", FOLLOWED)
def test_operator_is_followed(name: str) -> None:
    model = liven(Net(FOLLOWED[name]))
    graph = trace(model, X)
    assert widths(graph, free=True) == {"a": 8, "b": 6}
    assert graph.notes == ()
    for seed, realisation in enumerate(("auto", "graph")):
        prune_and_check(model, X, graph, random_masks(graph, seed), realisation=realisation, mixes=True)


def test_maxout() -> None:
    #  a(8) -> (4, 2) -> maximum of each pair -> twice: pairs are one unit
    model = liven(Net(lambda m, y: y.view(2, 4, 2, 6, 6).amax(2).repeat(1, 2, 1, 1)))
    graph = trace(model, X)
    assert widths(graph, free=True) == {"a": 4, "b": 6}
    prune_and_check(model, X, graph, random_masks(graph, 0, 0.5))


KEPT: dict[str, tuple[Callable[[Any, Tensor], Tensor], str]] = {
    "order of channels": (lambda m, y: y.cumsum(1), "its order along channels matters"),
    "argmax": (lambda m, y: y * y.argmax(1, keepdim=True), "argmax"),
    "topk": (lambda m, y: y * y.topk(2, 1)[0].sum(1, keepdim=True), "its order along channels matters"),
    "index": (lambda m, y: y[:, [7, 6, 5, 4, 3, 2, 1, 0]], "indexed by position"),
    "written by number": (
        lambda m, y: _set(y.tanh(), [1, 3], 0.5),
        "written at positions that are given by numbers",
    ),
    "channels filled by a constant": (
        lambda m, y: _set(y.tanh(), torch.arange(8) > 3, 0.5),
        "filled where a condition holds",
    ),
    "stepped slice": (lambda m, y: torch.cat([y[:, ::2], y[:, 1::2]], 1), "sliced with a step"),
    "sums by number of channels": (
        lambda m, y: y.index_add(1, torch.tensor([3, 3, 0, 1, 2, 6, 7, 7]), y.tanh()),
        "indexed by position",
    ),
    "one channel": (lambda m, y: y * y[:, 0][:, None], "indexed by position"),
    "fft": (lambda m, y: torch.fft.fft2(y).abs(), "_fft_c2c"),
    "constants in a row": (
        lambda m, y: y + torch.cat([y.new_ones(2, 3, 6, 6), y.new_zeros(2, 5, 6, 6)], 1),
        "joined with a tensor that no handler could follow",
    ),
    "assignment to zeros": (
        lambda m, y: _assigned(y, y.new_zeros(y.shape)),
        "joined with a tensor that no handler could follow",
    ),
    "copy to ones": (
        lambda m, y: y + y.new_ones(y.shape).copy_(y.tanh()),
        "joined with a tensor that no handler could follow",
    ),
    "autocast": (lambda m, y: _cast(m, y, enabled=True), "read by wrap_with_autocast, which has no handler"),
    "response norm": (lambda m, y: F.local_response_norm(y, 3), "pooled or resampled along it"),
    "linear over the plane": (lambda m, y: m.plane(y), "a linear map over another dimension"),
}


@pytest.mark.parametrize("name", KEPT)
def test_operator_keeps_what_it_reads(name: str) -> None:
    operator, reason = KEPT[name]
    model = liven(Net(operator))
    graph = trace(model, X)
    assert "b" in widths(graph, free=True)
    assert "a" not in widths(graph, free=True)
    assert reason in (graph.why_not_pruned(graph.layers[0]) or "")
    for seed, realisation in enumerate(("auto", "graph")):
        shrink_and_verify(model, graph, random_masks(graph, seed), realisation=realisation)


def test_a_product_of_matrices() -> None:
    #  attention over positions: (36 x 8) (8 x 36) and (8 x 36) (36 x 36), for each sample
    def attend(m: Any, y: Tensor) -> Tensor:
        tokens = y.flatten(2)
        weights = torch.bmm(tokens.transpose(1, 2), tokens).softmax(-1)
        return torch.bmm(tokens, weights).view(2, 8, 6, 6)

    model = liven(Net(attend))
    graph = trace(model, X)
    assert widths(graph, free=True) == {"a": 8, "b": 6}
    half = random_masks(graph, 0, 0.5)
    assert uses(graph, half)["macs"] == 36 * 9 * (3 * 4 + 4 * 3) + 3 * 4 + 2 * 36 * 36 * 4
    prune_and_check(model, X, graph, half, mixes=True)

    graph = trace(model, X, handlers={"aten::bmm": kept_whole})  # as an operator without a handler
    convolutions = 36 * 9 * (3 * 8 + 8 * 6) + 6 * 4
    assert uses(graph)["macs"] == convolutions + 2 * 36 * 36 * 8
    assert [x.name for x in graph.layers] == ["a", "bmm", "bmm@2", "b", "head"]
    assert "aten::bmm" in graph.why_not_pruned(graph.layers[1])
    assert {note.text for note in graph.notes} == {"no handler for aten::bmm: what it reads is kept whole"}
    prune_and_check(model, X, graph, random_masks(graph, 0), mixes=True)


def test_an_operator_of_another_library_is_kept_and_named() -> None:
    library = torch.library.Library("qcqp_prune_test", "FRAGMENT")
    library.define("twist(Tensor x) -> Tensor")
    library.impl("twist", lambda x: x.flip(1) * 2, "CompositeExplicitAutograd")
    library.impl("twist", lambda x: torch.empty_like(x), "Meta")
    twist = torch.ops.qcqp_prune_test.twist

    model = liven(Net(lambda m, y: twist(y)))
    graph = trace(model, X)
    assert reasons(graph)["a"] == "read by qcqp_prune_test::twist, which has no handler"
    shrink_and_verify(model, graph, random_masks(graph, 0))

    def handler(walk: Walk, node: torch.fx.Node) -> Axes:
        axes = list(walk.axes(walk.tensor_inputs(node)[0]))
        walk.table.freeze(axes[1], "turned round")
        return axes

    handled = trace(model, X, handlers={"qcqp_prune_test::twist": handler})
    assert reasons(handled)["a"] == "turned round"
    library._destroy()


def test_an_operator_that_comes_apart_may_be_the_output() -> None:
    class Out(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 5)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            y = self.b(torch.tanh(self.a(x)))
            return torch.einsum("ni,mi->nm", y, y), F.cosine_similarity(y, y.flip(0))

    model, x = liven(Out()), torch.randn(3, 6)
    graph = trace(model, x)
    assert "a" in widths(graph, free=True)
    assert np.array_equal(all_kept(graph).flat(graph), np.ones(graph.unit_count, bool))
    for seed, realisation in enumerate(("modules", "graph")):
        prune_and_check(model, x, graph, random_masks(graph, seed), realisation=realisation, mixes=True)


def test_pruning_does_not_change_the_scale_of_random_networks() -> None:
    """A smoke test of the helpers: random masks do remove something."""
    graph = trace(liven(Net(lambda m, y: torch.tanh(y))), X)
    kept = [int(random_masks(graph, seed).flat(graph).sum()) for seed in range(10)]
    assert min(kept) < graph.unit_count
