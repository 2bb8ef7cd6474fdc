"""Example inputs: what users pass, as ``(args, kwargs)``, as plain data, and made anew from plain data."""

from __future__ import annotations

import base64
import math
import zlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch.utils import _pytree as pytree

from qcqp_prune.errors import PlanError, TraceError
from qcqp_prune.graph.channels import ChannelGraph, InputSpec
from qcqp_prune.graph.outputs import output_leaves

ExampleInputs = Any
"""A tensor, a tuple or list of positional arguments, a mapping of keyword arguments, or ``(args, kwargs)``."""

_REGISTER = "register it with torch.export.register_dataclass(..., serialized_type_name=...)"


def as_call(example_inputs: ExampleInputs) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword arguments.

    Raises:
        TraceError: there is no tensor among them.
    """
    if is_call(example_inputs):
        args, kwargs = example_inputs
    elif isinstance(example_inputs, Mapping):
        args, kwargs = (), dict(example_inputs)
    elif isinstance(example_inputs, tuple | list):
        args, kwargs = tuple(example_inputs), {}
    else:
        args, kwargs = (example_inputs,), {}
    if not any(isinstance(leaf, torch.Tensor) for leaf in pytree.tree_leaves((args, kwargs))):
        for path, leaf in pytree.tree_leaves_with_path((args, kwargs)):
            if _holds_tensors(leaf):
                _require_plain(pytree.keystr(path), leaf)
        raise TraceError(
            f"example_inputs holds no tensor but {type(example_inputs).__name__}: give a tensor, a tuple of arguments, "
            "or a dict of keyword arguments"
        )
    return args, kwargs


def is_call(inputs: Any) -> bool:
    """Whether inputs are already ``(args, kwargs)``."""
    return (
        isinstance(inputs, tuple)
        and len(inputs) == 2
        and isinstance(inputs[0], tuple)
        and isinstance(inputs[1], dict)
    )


def batch_size(call: tuple[tuple[Any, ...], dict[str, Any]]) -> int:
    """First dimension of the first tensor, 1 where it has none."""
    for leaf in pytree.tree_leaves(call):
        if isinstance(leaf, torch.Tensor) and leaf.ndim > 0:
            if leaf.shape[0] == 0:
                raise TraceError("the first example input has a batch of 0: give at least one sample")
            return int(leaf.shape[0])
    return 1


def describe(call: tuple[tuple[Any, ...], dict[str, Any]]) -> tuple[tuple[InputSpec, ...], str]:
    """The leaves as plain data, and the tree that they hang on."""
    leaves, spec = pytree.tree_flatten_with_path(call)
    described = tuple(_describe(pytree.keystr(path), leaf) for path, leaf in leaves)
    try:
        return described, pytree.treespec_dumps(spec)
    except NotImplementedError as error:  # a class without a name to be stored under
        path, name = next(_unnamed(call))
        raise TraceError(
            f"example input {path} is a {name}, a class that cannot be stored with the graph: let the forward take a "
            f"tuple, a list or a dict in its place, or make it a dataclass and {_REGISTER}"
        ) from error


def _unnamed(call: Any) -> Iterator[tuple[str, str]]:
    """Where among the inputs there is a container that cannot be stored, and of what class it is."""
    for path, held in pytree.tree_leaves_with_path(
        call, is_leaf=lambda x: type(x) not in (tuple, list, dict)
    ):
        try:
            pytree.treespec_dumps(pytree.tree_structure(held))
        except NotImplementedError:
            yield pytree.keystr(path), type(held).__name__


def _holds_tensors(leaf: Any) -> bool:
    return any(isinstance(x, torch.Tensor) for x in output_leaves(leaf))


def _require_plain(path: str, leaf: Any) -> None:
    if leaf is None or isinstance(leaf, torch.Tensor | int | float | str | bool):
        return
    if _holds_tensors(leaf):
        raise TraceError(
            f"example input {path} is a {type(leaf).__name__} with tensors in it, a class that cannot be taken apart: "
            f"give its tensors in a tuple, a list or a dict, or {_REGISTER}"
        )
    raise TraceError(
        f"example input {path} is a {type(leaf).__name__}: only tensors and plain values are followed; "
        "give a tensor or a number in its place"
    )


def _describe(path: str, leaf: Any) -> InputSpec:
    if not isinstance(leaf, torch.Tensor):
        _require_plain(path, leaf)
        return InputSpec(path, (), "python", value=leaf)
    dtype = str(leaf.dtype).removeprefix("torch.")
    if leaf.is_floating_point() or leaf.is_complex() or leaf.numel() == 0:
        return InputSpec(path, tuple(leaf.shape), dtype)
    low, high = int(leaf.min()), int(leaf.max())
    two = bool(((leaf == low) | (leaf == high)).all())
    return InputSpec(path, tuple(leaf.shape), dtype, low, high, pattern=_packed(leaf == high) if two else "")


def _packed(bits: torch.Tensor) -> str:
    return base64.b64encode(zlib.compress(np.packbits(bits.cpu().numpy()).tobytes())).decode()


def _unpacked(spec: InputSpec) -> torch.Tensor:
    raw = np.frombuffer(zlib.decompress(base64.b64decode(spec.pattern)), np.uint8)
    bits = np.unpackbits(raw, count=math.prod(spec.shape)).astype(np.bool_).reshape(spec.shape)
    return torch.from_numpy(bits)


def make_inputs(
    graph: ChannelGraph, *, seed: int = 0, device: torch.device | str = "cpu"
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Random inputs of the traced shapes: standard normal, or integers in the range that the example had.

    A mask (integers or booleans with at most two values) is the example's own: what it hides is part of its meaning.

    Returns:
        ``(args, kwargs)``; the same for the same seed.
    """
    generator = torch.Generator().manual_seed(seed)
    leaves = [_make(spec, generator, device) for spec in graph.inputs]
    try:
        tree = pytree.treespec_loads(graph.input_tree)
    except (ValueError, NotImplementedError) as error:
        raise PlanError(
            f"the graph's description of its inputs cannot be read ({error}): trace again"
        ) from error
    args, kwargs = pytree.tree_unflatten(leaves, tree)
    return args, kwargs


def _make(spec: InputSpec, generator: torch.Generator, device: torch.device | str) -> Any:
    if spec.dtype == "python":
        return spec.value
    dtype = getattr(torch, spec.dtype)
    if dtype.is_floating_point or dtype.is_complex:
        return torch.randn(spec.shape, generator=generator).to(device=device, dtype=dtype)
    if spec.pattern:
        return torch.where(_unpacked(spec), spec.high, spec.low).to(device=device, dtype=dtype)
    return torch.randint(spec.low, spec.high + 1, spec.shape, generator=generator).to(
        device=device, dtype=dtype
    )
