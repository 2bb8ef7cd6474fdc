"""``python -m qcqp_prune``."""

from qcqp_prune.cli import main

main()
