"""Independent counts on a real network: PyTorch's own flop counter, ``numel``, and what layers return."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from qcqp_prune.graph.export import eval_mode
from qcqp_prune.graph.inputs import ExampleInputs, as_call, batch_size

_LAYER_OPS = {"aten::convolution", "aten::addmm", "aten::mm", "aten::bmm", "aten::linear"}


def measured_macs(module: nn.Module, example_inputs: ExampleInputs) -> int:
    """Multiply-adds of one sample; ``torch.utils.flop_counter`` counts two FLOPs for each."""
    args, kwargs = as_call(example_inputs)
    counter = FlopCounterMode(display=False)
    with eval_mode(module), torch.no_grad(), counter:
        module(*args, **kwargs)
    return _per_sample(counter.get_total_flops(), 2 * batch_size((args, kwargs)))


def measured_params(module: nn.Module) -> int:
    """Elements of all distinct parameters."""
    return sum(p.numel() for p in module.parameters())


def measured_memory(module: nn.Module, example_inputs: ExampleInputs) -> int:
    """Bytes of all parameters and of each convolution's and linear map's output, for one sample."""
    args, kwargs = as_call(example_inputs)
    counter = _OutputBytes()
    with eval_mode(module), torch.no_grad(), counter:
        module(*args, **kwargs)
    weights = sum(p.numel() * p.element_size() for p in module.parameters())
    return weights + _per_sample(counter.total, batch_size((args, kwargs)))


class _OutputBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch does not annotate it
    """Adds up the bytes that every operator with a weight matrix returns."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func._schema.name in _LAYER_OPS:
            self.total += out.numel() * out.element_size()
        return out


def _per_sample(total: int, divisor: int) -> int:
    quotient, rest = divmod(total, divisor)
    if rest:
        raise ValueError(f"a count of {total} does not divide by the batch: measure with a batch of 1")
    return quotient
