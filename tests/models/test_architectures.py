"""The networks are the published ones: parameter counts by hand, and the forward pass against a second one."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qcqp_prune.data import cifar10, digits
from qcqp_prune.models import (
    BasicBlock,
    DigitsNet,
    LeNet5,
    LeNet300,
    ResNetCifar,
    ZeroPadShortcut,
    densenet40,
    resnet20,
    resnet32,
    resnet56,
    vgg16_bn,
)
from qcqp_prune.train import FinetuneConfig, evaluate, finetune


def count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(("build", "blocks"), [(resnet20, 3), (resnet32, 5), (resnet56, 9)])
def test_resnet_has_the_parameters_of_its_table(build: Callable[[], ResNetCifar], blocks: int) -> None:
    def conv_bn(a: int, b: int) -> int:
        return 9 * a * b + 2 * b

    stem = conv_bn(3, 16)
    first = 2 * blocks * conv_bn(16, 16)
    second = conv_bn(16, 32) + (2 * blocks - 1) * conv_bn(32, 32)
    third = conv_bn(32, 64) + (2 * blocks - 1) * conv_bn(64, 64)
    assert count(build()) == stem + first + second + third + 64 * 10 + 10


def test_densenet40_has_the_parameters_of_its_table() -> None:
    planes, total = 16, 9 * 3 * 16
    for block in range(3):
        for _ in range(12):
            total += 2 * planes + 9 * planes * 12
            planes += 12
        if block < 2:
            total += 2 * planes + planes * planes
    total += 2 * planes + planes * 10 + 10
    assert planes == 448  # 16 + 36 layers of 12
    model = densenet40()
    assert count(model) == total
    assert round(total / 1e6, 1) == 1.0  # table 2 of the paper: 1.0M
    assert sum(isinstance(m, nn.Conv2d | nn.Linear) for m in model.modules()) == 40


def test_vgg16_has_the_parameters_of_its_layers() -> None:
    widths = [3, 64, 64, 128, 128, 256, 256, 256, 512, 512, 512, 512, 512, 512]
    convs = sum(9 * a * b + 2 * b for a, b in itertools.pairwise(widths))
    assert count(vgg16_bn()) == convs + 512 * 10 + 10


def test_lenets_have_the_published_parameters() -> None:
    assert count(LeNet5()) == 431_080
    assert count(LeNet300()) == 266_610


@pytest.mark.parametrize(
    ("model", "shape"),
    [
        (resnet20(7), (2, 3, 32, 32)),
        (densenet40(7), (2, 3, 32, 32)),
        (vgg16_bn(7), (2, 3, 32, 32)),
        (LeNet5(7), (2, 1, 28, 28)),
        (LeNet300(7), (2, 1, 28, 28)),
        (DigitsNet(7), (2, 1, 8, 8)),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_logits_have_one_column_for_each_class(model: nn.Module, shape: tuple[int, ...]) -> None:
    assert model.eval()(torch.zeros(shape)).shape == (2, 7)


@pytest.mark.parametrize("size", [8, 7])
def test_zero_pad_shortcut_is_option_a(size: int) -> None:
    x = torch.randn(2, 16, size, size)
    expected = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 8, 8))
    assert torch.equal(ZeroPadShortcut(8, 8)(x), expected)


def test_an_odd_number_of_new_channels_is_all_padded() -> None:
    assert BasicBlock(4, 7, stride=2)(torch.randn(1, 4, 6, 6)).shape == (1, 7, 3, 3)


def reference_forward(state: dict[str, Tensor], x: Tensor, blocks: int) -> Tensor:
    """ResNet with option A from section 4.2 of the paper, on a state dict alone."""

    def norm(x: Tensor, name: str) -> Tensor:
        mean, var, gamma, beta = (
            state[f"{name}.{n}"][:, None, None] for n in ("running_mean", "running_var", "weight", "bias")
        )
        return (x - mean) / torch.sqrt(var + 1e-5) * gamma + beta

    def conv(x: Tensor, name: str, stride: int) -> Tensor:
        return F.conv2d(x, state[f"{name}.weight"], stride=stride, padding=1)

    out = F.relu(norm(conv(x, "conv1", 1), "bn1"))
    for layer in (1, 2, 3):
        for block in range(blocks):
            name, stride = f"layer{layer}.{block}", 2 if layer > 1 and block == 0 else 1
            inner = F.relu(norm(conv(out, f"{name}.conv1", stride), f"{name}.bn1"))
            inner = norm(conv(inner, f"{name}.conv2", 1), f"{name}.bn2")
            if stride == 2:
                quarter = torch.zeros_like(out[:, : out.shape[1] // 2, ::2, ::2])
                out = torch.cat([quarter, out[:, :, ::2, ::2], quarter], dim=1)
            out = F.relu(inner + out)
    return out.mean(dim=(2, 3)) @ state["linear.weight"].T + state["linear.bias"]


def test_resnet_computes_what_the_paper_says() -> None:
    torch.manual_seed(0)
    model = resnet20().double()
    for buffer in model.buffers():  # statistics that matter
        if buffer.is_floating_point():
            buffer.uniform_(0.5, 1.5)
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(x), reference_forward(model.state_dict(), x, 3))


@pytest.mark.data
@pytest.mark.slow
@pytest.mark.parametrize(
    ("build", "file", "percent"),
    [
        (resnet20, "resnet20-12fca82f.th", 91.73),
        (resnet32, "resnet32-d509ac18.th", 92.63),
        (resnet56, "resnet56-4bfd9763.th", 93.39),
    ],
)
def test_pretrained_resnets_have_their_published_accuracy(
    data_root: Path, pretrained_root: Path, build: Callable[..., ResNetCifar], file: str, percent: float
) -> None:
    result = evaluate(
        build(pretrained=pretrained_root / file), cifar10(data_root).test.loader(250), device="cpu"
    )
    assert result.samples == 10_000
    assert round(100 * result.accuracy, 2) == percent


def test_digits_net_learns_its_digits() -> None:
    train, test = digits()
    torch.manual_seed(0)
    net = DigitsNet()
    finetune(net, train.loader(64, shuffle=True), epochs=30, config=FinetuneConfig.from_scratch())
    assert evaluate(net, test.loader(512)).accuracy >= 0.975
