"""Do the scores tell the truth? References that train or optimise, and how scores compare with them."""

from lightning_influence.evaluation.brittleness import Removal, margins, remove_top_k
from lightning_influence.evaluation.compare import Agreement, Comparison, compare
from lightning_influence.evaluation.leave_one_out import leave_one_out
from lightning_influence.evaluation.pbrf import pbrf
from lightning_influence.evaluation.report import VerificationReport
from lightning_influence.evaluation.responses import Responses
from lightning_influence.evaluation.retraining import Retraining, random_subsets, retrain_subsets
from lightning_influence.evaluation.retraining_recipe import Recipe

__all__ = [
    "Agreement",
    "Comparison",
    "Recipe",
    "Removal",
    "Responses",
    "Retraining",
    "VerificationReport",
    "compare",
    "leave_one_out",
    "margins",
    "pbrf",
    "random_subsets",
    "remove_top_k",
    "retrain_subsets",
]
