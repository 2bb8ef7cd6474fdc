"""Prune a PyTorch network to an exact resource budget by solving a discrete optimisation problem.

    import qcqp_prune as qp

    small, report = qp.prune(model, example_inputs, budgets={"macs": "50%"})

What needs torch is imported on first use, so that problems can be solved on machines without it.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from qcqp_prune.analyse import Comparison, RelaxedMasks, compare, relax
from qcqp_prune.errors import (
    BackendError,
    CertificateError,
    ConfigError,
    DataError,
    InfeasibleError,
    InvalidBudgetError,
    InvalidOptionError,
    InvalidScoreError,
    MaskMismatchError,
    MissingDependencyError,
    ModelLoadError,
    NoCertificateError,
    NoIncumbentError,
    NothingToPruneError,
    PlanError,
    QcqpPruneError,
    SolverIncapableError,
    SolverUnavailableError,
    TraceError,
    TrainingError,
    UnknownLayerError,
    UnsupportedOpError,
    VerificationError,
)
from qcqp_prune.graph.channels import ChannelGraph
from qcqp_prune.graph.masks import Masks
from qcqp_prune.program.coefficients import LowRank
from qcqp_prune.program.forms import PairTerm, PairwiseForm
from qcqp_prune.program.problem import PruningProblem
from qcqp_prune.program.rounds import Rounds
from qcqp_prune.resources.accelerator import AcceleratorCycles
from qcqp_prune.resources.counted import Macs, Memory, Params
from qcqp_prune.resources.latency import LatencyTable
from qcqp_prune.resources.peak import PeakMemory
from qcqp_prune.solve.backend import available_solvers
from qcqp_prune.solve.options import SolveOptions
from qcqp_prune.solve.pareto import ParetoFront, pareto
from qcqp_prune.solve.report import SolveReport

# Imported here and now, not on first use: the name would otherwise be taken by the subpackage `solve`.
from qcqp_prune.solve.run import solve
from qcqp_prune.storage import library_version

if TYPE_CHECKING:
    from qcqp_prune.apply.masked import masked
    from qcqp_prune.apply.plan import load, save
    from qcqp_prune.apply.shrink import shrink, shrink_and_verify
    from qcqp_prune.apply.verification import Verification
    from qcqp_prune.continuous import Training
    from qcqp_prune.graph.trace import trace
    from qcqp_prune.grid import sweep
    from qcqp_prune.importance import (
        Activation,
        BatchNormScale,
        Calibrated,
        Concave,
        Fisher,
        GeometricMedian,
        Lamp,
        Magnitude,
        NeuronSensitivity,
        Normalised,
        OutputChange,
        Random,
        Taylor,
    )
    from qcqp_prune.pipeline import prune
    from qcqp_prune.recovery import Recovery
    from qcqp_prune.report import PruneReport
    from qcqp_prune.resources.timing import measure_latency
    from qcqp_prune.train import (
        PSP,
        SPR,
        BudgetController,
        Control,
        FinetuneConfig,
        PSPConfig,
        SPRConfig,
        evaluate,
        finetune,
        recalibrate_batch_norm,
        reconstruct,
    )

__version__ = library_version()

__all__ = [
    "PSP",
    "SPR",
    "AcceleratorCycles",
    "Activation",
    "BackendError",
    "BatchNormScale",
    "BudgetController",
    "Calibrated",
    "CertificateError",
    "ChannelGraph",
    "Comparison",
    "Concave",
    "ConfigError",
    "Control",
    "DataError",
    "FinetuneConfig",
    "Fisher",
    "GeometricMedian",
    "InfeasibleError",
    "InvalidBudgetError",
    "InvalidOptionError",
    "InvalidScoreError",
    "Lamp",
    "LatencyTable",
    "LowRank",
    "Macs",
    "Magnitude",
    "MaskMismatchError",
    "Masks",
    "Memory",
    "MissingDependencyError",
    "ModelLoadError",
    "NeuronSensitivity",
    "NoCertificateError",
    "NoIncumbentError",
    "Normalised",
    "NothingToPruneError",
    "OutputChange",
    "PSPConfig",
    "PairTerm",
    "PairwiseForm",
    "Params",
    "ParetoFront",
    "PeakMemory",
    "PlanError",
    "PruneReport",
    "PruningProblem",
    "QcqpPruneError",
    "Random",
    "Recovery",
    "RelaxedMasks",
    "Rounds",
    "SPRConfig",
    "SolveOptions",
    "SolveReport",
    "SolverIncapableError",
    "SolverUnavailableError",
    "Taylor",
    "TraceError",
    "Training",
    "TrainingError",
    "UnknownLayerError",
    "UnsupportedOpError",
    "Verification",
    "VerificationError",
    "available_solvers",
    "compare",
    "evaluate",
    "finetune",
    "load",
    "masked",
    "measure_latency",
    "pareto",
    "prune",
    "recalibrate_batch_norm",
    "reconstruct",
    "relax",
    "save",
    "shrink",
    "shrink_and_verify",
    "solve",
    "sweep",
    "trace",
]

_LAZY = {
    "Activation": "importance",
    "BatchNormScale": "importance",
    "BudgetController": "train",
    "Calibrated": "importance",
    "Concave": "importance",
    "Control": "train",
    "FinetuneConfig": "train",
    "Fisher": "importance",
    "GeometricMedian": "importance",
    "Lamp": "importance",
    "Magnitude": "importance",
    "NeuronSensitivity": "importance",
    "Normalised": "importance",
    "OutputChange": "importance",
    "PSP": "train",
    "PSPConfig": "train",
    "PruneReport": "report",
    "Random": "importance",
    "Recovery": "recovery",
    "SPR": "train",
    "SPRConfig": "train",
    "Taylor": "importance",
    "Training": "continuous",
    "Verification": "apply.verification",
    "evaluate": "train",
    "finetune": "train",
    "load": "apply.plan",
    "masked": "apply.masked",
    "measure_latency": "resources.timing",
    "prune": "pipeline",
    "recalibrate_batch_norm": "train",
    "reconstruct": "train",
    "save": "apply.plan",
    "shrink": "apply.shrink",
    "shrink_and_verify": "apply.shrink",
    "sweep": "grid",
    "trace": "graph.trace",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        value = getattr(importlib.import_module(f"{__name__}.{_LAZY[name]}"), name)
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        raise MissingDependencyError(
            f"qcqp_prune.{name} needs PyTorch: install it with `pip install torch`"
        ) from error
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
