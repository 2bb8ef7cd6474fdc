"""Pooling, upsampling and other operators that mix the last dimensions and leave batch and channels alone."""

from __future__ import annotations

from functools import partial

from torch.fx import Node

from qcqp_prune.graph.axes import Axes
from qcqp_prune.graph.walk import Handler, Walk


def spatial(walk: Walk, node: Node, *, dims: int) -> Axes | list[Axes]:
    """The last ``dims`` dimensions are mixed, so nothing of them can go; the others pass."""
    axes = walk.axes(walk.tensor_inputs(node)[0])
    for labels in axes[-dims:]:
        walk.table.freeze(labels, "pooled or resampled along it")
    out: Axes = [*axes[:-dims], *[None] * dims]
    value = node.meta["val"]
    return [list(out) for _ in value] if isinstance(value, list | tuple) else out


HANDLERS: dict[str, Handler] = {
    f"aten::{name}{n}d{suffix}": partial(spatial, dims=n)
    for n in (1, 2, 3)
    for name in ("max_pool", "avg_pool", "adaptive_avg_pool", "adaptive_max_pool", "_adaptive_avg_pool", "lp_pool")
    for suffix in ("", "_with_indices")
} | {
    f"aten::upsample_{name}": partial(spatial, dims=n)
    for name, n in {
        "nearest1d": 1,
        "nearest2d": 2,
        "nearest3d": 3,
        "_nearest_exact2d": 2,
        "linear1d": 1,
        "bilinear2d": 2,
        "bicubic2d": 2,
        "trilinear3d": 3,
    }.items()
}
