"""The command line. Only what a command needs is imported, so that ``solve`` runs where torch is not installed."""

from qcqp_prune.cli.app import main

__all__ = ["main"]
