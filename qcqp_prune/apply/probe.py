"""A few output values of a network on inputs made from its graph: enough to notice another ``forward``."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from qcqp_prune.apply.masked import model_outputs
from qcqp_prune.apply.probe_data import Probe
from qcqp_prune.graph.channels import ChannelGraph
from qcqp_prune.graph.inputs import make_inputs

SAMPLES = 16


def take_probes(model: nn.Module, graph: ChannelGraph) -> tuple[Probe, ...]:
    """Run a network once, in eval mode, on inputs of the traced shapes and one seed."""
    tensors = [*model.parameters(), *model.buffers()]
    device = tensors[0].device if tensors else torch.device("cpu")
    call = make_inputs(graph, device=device)
    floating = next((t.dtype for t in tensors if t.is_floating_point()), None)
    try:
        outputs = model_outputs(model, call)
    except RuntimeError:
        # Weights that were cast after tracing want inputs of their own dtype.
        outputs = model_outputs(model, pytree.tree_map(lambda x: _cast(x, floating), call))
    return tuple(_probe(x) for x in outputs if isinstance(x, Tensor))


def _cast(leaf: Any, dtype: torch.dtype | None) -> Any:
    return leaf.to(dtype) if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf


def _probe(output: Tensor) -> Probe:
    flat = output.detach().reshape(-1).cpu()
    if flat.is_complex():
        flat = flat.abs()
    index = torch.linspace(0, max(flat.numel() - 1, 0), min(flat.numel(), SAMPLES)).round().long()
    values = flat[index].double().tolist()
    dtype = str(output.dtype).removeprefix("torch.")
    return Probe(tuple(output.shape), dtype, tuple(v if math.isfinite(v) else None for v in values))
