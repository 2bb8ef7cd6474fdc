"""Scores by chance: what any importance has to be better than."""

from __future__ import annotations

from dataclasses import dataclass
from numbers import Integral

import numpy as np
from torch import nn

from qcqp_prune.errors import InvalidOptionError, require_kind
from qcqp_prune.graph.channels import ChannelGraph
from qcqp_prune.program.forms import PairwiseForm


@dataclass(frozen=True)
class Random:
    """One number for each unit, drawn evenly from [0, 1): the control.

    A unit is worth as much in every layer, so a budget keeps the most where units cost the least.

    Attributes:
        seed: of numpy's generator, 0 or more; equal seeds give equal scores.
    """

    seed: int = 0

    def __post_init__(self) -> None:
        require_kind("seed", self.seed, Integral, "a whole number")
        if self.seed < 0:
            raise InvalidOptionError(f"seed={self.seed}: give 0 or more")

    def __call__(self, model: nn.Module, graph: ChannelGraph) -> PairwiseForm:
        """The objective over the graph's units; the model is not looked at."""
        return PairwiseForm(np.random.default_rng(self.seed).random(graph.unit_count))
