"""How the oracle goes through a network."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

import qcqp_prune as qp
from qcqp_prune.apply.masked import MaskedNetwork, exported_module
from qcqp_prune.graph.export import export
from qcqp_prune.graph.inputs import as_call


def test_weights_are_made_just_before_they_are_read() -> None:
    """In double precision all weights of a large network at once may be too many."""
    model, x = nn.Sequential(*(nn.Linear(4, 4) for _ in range(3))), torch.randn(1, 4)
    graph = qp.trace(model, x)
    network = MaskedNetwork(model, graph, np.ones(graph.unit_count, np.bool_))
    seen: list[str] = []
    module = exported_module(export(model, as_call(x)))
    (out,) = network.run(module, as_call(x), lambda node, value: seen.append(node.op))
    assert seen == ["placeholder", *["get_attr", "get_attr", "call_function"] * 3]
    torch.testing.assert_close(out, model(x))
