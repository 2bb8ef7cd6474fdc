"""Normalisations and other operators with one parameter entry for each channel."""

from __future__ import annotations

from torch.fx import Node

from qcqp_prune.graph.axes import Axes
from qcqp_prune.graph.ops.convolution import bias
from qcqp_prune.graph.walk import Handler, Walk

UNFOLLOWED = "normalised by parameters over a dimension that no handler could follow"


def channel_norm(walk: Walk, node: Node) -> Axes:
    """Batch and instance norm: each channel for itself."""
    source = walk.arg(node, "input")
    axes = list(walk.axes(source))
    labels = axes[1]
    for name in ("weight", "bias", "running_mean", "running_var"):
        vector = walk.arg(node, name)
        if isinstance(vector, Node):
            labels = walk.table.merge(labels, walk.axis(vector, 0), UNFOLLOWED)
    if labels is not None:
        walk.attribute(node, {"num_features": labels})
    axes[1] = labels
    return axes


def layer_norm(walk: Walk, node: Node) -> Axes:
    """Layer and RMS norm over the last dimensions; statistics are of the kept entries, as in a smaller network."""
    source, shape = walk.arg(node, "input"), walk.arg(node, "normalized_shape")
    axes = list(walk.axes(source))
    first = len(axes) - len(shape)
    for name in ("weight", "bias"):  # an RMS norm has no bias
        vector = walk.arg(node, name)
        if isinstance(vector, Node):
            for d in range(len(shape)):
                axes[first + d] = walk.table.merge(axes[first + d], walk.axis(vector, d), UNFOLLOWED)
    tracked = axes[first:]
    sizes = walk.shape(source)[first:]
    parts = [size if labels is None else labels for labels, size in zip(tracked, sizes, strict=True)]
    if any(labels is not None for labels in tracked):
        walk.attribute(node, {"normalized_shape": parts})
    return axes


def group_norm(walk: Walk, node: Node) -> Axes:
    """Group norm: every group keeps equally many channels, so that the groups stay what they were."""
    source, groups = walk.arg(node, "input"), int(walk.arg(node, "num_groups"))
    axes = list(walk.axes(source))
    labels = axes[1]
    for name in ("weight", "bias"):
        vector = walk.arg(node, name)
        if isinstance(vector, Node):
            labels = walk.table.merge(labels, walk.axis(vector, 0), UNFOLLOWED)
    axes[1] = labels
    if labels is not None:
        if groups == len(labels):
            walk.attribute(node, {"num_channels": labels, "num_groups": labels})
        else:
            walk.attribute(node, {"num_channels": labels})
            if groups > 1:
                walk.table.add_runs(labels, groups, "a group norm keeps equally many channels in each group")
    return axes


def prelu(walk: Walk, node: Node) -> Axes:
    """A slope for each channel, or one for all."""
    source, weight = walk.tensor_inputs(node)
    axes = list(walk.axes(source))
    if walk.shape(weight) == (1,):
        walk.table.freeze(walk.axis(weight, 0), "one slope for all channels")
    else:
        bias(walk, weight, labels) if (labels := axes[1]) is not None else walk.freeze_inputs(
            node, UNFOLLOWED
        )
        if labels is not None:
            walk.attribute(node, {"num_parameters": labels})
    return axes


HANDLERS: dict[str, Handler] = {
    "aten::batch_norm": channel_norm,
    "aten::instance_norm": channel_norm,
    "aten::layer_norm": layer_norm,
    "aten::rms_norm": layer_norm,
    "aten::group_norm": group_norm,
    "aten::prelu": prelu,
}
