"""Networks with their data and a recipe of training: what benchmarks that train or measure accuracy run on.

CIFAR ResNets have their published weights; the networks for Fashion-MNIST are trained here once and kept in
.cache/dense. The data is read from QCQP_PRUNE_DATA, or .cache/data.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property, partial
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

import qcqp_prune as qp
from benchmarks.instances import DATA, ROOT, pretrained
from qcqp_prune.data import Augmentation, BatchLoader, DataSplit, cifar10, fashion_mnist
from qcqp_prune.models import LeNet5
from qcqp_prune.models.resnet import initialise
from qcqp_prune.program.problem import all_resources, parse_budgets
from qcqp_prune.train import FinetuneConfig, finetune

DENSE = ROOT / ".cache" / "dense"
CALIBRATION = 2500
"""Training images that selections and recalibration may look at, the same for everyone."""
HELD_OUT = 1000
"""Further ones, on which predictions of the loss are checked."""


class Some:
    """The first batches of each epoch of a loader that shuffles, so that each short epoch sees other images."""

    def __init__(self, loader: BatchLoader, batches: int) -> None:
        self.loader, self.batches = loader, min(batches, len(loader))

    def __len__(self) -> int:
        return self.batches

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return islice(iter(self.loader), self.batches)

    def set_epoch(self, epoch: int) -> None:
        self.loader.set_epoch(epoch)


@dataclass(frozen=True, eq=False)
class Setting:
    """A network with its data, and the recipe by which it is trained further.

    Attributes:
        name: of the network.
        model: the dense network with its weights.
        example: what it is traced with.
        data: images that it was trained and is tested on.
        augment: random changes of training images.
        recipe: of training it further.
        options: of the trace.
        quick: whether weights lie channels last and tests run under bfloat16 as training does, which takes half of the
            time on a CPU that has it; for networks that take long.
    """

    name: str
    model: nn.Module
    example: Tensor
    data: DataSplit
    augment: Augmentation | None
    recipe: FinetuneConfig
    options: Mapping[str, Any] = field(default_factory=dict)
    quick: bool = False

    @cached_property
    def graph(self) -> qp.ChannelGraph:
        return qp.trace(self.model, self.example, **self.options)

    @cached_property
    def inner_graph(self) -> qp.ChannelGraph:
        """As ``graph``, but what is written by several layers, such as a residual stream, stays whole."""
        return qp.trace(
            self.model, self.example, **{**self.options, "ignored_layers": sorted(shared(self.graph))}
        )

    @cached_property
    def macs(self) -> int:
        """Multiply-adds of the dense network."""
        return qp.Macs().measure(self.model, self.example)

    def limit(self, budget: str) -> int:
        """Multiply-adds that a budget such as ``"50%"`` holds."""
        (parsed,) = parse_budgets(budget, all_resources())
        return parsed.limit(self.macs)

    def loader(self, seed: int, batches: int) -> Some:
        """Batches of 128 training images; order and augmentation depend on the seed alone."""
        return Some(
            self.data.train.loader(128, shuffle=True, augment=self.augment, drop_last=True, seed=seed),
            batches,
        )

    def calibration(self) -> BatchLoader:
        """Training images as they are, always the same ones in the same order."""
        return self._drawn(0, CALIBRATION)

    def held_out(self) -> BatchLoader:
        """Training images that the calibration has not, always the same ones."""
        return self._drawn(CALIBRATION, CALIBRATION + HELD_OUT)

    def _drawn(self, start: int, stop: int) -> BatchLoader:
        order = torch.randperm(len(self.data.train), generator=torch.Generator().manual_seed(0))
        return self.data.train.select(order[start:stop]).loader(250)


def shared(graph: qp.ChannelGraph) -> set[str]:
    """Layers whose outputs are channels of another layer's outputs too: those of residual streams."""
    writers: dict[int, set[str]] = {}
    for layer in graph.layers:
        for g in written(graph, layer):
            writers.setdefault(g, set()).add(layer.name)
    return set().union(*(names for names in writers.values() if len(names) > 1))


def written(graph: qp.ChannelGraph, layer: Any) -> set[int]:
    """Groups of a layer's outputs."""
    return set(graph.group_of_unit[graph.axes[layer.out_axis]].tolist())


def small_vgg() -> nn.Sequential:
    """Seven 3 x 3 convolutions of 8 to 64 channels with batch norm, for 28 x 28 grey images: 1.9 million MACs."""
    layers: list[nn.Module] = []
    planes = 1
    for stage in ((8,), (16, 16), (32, 32), (64, 64)):
        for width in stage:
            conv = nn.Conv2d(planes, width, 3, padding=1, bias=False)
            layers += [conv, nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
            planes = width
        layers.append(nn.MaxPool2d(2))
    model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(planes, 10))
    initialise(model)
    return model


def fashion(name: str, build: Callable[[], nn.Module]) -> Setting:
    """A network for Fashion-MNIST, trained from scratch by a recipe of its own and kept for the next run."""
    data = fashion_mnist(DATA / "fashion_mnist")
    torch.manual_seed(0)
    model = build()
    finetune(
        model,
        data.train.loader(128, shuffle=True),
        epochs=8,
        config=FinetuneConfig(lr=0.05, schedule="cosine", warmup=0.5),
        checkpoint=DENSE / name,
    )
    example = torch.zeros(1, 1, 28, 28)
    return Setting(name, model, example, data, None, FinetuneConfig(lr=0.02, schedule="cosine"))


def cifar(name: str) -> Setting:
    """A ResNet on CIFAR-10 with its published weights; the data is normalised as they ask for."""
    return Setting(
        name,
        pretrained(name),
        torch.zeros(1, 3, 32, 32),
        cifar10(DATA / "cifar-10-batches-bin"),
        Augmentation(),
        FinetuneConfig(lr=0.02, schedule="cosine", bfloat16=True),
        quick=name == "resnet56",
    )


SETTINGS: dict[str, Callable[[], Setting]] = {
    "lenet5": partial(fashion, "lenet5", LeNet5),
    "small_vgg": partial(fashion, "small_vgg", small_vgg),
    **{name: partial(cifar, name) for name in ("resnet20", "resnet32", "resnet56")},
}
