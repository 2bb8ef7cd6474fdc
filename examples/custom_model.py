"""Prune a network of your own, save it without pickle, and load it again.

    python examples/custom_model.py

The same from the command line:

    qcqp-prune trace examples/custom_model.py:GatedNet --input-shape 1,3,32,32 -o graph.json
    qcqp-prune solve graph.json --budget macs=40% --budget params=50% -o masks.json
    qcqp-prune shrink graph.json masks.json -o small
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from torch import Tensor, nn

import qcqp_prune as qp


class Gate(nn.Module):
    """Squeeze-and-excitation: one factor for each channel, computed from all of them."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.down = nn.Conv2d(channels, channels // 4, 1)
        self.up = nn.Conv2d(channels // 4, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        squeezed = x.mean((2, 3), keepdim=True)
        return x * torch.sigmoid(self.up(torch.relu(self.down(squeezed))))


class GatedNet(nn.Module):
    """Two branches that are concatenated, gated, and added back to the stream."""

    def __init__(self, width: int = 16, classes: int = 10) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()
        )
        self.left = nn.Conv2d(width, width // 2, 3, padding=1)
        self.right = nn.Conv2d(width, width // 2, 1)
        self.gate = Gate(width)
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        stream = self.stem(x)
        both = torch.cat([self.left(stream), self.right(stream)], 1)
        return self.head(torch.relu(stream + self.gate(both)).mean((2, 3)))


def main() -> None:
    torch.manual_seed(0)
    model = GatedNet()
    small, report = qp.prune(
        model,
        torch.randn(1, 3, 32, 32),
        budgets={"macs": "40%", "params": "50%"},
        min_keep={"stem.0": 4},
        time_limit=20,
    )
    for line in report.budgets:
        slack = "no budget" if line.slack is None else f"slack {line.slack:,}"
        print(f"{line.resource}: {line.used:,} of {line.dense:,} {line.unit}, {slack}")
    print(f"worth {report.solve.objective:.4f}, at most {report.solve.bound:.4f}, gap {report.solve.gap:.3%}")
    for row in report.layers:
        print(f"{row.name:10} {row.inputs} -> {row.outputs} {row.why_not or ''}")
    with tempfile.TemporaryDirectory() as folder:
        saved = qp.save(small, Path(folder) / "small", graph=report.graph, masks=report.masks)
        again = qp.load(saved, GatedNet)
        x = torch.randn(4, 3, 32, 32)
        print("loaded network computes the same:", torch.equal(small.eval()(x), again.eval()(x)))


if __name__ == "__main__":
    main()
