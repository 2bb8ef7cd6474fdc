"""What was done to a network and what is proved of it, as plain data and as tables for the terminal. No torch."""

from qcqp_prune.report.accuracy import Accuracy
from qcqp_prune.report.budgets import BudgetLine, ResourceRange, budget_lines, feasible_ranges
from qcqp_prune.report.content import PruneReport
from qcqp_prune.report.layers import LayerRow, OtherParameters, layer_rows, other_parameters
from qcqp_prune.report.regularised import Regularised
from qcqp_prune.report.rounds import Round

__all__ = [
    "Accuracy",
    "BudgetLine",
    "LayerRow",
    "OtherParameters",
    "PruneReport",
    "Regularised",
    "ResourceRange",
    "Round",
    "budget_lines",
    "feasible_ranges",
    "layer_rows",
    "other_parameters",
]
