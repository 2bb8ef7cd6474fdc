"""Independent counts on a real network: PyTorch's own flop counter, ``numel``, and what layers return."""

from __future__ import annotations

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from qcqp_prune.graph.export import eval_mode, plain_attention
from qcqp_prune.graph.inputs import ExampleInputs, as_call, batch_size
from qcqp_prune.graph.unknown import OutputBytes


def measured_macs(module: nn.Module, example_inputs: ExampleInputs) -> int:
    """Multiply-adds of one sample; ``torch.utils.flop_counter`` counts two FLOPs for each."""
    args, kwargs = as_call(example_inputs)
    counter = FlopCounterMode(display=False)
    with eval_mode(module), torch.no_grad(), plain_attention(), counter:
        module(*args, **kwargs)
    return _per_sample(counter.get_total_flops(), 2 * batch_size((args, kwargs)))


def measured_params(module: nn.Module) -> int:
    """Elements of all distinct parameters."""
    return sum(p.numel() for p in module.parameters())


def measured_memory(module: nn.Module, example_inputs: ExampleInputs) -> int:
    """Bytes of all parameters and of each convolution's and linear map's output, for one sample."""
    args, kwargs = as_call(example_inputs)
    counter = OutputBytes()
    with eval_mode(module), torch.no_grad(), plain_attention(), counter:
        module(*args, **kwargs)
    weights = sum(p.numel() * p.element_size() for p in module.parameters())
    return weights + _per_sample(counter.total, batch_size((args, kwargs)))


def _per_sample(total: int, divisor: int) -> int:
    quotient, rest = divmod(total, divisor)
    if rest:
        raise ValueError(f"a count of {total} does not divide by the batch: measure with a batch of 1")
    return quotient
