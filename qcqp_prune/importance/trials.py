"""What cuts of a network add to its loss, each measured alone."""

from __future__ import annotations

import logging
import math
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.fx import Node

from qcqp_prune.apply.masked import MaskedArithmetic, MaskedNetwork
from qcqp_prune.apply.verify import TOLERANCE, relative_error
from qcqp_prune.errors import InvalidScoreError, UnsupportedOpError
from qcqp_prune.graph.channels import BoolArray
from qcqp_prune.graph.observe import Observed, Steps
from qcqp_prune.graph.outputs import output_leaves
from qcqp_prune.importance.cuts import Cut, at_zero
from qcqp_prune.importance.gradients import Loss

logger = logging.getLogger(__name__)


class Trials:
    """Measures the loss of a network with one cut after another: one pass, from which each trial branches off.

    What goes is held at zero. Where that is not what a network without it computes (norms, means and softmaxes over
    channels that go), trials are run with masks, by the operators of the oracle.
    """

    def __init__(
        self, observed: Observed, loss: Loss, inputs: Sequence[Any], targets: Sequence[Tensor]
    ) -> None:
        self._observed, self._loss, self._inputs, self._targets = observed, loss, inputs, targets

    def run(self, cuts: Sequence[Cut]) -> list[dict[int, float]]:
        """For each cut what each of its counts adds to the loss, never less than at a smaller count."""
        graph = self._observed.graph
        with torch.no_grad():
            with_masks = self._masks_tell(cuts)
            steps = self._observed.steps(self._inputs)
            base = self._mean(steps.fork({}).results())
            read_first: dict[str, tuple[int, Node]] = {}
            for place, node in enumerate(steps.followed.program.graph.nodes):
                for source in node.all_input_nodes:
                    if source in steps.followed.state:
                        read_first.setdefault(steps.followed.state[source], (place, node))
            starts: dict[Node, list[int]] = defaultdict(list)
            for k, cut in enumerate(cuts):
                names = cut.touches(graph)
                read = [read_first[name] for name in names if name in read_first]
                if read:
                    starts[min(read, key=lambda x: x[0])[1]].append(k)
            found: list[dict[int, float]] = [{} for _ in cuts]
            for node in steps:
                for k in starts.get(node, ()):
                    worst = 0.0
                    for count in cuts[k].counts:
                        masks = self._masked(steps, cuts[k].flat(graph, count)) if with_masks else None
                        fork = steps.fork(cuts[k].changes(self._observed, count), masks)
                        worst = max(worst, self._mean(fork.results()) - base)
                        found[k][count] = worst
                    logger.debug("%s: loss added %s", cuts[k].groups, found[k])
        return found

    def _masks_tell(self, cuts: Sequence[Cut]) -> bool:
        """Whether masks give another output than zeros do, on the first batch, with the least of every cut made."""
        flat = np.ones(self._observed.graph.unit_count, np.bool_)
        for cut in cuts:
            if cut.block is None and cut.counts:
                flat &= cut.flat(self._observed.graph, cut.counts[0])
        steps = self._observed.steps(self._inputs[:1])
        changes = at_zero(self._observed, flat, {})
        zeros = output_leaves(steps.fork(changes).results())
        try:
            with_masks = output_leaves(steps.fork(changes, self._masked(steps, flat)).results())
        except UnsupportedOpError as e:
            logger.info("trials hold what goes at zero: %s", e)
            return False
        error, dtype = relative_error(with_masks, zeros)
        return error > TOLERANCE[dtype]

    def _masked(self, steps: Steps, flat: BoolArray) -> MaskedArithmetic:
        network = MaskedNetwork(self._observed.model, self._observed.graph, flat)
        return network.arithmetic(steps.followed.program)

    def _mean(self, outputs: Sequence[Any]) -> float:
        losses = [float(self._loss(y, t)) for y, t in zip(outputs, self._targets, strict=True)]
        mean = sum(losses) / len(losses)
        if not math.isfinite(mean):
            raise InvalidScoreError(
                f"the loss on the calibration data is {mean}: check the loss, the data and the weights"
            )
        return mean
