"""Exact resources. The counting forms are torch-free; ``measure`` counts independently on a real network."""

from qcqp_prune.resources.accelerator import AcceleratorCycles
from qcqp_prune.resources.counted import Macs, Memory, Params
from qcqp_prune.resources.latency import LatencyTable, LayerLatency
from qcqp_prune.resources.peak import PeakMemory

__all__ = ["AcceleratorCycles", "LatencyTable", "LayerLatency", "Macs", "Memory", "Params", "PeakMemory"]
