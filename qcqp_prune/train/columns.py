"""Convolutions that lost kernel columns, written as whole ones while they are worked on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from torch import Tensor, nn

from qcqp_prune.apply.shape_conv import ShapeConv2d


@contextmanager
def as_convolutions(model: nn.Module) -> Iterator[Mapping[str, Tensor]]:
    """Put a convolution that computes the same in place of each ``ShapeConv2d``, which takes its values at the end.

    What is traced then has one operator for each such layer, as the dense network does.

    Yields:
        For the name of each of their weights what of it may change, ``(filters, columns) bool``: the rest stays zero.
    """
    names = model.named_modules(remove_duplicate=False)
    found = {name: m for name, m in names if name and isinstance(m, ShapeConv2d)}
    whole = {m: m.dense() for m in found.values()}
    try:
        for name, m in found.items():
            _put(model, name, whole[m])
        yield {f"{name}.weight": _columns(m) for name, m in found.items()}
        for m, conv in whole.items():
            m.take(conv)
    finally:
        for name, m in found.items():
            _put(model, name, m)


def _columns(m: ShapeConv2d) -> Tensor:
    """As in the weight of a convolution as a matrix: for each input channel the kernel's positions."""
    return m.kept()[:, None].expand(-1, m.in_channels, -1).flatten(1)


def _put(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, own = name.rpartition(".")
    setattr(model.get_submodule(parent), own, module)
