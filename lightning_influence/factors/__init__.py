"""Accumulators of a layer's curvature, as `torchmetrics.Metric`s: batch by batch, over processes."""

from lightning_influence.factors.eigenvalue_correction import EigenvalueCorrection
from lightning_influence.factors.kronecker_covariance import KroneckerCovariance

__all__ = ["EigenvalueCorrection", "KroneckerCovariance"]
