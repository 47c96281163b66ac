"""Measures of how good an attribution is: functions, and classes that add up over batches and processes."""

from lightning_influence.metrics.agreement import mean_rank_correlation
from lightning_influence.metrics.brittleness import Brittleness, brittleness, data_support
from lightning_influence.metrics.detection import MislabelAUROC, mislabel_auroc
from lightning_influence.metrics.linear_datamodeling import (
    LinearDatamodelingScore,
    bootstrap_rank_correlations,
    linear_datamodeling_score,
    split_half_reliability,
    standard_errors,
    subset_predictions,
)
from lightning_influence.metrics.ranks import (
    SortedRows,
    average_ranks,
    rank_correlations,
    row_correlations,
)
from lightning_influence.metrics.removal import (
    LeaveKOutCorrelation,
    LeaveOneOutCorrelation,
    leave_k_out_correlation,
    leave_one_out_correlation,
)
from lightning_influence.metrics.retrieval import (
    MeanReciprocalRank,
    RecallAtK,
    mean_reciprocal_rank,
    recall_at_k,
)
from lightning_influence.metrics.stability import RankStability, rank_stability

__all__ = [
    "Brittleness",
    "LeaveKOutCorrelation",
    "LeaveOneOutCorrelation",
    "LinearDatamodelingScore",
    "MeanReciprocalRank",
    "MislabelAUROC",
    "RankStability",
    "RecallAtK",
    "SortedRows",
    "average_ranks",
    "bootstrap_rank_correlations",
    "brittleness",
    "data_support",
    "leave_k_out_correlation",
    "leave_one_out_correlation",
    "linear_datamodeling_score",
    "mean_rank_correlation",
    "mean_reciprocal_rank",
    "mislabel_auroc",
    "rank_correlations",
    "rank_stability",
    "recall_at_k",
    "row_correlations",
    "split_half_reliability",
    "standard_errors",
    "subset_predictions",
]
