"""Training: finetuning, regularisers that make structures vanish, budgets as their targets."""

from qcqp_prune.train.batchnorm import Recalibration, recalibrate_batch_norm
from qcqp_prune.train.budget import BudgetController, Control
from qcqp_prune.train.callbacks import Callback, TrainingState
from qcqp_prune.train.config import FinetuneConfig
from qcqp_prune.train.evaluate import Evaluation, evaluate
from qcqp_prune.train.history import EpochRecord, TrainingHistory
from qcqp_prune.train.loop import finetune
from qcqp_prune.train.psp import PSP, PSPConfig
from qcqp_prune.train.reconstruct import Reconstruction, reconstruct
from qcqp_prune.train.regularizer import Regularizer
from qcqp_prune.train.spr import SPR, SPRConfig

__all__ = [
    "PSP",
    "SPR",
    "BudgetController",
    "Callback",
    "Control",
    "EpochRecord",
    "Evaluation",
    "FinetuneConfig",
    "PSPConfig",
    "Recalibration",
    "Reconstruction",
    "Regularizer",
    "SPRConfig",
    "TrainingHistory",
    "TrainingState",
    "evaluate",
    "finetune",
    "recalibrate_batch_norm",
    "reconstruct",
]
