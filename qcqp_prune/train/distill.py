"""What a smaller network learns from the one that it was cut from."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qcqp_prune.errors import InvalidOptionError, TrainingError, require_kind
from qcqp_prune.train.config import FinetuneConfig
from qcqp_prune.train.modes import modes_kept, placed


def require_teacher(config: FinetuneConfig, model: nn.Module, teacher: nn.Module | None) -> None:
    """Refuse a teacher that would do nothing, and distillation without one.

    Raises:
        InvalidOptionError: one is there without the other, or the teacher is the network itself, or none.
    """
    if teacher is not None:
        require_kind("teacher", teacher, nn.Module, "a network, such as the dense one")
    if teacher is None and config.distillation:
        raise InvalidOptionError(
            f"distillation is {config.distillation} and there is no teacher: give one, such as the dense network, or "
            "distillation=0"
        )
    if teacher is not None and not config.distillation:
        raise InvalidOptionError(
            "a teacher does nothing with distillation 0: give FinetuneConfig(distillation=0.5)"
        )
    if teacher is not None and any(teacher is module for module in model.modules()):
        raise InvalidOptionError("the teacher is the network that is trained: give another one, or a copy")


@contextmanager
def teaching(teacher: nn.Module | None, device: torch.device) -> Iterator[None]:
    """A teacher in eval mode on a device; its modes and its device come back."""
    if teacher is None:
        yield
        return
    with modes_kept(teacher), placed(teacher, str(device)):
        teacher.eval()
        yield


def distillation_loss(logits: Tensor, taught: Tensor, temperature: float) -> Tensor:
    """``T^2 KL(softmax(taught / T) || softmax(logits / T))``, the mean over samples and positions, in nats.

    Args:
        logits: of the network that learns, ``(N, classes, ...)``.
        taught: of the teacher, in the same shape.
        temperature: T.

    Raises:
        TrainingError: the shapes differ.

    References:
        Hinton, Vinyals, Dean: Distilling the knowledge in a neural network, 2015, arXiv 1503.02531, section 2. With the
        factor T^2 the gradient does not shrink as T grows.
    """
    if taught.shape != logits.shape:
        raise TrainingError(
            f"The teacher gives outputs of shape {tuple(taught.shape)}, the network {tuple(logits.shape)}. Give a "
            "teacher of the same classes."
        )
    student, target = (F.log_softmax(x / temperature, dim=1) for x in (logits, taught))
    divergence = F.kl_div(student, target, reduction="none", log_target=True).sum(dim=1)
    return temperature**2 * divergence.mean()
