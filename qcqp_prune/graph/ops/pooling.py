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


def sampled(walk: Walk, node: Node) -> Axes:
    """``grid_sample``: the plane is sampled at places that a second tensor names; channels pass."""
    source, grid = walk.tensor_inputs(node)[:2]
    for labels in (*walk.axes(source)[2:], *walk.axes(grid)):
        walk.table.freeze(labels, "pooled or resampled along it")
    return [*walk.axes(source)[:2], *[None] * (len(walk.shape(node)) - 2)]


UPSAMPLING = {
    "upsample_nearest1d": 1,
    "upsample_nearest2d": 2,
    "upsample_nearest3d": 3,
    "_upsample_nearest_exact1d": 1,
    "_upsample_nearest_exact2d": 2,
    "_upsample_nearest_exact3d": 3,
    "upsample_linear1d": 1,
    "upsample_bilinear2d": 2,
    "upsample_bicubic2d": 2,
    "upsample_trilinear3d": 3,
    "_upsample_bilinear2d_aa": 2,
    "_upsample_bicubic2d_aa": 2,
}
POOLING = {
    f"{name}{n}d{suffix}": n
    for n in (1, 2, 3)
    for name in (
        "max_pool",
        "avg_pool",
        "adaptive_avg_pool",
        "adaptive_max_pool",
        "_adaptive_avg_pool",
        "lp_pool",
    )
    for suffix in ("", "_with_indices")
}
SAMPLING = ("grid_sampler", "grid_sampler_2d", "grid_sampler_3d")

HANDLERS: dict[str, Handler] = {
    **{f"aten::{name}": partial(spatial, dims=n) for name, n in {**POOLING, **UPSAMPLING}.items()},
    **{f"aten::{name}": sampled for name in SAMPLING},
}
