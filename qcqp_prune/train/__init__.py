"""Finetuning of a pruned network, and what belongs to it: batch-norm recalibration, evaluation, checkpoints."""

from qcqp_prune.train.batchnorm import Recalibration, recalibrate_batch_norm
from qcqp_prune.train.callbacks import Callback, TrainingState
from qcqp_prune.train.config import FinetuneConfig
from qcqp_prune.train.evaluate import Evaluation, evaluate
from qcqp_prune.train.history import EpochRecord, TrainingHistory
from qcqp_prune.train.loop import finetune

__all__ = [
    "Callback",
    "EpochRecord",
    "Evaluation",
    "FinetuneConfig",
    "Recalibration",
    "TrainingHistory",
    "TrainingState",
    "evaluate",
    "finetune",
    "recalibrate_batch_norm",
]
