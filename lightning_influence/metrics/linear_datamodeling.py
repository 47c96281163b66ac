"""The linear datamodeling score (LDS): do the scores predict what training on other subsets does?

For a query q and subsets S_1 ... S_m of the training examples, drawn at random,

    LDS_q = Spearman over j of ( sum over n in S_j of scores[q, n],  truth[j, q] )

with truth[j, q] the query's measurement after training on S_j, averaged over training seeds; the score is the mean
of LDS_q over the queries (Park et al. 2023, "TRAK: Attributing Model Behavior at Scale", arXiv:2303.14186).

Both the queries and the subsets are samples, so the bootstrap draws both anew, the same ones for all methods that
are given to it together, so that their differences are paired. Its error is right where queries, or subsets,
differ as such, and up to sqrt(3) times too large where each pair of them has noise of its own: it errs on the
safe side, as no exact bootstrap of two-way tables exists (Owen & Eckles 2012, "Bootstrapping data arrays of
arbitrary order", doi:10.1214/12-AOAS547).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from lightning_influence.metrics.checks import check_groups, check_measured, check_scores
from lightning_influence.metrics.ranks import SortedRows, rank_correlations, row_correlations

MOST_HALVES = 512


def linear_datamodeling_score(scores: Tensor, subsets: Tensor, truth: Tensor) -> Tensor:
    """The mean over queries of the rank correlation between summed scores and measured outputs.

    Args:
        scores: of each training example for each query, shape [q, N]; positive where it raises the output.
        subsets: bool, which examples a model was trained on, shape [m, N].
        truth: the models' outputs for the queries, shape [m, q]; average over seeds first.

    Returns:
        A float64 scalar between -1 and 1. A query whose outputs are all the same does not count (NaN if none is
        left); one whose sums are all the same scores 0.

    Raises:
        TypeError, ValueError: if shapes do not fit, or a number is not finite.

    Example:
        >>> subsets = torch.tensor([[True, False, True], [False, True, True], [True, True, False]])
        >>> scores = torch.tensor([[1.0, 2.0, 5.0]])
        >>> linear_datamodeling_score(scores, subsets, subsets.float() @ scores.T).item()
        1.0
    """
    predicted, actual = _pairs(scores, subsets, truth)
    return rank_correlations(predicted, actual).nanmean()


def subset_predictions(scores: Tensor, subsets: Tensor) -> Tensor:
    """The sum of the scores of each subset's examples.

    Args:
        scores: shape [..., q, N].
        subsets: bool [m, N].

    Returns:
        float64 [..., q, m].

    Example:
        >>> subset_predictions(torch.tensor([[1.0, 2.0]]), torch.tensor([[True, True], [False, True]])).tolist()
        [[3.0, 2.0]]
    """
    return scores.double() @ subsets.to(scores.device).double().T


def bootstrap_rank_correlations(
    predictions: Sequence[Tensor], actual: Tensor, *, num_bootstraps: int = 200, seed: int = 0
) -> Tensor:
    """Mean rank correlations of several methods on queries and subsets that are drawn anew.

    Args:
        predictions: of each method [..., q, m]; its score is the mean over leading dimensions, such as runs, too.
        actual: what was measured, shape [q, m].
        num_bootstraps: how often.
        seed: of the draws.

    Returns:
        float64 [methods, num_bootstraps]. The standard deviation of a row is the method's standard error, that of
        a difference of two rows the error of the difference.

    Raises:
        ValueError: if `num_bootstraps` is less than 2, of which there is no deviation.

    Example:
        >>> actual = torch.randn(8, 20, generator=torch.Generator().manual_seed(0))
        >>> drawn = bootstrap_rank_correlations([actual, -actual], actual, num_bootstraps=10)
        >>> drawn.mean(1).tolist()
        [1.0, -1.0]
    """
    if num_bootstraps < 2:
        raise ValueError(f"`num_bootstraps` must be at least 2, got {num_bootstraps}.")
    generator = torch.Generator().manual_seed(seed)
    q, m = actual.shape
    rows, truth = [SortedRows(predicted) for predicted in predictions], SortedRows(actual)
    drawn = torch.zeros(len(predictions), num_bootstraps, dtype=torch.float64)
    for draw in range(num_bootstraps):
        subsets = torch.randint(m, (m,), generator=generator).bincount(minlength=m).to(actual.device)
        queries = torch.randint(q, (q,), generator=generator).to(actual.device)
        ranks = truth.ranks(subsets)
        for method, predicted in enumerate(rows):
            found = row_correlations(predicted.ranks(subsets), ranks, subsets)
            drawn[method, draw] = found[..., queries].nanmean()
    return drawn


def split_half_reliability(outputs: Tensor) -> float:
    """How well outputs, averaged over seeds, would agree with a second set of as many seeds, as ranks.

    The rank correlation of the means over two halves of the seeds, averaged over queries and all ways to halve
    them (of very many ways, some), for the full number of seeds by the formula of Spearman and Brown,
    k r / (1 + (k - 1) r) with k the ratio of the numbers of seeds. The best that a prediction can score is about
    its square root.

    Args:
        outputs: shape [m, seeds, q].

    Returns:
        At most 1, and below -1 where halves say the opposite; NaN of one seed.

    Example:
        >>> outputs = torch.randn(20, 1, 4, generator=torch.Generator().manual_seed(0)).expand(20, 4, 4)
        >>> round(split_half_reliability(outputs), 6)
        1.0
    """
    seeds = outputs.shape[1]
    if seeds < 2:
        return float("nan")
    half, found = seeds // 2, []
    for part in _halves(seeds, half):
        other = sorted(set(range(seeds)) - set(part))[:half]
        one, two = (outputs[:, list(chosen)].double().mean(1).T for chosen in (part, other))
        found.append(rank_correlations(one, two).nanmean())
    r, longer = torch.stack(found).mean(), seeds / half
    return float(longer * r / (1 + (longer - 1) * r))


def _halves(seeds: int, half: int) -> Iterable[Sequence[int]]:
    if math.comb(seeds, half) <= MOST_HALVES:
        return itertools.combinations(range(seeds), half)
    generator = torch.Generator().manual_seed(0)
    return [torch.randperm(seeds, generator=generator)[:half].tolist() for _ in range(MOST_HALVES)]


def standard_errors(drawn: Tensor) -> Tensor:
    """The standard deviation over bootstrap draws, [..., draws]; without those in which no output had an order."""
    known = ~drawn.isnan()
    count = known.sum(-1)
    off = (drawn - drawn.nanmean(-1, keepdim=True)).nan_to_num()
    return (off.square().sum(-1) / (count - 1)).sqrt()


class LinearDatamodelingScore(Metric):
    """The linear datamodeling score over batches of queries; safe over several processes.

    `update(scores, subsets, truth)` takes the queries of a batch, `[q, N]` and `[m, q]` as
    `linear_datamodeling_score` does, with the same subsets each time. Only sums over subsets are kept, [q, m].

    Args:
        num_bootstraps: if positive, `compute` returns `{"lds": ..., "standard_error": ...}`, with the standard
            error over queries and subsets from so many draws; otherwise the score alone.
        seed: of the draws.
        kwargs: of `torchmetrics.Metric`.

    Example:
        >>> subsets = torch.tensor([[True, False, True], [False, True, True], [True, True, False]])
        >>> scores = torch.tensor([[1.0, 2.0, 5.0], [2.0, 1.0, 0.0]])
        >>> metric = LinearDatamodelingScore()
        >>> metric.update(scores, subsets, subsets.float() @ scores.T)
        >>> metric.compute().item()
        1.0
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False

    predicted: list[Tensor]
    actual: list[Tensor]
    num_subsets: Tensor

    def __init__(self, *, num_bootstraps: int = 0, seed: int = 0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if num_bootstraps < 0 or num_bootstraps == 1:
            raise ValueError(f"`num_bootstraps` must be 0 or at least 2, got {num_bootstraps}.")
        self.num_bootstraps, self.seed = num_bootstraps, seed
        # Flat, and of the metric's own dtype: a process without any query joins with an empty tensor of that kind.
        self.add_state("predicted", [], dist_reduce_fx="cat")
        self.add_state("actual", [], dist_reduce_fx="cat")
        self.add_state("num_subsets", torch.zeros((), dtype=torch.long), dist_reduce_fx="max")

    def update(self, scores: Tensor, subsets: Tensor, truth: Tensor) -> None:
        """Add the queries of a batch."""
        predicted, actual = _pairs(scores, subsets, truth)
        if int(self.num_subsets) not in (0, len(subsets)):
            raise ValueError(f"`subsets` must be the same in each update: {self.num_subsets}, got {len(subsets)}.")
        self.num_subsets = self.num_subsets.new_tensor(len(subsets))
        self.predicted.append(predicted.flatten().to(self.device, self.dtype))
        self.actual.append(actual.flatten().to(self.device, self.dtype))

    def compute(self) -> Tensor | dict[str, Tensor]:
        """The score of all queries so far, with its standard error if asked for."""
        if not int(self.num_subsets):
            raise ValueError("No query was given to `LinearDatamodelingScore`; call `update` first.")
        predicted, actual = (_joined(state, int(self.num_subsets)) for state in (self.predicted, self.actual))
        score = rank_correlations(predicted, actual).nanmean()
        if not self.num_bootstraps:
            return score
        options = {"num_bootstraps": self.num_bootstraps, "seed": self.seed}
        drawn = bootstrap_rank_correlations([predicted], actual, **options)
        return {"lds": score, "standard_error": standard_errors(drawn[0])}


def _pairs(scores: Tensor, subsets: Tensor, truth: Tensor) -> tuple[Tensor, Tensor]:
    """Predicted and measured outputs, each [q, m], after all checks."""
    check_scores(scores)
    check_groups(subsets, scores.shape[1], "subsets")
    check_measured(truth, "truth", len(subsets), len(scores))
    return subset_predictions(scores, subsets), truth.T.double().to(scores.device)


def _joined(state: list[Tensor] | Tensor, num_subsets: int) -> Tensor:
    flat = torch.cat(state) if isinstance(state, list) else state  # joined already after processes were
    return flat.view(-1, num_subsets)
