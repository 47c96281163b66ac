"""Measures of how good an attribution is."""

from lightning_influence.metrics.agreement import mean_rank_correlation

__all__ = ["mean_rank_correlation"]
