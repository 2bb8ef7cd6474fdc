"""What each unit, and each pair of neighbouring units, is worth: callables ``(model, graph) -> PairwiseForm``."""

from qcqp_prune.importance.activation import Activation
from qcqp_prune.importance.calibrated import Calibrated
from qcqp_prune.importance.chance import Random
from qcqp_prune.importance.derived import Concave, Lamp, Normalised
from qcqp_prune.importance.fisher import Fisher
from qcqp_prune.importance.layerwise import Importance
from qcqp_prune.importance.magnitude import BatchNormScale, Magnitude
from qcqp_prune.importance.median import GeometricMedian
from qcqp_prune.importance.sensitivity import NeuronSensitivity
from qcqp_prune.importance.taylor import Taylor

__all__ = [
    "Activation",
    "BatchNormScale",
    "Calibrated",
    "Concave",
    "Fisher",
    "GeometricMedian",
    "Importance",
    "Lamp",
    "Magnitude",
    "NeuronSensitivity",
    "Normalised",
    "Random",
    "Taylor",
]
