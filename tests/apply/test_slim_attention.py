"""``nn.MultiheadAttention`` with fewer or smaller heads stays one, in place, wherever it stands."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import qcqp_prune as qp
from qcqp_prune.apply.slim_attention import HeadSizes, SlimAttention
from tests.networks import keep, liven, prune_and_check, random_masks, run, widths

E, HEADS, D, L, S, N = 12, 3, 4, 5, 7, 2
PADDED = torch.zeros(N, S, dtype=torch.bool)
PADDED[0, 5:] = True
FUTURE = torch.ones(L, S, dtype=torch.bool).triu(1)
BIAS = torch.randn(N * HEADS, L, S, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


def tensors(*shapes: tuple[int, ...]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator) for shape in shapes]


MAKES: dict[str, dict[str, Any]] = {
    "plain": {},
    "tokens first": {"batch_first": False},
    "no bias": {"bias": False},
    "other widths of keys and values": {"kdim": 9, "vdim": 10},
    "bias tokens": {"add_bias_kv": True},
    "a token of zeros": {"add_zero_attn": True},
    "both, tokens first": {"add_bias_kv": True, "add_zero_attn": True, "batch_first": False},
}
CALLS: dict[str, dict[str, Any]] = {
    "plain": {},
    "no weights": {"need_weights": False},
    "weights of each head": {"average_attn_weights": False},
    "padding": {"key_padding_mask": PADDED},
    "padding, no weights": {"key_padding_mask": PADDED, "need_weights": False},
    "causal": {"attn_mask": FUTURE, "is_causal": True},
    "both masks": {"attn_mask": FUTURE, "key_padding_mask": PADDED, "is_causal": True, "need_weights": False},
    "a bias for each head": {"attn_mask": BIAS},
    "a bias, no weights": {"attn_mask": BIAS[0], "need_weights": False},
}


@pytest.mark.parametrize("make", MAKES)
def test_with_nothing_removed_it_is_the_attention_of_torch(make: str) -> None:
    options = {"batch_first": True, **MAKES[make]}
    dense = liven(nn.MultiheadAttention(E, HEADS, **options)).double().eval()
    slim = SlimAttention.take_over(copy.deepcopy(dense), HeadSizes(HEADS, D, D, D**-0.5))
    x, key, value = tensors((N, L, E), (N, S, options.get("kdim", E)), (N, S, options.get("vdim", E)))
    flat = [t.double() for t in (x, key, value)]
    args = flat if options["batch_first"] else [t.transpose(0, 1) for t in flat]
    for name, call in CALLS.items():
        for a, b in zip(dense(*args, **call), slim(*args, **call), strict=True):
            assert (a is None) == (b is None), name
            assert a is None or torch.allclose(a, b, atol=1e-12), name
    single = [t[0] for t in flat]
    for a, b in zip(dense(*single), slim(*single), strict=True):
        assert torch.allclose(a, b, atol=1e-12)
    if "kdim" not in options:
        own = args[0]
        assert torch.allclose(dense(own, own, own)[0], slim(own, own, own)[0], atol=1e-12)
    with pytest.raises(RuntimeError, match="give the mask as well"):
        slim(*args, is_causal=True)


class Cross(nn.Module):
    """x(12) -> attention(x, a(memory), b(memory)) -> (12), with what nn.MultiheadAttention takes."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(E, HEADS, batch_first=True, **options)
        self.a, self.b = nn.Linear(6, options.get("kdim", E)), nn.Linear(6, options.get("vdim", E))

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        y: Tensor = self.attention(x, self.a(memory), self.b(memory), need_weights=False)[0]
        return y


@pytest.mark.parametrize("units", ["heads", "head_dim"])
@pytest.mark.parametrize("make", ["plain", "no bias", "other widths of keys and values", "bias tokens"])
def test_projections_of_all_kinds_are_cut_in_place(make: str, units: str) -> None:
    model = liven(Cross(**MAKES[make]))
    inputs = tuple(tensors((N, L, E), (N, S, 6)))
    graph = qp.trace(model, inputs, units=[units, "widths"])
    inner = {n for name, n in widths(graph, free=True).items() if name.startswith("attention")}
    assert inner == {HEADS if units == "heads" else D}
    small, checked = prune_and_check(model, inputs, graph, random_masks(graph, 3, 0.6))
    assert (checked.realisation, checked.attention_layers) == ("modules", ("attention",))
    assert small.attention.scale == D**-0.5


def test_values_may_keep_other_dimensions_than_keys() -> None:
    model, inputs = liven(Cross(kdim=9, vdim=10)), tuple(tensors((N, L, E), (N, S, 6)))
    graph = qp.trace(model, inputs, units="head_dim", ignored_layers="attention@3")
    assert widths(graph, free=True) == {"attention": D}
    small, checked = prune_and_check(model, inputs, graph, keep(graph, attention=[2]))
    assert checked.realisation == "modules"
    assert (small.attention.head_dim, small.attention.value_dim) == (1, D)
    assert small.attention.k_proj_weight.shape == (HEADS, 9)
    assert small.attention.v_proj_weight.shape == (HEADS * D, 10)


def test_an_attention_that_lost_nothing_stays_what_it_was() -> None:
    model, inputs = liven(Cross(kdim=9, vdim=10)), tuple(tensors((N, L, E), (N, S, 6)))
    graph = qp.trace(model, inputs)
    small, checked = prune_and_check(model, inputs, graph, random_masks(graph, 0, 1.0))
    assert type(small.attention) is nn.MultiheadAttention
    assert checked.attention_layers == ()


def encoder(**options: Any) -> nn.Module:
    """Two encoder layers of 4 heads of 3 and 10 features, even and with all that the fused path asks for."""
    layer = nn.TransformerEncoderLayer(E, 4, 10, batch_first=True, **options)
    return liven(nn.TransformerEncoder(layer, 2)).eval()


@pytest.mark.parametrize("units", [["heads", "widths"], ["head_dim"], ["stream", "heads"]])
def test_within_encoder_layers_the_fused_path_stays_off(units: list[str]) -> None:
    """Two of four heads are left: an even number, so that nothing but their width keeps PyTorch from fusing them."""
    model, (x,) = encoder(), tensors((N, L, E))
    graph = qp.trace(model, x, units=units)
    masks = random_masks(graph, 1, 0.5)
    small, checked = prune_and_check(model, x, graph, masks, mixes="stream" in units)
    assert checked.realisation == "modules"
    assert len(checked.attention_layers) == 2
    assert isinstance(small.layers[0], nn.TransformerEncoderLayer)
    y = qp.masked(model, graph, masks)(x.double())
    assert torch.backends.mha.get_fastpath_enabled()
    with torch.no_grad():
        assert torch.allclose(small(x), y.float(), atol=1e-4)
        padded = small(x, src_key_padding_mask=PADDED[:, 2:])  # nested tensors, were it not slim
        assert torch.allclose(padded[1], y[1].float(), atol=1e-4)


class Padded(nn.Module):
    """An encoder that is given what of its input is padding; optionally in no other dtype than single precision."""

    def __init__(self, *, strict: bool) -> None:
        super().__init__()
        self.encoder, self.head, self.strict = encoder(), nn.Linear(E, 3), strict

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        if self.strict and x.dtype != torch.float32:
            raise RuntimeError("single precision, please")
        return self.head(self.encoder(x, src_key_padding_mask=mask))


@pytest.mark.filterwarnings(
    "ignore:The PyTorch API of nested tensors"
)  # which the fused path makes of the mask
@pytest.mark.parametrize("strict", [False, True])
def test_rows_of_padding_that_the_fused_path_would_zero_are_no_error(strict: bool) -> None:
    (x,) = tensors((N, L, E))
    mask = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    model = liven(Padded(strict=strict)).eval()
    graph = qp.trace(model, (x, mask))
    # Nothing of the attention goes, so that the fused path of each layer stays on.
    masks = keep(graph, **{f"encoder_layers_{k}_linear1": [0, 2, 5, 6] for k in (0, 1)})
    small, checked = qp.shrink_and_verify(model, graph, masks, realisation="modules")
    assert checked.max_relative_error <= checked.tolerance
    with torch.no_grad():
        got, want = small(x, mask), qp.masked(model, graph, masks)(x, mask)
    assert torch.allclose(got[~mask], want[~mask], atol=1e-5)


def test_it_trains_and_comes_back_from_a_file(tmp_path: Path) -> None:
    model, (x,) = encoder(dropout=0.0), tensors((N, L, E))
    graph = qp.trace(model, x)
    masks = random_masks(graph, 1, 0.5)
    small = qp.shrink(model, graph, masks)
    small.train()(x).square().sum().backward()
    assert all(p.grad is not None for p in small.parameters())
    qp.save(small, tmp_path / "net", graph=graph, masks=masks)
    again = qp.load(tmp_path / "net", encoder)
    assert isinstance(again.layers[1].self_attn, SlimAttention)
    assert again.state_dict().keys() == model.state_dict().keys()
    for a, b in zip(run(again, x), run(small, x), strict=True):
        assert torch.equal(a, b)


def test_hooks_and_shared_modules_stay() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.MultiheadAttention(E, HEADS, batch_first=True)
            self.b = self.a

        def forward(self, x: Tensor) -> Tensor:
            x = self.a(x, x, x)[0]
            return self.b(x, x, x)[0]

    model, (x,) = liven(Twice()), tensors((N, L, E))
    calls: list[int] = []
    model.a.register_forward_hook(lambda *_: calls.append(1))
    graph = qp.trace(model, x)
    small, checked = qp.shrink_and_verify(model, graph, random_masks(graph, 1, 0.5))
    assert checked.realisation == "modules"
    assert small.a is small.b
    assert {p.dtype for p in model.parameters()} == {
        torch.float32
    }  # whose verification was in double precision
    calls.clear()
    small(x)
    assert len(calls) == 2


def test_a_class_of_ones_own_is_left_to_the_rewritten_graph() -> None:
    class Own(nn.MultiheadAttention):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            y, weights = super().forward(*args, **kwargs)
            return 2 * y, weights

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = Own(E, HEADS, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            return self.attention(x, x, x, need_weights=False)[0]

    model, (x,) = liven(Net()), tensors((N, L, E))
    graph = qp.trace(model, x)
    _, checked = prune_and_check(model, x, graph, random_masks(graph, 1, 0.5))
    assert (checked.realisation, checked.attention_layers) == ("graph", ())


def test_warnings_of_torch_stay_what_they_were() -> None:
    """A cut encoder asks for nothing that warns."""
    model, (x,) = encoder(), tensors((N, L, E))
    graph = qp.trace(model, x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        small = qp.shrink(model, graph, random_masks(graph, 1, 0.5))
        copy.deepcopy(small)(x)
