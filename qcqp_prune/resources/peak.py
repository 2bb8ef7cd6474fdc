"""Peak memory: the bytes of all live activations at the worst moment of a forward pass."""

from __future__ import annotations

from typing import Any

from qcqp_prune.errors import InvalidBudgetError
from qcqp_prune.graph.channels import Activation, ChannelGraph
from qcqp_prune.program.forms import CountForm, CountFormBuilder, PeakForm


class PeakMemory:
    """Bytes of all activations that are alive at once, at the worst step, for one sample.

    A step is one operator of the exported graph. While it runs, its inputs and its output are there, and everything
    that a later step reads. Inputs of the network count until their last use; views and operators in place take nothing
    of their own; parameters and scratch space inside an operator do not count.
    """

    name = "peak_memory"
    unit = "bytes"
    on_request = True

    def form(self, graph: ChannelGraph) -> PeakForm:
        """``max over steps s of sum over activations a alive at s of bytes_a prod_d n_d(a)``.

        Raises:
            InvalidBudgetError: the graph does not say which tensors are alive.
        """
        if not graph.activations:
            raise InvalidBudgetError(
                "this graph does not say which tensors are alive when, so peak_memory cannot be counted: trace the "
                'network again, with sharing="strict" and without blocks'
            )
        # Use grows only where something is made.
        steps = sorted({a.first for a in graph.activations})
        return PeakForm.of(_step(graph, s) for s in steps)

    def measure(self, module: Any, example_inputs: Any) -> int:
        """The most bytes that the tensors of one forward pass hold at once, for one sample, by running it."""
        from qcqp_prune.resources.measure import measured_peak

        return measured_peak(module, example_inputs)


def _step(graph: ChannelGraph, step: int) -> CountForm:
    builder = CountFormBuilder(len(graph.groups))
    for activation in graph.activations:
        if activation.first <= step <= activation.last:
            _add(builder, graph, activation)
    return builder.build()


def _add(builder: CountFormBuilder, graph: ChannelGraph, activation: Activation) -> None:
    size, axes = activation.size, list(activation.axes)
    # A third dimension that shrinks is counted at its full width: never too little.
    for axis in axes[2:]:
        size *= len(graph.axes[axis])
    if not axes:
        builder.add_constant(size)
    elif len(axes) == 1:
        builder.add_counts(size, graph.axis_counts(axes[0]))
    else:
        builder.add_product(size, graph.axis_counts(axes[0]), graph.axis_counts(axes[1]))
