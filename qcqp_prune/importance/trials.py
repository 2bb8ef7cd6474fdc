"""What cuts of a network change, each measured alone."""

from __future__ import annotations

import logging
import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.fx import Node

from qcqp_prune.apply.masked import MaskedArithmetic, MaskedNetwork
from qcqp_prune.apply.verify import TOLERANCE, relative_error
from qcqp_prune.errors import InvalidOptionError, InvalidScoreError, UnsupportedOpError
from qcqp_prune.graph.channels import BoolArray
from qcqp_prune.graph.observe import Observed, Steps
from qcqp_prune.graph.outputs import output_leaves
from qcqp_prune.importance.cuts import Cut, at_zero
from qcqp_prune.importance.gradients import Loss

logger = logging.getLogger(__name__)

Harm = Callable[[Sequence[Any]], float]
"""How much worse a network is than the dense one, given what it returns for each batch."""


def added_loss(loss: Loss, targets: Sequence[Tensor], dense: Sequence[Any]) -> Harm:
    """By a loss: what is added to its mean over the batches."""

    def mean(outputs: Sequence[Any]) -> float:
        losses = [float(loss(y, t)) for y, t in zip(outputs, targets, strict=True)]
        return sum(losses) / len(losses)

    before = mean(dense)
    return lambda outputs: mean(outputs) - before


def output_error(dense: Sequence[Any]) -> Harm:
    """By what the dense network returns: the squared change of its outputs as a share of their variance.

    Where it gives infinity, as for what it masks out, nothing is compared.

    Raises:
        InvalidOptionError: no output is a tensor of floating numbers.
    """
    wanted = [_floats(x) for x in dense]
    if not wanted[0]:
        raise InvalidOptionError(
            "the network returns no tensor of floating numbers: give importance=Calibrated(batches, loss=...) with a "
            "loss of your own, or importance=Magnitude()"
        )
    scales = [_spread(leaves) for leaves in zip(*wanted, strict=True)]

    def error(outputs: Sequence[Any]) -> float:
        found = [_floats(x) for x in outputs]
        squares = [
            sum(
                float(torch.where(b.isfinite(), (a - b).double(), 0.0).square().sum())
                for a, b in zip(mine, theirs, strict=True)
            )
            for mine, theirs in zip(zip(*found, strict=True), zip(*wanted, strict=True), strict=True)
        ]
        return sum(s / scale for s, scale in zip(squares, scales, strict=True)) / len(scales)

    return error


def _floats(output: Any) -> list[Tensor]:
    return [x for x in output_leaves(output) if isinstance(x, Tensor) and x.is_floating_point() and x.numel()]


def _spread(leaves: Sequence[Tensor]) -> float:
    """The sum of squares about the mean; about zero for an output that is always the same."""
    entries = torch.cat([x[x.isfinite()].double() for x in leaves])
    about_mean = float((entries - entries.mean()).square().sum())
    return about_mean or float(entries.square().sum()) or 1.0


class Trials:
    """Measures the harm that one cut after another does: one pass, from which each trial branches off.

    What goes is held at zero. Where that is not what a network without it computes (norms, means and softmaxes over
    channels that go), trials are run with masks, by the operators of the oracle.
    """

    def __init__(
        self, observed: Observed, inputs: Sequence[Any], judge: Callable[[Sequence[Any]], Harm]
    ) -> None:
        self._observed, self._inputs, self._judge = observed, inputs, judge

    def run(self, cuts: Sequence[Cut]) -> list[dict[int, float]]:
        """For each cut the harm at each of its counts, never less than at a smaller count.

        Raises:
            InvalidOptionError: see ``output_error``.
            InvalidScoreError: the harm is NaN or infinite.
        """
        graph = self._observed.graph
        with torch.no_grad():
            with_masks = self._masks_tell(cuts)
            steps = self._observed.steps(self._inputs)
            harm = self._judge(steps.fork({}).results())
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
                        worst = max(worst, _finite(harm(fork.results())))
                        found[k][count] = worst
                    logger.debug("%s: %s", cuts[k].groups, found[k])
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


def _finite(harm: float) -> float:
    if not math.isfinite(harm):
        raise InvalidScoreError(
            f"what a cut changes on the calibration data is {harm}: check the loss, the data and the weights"
        )
    return harm
