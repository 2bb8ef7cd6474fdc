"""Time and memory of the decomposition against channels: torchvision's ResNet-50 from a quarter to twice its width.

    python -m benchmarks.growth [--widths 0.25 0.5 ...] [--work 40] [--again] [--quick]

Each width runs in a process of its own: the network is built with random weights, traced, and pruned to 50 % MACs with
a fixed number of oracle calls, so that every width does the same kind of work. ``--quick`` takes a quarter and a half
of the width with few calls and writes nothing. ``python -m benchmarks.tables`` draws docs/growth.svg.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import nn

from benchmarks.recording import in_a_process, peak_mb, record, recorded

WIDTHS = (0.25, 0.5, 0.75, 1.0, 1.5, 2.0)
WORK = 40


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--widths", type=float, nargs="+", default=list(WIDTHS))
    parser.add_argument("--work", type=int, default=WORK)
    parser.add_argument("--again", action="store_true")
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    widths, work = ([0.25, 0.5], 5) if options.quick else (options.widths, options.work)
    rows = (
        [] if options.quick or options.again else [row for row in recorded("growth") if row["work"] == work]
    )
    for width in widths:
        if any(row["width"] == width for row in rows):
            continue
        rows.append(in_a_process("benchmarks.growth:measure", width, work))
        rows.sort(key=lambda row: row["width"])
        print(rows[-1], flush=True)
        if not options.quick:
            record("growth", rows)
    if len(rows) > 1:
        pairs = [row["pairs"] for row in rows]
        for quantity in ("seconds", "solve_mb"):
            print(
                quantity,
                "grows with pairs to the power",
                round(exponent(pairs, [r[quantity] for r in rows]), 3),
            )


def measure(width: float, work: int) -> dict[str, Any]:
    """One row; memory is this process's."""
    import qcqp_prune as qp
    from qcqp_prune.program.program import Program
    from qcqp_prune.solve.backend import get_backend
    from qcqp_prune.solve.options import SolveOptions

    model = resnet50(width)
    import torch

    graph = qp.trace(model, torch.zeros(1, 3, 224, 224))
    problem = qp.PruningProblem.build(graph, qp.Magnitude()(model, graph), {"macs": "50%"})
    program = Program.from_problem(problem)
    del model
    before, started = peak_mb(), time.perf_counter()
    raw = get_backend("decomposition").solve(program, SolveOptions(work_limit=work, gap_limit=0.0, seed=0))
    seconds = time.perf_counter() - started
    return {
        "width": width,
        "work": work,
        "units": program.size,
        "pairs": program.pair_count,
        "seconds": round(seconds, 2),
        "peak_mb": peak_mb(),
        "solve_mb": max(peak_mb() - before, 1),
        "gap": None if raw.bound is None or raw.objective is None else raw.bound / raw.objective - 1,
    }


def resnet50(width: float) -> nn.Module:
    """torchvision's ResNet-50 with every layer's width multiplied, random weights of a fixed seed."""
    import torch

    from tests.zoo import torchvision_models

    models = torchvision_models()
    torch.manual_seed(0)

    class Wide(models.resnet.ResNet):
        def __init__(self) -> None:
            super().__init__(models.resnet.Bottleneck, [3, 4, 6, 3])

        def _make_layer(self, block: Any, planes: int, blocks: int, **kwargs: Any) -> nn.Module:
            if planes == 64:
                # Called first, when the stem stands: its width is that of the first stage.
                self.inplanes = int(64 * width)
                self.conv1 = nn.Conv2d(3, self.inplanes, kernel_size=7, stride=2, padding=3, bias=False)
                self.bn1 = nn.BatchNorm2d(self.inplanes)
            return super()._make_layer(block, int(planes * width), blocks, **kwargs)

    model = Wide()
    model.fc = nn.Linear(model.inplanes, 1000)
    return model.eval()


def exponent(pairs: Sequence[float], values: Sequence[float]) -> float:
    """Slope of the least-squares line through the points in double logarithms."""
    return float(np.polyfit([math.log(p) for p in pairs], [math.log(v) for v in values], 1)[0])


if __name__ == "__main__":
    main()
