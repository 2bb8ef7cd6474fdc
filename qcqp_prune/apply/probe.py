"""A few output values of a network on inputs made from its graph: enough to notice another ``forward``."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from qcqp_prune.apply.masked import model_outputs
from qcqp_prune.graph.channels import ChannelGraph
from qcqp_prune.graph.inputs import make_inputs

SAMPLES = 16
# Between machines and thread counts, sums are rounded in another order; another activation is far outside this.
_TOLERANCE = {"float64": 1e-6, "float32": 1e-3, "complex64": 1e-3}
_COARSE = 1e-1


@dataclass(frozen=True)
class Probe:
    """One output tensor.

    Attributes:
        shape, dtype: of the tensor.
        values: evenly spaced entries, None for those that are not finite.
    """

    shape: tuple[int, ...]
    dtype: str
    values: tuple[float | None, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Probe:
        """The inverse of ``to_json``."""
        return cls(tuple(data["shape"]), str(data["dtype"]), tuple(data["values"]))

    def agrees(self, other: Probe) -> bool:
        """Whether two networks gave the same, to rounding."""
        if (self.shape, self.dtype) != (other.shape, other.dtype):
            return False
        scale = max((abs(v) for v in self.values if v is not None), default=0.0)
        slip = _TOLERANCE.get(self.dtype, _COARSE) * scale + 1e-12
        return all(
            (a is None) == (b is None) and (a is None or b is None or abs(a - b) <= slip)
            for a, b in zip(self.values, other.values, strict=True)
        )


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
