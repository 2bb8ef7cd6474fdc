"""What comes back compiles, traces, exports and can be pruned again, in both realisations."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import qcqp_prune as qp
from qcqp_prune.apply.joined_sum import JoinedSum
from qcqp_prune.apply.shape_conv import ShapeConv2d
from qcqp_prune.apply.slim_attention import SlimAttention
from tests.graph.test_attention import Transformer
from tests.networks import all_kept, liven, random_masks


class Residual(nn.Module):
    """conv(3, 8) -> + relu(conv(8, 8)) -> norm -> relu -> conv(8, 4) -> mean over the plane."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.norm, self.c = nn.BatchNorm2d(8), nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        return self.c(self.norm(x + self.b(x).relu()).relu()).mean((2, 3))


def encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(12, 4, 10, batch_first=True)
    return nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)


IMAGE, TOKENS, WORDS = (2, 3, 6, 6), (2, 5, 7), (2, 5, 12)
CASES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], dict[str, Any], type[nn.Module] | None]] = {
    "convolutions": (Residual, IMAGE, {}, None),
    "uneven sums": (Residual, IMAGE, {"sharing": "free"}, JoinedSum),
    "kernel columns": (Residual, IMAGE, {"columns": True}, ShapeConv2d),
    "heads and widths": (Transformer, TOKENS, {}, None),
    "dimensions of heads": (Transformer, TOKENS, {"units": ["head_dim", "stream"]}, None),
    "an encoder of torch": (encoder, WORDS, {}, SlimAttention),
}
RESULTS = [
    *((name, "auto") for name in CASES),
    *((name, "graph") for name in ("convolutions", "an encoder of torch")),
]


def pruned(name: str, realisation: str) -> tuple[nn.Module, Tensor, dict[str, Any]]:
    make, shape, options, kind = CASES[name]
    model, x = liven(make()).eval(), torch.randn(shape, generator=torch.Generator().manual_seed(2))
    graph = qp.trace(model, x, **options)
    small = qp.shrink(model, graph, random_masks(graph, 1, 0.6), realisation=realisation)  # type: ignore[arg-type]
    by_class = (
        realisation == "auto" or kind is not SlimAttention
    )  # a rewritten graph has attention's operators
    assert kind is None or any(isinstance(m, kind) for m in small.modules()) == by_class
    return small.eval(), x, options


@pytest.mark.parametrize(("name", "realisation"), RESULTS)
def test_it_compiles_without_a_break(name: str, realisation: str) -> None:
    small, x, _ = pruned(name, realisation)
    torch._dynamo.reset()
    compiled = torch.compile(small, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert torch.allclose(compiled(x), small(x), atol=1e-5)
        assert torch.allclose(compiled(x[:1]), small(x[:1]), atol=1e-5)
    small.zero_grad()
    small(x).square().sum().backward()
    wanted = {key: p.grad.clone() for key, p in small.named_parameters() if p.grad is not None}
    small.zero_grad()
    compiled(x).square().sum().backward()
    assert wanted
    for key, p in small.named_parameters():
        assert (key in wanted) == (p.grad is not None), key
        assert p.grad is None or torch.allclose(p.grad, wanted[key], atol=1e-4), key


@pytest.mark.filterwarnings("ignore:.*torch.jit.*deprecated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize(("name", "realisation"), RESULTS)
def test_it_is_traced_and_stored_by_torchscript(name: str, realisation: str) -> None:
    small, x, _ = pruned(name, realisation)
    with torch.no_grad():
        traced = torch.jit.trace(small, (x,))
        stored = io.BytesIO()
        torch.jit.save(traced, stored)
        stored.seek(0)
        again = torch.jit.load(stored)
        more = torch.cat([x, x[:1]])
        assert torch.allclose(again(more), small(more), atol=1e-5)


@pytest.mark.parametrize(("name", "realisation"), RESULTS)
def test_it_is_exported_and_pruned_again(name: str, realisation: str) -> None:
    small, x, options = pruned(name, realisation)
    with torch.no_grad():
        exported = torch.export.export(small, (x,)).module()
        assert torch.allclose(exported(x), small(x), atol=1e-5)
    scatters = name in ("uneven sums", "kernel columns")  # by operators that keep what they read
    graph = qp.trace(small, x, **({} if scatters else options))
    assert (graph.prunable_count > 0) != scatters
    whole, checked = qp.shrink_and_verify(small, graph, all_kept(graph))
    assert checked.max_relative_error <= 1e-8
    with torch.no_grad():
        assert torch.allclose(whole(x), small(x), atol=1e-5)
    if not scatters:
        qp.shrink(small, graph, random_masks(graph, 0, 0.5))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("realisation", ["auto", "graph"])
@pytest.mark.parametrize("name", ["convolutions", "an encoder of torch"])
def test_it_runs_as_onnx(name: str, realisation: str) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    small, x, _ = pruned(name, realisation)
    stored = io.BytesIO()
    torch.onnx.export(small, (x,), stored, dynamo=False, opset_version=17)
    session = onnxruntime.InferenceSession(stored.getvalue())
    (got,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    with torch.no_grad():
        assert torch.allclose(torch.from_numpy(got), small(x), atol=1e-4)
