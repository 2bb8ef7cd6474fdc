"""Programs of what layers lose without units of a group, larger than those of ``random_problem``."""

from __future__ import annotations

import itertools

import numpy as np

from qcqp_prune.program.program import Program
from qcqp_prune.testing.instances import Sketch


def within_program(seed: int, *, rank: int = 4, width: int = 24, groups: int = 3) -> Program:
    """A chain whose groups are coupled with themselves; the lower the rank, the more units replace each other."""
    sketch = Sketch(np.random.default_rng(seed), fraction=0.4)
    ids = [sketch.group(width) for _ in range(groups)]
    for g in ids:
        directions = sketch.rng.normal(0.2, 0.5, (rank, width))
        gram = directions.T @ directions
        sketch.pairs.append((g, g, np.diag(gram.sum(1)) - gram / 2))
    for g, h in itertools.pairwise(ids):
        sketch.products.append((g, h, int(sketch.rng.integers(1, 40))))
    return Program.from_problem(sketch.problem())
