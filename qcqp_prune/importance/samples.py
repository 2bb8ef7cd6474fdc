"""Calibration data: the first samples of a loader, in batches of one shape and size."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from qcqp_prune.data import seed_epoch
from qcqp_prune.errors import InvalidOptionError
from qcqp_prune.graph.batches import PAIRS, Call, arguments, is_pair, require_loader, shown
from qcqp_prune.graph.channels import ChannelGraph

logger = logging.getLogger(__name__)

HELD = 2**31
"""Bytes that what a network computes for all samples at once may take, roughly."""

_ALIVE = 4
"""Tensors that are alive together, each as large as the largest result of a layer."""

_FEW = 0.75
"""Share of what was read; where fewer are used, that is a warning."""


def samples_of(
    batches: Iterable[Any],
    graph: ChannelGraph,
    samples: int,
    device: torch.device,
    *,
    seed: int = 0,
    who: str,
) -> tuple[list[Any], list[Tensor]]:
    """Batches of one shape and size with ``samples`` samples at most together.

    Fewer where more would take too much memory, because all are held at once: those whose results of the
    largest layer fit four times into two gigabytes. Of batches of several shapes those in which most samples come; of
    several sizes the same, and the others are joined and cut to that size. What is left over, as a smaller last batch
    is, is not used; a warning says so where that is much of what was read.

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
        InvalidOptionError: there is no batch, one is no pair of inputs and targets, or what was given is no loader.
    """
    require_loader(batches, who)
    if samples < 1:
        raise InvalidOptionError(f"samples is {samples}: give a positive number")
    largest = max(
        (x.out_elements * len(graph.axes[x.out_axis]) * x.itemsize for x in graph.layers), default=1
    )
    samples = max(1, min(samples, HELD // (_ALIVE * max(largest, 1))))
    alike: dict[Any, list[_Batch]] = defaultdict(list)
    held = whole = 0
    for given in _from_start(batches, seed):
        batch = _Batch.of(given, device, who)
        part = batch.part(0, samples - held)
        if part.size:
            alike[part.shape()].append(part)
        held += part.size
        whole += part.size if part is batch else 0
        if held >= samples:
            break
    if not alike:
        raise InvalidOptionError(
            f"{who} was given no batch: pass a loader with at least one (one-shot iterators run dry)"
        )
    used = _of_one_size(max(alike.values(), key=_samples))
    # A batch that is more than what was asked for is no loss.
    if (left := whole - _samples(used)) > 0:
        logger.log(
            logging.WARNING if _samples(used) < _FEW * whole else logging.INFO,
            f"{who} does not use {left:,} of {whole:,} samples, in batches of other shapes or sizes than most have: "
            "give batches of one shape and size for all to count",
        )
    return [batch.inputs for batch in used], [batch.targets for batch in used]


@dataclass(frozen=True, eq=False)
class _Batch:
    """Arguments of a model, ``(args, kwargs)``, with targets."""

    inputs: Call
    targets: Tensor

    @classmethod
    def of(cls, given: Any, device: torch.device, who: str) -> _Batch:
        """What a loader yielded, on a device.

        Raises:
            InvalidOptionError: it is no pair of inputs and targets.
        """
        if not is_pair(given):
            raise InvalidOptionError(f"{who} was given {shown(given)} as a batch: give a loader of {PAIRS}")
        return cls(arguments(given[0], device), given[1].to(device))

    @property
    def size(self) -> int:
        """How many samples it holds."""
        return len(self.targets)

    def shape(self) -> Any:
        """Alike for batches that differ in nothing but the number of their samples."""

        def of(x: Any) -> Any:
            if not isinstance(x, Tensor):
                return x
            return (tuple(x.shape[1:]) if self.each(x) else x.shape, self.each(x), x.dtype)

        leaves, tree = pytree.tree_flatten(self.inputs)
        return str(tree), *map(of, leaves)

    def each(self, x: Any) -> bool:
        """Whether something has an entry for each sample."""
        return isinstance(x, Tensor) and x.ndim > 0 and len(x) == self.size

    def part(self, start: int, stop: int) -> _Batch:
        """Some of its samples."""
        if start <= 0 and stop >= self.size:
            return self
        inputs = pytree.tree_map(lambda x: x[start:stop] if self.each(x) else x, self.inputs)
        return _Batch(inputs, self.targets[start:stop])

    def joined(self, others: Sequence[_Batch]) -> _Batch:
        """With the samples of others of the same shape behind its own."""

        def along(x: Any, *rest: Any) -> Any:
            return torch.cat([x, *rest]) if self.each(x) else x

        inputs = pytree.tree_map(along, self.inputs, *(other.inputs for other in others))
        return _Batch(inputs, torch.cat([self.targets, *(other.targets for other in others)]))


def _samples(batches: Iterable[_Batch]) -> int:
    return sum(batch.size for batch in batches)


def _of_one_size(batches: Sequence[_Batch]) -> list[_Batch]:
    """Batches of the size in which most samples come, and what the others make together of that size."""
    by_size: dict[int, list[_Batch]] = defaultdict(list)
    for batch in batches:
        by_size[batch.size].append(batch)
    kept = max(by_size.values(), key=_samples)
    size = kept[0].size
    rest = [batch for batch in batches if batch.size != size]
    if len({(batch.targets.shape[1:], batch.targets.dtype) for batch in rest}) != 1:
        return kept  # none, or targets that do not fit behind one another
    whole = rest[0].joined(rest[1:])
    return kept + [whole.part(k, k + size) for k in range(0, whole.size - size + 1, size)]


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
