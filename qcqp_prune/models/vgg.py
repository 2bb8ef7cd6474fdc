"""VGG-16 with batch norm for 32 x 32 images and a single linear classifier, as the pruning literature uses it."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from qcqp_prune.models.resnet import initialise

_STAGES = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))


class VGG16Cifar(nn.Module):
    """Thirteen 3 x 3 convolutions, each with batch norm and ReLU, a 2 x 2 max pool after each stage, one linear layer.

    The convolutions have no bias: the batch norm behind each has one.

    Args:
        num_classes: outputs.

    References:
        Simonyan, Zisserman: Very deep convolutional networks for large-scale image recognition, arXiv 1409.1556.
        Li et al.: Pruning filters for efficient ConvNets, ICLR 2017, arXiv 1608.08710 (the CIFAR-10 variant).
    """

    def __init__(self, num_classes: int = 10) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        planes = 3
        for stage in _STAGES:
            for width in stage:
                conv = nn.Conv2d(planes, width, 3, padding=1, bias=False)
                layers += [conv, nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
                planes = width
            layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Linear(planes, num_classes)
        initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        """Map images (N, 3, 32, 32) to logits (N, num_classes)."""
        return cast(Tensor, self.classifier(torch.flatten(self.features(x), 1)))


def vgg16_bn(num_classes: int = 10) -> VGG16Cifar:
    """Build VGG-16 with batch norm for 32 x 32 images."""
    return VGG16Cifar(num_classes)
