"""Relaxed masks beside exact ones, on one instance."""

from qcqp_prune.analyse.compare import Comparison, GroupDifference, Origin, compare
from qcqp_prune.analyse.relax import RelaxedMasks, relax, rounded, thresholded

__all__ = [
    "Comparison",
    "GroupDifference",
    "Origin",
    "RelaxedMasks",
    "compare",
    "relax",
    "rounded",
    "thresholded",
]
