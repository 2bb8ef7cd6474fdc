"""The training loop."""

from __future__ import annotations

import logging
import math
import os
import time
from collections.abc import Sequence
from contextlib import ExitStack, nullcontext
from numbers import Integral
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import SGD, AdamW, Optimizer
from torch.utils import _pytree as pytree

from qcqp_prune.data import seed_epoch
from qcqp_prune.errors import InvalidOptionError, TrainingError, require_kind
from qcqp_prune.graph.batches import Call, outputs_of
from qcqp_prune.graph.outputs import logits_of
from qcqp_prune.importance.losses import Loss, loss_of, name_of
from qcqp_prune.train.average import WeightAverage
from qcqp_prune.train.batches import Loader, batches_of, length_of, require_labels, right_among
from qcqp_prune.train.callbacks import Callback, ProgressBar, TrainingState
from qcqp_prune.train.checkpoint import RunIdentity, read_checkpoint, state_digest, write_checkpoint
from qcqp_prune.train.config import FinetuneConfig
from qcqp_prune.train.distill import distillation_loss, require_teacher, teaching
from qcqp_prune.train.evaluate import evaluate
from qcqp_prune.train.history import EpochRecord, TrainingHistory
from qcqp_prune.train.modes import modes_kept, placed, random_state_kept
from qcqp_prune.train.regularizer import Regularizer

logger = logging.getLogger(__name__)


def finetune(
    model: nn.Module,
    loader: Loader,
    *,
    epochs: int = 10,
    config: FinetuneConfig | None = None,
    validation: Loader | None = None,
    callbacks: Sequence[Callback] = (),
    checkpoint: str | os.PathLike[str] | None = None,
    regularizer: Regularizer | None = None,
    teacher: nn.Module | None = None,
    loss: Loss | None = None,
    first_epoch: int = 0,
) -> TrainingHistory:
    """Train a network on from the weights it has.

    Everything random is drawn anew for each epoch from `(config.seed, epoch)`: torch's generators, the generator of a
    `DataLoader`, and, through `set_epoch`, the order of a loader or sampler that has one. So a run that was killed and
    resumed from its checkpoint computes bit for bit what an uninterrupted one computes (on a device whose operations
    repeat exactly, the CPU for one). The caller's random state, the model's modes and device come back as they were.

    Frozen parameters (`requires_grad` False) stay as they are; so do the running statistics of a batch norm whose own
    parameters are all frozen.

    Args:
        model: maps inputs to logits (N, classes), alone or among other outputs (``logits_of``); changed in place.
        loader: yields `(inputs, targets)`, targets (N,) int64, or what the loss takes.
        epochs: passes over the loader, in the whole run.
        config: the recipe; `FinetuneConfig()` where None.
        validation: a second loader, evaluated after each epoch.
        callbacks: called in the order given.
        checkpoint: a file written after each epoch, and gone on from where it is there already. A run that it says is
            complete is not repeated: its weights are loaded.
        regularizer: a penalty that is added to the loss, such as `SPR` or `PSP`, made for this model.
        teacher: for `config.distillation`, a network of the same classes, such as the dense one; it runs in eval mode
            without gradients, and its modes and device come back.
        loss: `loss(model(inputs), targets)`, a mean over samples, of a network that may return anything and targets of
            any kind; cross-entropy where None.
        first_epoch: epochs draw what those from this number on draw, so that a run after another one sees new orders.

    Returns:
        A record of each epoch.

    Raises:
        TrainingError: nothing to train, nothing to train on, a target that is no class, a loss that is not finite, or a
            checkpoint of another run.
        InvalidOptionError: `epochs` is not positive, distillation and teacher are not there together, weights are
            averaged under a regulariser, labels are smoothed for a loss of one's own, which does not take what the
            network returns or gives no single number, or nobody can tell which of several outputs are the logits.
    """
    config = FinetuneConfig() if config is None else config
    require_kind("config", config, FinetuneConfig, "FinetuneConfig(...)")
    require_kind("epochs", epochs, Integral, "a whole number")
    if epochs < 1:
        raise InvalidOptionError(f"epochs is {epochs}; give a positive number.")
    require_teacher(config, model, teacher)
    require_unsmoothed(config, loss)
    if config.ema and regularizer is not None:
        raise InvalidOptionError(
            f"ema is {config.ema} and there is a regularizer: in an average nothing has vanished; give ema=0 here, and "
            "average in the finetuning after the cut"
        )
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not trained:
        raise TrainingError(
            "Every parameter of the model is frozen, so there is nothing to train. "
            "Set requires_grad_(True) on those that may change."
        )
    with ExitStack() as stack:
        stack.enter_context(modes_kept(model))
        device = stack.enter_context(placed(model, config.device))
        stack.enter_context(random_state_kept(device))
        optimizer = _optimizer(config, list(trained.values()))
        stack.enter_context(teaching(teacher, device))
        state = TrainingState(
            model, optimizer, epochs, batches=length_of(loader), regularizer=regularizer, teacher=teacher
        )
        state.criterion = loss
        state.average = WeightAverage(model, config.ema) if config.ema else None
        parts = [part for part in (regularizer, state.average) if part is not None]
        identity = RunIdentity(
            config,
            epochs,
            tuple(trained),
            {} if regularizer is None else regularizer.describe(),
            "" if teacher is None else state_digest(teacher),
            first_epoch,
            name_of(loss),
        )
        path = None if checkpoint is None else Path(checkpoint)
        if path is not None and path.exists():
            state.records = read_checkpoint(path, identity, model, optimizer, parts)
            logger.info("Resuming from %s after epoch %d of %d.", path, len(state.records), epochs)
        resumed_at = len(state.records)
        if config.progress and resumed_at < epochs:
            callbacks = [*callbacks, stack.enter_context(ProgressBar())]
        for epoch in range(resumed_at, epochs):
            state.epoch = epoch
            _epoch(state, loader, config, callbacks, device, validation, first_epoch)
            if path is not None:
                write_checkpoint(path, identity, model, optimizer, state.records, parts)
            if state.stop:
                break
        if state.average is not None:
            state.average.put_in()
    return TrainingHistory(tuple(state.records), resumed_at)


def _epoch(
    state: TrainingState,
    loader: Loader,
    config: FinetuneConfig,
    callbacks: Sequence[Callback],
    device: torch.device,
    validation: Loader | None,
    first_epoch: int,
) -> None:
    start = time.perf_counter()
    seed_epoch(loader, config.seed, first_epoch + state.epoch)
    _train_mode(state.model)
    for callback in callbacks:
        callback.on_epoch_start(state)
    loss_sum, penalty_sum, samples, lr = 0.0, 0.0, 0, 0.0
    right: int | None = 0
    for batch, (call, targets) in enumerate(batches_of(loader, device)):
        state.batch = batch
        share, step = (batch / state.batches, 1 / state.batches) if state.batches else (0.0, 1.0)
        lr = config.learning_rate(state.epoch + min(share, 1.0), state.epochs, step)
        for group in state.optimizer.param_groups:
            group["lr"] = lr
        found = _step(state, call, targets, config, device)
        loss_sum += state.loss * len(targets)
        penalty_sum += state.penalty * len(targets)
        right = None if right is None or found is None else right + found
        samples += len(targets)
        for callback in callbacks:
            callback.on_batch_end(state)
    if not samples:
        raise TrainingError(
            "The loader yields no batch, so there is nothing to train on. Give one with samples."
        )
    if not all(bool(p.isfinite().all()) for p in state.model.parameters()):
        raise _diverged(state, "a weight is not finite")
    with nullcontext() if state.average is None else state.average.shown():
        held_out = (
            None
            if validation is None
            else evaluate(state.model, validation, loss=state.criterion, device=str(device))
        )
    state.records.append(
        EpochRecord(
            epoch=state.epoch + 1,
            lr=lr,
            loss=loss_sum / samples,
            accuracy=None if right is None else right / samples,
            validation_loss=None if held_out is None else held_out.loss,
            validation_accuracy=None if held_out is None else held_out.accuracy,
            seconds=time.perf_counter() - start,
            penalty=None if state.regularizer is None else penalty_sum / samples,
        )
    )
    logger.info("%s", state.records[-1])
    for callback in callbacks:
        callback.on_epoch_end(state)


def _step(
    state: TrainingState,
    call: Call,
    targets: Tensor,
    config: FinetuneConfig,
    device: torch.device,
) -> int | None:
    """Take a step; how many samples were classified right before it, None where the targets are no classes."""
    state.optimizer.zero_grad(set_to_none=True)
    with torch.autocast(device.type, torch.bfloat16, enabled=config.bfloat16):
        outputs = outputs_of(state.model, call, "finetune", TrainingError)
    if state.criterion is None:
        outputs = logits_of(outputs).float()
        require_labels(targets, outputs)
        right: int | None = int((outputs.argmax(dim=1) == targets).sum())
        loss = F.cross_entropy(outputs, targets, label_smoothing=config.label_smoothing)
    else:
        outputs = pytree.tree_map_only(Tensor, _from_bfloat16, outputs) if config.bfloat16 else outputs
        right = right_among(outputs, targets)
        loss = loss_of(state.criterion, outputs, targets, "finetune")
    if state.teacher is not None:
        with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=config.bfloat16):
            taught = outputs_of(state.teacher, call, "the teacher", TrainingError)
        taught = logits_of(taught).float()
        learned = distillation_loss(logits_of(outputs).float(), taught, config.temperature)
        loss = (1 - config.distillation) * loss + config.distillation * learned
    state.loss = loss.item()
    if not math.isfinite(state.loss):
        raise _diverged(state, f"the loss is {state.loss}")
    if state.regularizer is not None:
        penalty = state.regularizer()
        state.penalty = penalty.item()
        loss = loss + penalty
    torch.autograd.backward(loss)
    if config.grad_clip is not None:
        parameters = [p for group in state.optimizer.param_groups for p in group["params"]]
        nn.utils.clip_grad_norm_(parameters, config.grad_clip)
    state.optimizer.step()
    if state.regularizer is not None:
        state.regularizer.after_step()
    if state.average is not None:
        state.average.update()
    return right


def require_unsmoothed(config: FinetuneConfig, loss: Loss | None) -> None:
    """Refuse to smooth labels of which a loss of one's own knows nothing.

    Raises:
        InvalidOptionError: both are there.
    """
    if loss is not None and config.label_smoothing:
        raise InvalidOptionError(
            f"label_smoothing is {config.label_smoothing} and there is a loss: it is of the cross-entropy; smooth in "
            "the loss, or give label_smoothing=0"
        )


def _from_bfloat16(x: Tensor) -> Tensor:
    """What autocast made, in the precision that a loss is to be taken in."""
    return x.float() if x.dtype == torch.bfloat16 else x


def _optimizer(config: FinetuneConfig, parameters: list[nn.Parameter]) -> Optimizer:
    if config.optimizer == "adamw":
        return AdamW(parameters, lr=config.lr, weight_decay=config.weight_decay)
    return SGD(
        parameters,
        lr=config.lr,
        momentum=config.momentum,
        nesterov=config.nesterov,
        weight_decay=config.weight_decay,
    )


def _train_mode(model: nn.Module) -> None:
    model.train()
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            own = list(module.parameters(recurse=False))
            if own and not any(p.requires_grad for p in own):
                module.eval()


def _diverged(state: TrainingState, what: str) -> TrainingError:
    return TrainingError(
        f"Training diverged: {what} in epoch {state.epoch + 1}, batch {state.batch + 1}. Lower lr, set grad_clip, "
        "add warmup, and check that inputs and weights are finite; the model holds the weights of that moment."
    )
