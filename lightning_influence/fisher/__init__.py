"""Curvature of gradients under labels that the model predicts: passes through a step's graph, and their sums."""

from lightning_influence.fisher.factors import LabelFactors
from lightning_influence.fisher.graph import check_graph
from lightning_influence.fisher.kinds import FisherKind, LabelSource, describe_fisher
from lightning_influence.fisher.passes import LabelPasses

__all__ = ["FisherKind", "LabelFactors", "LabelPasses", "LabelSource", "check_graph", "describe_fisher"]
