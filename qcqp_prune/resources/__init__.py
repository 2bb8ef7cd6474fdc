"""Exact resources. The counting forms are torch-free; ``measure`` counts independently on a real network."""

from qcqp_prune.resources.counted import Macs, Memory, Params

__all__ = ["Macs", "Memory", "Params"]
