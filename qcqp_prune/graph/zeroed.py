"""Tensors with everything that masks remove at zero, in their full size."""

from __future__ import annotations

import torch
from torch import Tensor

from qcqp_prune.graph.channels import BoolArray, ChannelGraph, TensorSpec


def tensor_mask(graph: ChannelGraph, spec: TensorSpec, flat: BoolArray) -> Tensor | None:
    """Which entries of a parameter or buffer are kept, in its shape; None where all are. Kernel columns aside."""
    if all(axis is None or flat[graph.axes[axis]].all() for axis in spec.axes):
        return None
    mask = torch.ones(spec.shape, dtype=torch.bool)
    for dim, axis in enumerate(spec.axes):
        if axis is None:
            continue
        kept = torch.from_numpy(flat[graph.axes[axis]])
        if dim == 1 and spec.segments > 1:
            local = kept.reshape(spec.segments, 1, -1)
            rows = mask.reshape(spec.segments, -1, spec.shape[1], *spec.shape[2:])
            mask = (rows & local.reshape(*local.shape, *[1] * (len(spec.shape) - 2))).reshape(spec.shape)
        else:
            mask = mask & kept.reshape([-1 if d == dim else 1 for d in range(len(spec.shape))])
    return mask


def kernel_mask(graph: ChannelGraph, spec: TensorSpec, flat: BoolArray) -> Tensor:
    """Which entries of a weight with kernel columns are in a kept column, to be broadcast over its inputs."""
    kept = torch.from_numpy(graph.kernel_mask(spec, flat).copy())
    return kept.reshape(spec.shape[0], 1, *spec.shape[2:])


def zeroed(tensor: Tensor, graph: ChannelGraph, spec: TensorSpec, flat: BoolArray) -> Tensor:
    """A parameter or buffer with what is removed at zero; the tensor itself where nothing of it is."""
    mask = tensor_mask(graph, spec, flat)
    if mask is not None:
        tensor = tensor.masked_fill(~mask.to(tensor.device), 0)
    if spec.columns is not None and not flat[graph.axes[spec.columns]].all():
        tensor = tensor * kernel_mask(graph, spec, flat).to(tensor.device)
    return tensor
