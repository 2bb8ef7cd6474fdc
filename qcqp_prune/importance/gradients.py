"""Calibration batches, and gradients of the loss on them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from qcqp_prune.errors import InvalidOptionError, InvalidScoreError
from qcqp_prune.graph.batches import PAIRS, Call, arguments, is_pair, outputs_of, require_loader, shown
from qcqp_prune.graph.channels import ChannelGraph, Layer
from qcqp_prune.graph.state import eval_mode
from qcqp_prune.importance.losses import Loss, cross_entropy, loss_of

Batches = Iterable[Any]
"""Pairs of (inputs, targets), inputs a tensor, a tuple of arguments or a dict of keyword ones, targets a tensor; gone
through once each time an importance is computed."""


def read_batches(batches: Batches, device: torch.device, who: str) -> Iterator[tuple[Call, Tensor]]:
    """Arguments and targets on a device.

    Args:
        batches: what the user gave.
        device: where to.
        who: whose batches they are, for messages.

    Raises:
        InvalidOptionError: one is no pair of inputs and targets, there is none, or what was given is no loader.
    """
    require_loader(batches, who)
    count = 0
    for batch in batches:
        if not is_pair(batch):
            raise InvalidOptionError(f"{who} was given {shown(batch)} as a batch: give a loader of {PAIRS}")
        yield arguments(batch[0], device), batch[1].to(device)
        count += 1
    if count == 0:
        raise InvalidOptionError(
            f"{who} was given no batch: pass a loader with at least one (one-shot iterators run dry)"
        )


def device_of(model: nn.Module) -> torch.device:
    """Where the first parameter of a model lies; the CPU where it has none."""
    first = next(model.parameters(), None)
    return torch.device("cpu") if first is None else first.device


def weight_names(graph: ChannelGraph) -> list[str]:
    """The weights of all layers, each once."""
    return list(dict.fromkeys(layer.weight for layer in graph.layers if layer.weight))


def trainable(model: nn.Module, names: Iterable[str], who: str) -> dict[str, nn.Parameter]:
    """Parameters by name.

    Raises:
        InvalidOptionError: one does not require a gradient.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    names = list(names)
    frozen = [n for n in names if n not in parameters or not parameters[n].requires_grad]
    if frozen:
        raise InvalidOptionError(
            f"{frozen[0]} and {len(frozen) - 1} more parameters do not require gradients, which {who} needs: "
            "call requires_grad_(True) on the model, or use Magnitude"
        )
    return {name: parameters[name] for name in names}


def batch_gradients(
    model: nn.Module, parameters: dict[str, nn.Parameter], batches: Batches, loss: Loss | None, who: str
) -> Iterator[dict[str, Tensor]]:
    """Gradients of each batch's loss in eval mode, by name; none for a parameter that the loss does not depend on.

    The model's own gradients and modes are left as they were.
    """
    with eval_mode(model), torch.enable_grad():
        for call, targets in read_batches(batches, device_of(model), who):
            value = loss_of(loss or cross_entropy, outputs_of(model, call, who), targets, who)
            if not value.requires_grad:
                raise InvalidOptionError(
                    f"{who}: the loss has no gradient towards any weight: give one that autograd can follow, or use "
                    "Magnitude"
                )
            found = torch.autograd.grad(value, list(parameters.values()), allow_unused=True)
            yield {n: g for n, g in zip(parameters, found, strict=True) if g is not None}


def require_finite(values: dict[str, Tensor]) -> None:
    """Refuse sums of gradients that hold NaN or infinity.

    Raises:
        InvalidScoreError: one does.
    """
    broken = [name for name, value in values.items() if not torch.isfinite(value).all()]
    if broken:
        raise InvalidScoreError(
            f"the gradient of {broken[0]} is NaN or infinite: check the loss and the data"
        )


def uses(graph: ChannelGraph) -> Counter[tuple[str, tuple[int, int] | None]]:
    """How often each weight, or part of a weight, is used; its gradient is of all of these together."""
    return Counter((layer.weight, layer.rows) for layer in graph.layers)


def share(layer: Layer, counted: Counter[tuple[str, tuple[int, int] | None]]) -> float:
    """The part of it that one use gets."""
    return 1 / counted[layer.weight, layer.rows]
