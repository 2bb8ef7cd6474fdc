"""Automatic verification of what surgery returns: identity 2 (counts) and identity 3 (outputs)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from qcqp_prune.apply.masked import MaskedNetwork, exported_module, model_outputs
from qcqp_prune.apply.verification import Count
from qcqp_prune.apply.widened import Widened
from qcqp_prune.errors import VerificationError
from qcqp_prune.graph.channels import BoolArray, ChannelGraph
from qcqp_prune.graph.export import export, plain_attention
from qcqp_prune.graph.inputs import make_inputs
from qcqp_prune.graph.outputs import output_leaves, traced_state
from qcqp_prune.graph.state import tensors_replaced
from qcqp_prune.program.problem import Resource

TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}
"""Largest accepted relative error by the dtype of the computation: rounding only."""


class OutputShapeError(VerificationError):
    """An output of the smaller network has another shape than that of the masked one."""


class Oracle:
    """Outputs of the masked network, computed once, to compare candidates with."""

    def __init__(self, model: nn.Module, graph: ChannelGraph, flat: BoolArray, *, seed: int = 0) -> None:
        device = next(iter(model.parameters()), torch.zeros(0)).device
        self.call = make_inputs(graph, seed=seed, device=device)
        self.network = MaskedNetwork(model, graph, flat)
        self._model = model
        self._module = self.network.without_blocks(exported_module(export(model, self.call)))
        try:
            self.dtype: torch.dtype | None = torch.float64
            self.outputs = self._run(self.call)
        except RuntimeError:
            self._use_own_dtype()
        self.uneven_sums = len(self.network.uneven_sums)
        self.input_dependence = self._input_dependence(make_inputs(graph, seed=seed + 1, device=device))

    def _run(self, call: Any) -> list[Any]:
        if self.dtype is None:
            return self.network.run(self._module, call)
        return self.network.run(self._module, _cast(call, self.dtype), dtype=self.dtype)

    def _input_dependence(self, other: Any) -> float:
        """Largest change of the outputs with the input, relative to the largest output."""
        worst = 0.0
        for a, b in zip(self.outputs, self._run(other), strict=True):
            if isinstance(a, Tensor) and a.shape == b.shape and a.numel():
                scale = float(a.double().abs().max())
                change = float((a.double() - b.double()).abs().max())
                worst = max(worst, change / scale if scale > 0 else 0.0)
        return worst

    def error(self, small: nn.Module) -> tuple[float, torch.dtype]:
        """Largest relative error of a candidate, and the dtype of the comparison.

        Whether the model takes double precision is tried only where the candidate does not: all of a large model's
        weights in double precision may be more than a machine has.
        """
        if self.dtype is not None:
            try:
                return relative_error(double_outputs(small, self.call), self.outputs)
            except VerificationError:
                raise
            except RuntimeError:
                if self._takes_double():
                    raise
            self._use_own_dtype()
        return relative_error(model_outputs(small, self.call), self.outputs)

    def _takes_double(self) -> bool:
        try:
            double_outputs(self._model, self.call)
        except RuntimeError:
            return False
        return True

    def _use_own_dtype(self) -> None:
        """Something in this forward takes no other dtype: compare in the network's own."""
        self.dtype = None
        self.outputs = self._run(self.call)


def check_counts(
    graph: ChannelGraph, flat: BoolArray, small: nn.Module, call: Any, resources: Sequence[Resource]
) -> tuple[Count, ...]:
    """Identity 2: the form's value equals an independent count, as integers.

    Raises:
        VerificationError: they differ.
    """
    kept = [int(flat[graph.units(g)].sum()) for g in range(len(graph.groups))]
    counts = []
    for resource in resources:
        measure = getattr(resource, "measure", None)
        if measure is None:
            continue
        predicted = resource.form(graph).evaluate(kept)
        count = Count(
            resource.name, resource.unit, predicted, _measured(measure, graph, small, call, predicted)
        )
        if count.measured != count.predicted:
            raise VerificationError(
                f"{count.resource}: predicted {count.predicted:,} {count.unit}, measured {count.measured:,} on the "
                "smaller network: the model does work that the graph does not count; report it with the model"
            )
        counts.append(count)
    return tuple(counts)


def _measured(measure: Any, graph: ChannelGraph, small: nn.Module, call: Any, expected: int) -> int:
    """A count of the traced batch, for one sample; of one sample alone where something does not grow with the batch."""
    try:
        measured = int(measure(small, call))
    except ValueError:
        measured = -1
    if measured != expected and graph.batch > 1:
        one = pytree.tree_map_only(
            Tensor, lambda x: x[:1] if x.ndim and x.shape[0] == graph.batch else x, call
        )
        try:
            return int(measure(small, one))
        except (RuntimeError, ValueError, AssertionError):  # a forward that takes the traced batch only
            return measured
    return measured


def double_outputs(model: nn.Module, call: Any) -> list[Any]:
    """The leaves of a forward pass in double precision; the model has its own tensors back afterwards.

    By PyTorch's plain attention, as the masked network: its fused encoder layers put zeros where a mask says padding.
    """

    def cast(tensor: Tensor) -> Tensor:
        return tensor.detach().double() if tensor.is_floating_point() else tensor

    args, kwargs = _cast(call, torch.float64)
    with traced_state(model), tensors_replaced(model, cast), torch.no_grad(), plain_attention(), Widened():
        return output_leaves(model(*args, **kwargs))


def _cast(call: Any, dtype: torch.dtype) -> Any:
    def cast(leaf: Any) -> Any:
        return leaf.to(dtype) if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf

    return pytree.tree_map(cast, call)


def relative_error(outputs: list[Any], expected: list[Any]) -> tuple[float, torch.dtype]:
    """Largest difference relative to the largest entry of its tensor, and the dtype of the comparison.

    Raises:
        OutputShapeError: two tensors are of unlike shapes.
    """
    pairs = [(a, b) for a, b in zip(outputs, expected, strict=True) if isinstance(b, Tensor)]
    worst, dtype = 0.0, torch.float64
    for a, b in pairs:
        if a.shape != b.shape:
            raise OutputShapeError(f"an output has shape {tuple(a.shape)}, not {tuple(b.shape)}")
        if a.numel() == 0:
            continue
        dtype = a.dtype if a.is_floating_point() else dtype
        scale = float(b.double().abs().max())
        error = float((a.double() - b.double()).abs().max())
        relative = error / scale if scale > 0 else (0.0 if error == 0 else float("inf"))
        worst = max(worst, float("inf") if relative != relative else relative)
    return worst, dtype
