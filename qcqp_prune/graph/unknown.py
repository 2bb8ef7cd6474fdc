"""Operators without a handler: what they read is kept whole, and what they cost is counted as it is."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch.fx import Node
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from qcqp_prune.graph.axes import Axes
from qcqp_prune.graph.ops.convolution import per_sample
from qcqp_prune.graph.walk import FoundLayer, Walk, example_call, op_name

logger = logging.getLogger(__name__)

MATRIX_OPS = {"aten::convolution", "aten::addmm", "aten::mm", "aten::bmm", "aten::baddbmm", "aten::linear"}


class OutputBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Adds up the bytes that every operator that multiplies matrices returns."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func._schema.name in MATRIX_OPS:
            self.total += out.numel() * out.element_size()
        return out


def kept_whole(walk: Walk, node: Node) -> Axes | list[Axes]:
    """Freeze what an operator reads, say so, and count its fixed cost as a layer that cannot be pruned."""
    name, value = op_name(node), node.meta["val"]
    reason = f"read by {name}, which has no handler"
    if node.all_input_nodes:
        walk.note(node, f"no handler for {name}: what it reads is kept whole")
    walk.freeze_inputs(node, reason)
    macs, size = _fixed_cost(walk, node)
    if macs or size:
        one = walk.table.fresh(1)
        walk.table.freeze(one, reason)
        walk.layers.append(
            FoundLayer(
                node,
                name.removeprefix("aten::"),
                "",
                one,
                one,
                1,
                macs_per_pair=per_sample(walk, node, macs),
                out_elements=per_sample(walk, node, size),
                itemsize=1,
            )
        )
    tensors = value if isinstance(value, list | tuple) else [value]
    untracked: list[Axes] = [[None] * v.ndim if isinstance(v, torch.Tensor) else [] for v in tensors]
    return untracked if isinstance(value, list | tuple) else untracked[0]


def _fixed_cost(walk: Walk, node: Node) -> tuple[int, int]:
    """Multiply-adds, and bytes that matrix products return, found by running the operator on shapes alone."""
    args, kwargs = example_call(node)
    modes = [x.fake_mode for x in pytree.tree_leaves((args, kwargs)) if hasattr(x, "fake_mode")]
    if not modes:
        return 0, 0
    flops, outputs = FlopCounterMode(display=False), OutputBytes()
    try:
        with torch.no_grad(), modes[0], flops, outputs:
            node.target(*args, **kwargs)  # type: ignore[operator]
    except Exception as error:  # noqa: BLE001 - of many kinds; verification finds out if there was a cost
        logger.debug("%s does not run on shapes alone: %s", node, error)
        walk.note(node, f"the cost of {op_name(node)} could not be counted")
        return 0, 0
    return flops.get_total_flops() // 2, outputs.total
