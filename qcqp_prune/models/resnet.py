"""ResNet-20, 32 and 56 for 32 x 32 images, with the parameter names that the published weights use."""

from __future__ import annotations

import os
from typing import Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qcqp_prune.models.pretrained import load_pretrained

Shortcut = Literal["zero_pad", "projection"]


class ZeroPadShortcut(nn.Module):
    """Option A of He et al.: every second pixel, and zero channels before and after the old ones.

    The padding is a module of its own, so that a smaller network is had by changing `pad.padding` and no code.

    Args:
        front: zero channels put before the old ones.
        back: zero channels put after them.
    """

    def __init__(self, front: int, back: int) -> None:
        super().__init__()
        # A 3-d pad of an (N, C, H, W) tensor acts on C, H and W; its last two numbers are those of C.
        self.pad = nn.ConstantPad3d((0, 0, 0, 0, front, back), 0.0)

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, C, H, W) to (N, front + C + back, ceil(H / 2), ceil(W / 2))."""
        return cast(Tensor, self.pad(x[:, :, ::2, ::2]))


class BasicBlock(nn.Module):
    """Two 3 x 3 convolutions beside a shortcut: `relu(bn2(conv2(relu(bn1(conv1(x))))) + shortcut(x))`.

    Args:
        in_planes: channels read.
        planes: channels put out.
        inner: channels between the two convolutions; `planes` where it is None.
        stride: 1, or 2 to halve the image.
        shortcut: what stands on the shortcut where the shape changes.
    """

    def __init__(
        self,
        in_planes: int,
        planes: int,
        *,
        inner: int | None = None,
        stride: int = 1,
        shortcut: Shortcut = "zero_pad",
    ) -> None:
        super().__init__()
        inner = planes if inner is None else inner
        self.conv1 = nn.Conv2d(in_planes, inner, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(inner)
        self.conv2 = nn.Conv2d(inner, planes, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.shortcut: nn.Module
        if stride == 1 and in_planes == planes:
            self.shortcut = nn.Sequential()
        elif shortcut == "zero_pad":
            extra = planes - in_planes
            self.shortcut = ZeroPadShortcut(extra // 2, extra - extra // 2)
        else:
            self.shortcut = nn.Sequential(
                nn.Conv2d(in_planes, planes, 1, stride=stride, bias=False), nn.BatchNorm2d(planes)
            )

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, in_planes, H, W) to (N, planes, H / stride, W / stride)."""
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out)) + self.shortcut(x)
        return F.relu(out)


class ResNetCifar(nn.Module):
    """A residual network of depth `6 * blocks + 2` for 32 x 32 RGB images; 16, 32 and 64 channels in three stages.

    Parameters and buffers are named as in the widespread CIFAR-10 port, so that its weights load.

    Args:
        blocks: residual blocks in each stage.
        num_classes: outputs.

    References:
        He, Zhang, Ren, Sun: Deep residual learning for image recognition, CVPR 2016, section 4.2, arXiv 1512.03385.
        Port and weights: https://github.com/akamaster/pytorch_resnet_cifar10
    """

    def __init__(self, blocks: int, num_classes: int = 10) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = _stage(16, 16, blocks, stride=1)
        self.layer2 = _stage(16, 32, blocks, stride=2)
        self.layer3 = _stage(32, 64, blocks, stride=2)
        self.linear = nn.Linear(64, num_classes)
        initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        """Map images (N, 3, 32, 32) to logits (N, num_classes)."""
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.layer3(self.layer2(self.layer1(out)))
        out = torch.flatten(F.adaptive_avg_pool2d(out, 1), 1)
        return cast(Tensor, self.linear(out))


def resnet20(num_classes: int = 10, *, pretrained: str | os.PathLike[str] | None = None) -> ResNetCifar:
    """Build ResNet-20, filled from the file `pretrained` where one is given (see `load_pretrained`)."""
    return _build(3, num_classes, pretrained)


def resnet32(num_classes: int = 10, *, pretrained: str | os.PathLike[str] | None = None) -> ResNetCifar:
    """Build ResNet-32, filled from the file `pretrained` where one is given (see `load_pretrained`)."""
    return _build(5, num_classes, pretrained)


def resnet56(num_classes: int = 10, *, pretrained: str | os.PathLike[str] | None = None) -> ResNetCifar:
    """Build ResNet-56, filled from the file `pretrained` where one is given (see `load_pretrained`)."""
    return _build(9, num_classes, pretrained)


def initialise(model: nn.Module) -> None:
    """Fill convolutions and linear layers as He et al. do: normal, variance 2 / fan_in; biases zero."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)


def _stage(in_planes: int, planes: int, blocks: int, *, stride: int) -> nn.Sequential:
    first = BasicBlock(in_planes, planes, stride=stride)
    return nn.Sequential(first, *(BasicBlock(planes, planes) for _ in range(blocks - 1)))


def _build(blocks: int, num_classes: int, pretrained: str | os.PathLike[str] | None) -> ResNetCifar:
    model = ResNetCifar(blocks, num_classes)
    return model if pretrained is None else load_pretrained(model, pretrained)
