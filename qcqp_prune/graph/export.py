"""A model as an exported program: in eval mode, with errors that say what to do, unknown operators decomposed."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.export import ExportedProgram
from torch.fx import Node
from torch.fx import config as fx_config
from torch.nn.attention import SDPBackend, sdpa_kernel

from qcqp_prune.errors import TraceError
from qcqp_prune.graph.decompose import decomposed
from qcqp_prune.graph.inline import inlined
from qcqp_prune.graph.ops import HANDLERS
from qcqp_prune.graph.ops.recurrent import GATES
from qcqp_prune.graph.outputs import open_outputs, traced_state
from qcqp_prune.graph.state import drop_caches
from qcqp_prune.graph.walk import is_pointwise, op_name


@contextlib.contextmanager
def plain_attention() -> Iterator[None]:
    """PyTorch's plain implementation of attention, made of products of matrices that can be followed and counted."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


@contextlib.contextmanager
def without_stack_traces() -> Iterator[None]:
    """No node is told the lines of the forward that made it: nothing here reads them, and to find them takes long.

    The switch is of recent versions of PyTorch; to older ones it says nothing.
    """
    before = getattr(fx_config, "do_not_emit_stack_traces", False)
    fx_config.do_not_emit_stack_traces = True
    try:
        yield
    finally:
        fx_config.do_not_emit_stack_traces = before


@contextlib.contextmanager
def plain_recurrence(model: nn.Module) -> Iterator[None]:
    """PyTorch's own implementation of recurrent layers where a model has any: fused ones hide what they multiply."""
    graph = getattr(model, "graph", None)
    calls: list[Node] = list(graph.nodes) if isinstance(graph, torch.fx.Graph) else []
    names = {name.rpartition(".")[2] for m in model.modules() for name in vars(m)["_parameters"]}
    recurrent = any(name.startswith("weight_hh") for name in names) or any(op_name(n) in GATES for n in calls)
    fused: Any = (torch.backends.mkldnn, torch.backends.cudnn)
    before = [backend.enabled for backend in fused]
    try:
        for backend in fused if recurrent else ():
            backend.enabled = False
        yield
    finally:
        for backend, enabled in zip(fused, before, strict=True):
            backend.enabled = enabled


def export(
    model: nn.Module,
    call: tuple[tuple[Any, ...], dict[str, Any]],
    *,
    what: str = "the example inputs",
    **options: Any,
) -> ExportedProgram:
    """``torch.export`` in eval mode, with errors that say what to do.

    Raises:
        TraceError: the model is scripted, does not run on the inputs, or does not export.
    """
    if isinstance(model, torch.jit.ScriptModule):
        raise TraceError(
            "the model is a scripted module, which cannot be traced: pass the nn.Module it was made from"
        )
    if not isinstance(model, nn.Module):
        raise TraceError(f"the model is a {type(model).__name__}: pass a torch.nn.Module")
    args, kwargs = call
    with (
        traced_state(model),
        open_outputs(model),
        torch.no_grad(),
        plain_attention(),
        without_stack_traces(),
        warnings.catch_warnings(),
    ):
        try:
            model(*args, **kwargs)
        except Exception as error:  # whatever a user's forward raises
            raise TraceError(
                f"{type(model).__name__} does not run on {what} ({_first_line(error)}): "
                "give inputs of the shape, type and device that its forward takes"
            ) from error
        drop_caches(model)
        # Recurrent layers hold their weights twice; nothing of that is left on the model afterwards.
        warnings.filterwarnings(
            "ignore", message="The tensor attribute.* assigned during export", category=UserWarning
        )
        try:
            program = inlined(torch.export.export(model, args, kwargs, strict=False, **options))
            return decomposed(program, _is_known)
        except Exception as error:  # torch.export raises many kinds
            raise TraceError(
                f"{type(model).__name__} runs but torch.export cannot follow its forward ({_first_line(error)}): "
                "remove control flow that depends on tensor values, or pass the part of the model that has none"
            ) from error


def _is_known(node: Node) -> bool:
    return op_name(node) in HANDLERS or is_pointwise(node)


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
