"""What each unit, and each pair of neighbouring units, is worth: callables ``(model, graph) -> PairwiseForm``."""

from qcqp_prune.importance.magnitude import BatchNormScale, Magnitude
from qcqp_prune.importance.taylor import Taylor

__all__ = ["BatchNormScale", "Magnitude", "Taylor"]
