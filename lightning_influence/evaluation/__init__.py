"""What scores predict, and what not: references that train or optimise, and measures of agreement."""

from lightning_influence.evaluation.compare import Agreement, Comparison, compare
from lightning_influence.evaluation.leave_one_out import leave_one_out
from lightning_influence.evaluation.pbrf import pbrf
from lightning_influence.evaluation.responses import Responses

__all__ = ["Agreement", "Comparison", "Responses", "compare", "leave_one_out", "pbrf"]
