"""What scores predict, and what not: references that train or optimise, and measures of agreement."""

from lightning_influence.evaluation.pbrf import pbrf
from lightning_influence.evaluation.responses import Responses

__all__ = ["Responses", "pbrf"]
