"""Calibration data: the first samples of a loader, in batches of one size."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from qcqp_prune.data import seed_epoch
from qcqp_prune.errors import InvalidOptionError
from qcqp_prune.graph.batches import PAIRS, arguments, is_pair, shown
from qcqp_prune.graph.channels import ChannelGraph

HELD = 2**31
"""Bytes that what a network computes for all samples at once may take, roughly."""

_ALIVE = 4
"""Tensors that are alive together, each as large as the largest result of a layer."""


def samples_of(
    batches: Iterable[Any],
    graph: ChannelGraph,
    samples: int,
    device: torch.device,
    *,
    seed: int = 0,
    who: str,
) -> tuple[list[Any], list[Tensor]]:
    """Batches of one size with ``samples`` samples at most together; a part of the first where it alone has more.

    Fewer where more would take too much memory, because all are held at once: those whose results of the
    largest layer fit four times into two gigabytes.

    Args:
        batches: pairs of (inputs, targets), inputs as for ``arguments``; iterated once.
        graph: of the network that they are for.
        samples: how many.
        device: where they are put.
        seed: the loader starts from it as in a first epoch, whatever it has drawn before; torch's own state comes back.
        who: asks, for errors.

    Returns:
        Inputs as ``(args, kwargs)``, and targets.

    Raises:
        InvalidOptionError: there is no batch, or one is no pair of inputs and targets.
    """
    inputs: list[Any] = []
    targets: list[Tensor] = []
    if samples < 1:
        raise InvalidOptionError(f"samples is {samples}: give a positive number")
    largest = max(
        (x.out_elements * len(graph.axes[x.out_axis]) * x.itemsize for x in graph.layers), default=1
    )
    samples = max(1, min(samples, HELD // (_ALIVE * max(largest, 1))))
    for batch in _from_start(batches, seed):
        if not is_pair(batch):
            raise InvalidOptionError(f"{who} was given {shown(batch)} as a batch: give a loader of {PAIRS}")
        if targets and len(batch[1]) != len(targets[0]):
            continue  # a smaller last one
        if targets and (len(targets) + 1) * len(targets[0]) > samples:
            break
        inputs.append(arguments(batch[0], device))
        targets.append(batch[1].to(device))
    if not inputs:
        raise InvalidOptionError(
            f"{who} was given no batch: pass a loader with at least one (one-shot iterators run dry)"
        )
    return first(inputs, targets, samples)


def _from_start(batches: Iterable[Any], seed: int) -> Iterator[Any]:
    with torch.random.fork_rng(devices=[]):
        seed_epoch(batches, seed, 0)
        yield from batches


def first(inputs: list[Any], targets: list[Tensor], samples: int) -> tuple[list[Any], list[Tensor]]:
    """The first of them: whole batches, or a part of the first one."""
    size = len(targets[0])
    if samples >= size:
        return inputs[: samples // size], targets[: samples // size]

    def part(x: Any) -> Any:
        return x[:samples] if isinstance(x, Tensor) and x.ndim and len(x) == size else x

    return [pytree.tree_map(part, inputs[0])], [targets[0][:samples]]
