"""From masks to a physically smaller network, verified before it is handed back."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import torch
from torch import nn

from qcqp_prune.apply.hf_config import follow
from qcqp_prune.apply.removed import need_rewriting
from qcqp_prune.apply.rewrite import REALISATION_KEY, rewritings
from qcqp_prune.apply.shape_conv import ShapeConv2d
from qcqp_prune.apply.slim_attention import SlimAttention
from qcqp_prune.apply.surgery import check_masks, copied, cut
from qcqp_prune.apply.verification import Verification
from qcqp_prune.apply.verify import TOLERANCE, Oracle, OutputShapeError, check_counts
from qcqp_prune.errors import VerificationError
from qcqp_prune.graph.channels import BoolArray, ChannelGraph
from qcqp_prune.graph.masks import Masks
from qcqp_prune.program.problem import Resource, counted_resources

logger = logging.getLogger(__name__)

Realisation = Literal["auto", "modules", "graph"]


def shrink(
    model: nn.Module,
    graph: ChannelGraph,
    masks: Masks,
    *,
    realisation: Realisation = "auto",
    resources: Sequence[Resource] = (),
) -> nn.Module:
    """The smaller network that the masks describe, verified; the model itself is not changed.

    See ``shrink_and_verify``, which also returns what was checked.
    """
    return shrink_and_verify(model, graph, masks, realisation=realisation, resources=resources)[0]


def shrink_and_verify(
    model: nn.Module,
    graph: ChannelGraph,
    masks: Masks,
    *,
    realisation: Realisation = "auto",
    resources: Sequence[Resource] = (),
) -> tuple[nn.Module, Verification]:
    """Cut a copy of the model, and check it against the masked network and independent counters.

    Args:
        model: the module that was traced, with the weights to keep.
        graph: its channel graph.
        masks: which units to keep, from ``solve``.
        realisation: ``modules`` keeps the model's own classes; ``graph`` gives a rewritten graph module, for a
            forward with shapes written into it; ``auto`` tries the first and falls back on the second.
        resources: resources to measure besides the known ones.

    Returns:
        The smaller network in the model's train or eval mode, and what was checked.

    Raises:
        MaskMismatchError: graph, masks and model do not belong together.
        VerificationError: no realisation computes what the masked network computes, or costs what was predicted.
    """
    flat = masks.flat(graph)
    check_masks(graph, flat)
    small = copied(model)
    cut(small, graph, flat)
    config = follow(small, graph, flat) if realisation != "graph" else ""
    oracle = Oracle(model, graph, flat)
    failure, fits, beyond = "", False, _beyond_modules(graph, flat, oracle)
    if beyond and realisation != "graph":
        failure, remedy = beyond
        if realisation == "modules":
            raise VerificationError(
                f'{failure}, which the forward of {graph.model} cannot do: use realisation="graph", or trace {remedy}'
            )
        logger.info("%s: %s; rewriting its graph", graph.model, failure)
    elif realisation != "graph":
        try:
            return small, replace(_verified(small, graph, flat, oracle, resources), config=config)
        except (VerificationError, RuntimeError, ValueError, AssertionError) as error:
            first = str(error).strip().splitlines()[0][:300] if str(error).strip() else type(error).__name__
            failure, fits = first.partition(": report it")[0], _is_of_values(error)
        if realisation == "modules":
            cause = "does not follow what its layers keep" if fits else "has shapes written into it"
            raise VerificationError(
                f"the smaller {graph.model} does not compute what the masked network does ({failure}): its forward "
                f'{cause}; use realisation="graph"'
            )
        logger.info(
            "%s: the modules' own forward does not fit (%s); rewriting its graph", graph.model, failure
        )
    does = "compute what the masked network does" if fits else "fit the smaller shapes"
    why = f"the model's own forward does not {does} ({failure})" if failure else "asked for"
    if beyond and failure:
        why = failure
    wrong: Exception = VerificationError(f"{graph.model} cannot be rewritten: report it with the model")
    for module in rewritings(model, small, graph, flat):
        note = "; ".join(filter(None, (why, module.meta[REALISATION_KEY])))
        try:
            return module, _verified(module, graph, flat, oracle, resources, realisation="graph", note=note)
        except (RuntimeError, TypeError, ValueError, AssertionError) as error:
            wrong = error
            logger.debug("%s: a rewritten graph does not do: %s", graph.model, error)
    raise wrong


def _is_of_values(error: Exception) -> bool:
    """Whether a smaller network runs and returns tensors of the right shapes, but with other values or counts."""
    return isinstance(error, VerificationError) and not isinstance(error, OutputShapeError)


def _beyond_modules(graph: ChannelGraph, flat: BoolArray, oracle: Oracle) -> tuple[str, str] | None:
    """What the masks ask of a network that no forward of modules does, and how to trace without it."""
    if oracle.uneven_sums:
        what = f"{oracle.uneven_sums} additions join layers that keep different channels"
        return what, 'with sharing="strict"'
    without = need_rewriting(graph, flat)
    if without:
        return f"{len(without)} residual branches are removed ({', '.join(without)})", "without blocks"
    return None


def _verified(
    small: nn.Module,
    graph: ChannelGraph,
    flat: BoolArray,
    oracle: Oracle,
    resources: Sequence[Resource],
    *,
    realisation: str = "modules",
    note: str = "",
) -> Verification:
    error, dtype = oracle.error(small)
    tolerance = TOLERANCE.get(dtype, TOLERANCE[torch.float32])
    if not error <= tolerance:
        raise VerificationError(
            f"outputs of the smaller network differ from the masked one's by {error:.2e} relative ({dtype}, at most "
            f"{tolerance:.0e}): report it with the model"
        )
    counted = check_counts(graph, flat, small, oracle.call, list(counted_resources(resources).values()))
    checked = Verification(
        counted,
        error,
        tolerance,
        str(dtype).removeprefix("torch."),
        realisation,
        note,
        oracle.input_dependence,
        _paths(small, ShapeConv2d),
        _paths(small, SlimAttention),
        tuple(graph.blocks[b].name for b in graph.removed_blocks(flat)),
    )
    if checked.caution:
        logger.warning("%s: %s", graph.model, checked.caution)
    return checked


def _paths(model: nn.Module, kind: type[nn.Module]) -> tuple[str, ...]:
    return tuple(path for path, module in model.named_modules() if isinstance(module, kind))
