"""What each objective does to a network without finetuning, and whether predictions of the loss are right.

    python -m benchmarks.objectives [--parts selections predictions] [--objectives Calibrated ...] [--masks 30]
                                    [--orders random Calibrated] [--threads 1] [--again] [--dry]

On the pretrained ResNet-20. ``selections``: for each objective and budget what the solver keeps in 30 s, the error of
the outputs that ``Calibrated`` predicts for it, and accuracy on the whole test set: as it is cut, with batch norms
recalibrated, with means corrected (``reconstruct(method="means")``), and reconstructed, each on the 2,500 calibration
images and each starting from the cut network.

``predictions``: masks that keep a random number of each group's units, evenly from 30 to 100 % of them, ``--masks`` of
each of three kinds: random units, the best by ``Calibrated``, the best by magnitude. So either objective can be
judged on as many masks of random units as of its own order; the numbers of units are the same under both orders. A
mask depends on its kind and its number alone. Predicted is what the mask costs of the objective (``Calibrated``, the
same measuring loss, magnitude), measured the mean loss on 1,000 training images that no objective has seen: of the cut
network recalibrated, and of it reconstructed.

One row for each selection and mask; those that are recorded are not measured again (``--again`` does so). ``--dry``
measures and writes nothing. Data as in ``benchmarks.settings``.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Callable, Iterator
from functools import cache, partial
from typing import Any

import numpy as np
import torch
from torch import nn

import qcqp_prune as qp
from benchmarks.accuracy import accuracy_of, dense_accuracy
from benchmarks.accuracy_methods import Solved, scores
from benchmarks.importances import BY_LOSS, DEFAULT, OBJECTIVES, PRINTED
from benchmarks.recording import library_commit, matches, record, recorded
from benchmarks.settings import SETTINGS, Setting
from qcqp_prune.graph.channels import BoolArray
from qcqp_prune.program.ranks import worth_alone
from qcqp_prune.train.reconstruct import Method

NAME, NETWORK = "objectives", "resnet20"
BUDGETS = ("75%", "50%")
ORDERS, PREDICTING = (DEFAULT, PRINTED), (DEFAULT, BY_LOSS, PRINTED)
FLOORED = f"{PRINTED}, floors 30 %"
FLOORS = {FLOORED: 0.3}
"""The printed objective under floors: the least share of each layer that is kept (``min_keep``)."""
RANDOM_UNITS = "random"
KINDS = (RANDOM_UNITS, *ORDERS)
LEAST = 0.3
"""The smallest share of a group that a mask keeps."""
REPAIRS: dict[str, Method | None] = {
    "recalibrated": None,
    "bias_corrected": "means",
    "reconstructed": "least_squares",
}
"""By what rows call them: the method of ``reconstruct``, or None where batch norms are recalibrated."""
Row = dict[str, Any]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parts, names = ("selections", "predictions"), [*OBJECTIVES, *FLOORS]
    parser.add_argument("--parts", nargs="+", default=list(parts), choices=parts)
    parser.add_argument("--objectives", nargs="+", default=names, choices=names, help="of selections")
    parser.add_argument("--masks", type=int, default=30, help="of each kind")
    parser.add_argument("--orders", nargs="+", default=list(KINDS), choices=KINDS, help="kinds of masks")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--again", action="store_true")
    parser.add_argument("--dry", action="store_true")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    setting = SETTINGS[NETWORK]()
    about = {"network": NETWORK, "commit": library_commit()}
    for key, measure in _asked(setting, options):
        if not options.again and any(matches(row, key) for row in recorded(NAME)):
            continue
        started = time.perf_counter()
        row = key | about | measure()
        row["seconds"] = round(time.perf_counter() - started, 1)
        print(row, flush=True)
        if not options.dry:
            # Read anew: another process may measure another part meanwhile.
            record(NAME, [r for r in recorded(NAME) if not matches(r, key)] + [row])


def _asked(setting: Setting, options: argparse.Namespace) -> Iterator[tuple[Row, Callable[[], Row]]]:
    """What names each row that is asked for, and how it is measured."""
    if "selections" in options.parts:
        for name in options.objectives:
            for budget in BUDGETS:
                key = {"part": "selections", "objective": name, "budget": budget}
                yield key, partial(selection, setting, name, budget)
    if "predictions" in options.parts:
        for number in range(options.masks):
            for order in options.orders:
                key = {"part": "predictions", "order": order, "mask": number}
                yield key, partial(prediction, setting, order, number)


def selection(setting: Setting, name: str, budget: str) -> Row:
    """What one objective, or the printed one under floors, does at one budget."""
    objective = PRINTED if name in FLOORS else name
    masks, about = Solved(OBJECTIVES[objective], "auto", min_keep=FLOORS.get(name)).select(setting, budget)
    flat = masks.flat(setting.graph)
    small = qp.shrink(setting.model, setting.graph, masks)
    used = qp.Macs().measure(small, setting.example)
    dense = np.ones_like(flat)
    accuracy = {"dense": dense_accuracy(setting), "cut": accuracy_of(small, setting)}
    for repaired, model in _repaired(setting, masks, small, tuple(REPAIRS)):
        accuracy[repaired] = accuracy_of(model, setting)
    return {
        "value": about.pop("objective"),
        "dense_value": _worth(setting, objective, dense),
        **about,
        "printed_share": _worth(setting, PRINTED, flat) / _worth(setting, PRINTED, dense),
        "predicted_error": forgone(setting, DEFAULT, flat),
        "macs": {"used": used, "limit": setting.limit(budget), "dense": setting.macs},
        "kept": kept(setting, masks),
        "accuracy": accuracy,
    }


def prediction(setting: Setting, order: str, number: int) -> Row:
    """What is predicted for one mask, and measured."""
    flat = drawn(setting, order, number)
    masks = qp.Masks.from_flat(setting.graph, flat)
    small = qp.shrink(setting.model, setting.graph, masks)
    loss = {"dense": dense_loss(setting)}
    for repaired, model in _repaired(setting, masks, small, ("recalibrated", "reconstructed")):
        loss[repaired] = _loss(model, setting)
    return {
        "predicted": {name: forgone(setting, name, flat) for name in PREDICTING},
        "kept": kept(setting, masks),
        "loss": loss,
    }


def drawn(setting: Setting, order: str, number: int) -> BoolArray:
    """A mask over all units: random numbers of each group, and units in an order.

    Args:
        order: name of the objective by which the best are kept, or ``random``.
        number: of the mask.
    """
    graph = setting.graph
    generator = np.random.default_rng([number, int(order == RANDOM_UNITS)])
    if order == RANDOM_UNITS:
        worth = generator.random(graph.unit_count)
    else:
        worth = worth_alone(scores(setting, OBJECTIVES[order]))
    flat = np.ones(graph.unit_count, np.bool_)
    for g, group in enumerate(graph.groups):
        if not group.stays:
            count = int(generator.choice([n for n in group.counts() if n >= LEAST * group.width]))
            units = graph.units(g)
            flat[units.start + np.argsort(-worth[units], kind="stable")[count:]] = False
    return flat


def forgone(setting: Setting, name: str, flat: BoolArray) -> float:
    """What a mask costs of an objective; by ``Calibrated`` that is the predicted error of the outputs."""
    return _worth(setting, name, np.ones_like(flat)) - _worth(setting, name, flat)


def _worth(setting: Setting, name: str, flat: BoolArray) -> float:
    """The value of an objective at a mask."""
    return scores(setting, OBJECTIVES[name]).evaluate(flat)


def kept(setting: Setting, masks: qp.Masks) -> dict[str, list[int]]:
    """How many units of each group that may lose some are kept, and how many there are."""
    counts = masks.counts()
    return {g.id: [counts[g.id], g.width] for g in setting.graph.groups if not g.stays}


def _repaired(
    setting: Setting, masks: qp.Masks, small: nn.Module, names: tuple[str, ...]
) -> Iterator[tuple[str, nn.Module]]:
    """The cut network repaired in one way after another, each from the cut one."""
    for name in names:
        model, images, device = copy.deepcopy(small), setting.calibration(), setting.recipe.device
        method = REPAIRS[name]
        if method is None:
            qp.recalibrate_batch_norm(model, images, device=device)
        else:
            qp.reconstruct(model, setting.model, setting.graph, masks, images, method=method, device=device)
        yield name, model


@cache
def dense_loss(setting: Setting) -> float:
    return _loss(setting.model, setting)


def _loss(model: nn.Module, setting: Setting) -> float:
    """On images that were not calibrated on."""
    return qp.evaluate(model, setting.held_out(), device=setting.recipe.device).loss


if __name__ == "__main__":
    main()
