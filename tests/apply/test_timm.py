"""Small networks of timm: traced, cut to about half of each layer, and verified."""

from __future__ import annotations

import importlib
import importlib.util

import pytest
import torch
from torch import nn

import qcqp_prune as qp
from benchmarks.zoo import timm as registry
from tests.networks import prune_and_check, random_masks
from tests.zoo import lively, torchvision_models

if importlib.util.find_spec("timm") is None:
    pytest.skip("timm is not installed: pip install --no-deps timm", allow_module_level=True)

X = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(1))

MODELS = {
    "test_coatnet": 1.0,  # convolutions, then attention with a bias from relative positions
    "test_nfnet": 1.0,  # weights standardised in every forward
    "test_vit3": 0.9,  # class and register tokens, attention pooling
}
"""Share of the multiply-adds at least that belongs to layers of which something can go."""


QUICK = ("test_nfnet",)


def made(name: str) -> nn.Module:
    torchvision_models()
    torch.manual_seed(0)
    timm = importlib.import_module("timm")
    options = {"img_size": 64} if timm.get_pretrained_cfg(name).fixed_input_size else {}
    return lively(timm.create_model(name, num_classes=7, **options), X)


@pytest.mark.parametrize(
    ("name", "share"),
    [pytest.param(*item, marks=() if item[0] in QUICK else pytest.mark.slow) for item in MODELS.items()],
)
def test_random_halves(name: str, share: float) -> None:
    model = made(name)
    graph = qp.trace(model, X)
    frozen = [all(graph.groups[g].stays for g in set(graph.group_of_unit[a].tolist())) for a in graph.axes]
    macs = {
        x.name: x.macs_per_pair * len(graph.axes[x.in_axis]) * len(graph.axes[x.out_axis]) // x.segments
        for x in graph.layers
    }
    free = sum(macs[x.name] for x in graph.layers if not (frozen[x.in_axis] and frozen[x.out_axis]))
    assert free >= share * 0.99 * sum(macs.values())
    prune_and_check(model, X, graph, random_masks(graph, 0, 0.5), mixes=True)


def test_every_family_has_a_case() -> None:
    torchvision_models()
    timm = importlib.import_module("timm")
    assert set(registry.FAMILIES) == set(timm.list_modules())
    for family, names in registry.FAMILIES.items():
        assert set(names.split()) <= set(timm.list_models(module=family)), family
