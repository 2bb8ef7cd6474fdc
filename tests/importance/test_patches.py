"""A layer is its rows times its matrix, whatever kernel, stride, padding, dilation and groups it has."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import qcqp_prune as qp
from qcqp_prune.graph.observe import Observed, read_by
from qcqp_prune.importance.patches import Patches, as_matrix, write_matrix

IMAGE = torch.zeros(2, 4, 9, 8)
LAYERS = {
    "plain": (nn.Conv2d(4, 6, 3), IMAGE),
    "strided": (nn.Conv2d(4, 6, (3, 2), stride=(2, 3), padding=(2, 0)), IMAGE),
    "dilated": (nn.Conv2d(4, 6, 3, dilation=(1, 2), padding=1), IMAGE),
    "same": (nn.Conv2d(4, 6, 3, padding="same", bias=False), IMAGE),
    "grouped": (nn.Conv2d(4, 6, 3, groups=2), IMAGE),
    "depthwise": (nn.Conv2d(4, 8, 3, groups=4), IMAGE),
    "one": (nn.Conv1d(4, 3, 5, padding=2), torch.zeros(2, 4, 9)),
    "three": (nn.Conv3d(2, 3, 2, stride=2), torch.zeros(2, 2, 4, 4, 6)),
    "linear": (nn.Linear(5, 3), torch.zeros(2, 5)),
    "sequence": (nn.Linear(5, 3), torch.zeros(2, 7, 5)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_rows_times_matrix_is_the_layer(name: str) -> None:
    torch.manual_seed(0)
    layer, example = LAYERS[name]
    model = nn.Sequential(layer)
    graph = qp.trace(model, example)
    steps = Observed(model, graph).steps([torch.randn_like(example)])
    for node in steps:
        if node not in steps.followed.layer_of:
            continue
        (made,), (read,), weight = steps.evaluate(node), steps[read_by(node)], model[0].weight
        patches = Patches.of(graph.layers[0], node, weight)
        assert patches is not None
        positions = patches.draw(made, 12, torch.Generator().manual_seed(1))
        rows = patches.read(read, positions)
        matrix = as_matrix(graph.layers[0], weight)
        wanted = patches.made(made, positions)
        assert rows.shape == (len(wanted), matrix.shape[1])
        assert len(rows) <= 14
        bias = 0 if model[0].bias is None else model[0].bias
        torch.testing.assert_close(rows.double() @ matrix.T + bias, wanted.double(), rtol=1e-5, atol=1e-5)
        assert torch.equal(write_matrix(graph.layers[0], torch.zeros_like(weight), matrix), weight)
