"""For those who write solvers or resources: small problems, their exact optima, and a test that a backend must pass."""

from qcqp_prune.testing.backends import BackendCheck, check_backend
from qcqp_prune.testing.chains import chain_problem, free_residual_problem
from qcqp_prune.testing.exhaustive import Optimum, exhaustive
from qcqp_prune.testing.instances import STRUCTURES, random_problem

__all__ = [
    "STRUCTURES",
    "BackendCheck",
    "Optimum",
    "chain_problem",
    "check_backend",
    "exhaustive",
    "free_residual_problem",
    "random_problem",
]
