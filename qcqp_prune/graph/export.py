"""A model as an exported program: in eval mode, with errors that say what to do, unknown operators decomposed."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch._C import DispatchKey
from torch.export import ExportedProgram, default_decompositions
from torch.fx import Node

from qcqp_prune.errors import TraceError
from qcqp_prune.graph.ops import HANDLERS
from qcqp_prune.graph.walk import is_pointwise, op_name

logger = logging.getLogger(__name__)

_WHOLE = {"aten::lstm", "aten::gru", "aten::rnn_tanh", "aten::rnn_relu", "aten::scaled_dot_product_attention"}
"""Never decomposed: they would unroll over time, or hide the cost that is known of the whole."""

_ROUNDS = 4

@contextlib.contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """The model in eval mode; each module gets its own mode back."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


def export(model: nn.Module, call: tuple[tuple[Any, ...], dict[str, Any]], **options: Any) -> ExportedProgram:
    """``torch.export`` in eval mode, with errors that say what to do.

    Raises:
        TraceError: the model is scripted, does not run on the inputs, or does not export.
    """
    if isinstance(model, torch.jit.ScriptModule):
        raise TraceError("the model is a scripted module, which cannot be traced: pass the nn.Module it was made from")
    if not isinstance(model, nn.Module):
        raise TraceError(f"the model is a {type(model).__name__}: pass a torch.nn.Module")
    args, kwargs = call
    with eval_mode(model), torch.no_grad():
        try:
            model(*args, **kwargs)
        except Exception as error:  # whatever a user's forward raises
            raise TraceError(
                f"{type(model).__name__} does not run on the example inputs ({_first_line(error)}): "
                "give inputs of the shape, type and device that its forward takes"
            ) from error
        try:
            return decomposed(torch.export.export(model, args, kwargs, strict=False, **options))
        except Exception as error:  # torch.export raises many kinds
            raise TraceError(
                f"{type(model).__name__} runs but torch.export cannot follow its forward ({_first_line(error)}): "
                "remove control flow that depends on tensor values, or pass the part of the model that has none"
            ) from error


def decomposed(program: ExportedProgram) -> ExportedProgram:
    """The same program, in which operators without a handler are written in simpler ones where PyTorch knows how."""
    table = default_decompositions()
    tried: set[Any] = set()
    for _ in range(_ROUNDS):
        unknown = {node.target for node in program.graph.nodes if _is_unknown(node)} - tried
        tried |= unknown
        rules = {op: table[op] for op in unknown if op in table}
        if not rules and not any(op.has_kernel_for_dispatch_key(_IMPLICIT) for op in unknown):
            break
        try:
            program = program.run_decompositions(rules)
        except Exception as error:  # noqa: BLE001 - of many kinds; the operator is then kept whole and reported
            logger.debug("cannot decompose %s: %s", [str(op) for op in unknown], error)
            break
    return program


_IMPLICIT = DispatchKey.CompositeImplicitAutograd


def _is_unknown(node: Node) -> bool:
    if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
        return False
    return op_name(node) not in HANDLERS and op_name(node) not in _WHOLE and not is_pointwise(node)


def canonical_names(model: nn.Module) -> dict[str, str]:
    """For each state-dict path of a parameter or buffer the first path of the same tensor."""
    first: dict[int, str] = {}
    names = {}
    tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    for name, tensor in tensors:
        names[name] = first.setdefault(id(tensor), name)
    return names


def state_placeholders(program: ExportedProgram, names: Mapping[str, str]) -> dict[str, str]:
    """For each placeholder of a parameter or buffer the canonical state-dict name."""
    signature = program.graph_signature
    found = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    return {placeholder: names[name] for placeholder, name in found.items()}


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:300]}" if lines else type(error).__name__
