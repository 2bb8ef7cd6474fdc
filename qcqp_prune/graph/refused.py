"""What a trace refuses once a model is exported: sizes that nobody knows before the values are there."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

from qcqp_prune.errors import TraceError
from qcqp_prune.graph.walk import op_name


def require_sizes(program: ExportedProgram, model: nn.Module) -> None:
    """Refuse tensors whose sizes cannot be known from the inputs' shapes, or not be seen.

    Raises:
        TraceError: a size follows values, such as that of ``torch.nonzero``, or ``torch.vmap`` hides a dimension.
    """
    for node in program.graph.nodes:
        value = node.meta.get("val")
        for tensor in value if isinstance(value, list | tuple) else [value]:
            if not isinstance(tensor, Tensor):
                continue
            if any(free_unbacked_symbols(size) for size in tensor.shape):
                raise TraceError(
                    f"{_where(node, model)} makes a tensor whose size depends on values ({op_name(node)}), so that its "
                    "cost and its channels cannot be known: compute all positions and choose by a mask of fixed size, "
                    "such as torch.where(mask, a, b) with three arguments, or trace the part of the model without it"
                )
            if torch._C._functorch.is_batchedtensor(tensor):
                raise TraceError(
                    f"{_where(node, model)} runs under torch.vmap, which hides a dimension: let the layers and "
                    "operators take the whole batch at once"
                )


def _where(node: Node, model: nn.Module) -> str:
    stack = node.meta.get("nn_module_stack") or {"": ("", None)}
    return str(list(stack.values())[-1][0]).split("@")[0] or type(model).__name__
