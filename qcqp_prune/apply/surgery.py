"""In-place surgery: slice every parameter and buffer, then set the attributes that follow."""

from __future__ import annotations

import copy
import pickle
import warnings
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from qcqp_prune.apply.removed import drop_blocks
from qcqp_prune.apply.shape_conv import ShapeConv2d, column_index
from qcqp_prune.apply.slim_attention import slim_attentions
from qcqp_prune.apply.uneven_rnn import put_uneven
from qcqp_prune.errors import MaskMismatchError
from qcqp_prune.graph.channels import Attribute, BoolArray, ChannelGraph, TensorSpec
from qcqp_prune.graph.state import caches_dropped


def check_masks(graph: ChannelGraph, flat: BoolArray) -> None:
    """Refuse masks that no smaller network realises.

    Raises:
        MaskMismatchError: a frozen unit is removed, tied groups keep different counts, a layer loses all its
            inputs, outputs or kernel columns, a part of a residual branch goes alone, or a unit is kept without its
            whole or a whole without any part.
    """
    counts = np.bincount(graph.group_of_unit[flat], minlength=len(graph.groups))
    ties: dict[str, int] = {}
    for group, count in zip(graph.groups, counts.tolist(), strict=True):
        if group.frozen_reason is not None and count < group.width:
            raise MaskMismatchError(
                f"the masks remove units of {group.id}, which is kept ({group.frozen_reason}): take masks from solve()"
            )
        if group.tie is not None and ties.setdefault(group.tie, count) != count:
            raise MaskMismatchError(
                f"the masks keep {count} units of {group.id} and {ties[group.tie]} of {group.tie}, which must be "
                "equal: take masks from solve()"
            )
    if not graph.needs.hold(counts):
        raise MaskMismatchError(
            "the masks empty a part of a residual branch and keep the rest: take masks from solve()"
        )
    gone = graph.removed_layers(flat)
    for layer in (layer for k, layer in enumerate(graph.layers) if k not in gone):
        for side, axis in (
            ("inputs", layer.in_axis),
            ("outputs", layer.out_axis),
            ("kernel columns", layer.made_axis),
        ):
            if not flat[graph.axes[axis]].any():
                raise MaskMismatchError(f"the masks remove all {side} of {layer.name}: keep at least one")
    orphans = flat[graph.links.parts] & ~flat[graph.links.wholes]
    if orphans.any():
        group = graph.groups[graph.group_of_unit[graph.links.parts[orphans][0]]]
        raise MaskMismatchError(
            f"the masks keep a unit of {group.id} that belongs to one they remove: take masks from solve()"
        )
    if not graph.links.hold(flat, exempt=graph.stays):
        raise MaskMismatchError(
            "the masks keep a unit of which they remove all parts, such as a channel of a sum that nothing writes: "
            "take masks from solve(), or close them with graph.links.closed()"
        )


def cut(model: nn.Module, graph: ChannelGraph, flat: BoolArray) -> None:
    """Shrink a module in place.

    Args:
        model: the module that was traced, or an unchanged copy.
        graph: its channel graph.
        flat: ``(unit_count,) bool``, from ``Masks.flat``.

    Raises:
        MaskMismatchError: the model's tensors do not have the shapes that the graph knows.
    """
    tensors = dict(model.named_parameters(remove_duplicate=False)) | dict(
        model.named_buffers(remove_duplicate=False)
    )
    pieces, gone = {}, graph.removed_tensors(flat)
    for spec in graph.tensors:
        tensor = tensors.get(spec.name)
        if tensor is None or tuple(tensor.shape) != spec.shape:
            found = "is missing" if tensor is None else f"has shape {tuple(tensor.shape)}, not {spec.shape}"
            raise MaskMismatchError(f"{spec.name} {found}: shrink the model that was traced, and only once")
        if spec.name not in gone:
            pieces[spec.name] = kept_part(graph, spec, tensor.detach(), flat)
    left = [spec for spec in graph.tensors if spec.name not in gone]
    for spec in left:
        _replace(model, spec, tensors[spec.name], pieces[spec.name])
    drop_blocks(model, graph, flat)
    slim_attentions(model, graph, flat)  # it reads the dense sizes of heads
    present = dict(model.named_modules(remove_duplicate=False))
    for attribute in graph.attributes:
        if attribute.module in present:
            _set_attribute(model, attribute, flat)
    for spec in left:
        kernel = sparse_kernel(graph, spec, flat)
        if kernel is not None:
            _put_shape_conv(model, spec, kernel)
    put_uneven(model)


@torch.no_grad()
def put_back(model: nn.Module, small: nn.Module, graph: ChannelGraph, flat: BoolArray) -> None:
    """Give a network the weights of the smaller one that was cut from it, in place, where they were cut from.

    What was removed is left as it is: cut by the same masks, or by masks that keep less, the network is the smaller one
    with the weights that it has now.

    Args:
        model: the module that ``small`` was cut from; of either realisation.
        small: the smaller network, which may have been trained since.
        graph: the channel graph of ``model``.
        flat: ``(unit_count,) bool``, the masks that ``small`` was cut with.

    Raises:
        MaskMismatchError: the smaller network does not have the shapes that the masks say.
    """
    whole, parts = (
        dict(m.named_parameters(remove_duplicate=False)) | dict(m.named_buffers(remove_duplicate=False))
        for m in (model, small)
    )
    gone = graph.removed_tensors(flat)
    for spec in (spec for spec in graph.tensors if spec.name not in gone):
        tensor, part = whole[spec.name], parts.get(spec.name)
        places = kept_part(graph, spec, torch.arange(tensor.numel()).reshape(spec.shape), flat)
        if part is None or part.shape != places.shape:
            found = (
                "is missing" if part is None else f"has shape {tuple(part.shape)}, not {tuple(places.shape)}"
            )
            raise MaskMismatchError(f"{spec.name} {found}: give the network that these masks made")
        entries = tensor.detach().flatten().clone()
        entries[places.flatten().to(tensor.device)] = part.detach().flatten().to(tensor)
        tensor.copy_(entries.reshape(spec.shape))


def sparse_kernel(graph: ChannelGraph, spec: TensorSpec, flat: BoolArray) -> BoolArray | None:
    """Which columns each kept filter has, ``(kept filters, kernel positions)``; None where all have all."""
    if spec.columns is None:
        return None
    kernel = graph.kernel_mask(spec, flat)
    kernel = kernel if spec.axes[0] is None else kernel[flat[graph.axes[spec.axes[0]]]]
    return None if kernel.all() else kernel


def _put_shape_conv(model: nn.Module, spec: TensorSpec, kernel: BoolArray) -> None:
    """Replace a convolution, whose weight and attributes are cut already, by one that has columns only."""
    path = spec.name.rpartition(".")[0]
    conv = model.get_submodule(path)
    if not isinstance(conv, nn.Conv2d):
        raise MaskMismatchError(
            f"{path} is a {type(conv).__name__}, whose kernel columns cannot be cut: shrink the model that was traced"
        )
    weight = cast(nn.Parameter, conv.weight)
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, ShapeConv2d(conv, weight, kernel))


def kept_part(graph: ChannelGraph, spec: TensorSpec, tensor: Tensor, flat: BoolArray) -> Tensor:
    """The kept entries of a tensor, a copy where anything goes.

    A weight that loses kernel columns becomes a matrix, a row for each column, as ``ShapeConv2d`` stores it.
    """
    kernel = sparse_kernel(graph, spec, flat)
    if kernel is not None:
        return _kept_columns(graph, spec, tensor, flat)
    kept = [None if axis is None else flat[graph.axes[axis]] for axis in spec.axes]
    if all(k is None or k.all() for k in kept):
        return tensor
    if spec.segments > 1:
        tensor = _kept_segments(spec, tensor, kept)
        kept[0] = kept[1] = None
    for dim, k in enumerate(kept):
        if k is not None and not k.all():
            index = torch.from_numpy(np.flatnonzero(k)).to(tensor.device)
            tensor = tensor.index_select(dim, index)
    return tensor.contiguous()


def _kept_columns(graph: ChannelGraph, spec: TensorSpec, tensor: Tensor, flat: BoolArray) -> Tensor:
    rows = torch.from_numpy(column_index(graph.kernel_mask(spec, flat))).to(tensor.device)
    matrix = tensor.flatten(2).permute(2, 0, 1).reshape(-1, spec.shape[1]).index_select(0, rows)
    if spec.axes[1] is not None:
        ins = torch.from_numpy(np.flatnonzero(flat[graph.axes[spec.axes[1]]])).to(tensor.device)
        matrix = matrix.index_select(1, ins)
    return matrix.contiguous()


def _kept_segments(spec: TensorSpec, tensor: Tensor, kept: list[BoolArray | None]) -> Tensor:
    """A grouped convolution's weight: dimension 1 is local to each segment of dimension 0."""
    whole = np.ones(spec.shape[0], np.bool_), np.ones(spec.segments * spec.shape[1], np.bool_)
    rows = (whole[0] if kept[0] is None else kept[0]).reshape(spec.segments, -1)
    cols = (whole[1] if kept[1] is None else kept[1]).reshape(spec.segments, -1)
    parts = []
    for block, r, c in zip(tensor.reshape(spec.segments, -1, *tensor.shape[1:]), rows, cols, strict=True):
        if r.any() and c.any():
            parts.append(block[torch.from_numpy(np.flatnonzero(r))][:, torch.from_numpy(np.flatnonzero(c))])
    if len({p.shape for p in parts}) != 1:
        raise MaskMismatchError(
            f"the masks keep unequal counts in the groups of {spec.name}: take masks from solve()"
        )
    return torch.cat(parts)


def _replace(model: nn.Module, spec: TensorSpec, old: Tensor, piece: Tensor) -> None:
    if piece.shape == old.shape:
        return
    new: Tensor = piece
    if isinstance(old, nn.Parameter):
        new = nn.Parameter(piece, requires_grad=old.requires_grad)
    for path in (spec.name, *spec.aliases):
        parent, _, leaf = path.rpartition(".")
        owner = model.get_submodule(parent)
        if spec.kind == "parameter":
            # Through the module: recurrent ones keep their weights in a list besides.
            setattr(owner, leaf, new)
        else:
            owner._buffers[leaf] = new


def _set_attribute(model: nn.Module, attribute: Attribute, flat: BoolArray) -> None:
    value: list[int] = [p if isinstance(p, int) else int(flat[list(p)].sum()) for p in attribute.parts]
    module = model.get_submodule(attribute.module)
    new: Any = value[0] if attribute.scalar else tuple(value)
    old = getattr(module, attribute.name)
    if isinstance(old, list):
        new = value
    if isinstance(old, torch.Size):
        new = torch.Size(value)
    setattr(module, attribute.name, new)


def copied(model: nn.Module) -> nn.Module:
    """A deep copy that shares nothing with the model.

    Raises:
        MaskMismatchError: the model cannot be copied.
    """
    # What a hook computes before each call, such as a weight of the old weight_norm, has a history of gradients, with
    # which PyTorch copies nothing; the copy computes its own.
    computed = {
        id(value): value.detach().clone()
        for module in model.modules()
        for value in vars(module).values()
        if isinstance(value, Tensor) and not value.is_leaf
    }
    try:
        with caches_dropped(model), warnings.catch_warnings():
            # PyTorch copies a graph module by its own deprecated tree functions.
            warnings.filterwarnings("ignore", message=".*LeafSpec", category=FutureWarning)
            return copy.deepcopy(model, computed)
    except (TypeError, RuntimeError, pickle.PickleError) as error:
        raise MaskMismatchError(
            f"the model cannot be copied ({error}): rebuild it with its constructor and load its state dict first"
        ) from error
