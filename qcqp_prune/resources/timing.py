"""Latency tables measured on this machine: each distinct layer, alone, at a grid of widths."""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from qcqp_prune.errors import InvalidBudgetError, InvalidOptionError
from qcqp_prune.graph.channels import ChannelGraph, IntArray, Layer
from qcqp_prune.graph.inputs import ExampleInputs, as_call
from qcqp_prune.graph.state import eval_mode
from qcqp_prune.resources.latency import LatencyTable, LayerLatency

Make = Callable[[int, int], tuple[nn.Module, Tensor]]
"""A layer with so many input and output channels, and an input for it."""

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def measure_latency(
    model: nn.Module,
    graph: ChannelGraph,
    example_inputs: ExampleInputs,
    *,
    points: int = 8,
    repeats: int = 7,
) -> LatencyTable:
    """Time every distinct layer shape of a network, alone, at a grid of kept channels.

    Runs on the device and with the threads that torch is set to. Take it on an idle machine: medians forgive single
    interruptions, not a second job.

    Args:
        model: the traced network; it is not changed.
        graph: from ``trace``.
        example_inputs: as for ``trace``; its batch is what is timed.
        points: widths in each direction, equally spaced up to the full one.
        repeats: timed runs at each width; the median counts, after one run that does not.

    Raises:
        InvalidOptionError: ``points`` or ``repeats`` is not positive.
        InvalidBudgetError: a layer is no module of the network, so it cannot be timed alone.
    """
    if min(points, repeats) < 1:
        raise InvalidOptionError(f"points={points}, repeats={repeats}: give positive numbers")
    shapes = _input_shapes(model, example_inputs)
    modules = dict(model.named_modules(remove_duplicate=False))
    tables: dict[str, LayerLatency] = {}
    layers: dict[str, str] = {}
    for layer in graph.layers:
        if not layer.weight:
            continue
        path = layer.name.split("@")[0]
        module, shape = modules.get(path), shapes.get(path)
        if not isinstance(module, (*CONVOLUTIONS, nn.Linear)) or shape is None:
            raise InvalidBudgetError(
                f"{layer.name} is not the call of a convolution or linear module, so it cannot be timed alone: add it "
                "to the table by hand"
            )
        key = f"{module.extra_repr()} of {'x'.join(map(str, shape))}"
        layers[layer.name] = key
        if key not in tables:
            tables[key] = _measured(graph, layer, _maker(module, shape), (points, repeats))
    return LatencyTable(
        tables, layers, f"{platform.processor() or platform.machine()}, torch {torch.__version__}"
    )


def _input_shapes(model: nn.Module, example_inputs: ExampleInputs) -> dict[str, tuple[int, ...]]:
    """The shape that each module is first called with."""
    shapes: dict[str, tuple[int, ...]] = {}
    handles = []
    for path, module in model.named_modules(remove_duplicate=False):

        def note(_: nn.Module, args: tuple[Any, ...], path: str = path) -> None:
            if args and isinstance(args[0], Tensor):
                shapes.setdefault(path, tuple(args[0].shape))

        handles.append(module.register_forward_pre_hook(note))
    args, kwargs = as_call(example_inputs)
    try:
        with eval_mode(model), torch.no_grad():
            model(*args, **kwargs)
    finally:
        for handle in handles:
            handle.remove()
    return shapes


def _maker(module: nn.Module, shape: tuple[int, ...]) -> Make:
    weight = next(module.parameters())
    where: dict[str, Any] = {"device": weight.device, "dtype": weight.dtype}
    bias = getattr(module, "bias", None) is not None
    if isinstance(module, nn.Linear):
        return lambda a, b: (nn.Linear(a, b, bias, **where), torch.randn(*shape[:-1], a, **where))
    assert isinstance(module, CONVOLUTIONS)
    kind: Any = type(module)
    channel = len(shape) - len(module.kernel_size) - 1
    depthwise = module.groups > 1 and module.groups in (module.in_channels, module.out_channels)
    local = module.in_channels // module.groups
    options: dict[str, Any] = {
        "stride": module.stride,
        "padding": module.padding,
        "dilation": module.dilation,
    }
    if isinstance(module, nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d):
        options["output_padding"] = module.output_padding

    def make(ins: int, outs: int) -> tuple[nn.Module, Tensor]:
        groups = ins // local if depthwise else module.groups
        layer = kind(ins, outs, module.kernel_size, groups=groups, bias=bias, **options, **where)
        return layer, torch.randn(*shape[:channel], ins, *shape[channel + 1 :], **where)

    return make


def _measured(graph: ChannelGraph, layer: Layer, make: Make, effort: tuple[int, int]) -> LayerLatency:
    points, repeats = effort
    ins, outs = (len(graph.axes[axis]) for axis in (layer.in_axis, layer.out_axis))
    if graph.is_depthwise(layer):
        grid = _grid(ins, points, ins // layer.segments)
        times = [_median(make(n, n * outs // ins), repeats) for n in grid.tolist()]
        return LayerLatency(grid, np.zeros(0, np.int64), np.asarray(times, np.int64))
    first, second = _grid(ins, points, layer.segments), _grid(outs, points, layer.segments)
    rows = [[_median(make(a, b), repeats) for b in second.tolist()] for a in first.tolist()]
    return LayerLatency(first, second, np.asarray(rows, np.int64))


def _grid(width: int, points: int, unit: int) -> IntArray:
    """Equally spaced widths up to the full one, in whole units."""
    units = width // unit
    return np.unique(np.ceil(np.arange(1, points + 1) * units / points).astype(np.int64)) * unit


def _median(made: tuple[nn.Module, Tensor], repeats: int) -> int:
    """Nanoseconds of one call."""
    layer, x = made
    layer.eval()
    times = []
    with torch.inference_mode():
        for _ in range(repeats + 1):
            start = _now(x)
            layer(x)
            times.append(_now(x) - start)
    return round(statistics.median(times[1:]))


def _now(x: Tensor) -> int:
    if x.is_cuda:
        torch.cuda.synchronize(x.device)
    return time.perf_counter_ns()
