"""Do the scores tell the truth? Retraining, and what can be compared with it."""

from lightning_influence.evaluation.brittleness import Removal, margins, remove_top_k
from lightning_influence.evaluation.retraining import Retraining, random_subsets, retrain_subsets
from lightning_influence.evaluation.retraining_recipe import Recipe

__all__ = ["Recipe", "Removal", "Retraining", "margins", "random_subsets", "remove_top_k", "retrain_subsets"]
