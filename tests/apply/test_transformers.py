"""Vision transformers as torchvision and timm define them: heads and feed-forward widths are pruned, and verified."""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import qcqp_prune as qp
from tests.networks import keep, liven, prune_and_check, random_masks, widths
from tests.zoo import torchvision_models

TINY = {"num_layers": 2, "num_heads": 4, "hidden_dim": 32, "mlp_dim": 48, "num_classes": 5}
BLOCK = "encoder.layers.encoder_layer_{}."


def image(side: int, batch: int = 1) -> torch.Tensor:
    return torch.randn(batch, 3, side, side, generator=torch.Generator().manual_seed(1))


def tiny() -> nn.Module:
    return liven(torchvision_models().VisionTransformer(image_size=32, patch_size=16, **TINY)).eval()


@pytest.mark.parametrize("streams", [False, True])
def test_a_small_vision_transformer(streams: bool) -> None:
    """Four patches and a class token; two blocks of 4 heads of 8, and 48 wide feed-forward layers."""
    model, x = tiny(), image(32, 2)
    graph = qp.trace(model, x, units=["heads", "widths", "stream"] if streams else None)
    blocks = {BLOCK.format(b) + part: n for b in (0, 1) for part, n in (("self_attention", 4), ("mlp.0", 48))}
    assert widths(graph, free=True) == {**({"conv_proj": 32} if streams else {}), **blocks}
    for seed in range(2):
        small, checked = prune_and_check(
            model, x, graph, random_masks(graph, seed), mixes=streams, live=False
        )
        assert checked.realisation == "modules"
        with torch.no_grad():
            assert small(image(32, 5)).shape == (5, 5)


def test_whole_heads_that_do_nothing_go_first() -> None:
    """A head whose values and columns are small costs as much as any other, so the solver drops it."""
    model, x = tiny(), image(32)
    with torch.no_grad():
        for b, head in ((0, 1), (1, 3)):
            attention = model.get_submodule(BLOCK.format(b) + "self_attention")
            attention.in_proj_weight.view(3, 4, 8, 32)[:, head] *= 1e-3
            attention.out_proj.weight.view(32, 4, 8)[:, head] *= 1e-3
    graph = qp.trace(model, x, ignored_layers=["*.mlp.0"])
    head_macs = 5 * 32 * 8 * 4 + 2 * 5 * 5 * 8  # four projections and two products
    dense = qp.Macs().measure(model, x)
    problem = qp.PruningProblem.build(graph, qp.Magnitude()(model, graph), {"macs": dense - 2 * head_macs})
    report = qp.solve(problem, "block_coordinate", options=qp.SolveOptions(work_limit=3))
    wanted = {
        (BLOCK.format(b) + "self_attention").replace(".", "_"): [h for h in range(4) if h != gone]
        for b, gone in ((0, 1), (1, 3))
    }
    assert np.array_equal(report.masks.flat(graph), keep(graph, **wanted).flat(graph))
    assert report.usage["macs"].slack == 0


def half(model: nn.Module, x: torch.Tensor) -> qp.Verification:
    graph = qp.trace(model, x, min_keep=0.25)
    problem = qp.PruningProblem.build(graph, qp.Magnitude()(model, graph), {"macs": "50%"})
    report = qp.solve(problem, "block_coordinate", options=qp.SolveOptions(work_limit=2))
    small, checked = qp.shrink_and_verify(model, graph, report.masks)
    dense = qp.Macs().measure(model, x)
    assert report.usage["macs"].dense == dense
    assert dense * 0.49 < qp.Macs().measure(small, x) <= dense // 2
    assert checked.max_relative_error <= 1e-8
    assert checked.caution == ""
    return checked


@pytest.mark.slow
@pytest.mark.parametrize("side", [64, 224])
def test_vit_b_16_at_half_its_multiply_adds(side: int) -> None:
    """Counted by hand: 12 blocks of 4 projections, 2 products and 2 feed-forward maps over the tokens."""
    torch.manual_seed(0)
    model = liven(torchvision_models().vit_b_16(weights=None, image_size=side)).eval()
    x, tokens = image(side), (side // 16) ** 2 + 1
    block = tokens * 768 * (4 * 768 + 2 * 3072) + 2 * tokens * tokens * 768
    assert qp.Macs().measure(model, x) == 12 * block + (tokens - 1) * 768 * 768 + 768 * 1000
    half(model, x)


def timm_model(name: str, **options: Any) -> nn.Module:
    if importlib.util.find_spec("timm") is None:
        pytest.skip("timm is not installed: pip install --no-deps timm")
    torchvision_models()
    torch.manual_seed(0)
    return liven(importlib.import_module("timm").create_model(name, **options)).eval()


TIMM = {"deit_tiny_distilled_patch16_224": 64}
SLOW_TIMM = {"vit_tiny_patch16_224": 64, "deit3_small_patch16_224": 64, "swin_tiny_patch4_window7_224": 224}


@pytest.mark.parametrize(
    ("name", "side"),
    [*TIMM.items(), *(pytest.param(*item, marks=pytest.mark.slow) for item in SLOW_TIMM.items())],
)
def test_vision_transformers_of_timm(name: str, side: int) -> None:
    """Number of heads and their width are attributes there, so the model's own classes come back."""
    checked = half(timm_model(name, img_size=side), image(side))
    assert checked.realisation == "modules"
