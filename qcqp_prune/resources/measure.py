"""Independent counts on a real network: PyTorch's own flop counter, ``numel``, and what layers return."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree
from torch.utils.flop_counter import FlopCounterMode
from torch.utils.hooks import RemovableHandle

from qcqp_prune.graph.export import export, plain_attention, plain_recurrence
from qcqp_prune.graph.inputs import ExampleInputs, as_call, batch_size
from qcqp_prune.graph.state import eval_mode, tensors_replaced
from qcqp_prune.graph.unknown import OutputBytes


def measured_macs(module: nn.Module, example_inputs: ExampleInputs) -> int:
    """Multiply-adds of one sample; ``torch.utils.flop_counter`` counts two FLOPs for each."""
    args, kwargs = as_call(example_inputs)
    counter = FlopCounterMode(display=False)
    # The counter watches gradients of what modules are given, and stumbles over a parameter that is handed on.
    detached = tensors_replaced(module, torch.Tensor.detach)
    with eval_mode(module), detached, torch.no_grad(), plain_attention(), plain_recurrence(module), counter:
        module(*args, **kwargs)
    return _per_sample(counter.get_total_flops(), 2 * batch_size((args, kwargs)))


def measured_params(module: nn.Module) -> int:
    """Elements of all distinct parameters."""
    return sum(p.numel() for p in module.parameters())


def measured_memory(module: nn.Module, example_inputs: ExampleInputs) -> int:
    """Bytes of all parameters and of each convolution's and linear map's output, for one sample.

    A module that says of itself ``counts_as_one_layer`` counts by what it returns, whatever it is made of.
    """
    args, kwargs = as_call(example_inputs)
    counter = OutputBytes()
    hooks = [
        h for m in module.modules() if getattr(m, "counts_as_one_layer", False) for h in _as_one(m, counter)
    ]
    try:
        with eval_mode(module), torch.no_grad(), plain_attention(), plain_recurrence(module), counter:
            module(*args, **kwargs)
    finally:
        for hook in hooks:
            hook.remove()
    weights = sum(p.numel() * p.element_size() for p in module.parameters())
    return weights + _per_sample(counter.total, batch_size((args, kwargs)))


def measured_peak(module: nn.Module, example_inputs: ExampleInputs) -> int:
    """The most bytes that tensors hold at once while the exported network runs, operator by operator, for one sample.

    Each value is dropped after its last use. What counts is distinct storage, parameters and buffers left out. A module
    that ``counts_as_one_layer`` is one operator: its ``dense`` convolution takes its place.
    """
    call = as_call(example_inputs)
    module = _with_dense_layers(module)
    network = export(module, call).module()
    assert isinstance(network, torch.fx.GraphModule)
    runner, graph = torch.fx.Interpreter(network), network.graph
    runner.args_iter = iter(pytree.tree_leaves(call))
    own = {t.untyped_storage().data_ptr() for t in (*module.parameters(), *module.buffers())}
    place = {node: k for k, node in enumerate(graph.nodes)}
    last = {node: max([k, *(place[user] for user in node.users)]) for node, k in place.items()}
    peak = 0
    with torch.no_grad():
        for node, k in place.items():
            if node.op == "call_module":  # a check of the inputs, which computes nothing
                continue
            runner.env[node] = runner.run_node(node)
            tensors = [
                t for t in pytree.tree_leaves(list(runner.env.values())) if isinstance(t, torch.Tensor)
            ]
            storages = {s.data_ptr(): s.nbytes() for s in (t.untyped_storage() for t in tensors)}
            peak = max(peak, sum(size for where, size in storages.items() if where not in own))
            runner.env = {other: value for other, value in runner.env.items() if last[other] > k}
    return _per_sample(peak, batch_size(call))


def _with_dense_layers(module: nn.Module) -> nn.Module:
    """A copy with every module that counts as one layer replaced by one; the module itself where there is none."""
    if not any(getattr(m, "counts_as_one_layer", False) for m in module.modules()):
        return module
    module = copy.deepcopy(module)
    for path, child in list(module.named_modules()):
        if getattr(child, "counts_as_one_layer", False):
            parent, _, name = path.rpartition(".")
            setattr(module.get_submodule(parent), name, child.dense())
    return module


def _as_one(module: nn.Module, counter: OutputBytes) -> list[RemovableHandle]:
    """Hooks that count a module's output instead of what happens in it."""
    before: list[int] = []

    def enter(module: nn.Module, args: Any) -> None:
        before.append(counter.total)

    def leave(module: nn.Module, args: Any, out: torch.Tensor) -> None:
        counter.total = before.pop() + out.numel() * out.element_size()

    return [module.register_forward_pre_hook(enter), module.register_forward_hook(leave)]


def _per_sample(total: int, divisor: int) -> int:
    quotient, rest = divmod(total, divisor)
    if rest:
        raise ValueError(f"a count of {total} does not divide by the batch: measure with a batch of 1")
    return quotient
