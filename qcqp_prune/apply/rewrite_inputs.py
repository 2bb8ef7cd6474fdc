"""What a rewritten graph takes: sizes of its inputs that stay free, sizes that are fixed, arguments that it drops."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.fx import GraphModule
from torch.utils import _pytree as pytree

from qcqp_prune.apply.masked import exported_module
from qcqp_prune.errors import TraceError
from qcqp_prune.graph.channels import ChannelGraph
from qcqp_prune.graph.export import export
from qcqp_prune.graph.inputs import make_inputs

logger = logging.getLogger(__name__)

Place = tuple[int, int]
"""A size: the number of a tensor among the inputs, and its dimension."""

_LISTED = 4
"""So many dropped arguments are named; models of transformers have twenty."""

_SEQUENCE = 3
"""Of tensors with more dimensions, such as images, the batch alone is free.

Each stride halves a plane: sizes are quotients of quotients, and PyTorch takes minutes to reason about those of a
windowed transformer. A length of a sequence stays what it is from the first layer to the last.
"""

_UNBOUNDED = 2**31
"""``torch.export`` writes an open end of a range as a huge number, or as one that is none."""


@dataclass(frozen=True)
class Range:
    """The sizes that a free dimension of an input may have, ``None`` where there is no end."""

    low: int | None = None
    high: int | None = None

    def __str__(self) -> str:
        if self.low is None:
            return "any" if self.high is None else f"up to {self.high}"
        return f"from {self.low}" if self.high is None else f"{self.low} to {self.high}"


@dataclass(frozen=True)
class Exported:
    """An exported module to rewrite.

    Attributes:
        module: with some sizes of its inputs free.
        call: ``(args, kwargs)`` to run it with.
        ranges: for each of its placeholders, by number, and dimension the sizes that it may have.
        takes: what of its inputs is fixed and which arguments it has not, in words; empty where it takes all that the
            model does.
    """

    module: GraphModule
    call: Any
    ranges: Mapping[Place, Range]
    takes: str


def exports(model: nn.Module, graph: ChannelGraph) -> Iterator[Exported]:
    """Exports of a model, those with more free sizes first; each is made when it is asked for.

    All sizes of sequences are free where that can be; then all but those that a decision of the forward depends on,
    the batch alone, and none. A decision is made once, while exporting: at a size for which the model makes another
    one the graph would compute something else. Of those that come down to a range the graph checks the range.

    Args:
        model: the traced module.
        graph: its channel graph.

    Yields:
        The first is as good as any; a later one is for where something cannot be rewritten with sizes that are free.
    """
    device = next(iter(model.parameters()), torch.zeros(0)).device
    call = make_inputs(graph, device=device)
    double = pytree.tree_map(lambda x: torch.cat([x, x]) if _has_batch(x, graph.batch) else x, call)
    tensors = _tensors(double)
    batch = {(k, 0) for k, x in enumerate(tensors) if _has_batch(x, 2 * graph.batch)}
    every = batch | {
        (k, d)
        for k, x in enumerate(tensors)
        for d, size in enumerate(x.shape)
        if x.ndim <= _SEQUENCE and size > 1
    }
    if batch:
        wide = _export(model, double, every)
        decides = _deciding(wide, tensors) - batch if wide is not None else set()
        if decides:
            wide = _export(model, double, every - decides)
            wide = None if wide is None or _deciding(wide, tensors) - batch else wide
        if wide is not None and batch <= _free(wide):
            yield _exported(model, wide, double)
        if wide is None or _free(wide) != batch:
            narrow = _export(model, double, batch)
            if narrow is not None and batch <= _free(narrow):
                yield _exported(model, narrow, double)
    yield _exported(model, export(model, call), call)


def require_size(size: int, low: int | None, high: int | None, name: str) -> None:
    """Refuse an input of a size for which the model may decide something else, called from a rewritten graph.

    Raises:
        ValueError: the size is outside the range.
    """
    if torch.jit.is_tracing():  # type: ignore[attr-defined, no-untyped-call]  # there a size is a tensor
        return
    if (low is not None and size < low) or (high is not None and size > high):
        raise ValueError(
            f"a size of input {name} is {size}, but this graph is for {Range(low, high)}: prune again with such inputs"
        )


def check_ranges(module: GraphModule, ranges: Mapping[Place, Range]) -> None:
    """Let a graph refuse sizes outside its ranges, in place."""
    inputs = list(module.graph.find_nodes(op="placeholder"))
    for (k, dim), allowed in ranges.items():
        if allowed == Range():
            continue
        with module.graph.inserting_after(inputs[-1]):
            size = module.graph.call_function(torch.ops.aten.sym_size.int, (inputs[k], dim))
        with module.graph.inserting_after(size):
            module.graph.call_function(require_size, (size, allowed.low, allowed.high, inputs[k].name))


def _export(model: nn.Module, call: Any, free: set[Place]) -> ExportedProgram | None:
    """The program with these sizes free, as far as they stay so; None where it cannot be exported with them."""
    numbers = iter(range(len(_tensors(call))))

    def dims(leaf: Any) -> dict[int, Any] | None:
        if not isinstance(leaf, Tensor):
            return None
        k = next(numbers)
        return {d: torch.export.Dim.AUTO for d in range(leaf.ndim) if (k, d) in free}

    args, kwargs = pytree.tree_map(dims, call)
    # By name, and the arguments that one name takes as a tuple: so torch.export has them as well.
    spec = dict(inspect.signature(model.forward).bind(*args, **kwargs).arguments)
    try:
        return export(model, call, dynamic_shapes=spec)
    except TraceError as error:
        logger.debug("%s does not export with free sizes: %s", type(model).__name__, error)
        return None


def _exported(model: nn.Module, program: ExportedProgram, call: Any) -> Exported:
    values, leaves = _values(program), pytree.tree_leaves(call)
    numbers = [k for k, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
    ranges = {
        (numbers[k], d): _range(program, value.shape[d])
        for k, value in enumerate(values)
        for d in range(value.ndim)
        if _symbols(value.shape[d])
    }
    return Exported(exported_module(program), call, ranges, _takes(model, call, ranges))


def _range(program: ExportedProgram, size: Any) -> Range:
    """From the constraints of the export; that it had two samples or more is none."""
    found = program.range_constraints.get(size.node.expr)
    if found is None:
        return Range()
    ends = [int(end) if -_UNBOUNDED < end < _UNBOUNDED else None for end in (found.lower, found.upper)]
    return Range(None if ends[0] is None or ends[0] <= 2 else ends[0], ends[1])


def _takes(model: nn.Module, call: Any, ranges: Mapping[Place, Range]) -> str:
    args, kwargs = call
    signature = inspect.signature(model.forward)
    bound = signature.bind(*args, **kwargs).arguments
    numbers = {id(leaf): k for k, leaf in enumerate(pytree.tree_leaves(call)) if isinstance(leaf, Tensor)}
    sizes, values = [], []
    for path, leaf in pytree.tree_leaves_with_path(dict(bound)):
        name = cast("pytree.MappingKey[str, Any]", path[0]).key + pytree.keystr(path[1:])
        if isinstance(leaf, Tensor):
            allowed = [ranges.get((numbers[id(leaf)], d)) for d in range(leaf.ndim)]
            if any(r != Range() for r in allowed):
                shown = [str(n if r is None else r) for n, r in zip(leaf.shape, allowed, strict=True)]
                sizes.append(f"{name} of sizes ({', '.join(shown)})")
        elif leaf is not None:
            values.append(f"{name} as {leaf!r}")
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    dropped = [
        p.name for p in signature.parameters.values() if p.name not in bound and p.kind not in variadic
    ]
    more = f" and {len(dropped) - _LISTED} others" if len(dropped) > _LISTED else ""
    parts = [f"it is made for {', '.join((*sizes, *values))}"] if sizes or values else []
    parts += [f"it does not take {', '.join(dropped[:_LISTED])}{more}"] if dropped else []
    return "; ".join(parts)


def _deciding(program: ExportedProgram, inputs: Sequence[Tensor]) -> set[Place]:
    """Sizes of which something other than a range was decided while the model was exported.

    PyTorch notes whatever it or the forward asked of a size. Most answers are the same for every size in the range (a
    product of sizes is divisible by one of them), or about sizes of 1, which operators see to themselves when they run.
    So each is put to the test at some other sizes.
    """
    places: dict[Any, set[Place]] = {}
    hints: dict[Any, int] = {}
    values = _values(program)
    for k, (value, given) in enumerate(zip(values, inputs, strict=True)):
        for d, size in enumerate(value.shape):
            for symbol in _symbols(size):
                places.setdefault(symbol, set()).add((k, d))
                if cast(torch.SymInt, size).node.expr == symbol:
                    hints[symbol] = given.shape[d]
    if not places:
        return set()
    env = next(v.fake_mode.shape_env for v in values if hasattr(v, "fake_mode"))
    samples = list(_samples(hints, program))
    found = set(places) - set(hints)
    for guard in dict.fromkeys(env.replace(guard.expr) for guard in env.guards):
        symbols = guard.free_symbols & set(places)
        if symbols <= found or getattr(guard, "rel_op", "") == "!=":
            continue
        if not all(_holds(guard, sample) for sample in samples):
            found |= symbols
    return {place for symbol in found for place in places[symbol]}


def _samples(hints: Mapping[Any, int], program: ExportedProgram) -> Iterator[dict[Any, int]]:
    """Other sizes: one alone, and all of them."""

    def within(symbol: Any, size: int) -> int:
        found = program.range_constraints.get(symbol)
        return int(min(max(size, found.lower, 2), found.upper)) if found is not None else max(size, 2)

    for factor, more in ((1, -1), (1, 1), (1, 2), (2, 1), (3, 0)):
        for symbol, size in hints.items():
            yield {**hints, symbol: within(symbol, factor * size + more)}
        yield {s: within(s, factor * size + more + k) for k, (s, size) in enumerate(hints.items())}


def _holds(guard: Any, sizes: Mapping[Any, int]) -> bool:
    try:
        return bool(guard.subs(sizes) == True)  # noqa: E712 - sympy's truth, or something it could not work out
    except ZeroDivisionError:
        return False


def _free(program: ExportedProgram) -> set[Place]:
    """Sizes that stayed free: some operators need a number, and the export writes it down."""
    return {
        (k, d) for k, v in enumerate(_values(program)) for d, size in enumerate(v.shape) if _symbols(size)
    }


def _values(program: ExportedProgram) -> list[Tensor]:
    inputs = set(program.graph_signature.user_inputs)
    values = [n.meta["val"] for n in program.graph.nodes if n.op == "placeholder" and n.name in inputs]
    return [v for v in values if isinstance(v, Tensor)]


def _symbols(size: Any) -> set[Any]:
    return set(size.node.expr.free_symbols) if isinstance(size, torch.SymInt) else set()


def _tensors(call: Any) -> list[Tensor]:
    return [x for x in pytree.tree_leaves(call) if isinstance(x, Tensor)]


def _has_batch(leaf: Any, batch: int) -> bool:
    return isinstance(leaf, Tensor) and leaf.ndim > 0 and leaf.shape[0] == batch
