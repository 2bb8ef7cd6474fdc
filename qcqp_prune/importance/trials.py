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
from qcqp_prune.apply.verify import TOLERANCE
from qcqp_prune.errors import InvalidScoreError, UnsupportedOpError
from qcqp_prune.graph.channels import BoolArray
from qcqp_prune.graph.observe import Observed, Steps
from qcqp_prune.graph.outputs import floats
from qcqp_prune.graph.walk import additions
from qcqp_prune.importance.cuts import Cut, at_zero
from qcqp_prune.importance.losses import Loss, loss_of
from qcqp_prune.importance.output_error import Harm, output_error

logger = logging.getLogger(__name__)


def added_loss(loss: Loss, targets: Sequence[Tensor], dense: Sequence[Any]) -> Harm:
    """By a loss: what is added to its mean over the batches."""

    def mean(outputs: Sequence[Any]) -> float:
        losses = [float(loss_of(loss, y, t, "Calibrated")) for y, t in zip(outputs, targets, strict=True)]
        return sum(losses) / len(losses)

    before = mean(dense)
    return lambda outputs: mean(outputs) - before


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
            InvalidScoreError: see ``output_error``, or the harm is NaN or infinite.
        """
        graph = self._observed.graph
        with torch.no_grad():
            steps = self._observed.steps(self._inputs)
            harm = self._judge(steps.fork({}).results())
            with_masks = self._masks_tell(cuts)
            if with_masks:
                # From the first operator on: values carry marks of what goes with what it is added to.
                steps = steps.fork({}, self._masked(steps, np.ones(graph.unit_count, np.bool_)))
            starts = self._starts(steps, cuts)
            found: list[dict[int, float]] = [{} for _ in cuts]
            for node in steps:
                for k in starts.get(node, ()):
                    worst = 0.0
                    for count in cuts[k].counts:
                        outputs = self._fork(steps, node, cuts[k], count, with_masks=with_masks).results()
                        worst = max(worst, _finite(harm(outputs)))
                        found[k][count] = worst
                    logger.debug("%s: %s", cuts[k].groups, found[k])
        return found

    def _starts(self, steps: Steps, cuts: Sequence[Cut]) -> dict[Node, list[int]]:
        """Where each cut begins to matter: what reads something that it changes, or the addition without its branch."""
        nodes = list(steps.followed.program.graph.nodes)
        read_first: dict[str, int] = {}
        for place, node in enumerate(nodes):
            for source in node.all_input_nodes:
                if source in steps.followed.state:
                    read_first.setdefault(steps.followed.state[source], place)
        numbered = {index: node for node, index in additions(steps.followed.program.graph).items()}
        starts: dict[Node, list[int]] = defaultdict(list)
        for k, cut in enumerate(cuts):
            if cut.block is not None:
                starts[numbered[self._observed.graph.blocks[cut.block].addition]].append(k)
                continue
            places = [read_first[name] for name in cut.touches(self._observed.graph) if name in read_first]
            if places:
                starts[nodes[min(places)]].append(k)
        return starts

    def _fork(self, steps: Steps, node: Node, cut: Cut, count: int, *, with_masks: bool) -> Steps:
        """The run with a cut, from the node on at which it begins to matter."""
        graph = self._observed.graph
        if cut.block is not None:
            kept = node.args[1 - graph.blocks[cut.block].operand]
            assert isinstance(kept, Node)
            return steps.fork({}, replaced={node: kept})
        masks = self._masked(steps, cut.flat(graph, count)) if with_masks else None
        return steps.fork(cut.changes(self._observed, count), masks)

    def _masks_tell(self, cuts: Sequence[Cut]) -> bool:
        """Whether masks give another output than zeros do, on the first batch, with the least of every cut made."""
        flat = np.ones(self._observed.graph.unit_count, np.bool_)
        for cut in cuts:
            if cut.block is None and cut.counts:
                flat &= cut.flat(self._observed.graph, cut.counts[0])
        steps = self._observed.steps(self._inputs[:1])
        changes = at_zero(self._observed, flat, {})
        zeros = steps.fork(changes).results()
        if not (leaves := floats(zeros[0])):
            return True
        try:
            with_masks = steps.fork(changes, self._masked(steps, flat)).results()
            error = output_error(zeros)(with_masks)
        except UnsupportedOpError as e:
            logger.info("trials hold what goes at zero: %s", e)
            return False
        except InvalidScoreError:
            return True
        return not error <= max(TOLERANCE[x.dtype] for x in leaves) ** 2

    def _masked(self, steps: Steps, flat: BoolArray) -> MaskedArithmetic:
        network = MaskedNetwork(self._observed.model, self._observed.graph, flat)
        return network.arithmetic(steps.followed.program)


def _finite(harm: float) -> float:
    if not math.isfinite(harm):
        raise InvalidScoreError(
            f"what a cut changes on the calibration data is {harm}: check the loss, the data and the weights"
        )
    return harm
