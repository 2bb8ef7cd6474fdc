"""What follows a cut: the smaller network repaired without training, then finetuned, each measured."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from numbers import Integral
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import nn

from qcqp_prune.data import seed_epoch
from qcqp_prune.errors import InvalidOptionError, MaskMismatchError, TraceError, require_kind
from qcqp_prune.graph.batches import require_loader
from qcqp_prune.graph.channels import ChannelGraph
from qcqp_prune.graph.masks import Masks
from qcqp_prune.graph.state import buffers_kept
from qcqp_prune.importance.losses import Loss
from qcqp_prune.program.rounds import Rounds
from qcqp_prune.report import Accuracy
from qcqp_prune.train import (
    Evaluation,
    FinetuneConfig,
    evaluate,
    finetune,
    recalibrate_batch_norm,
    reconstruct,
)
from qcqp_prune.train.batches import Loader, first_batch
from qcqp_prune.train.loop import require_unsmoothed
from qcqp_prune.train.modes import random_state_kept
from qcqp_prune.watch import Clock, Watcher

logger = logging.getLogger(__name__)

Repair = Literal["reconstruct", "means", "batch_norm"]


@dataclass(frozen=True)
class Recovery:
    """What is measured, and done after cutting, with data.

    Attributes:
        validation: loader on which accuracy is measured at each step; None measures nothing. Like ``train`` it is gone
            through several times, so an iterator, which runs dry, is refused.
        train: loader for the default importance, repair and finetuning, gone through by each; None does without.
        repair: what is done after cutting: ``reconstruct`` refits layers by least squares, ``means`` corrects means
            (both ``qcqp_prune.reconstruct``), ``batch_norm`` gives batch norms their statistics anew
            (``recalibrate_batch_norm``), None does nothing.
        samples: how many ``reconstruct`` and ``means`` use at most.
        batches: how many batches ``batch_norm`` uses at most.
        epochs: of finetuning; 0 for none.
        config: the recipe of the finetuning; ``FinetuneConfig.recommended(model)`` where None. With ``distillation``
            the network that was handed in is the teacher.
        checkpoint: a file from which a killed finetuning goes on; beside it lies the selection that it is of.
        loss: what is minimised in finetuning and measured beside the accuracy, ``loss(model(inputs), targets)``, a mean
            over samples; cross-entropy where None.

    Raises:
        InvalidOptionError: epochs is negative, or asked for without a training loader; there is no such repair; samples
            or batches is not positive; a loader is none, or an iterator; config is no recipe; labels are smoothed for a
            loss of one's own.
    """

    validation: Loader | None = field(default=None, repr=False)
    train: Loader | None = field(default=None, repr=False)
    repair: Repair | None = "reconstruct"
    samples: int = 2_500
    batches: int | None = None
    epochs: int = 0
    config: FinetuneConfig | None = None
    checkpoint: str | os.PathLike[str] | None = None
    loss: Loss | None = None

    def __post_init__(self) -> None:
        for name in ("epochs", "samples", "batches"):
            if getattr(self, name) is not None or name != "batches":
                require_kind(name, getattr(self, name), Integral, "a whole number")
        if self.config is not None:
            require_kind("config", self.config, FinetuneConfig, "FinetuneConfig(...), or None")
        for name in ("validation", "train"):
            if getattr(self, name) is not None:
                require_loader(getattr(self, name), name)
        if self.epochs < 0:
            raise InvalidOptionError(f"epochs is {self.epochs}: give a number from 0 up")
        for name in ("samples", "batches"):
            count = getattr(self, name)
            if count is not None and count < 1:
                rest = ", or None for all" if name == "batches" else ""
                raise InvalidOptionError(f"{name} is {count}: give a positive number{rest}")
        for name in ("validation", "train"):
            if isinstance(getattr(self, name), Iterator):
                raise InvalidOptionError(
                    f"{name} is a {type(getattr(self, name)).__name__}, which can be gone through once only, and "
                    "several steps need it: give the loader itself, or a list of its batches"
                )
        if self.repair is not None and self.repair not in get_args(Repair):
            known = ", ".join(get_args(Repair))
            raise InvalidOptionError(f"repair is {self.repair!r}: choose from {known}, or None")
        if self.epochs and self.train is None:
            raise InvalidOptionError(
                f"{self.epochs} epochs of finetuning and no train loader: give one, or epochs=0"
            )

        if self.config is not None:
            require_unsmoothed(self.config, self.loss)

    def recipe(self, model: nn.Module) -> FinetuneConfig:
        """The recipe for a network."""
        return FinetuneConfig.recommended(model) if self.config is None else self.config

    def describe(self, model: nn.Module, rounds: Rounds) -> str:
        """The recipe in words, and whose choice it is; empty where nothing is finetuned."""
        if not self.epochs and not (rounds.count > 1 and rounds.epochs):
            return ""
        recipe, advised = self.recipe(model), FinetuneConfig.recommended(model)
        same = _alike(recipe, advised)
        whose = f"the recipe recommended for {type(model).__name__}" if same else "a given recipe"
        return f"{whose}: {recipe.describe()}"

    def unused(self, model: nn.Module, rounds: Rounds) -> tuple[str, ...]:
        """What was given for a repair or a finetuning that is not asked for, a sentence for each."""
        found = []
        fits = self.repair in ("reconstruct", "means")
        if self.train is None and self.repair not in (None, type(self).repair):
            found.append(f"nothing is repaired by {self.repair}, as there is no train loader")
        if self.batches is not None and (self.train is None or self.repair != "batch_norm"):
            found.append(
                "batches does nothing unless batch norms are recalibrated: reconstruct and means take samples"
            )
        if self.samples != type(self).samples and (self.train is None or not fits):
            found.append("samples does nothing: it is of reconstruct and means, which need a train loader")
        config = self.config or FinetuneConfig()
        if not config.distillation and config.temperature != type(config).temperature:
            found.append("temperature does nothing without distillation")
        if rounds.count == 1 and rounds.epochs and not self.epochs:
            found.append(
                f"the {rounds.epochs} epochs of a single round do nothing: what follows the last cut is finetuned by "
                "the epochs of the recovery"
            )
        if self.epochs or (rounds.count > 1 and rounds.epochs):
            return tuple(found)
        if self.config is not None:
            plain = (FinetuneConfig(), FinetuneConfig.recommended(model))
            if not any(_alike(self.config, other) for other in plain):
                found.append("nothing is finetuned, as epochs is 0: of the recipe only seed and device count")
        if self.checkpoint is not None and self.selection_file(1, rounds) is None:
            found.append(f"nothing is finetuned, as epochs is 0: {os.fspath(self.checkpoint)} is not written")
        return tuple(found)

    def after_round(self, number: int, rounds: Rounds) -> Recovery:
        """What follows one of several cuts, counted from 1; all but the last have files of their own."""
        if number == rounds.count:
            return self
        file = None if self.checkpoint is None else f"{os.fspath(self.checkpoint)}.round{number}"
        return replace(self, epochs=rounds.epochs, checkpoint=file)

    def selection_file(self, number: int, rounds: Rounds) -> Path | None:
        """Where the selection of a round lies beside the checkpoints, None without such."""
        if self.checkpoint is None or (rounds.count == 1 and not self.epochs):
            return None
        which = "selection" if rounds.count == 1 else f"round{number}"
        return Path(f"{os.fspath(self.checkpoint)}.{which}.json")


def _alike(recipe: FinetuneConfig, other: FinetuneConfig) -> bool:
    """Whether two recipes differ at most in what is no part of a recipe."""
    return recipe == replace(other, seed=recipe.seed, device=recipe.device, progress=recipe.progress)


@dataclass(frozen=True)
class Measured:
    """Accuracy at each step, epochs of the finetuning as ``TrainingHistory.to_dict``, and the repair in words."""

    accuracy: Accuracy
    training: dict[str, Any] | None
    repair: str = ""


@dataclass(frozen=True, eq=False)
class Before:
    """What a network was cut from: the larger network, its graph, and what was kept of it."""

    network: nn.Module
    graph: ChannelGraph
    masks: Masks


def recover(
    small: nn.Module,
    dense: nn.Module,
    before: Before,
    recovery: Recovery,
    *,
    watch: Watcher,
    clock: Clock,
    first_epoch: int = 0,
) -> Measured:
    """Recover what can be recovered of a smaller network's accuracy, in place, and measure after each step.

    Args:
        small: after the cut.
        dense: the network that pruning began with, the teacher where the recipe has one.
        before: what the last cut was made from.
        recovery: what is done, its ``config`` given.
        watch: told what happens.
        clock: adds up seconds.
        first_epoch: epochs of finetuning that rounds before have had.
    """
    config = recovery.recipe(dense)
    found = measure(small, recovery, config.device, watch, clock, "pruned")
    accuracy = noted(Accuracy(), "pruned", found, recovery)
    if recovery.train is None:
        return Measured(accuracy, None)
    repaired = ""
    if recovery.repair is not None:
        with clock("repair"):
            repaired = _repaired(small, before, recovery, config, first_epoch)
        if repaired:
            found = measure(small, recovery, config.device, watch, clock, "repaired")
            accuracy = noted(accuracy, "repaired", found, recovery)
    if not recovery.epochs:
        return Measured(accuracy, None, repaired)
    with clock("finetune"):
        history = finetune(
            small,
            recovery.train,
            epochs=recovery.epochs,
            config=config,
            checkpoint=recovery.checkpoint,
            teacher=dense if config.distillation else None,
            loss=recovery.loss,
            first_epoch=first_epoch,
        )
    found = measure(small, recovery, config.device, watch, clock, "finetuned")
    return Measured(noted(accuracy, "finetuned", found, recovery), history.to_dict(), repaired)


def _repaired(
    small: nn.Module, before: Before, recovery: Recovery, config: FinetuneConfig, epoch: int
) -> str:
    """Repair a network in place; in words what was done, nothing where there was nothing to do."""
    assert recovery.train is not None
    hindrance = ""
    if recovery.repair in ("reconstruct", "means"):
        try:
            done = reconstruct(
                small,
                before.network,
                before.graph,
                before.masks,
                recovery.train,
                method="means" if recovery.repair == "means" else "least_squares",
                samples=recovery.samples,
                seed=config.seed,
                device=config.device,
            )
        except (TraceError, MaskMismatchError) as error:
            hindrance = f", as reconstruction is not possible ({error})"
            logger.warning("Batch norms are recalibrated instead%s", hindrance)
        else:
            return done.describe()
    # A run that goes on from a checkpoint has drawn less from the loader than one that was never stopped.
    with random_state_kept(torch.device("cpu")):
        seed_epoch(recovery.train, config.seed, epoch)
        norms = recalibrate_batch_norm(small, recovery.train, batches=recovery.batches, device=config.device)
    return f"{len(norms.layers)} batch norms on {norms.samples:,} samples{hindrance}" if norms.layers else ""


def require_usable(model: nn.Module, recovery: Recovery, rounds: Rounds) -> None:
    """Put one batch through the dense network and its loss wherever it is to be trained or measured later.

    What was given for nothing is said as well.

    Raises:
        QcqpPruneError: what ``finetune`` and ``evaluate`` raise on it.
    """
    for note in recovery.unused(model, rounds):
        logger.warning("%s", note)
    trains = recovery.epochs or (rounds.count > 1 and rounds.epochs)
    for loader in (recovery.validation, recovery.train if trains else None):
        if loader is not None:
            with buffers_kept(model):
                evaluate(model, first_batch(loader), loss=recovery.loss, device=recovery.recipe(model).device)


def measure(
    model: nn.Module, recovery: Recovery, device: str, watch: Watcher, clock: Clock, step: str
) -> Evaluation | None:
    """Accuracy and loss at one step, None without validation data."""
    if recovery.validation is None:
        return None
    with clock("evaluate"):
        result = evaluate(model, recovery.validation, loss=recovery.loss, device=device)
    watch.evaluated(step, result)
    return result


def noted(accuracy: Accuracy, step: str, found: Evaluation | None, recovery: Recovery) -> Accuracy:
    """With what was found at a step, which is nothing without validation data; the loss where one was given."""
    if found is None:
        return accuracy
    losses = accuracy.losses if recovery.loss is None else {**accuracy.losses, step: found.loss}
    return replace(accuracy, losses=losses, samples=found.samples, **{step: found.accuracy})
