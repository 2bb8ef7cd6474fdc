"""Networks of the pruning literature, in the layouts that published weights use. Importing this needs torch alone."""

from qcqp_prune.models.densenet import DenseNetCifar, densenet40
from qcqp_prune.models.digits import DigitsNet
from qcqp_prune.models.lenet import LeNet5, LeNet300
from qcqp_prune.models.pretrained import load_pretrained
from qcqp_prune.models.resnet import BasicBlock, ResNetCifar, ZeroPadShortcut, resnet20, resnet32, resnet56
from qcqp_prune.models.vgg import VGG16Cifar, vgg16_bn

__all__ = [
    "BasicBlock",
    "DenseNetCifar",
    "DigitsNet",
    "LeNet5",
    "LeNet300",
    "ResNetCifar",
    "VGG16Cifar",
    "ZeroPadShortcut",
    "densenet40",
    "load_pretrained",
    "resnet20",
    "resnet32",
    "resnet56",
    "vgg16_bn",
]
