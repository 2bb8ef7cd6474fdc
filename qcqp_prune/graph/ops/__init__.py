"""One handler for each operator, one file for each family, one table of them all."""

from __future__ import annotations

from qcqp_prune.graph.ops import (
    attention,
    complex_numbers,
    convolution,
    joins,
    lookups,
    norms,
    pooling,
    recurrent,
    reductions,
    shapes,
    splits,
    sums,
    windows,
)
from qcqp_prune.graph.walk import Handler

HANDLERS: dict[str, Handler] = {
    **attention.HANDLERS,
    **complex_numbers.HANDLERS,
    **convolution.HANDLERS,
    **norms.HANDLERS,
    **joins.HANDLERS,
    **lookups.HANDLERS,
    **pooling.HANDLERS,
    **recurrent.HANDLERS,
    **reductions.HANDLERS,
    **shapes.HANDLERS,
    **splits.HANDLERS,
    **sums.HANDLERS,
    **windows.HANDLERS,
}
