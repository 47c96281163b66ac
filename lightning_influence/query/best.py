"""The best k scores of each query, of chunks that come one after the other."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_influence.functional.ranking import top_k


class BestSoFar:
    """Holds k scores a query, whatever has been added; what `functional.ranking.top_k` gives of all at once.

    Args:
        k: how many.
        largest: whether large scores are the best.
    """

    def __init__(self, k: int, *, largest: bool = True) -> None:
        self._k, self._largest = k, largest
        self._scores: Tensor | None = None
        self._indices: Tensor | None = None

    def add(self, indices: Tensor, scores: Tensor) -> None:
        """Let some more examples compete.

        Args:
            indices: int64 [n], ascending, and larger than all before: ties go to the lower.
            scores: shape [q, n].
        """
        if self._none_enters(scores):
            return
        entering = self._entering(self._order(scores))
        places, found = _packed(entering, scores)
        numbers = indices.to(scores.device)[places.clamp(min=0)].masked_fill(places < 0, -1)
        if self._scores is not None and self._indices is not None:
            found = torch.cat([self._scores, found], dim=1)
            numbers = torch.cat([self._indices, numbers], dim=1)
        self._scores, best = top_k(found, self._k, largest=self._largest)
        self._indices = numbers.gather(1, best)

    def result(self) -> tuple[Tensor, Tensor]:
        """Indices int64 [q, k] and scores [q, k], best first; fewer if fewer were added."""
        assert self._scores is not None
        assert self._indices is not None
        return self._indices, self._scores

    def _none_enters(self, scores: Tensor) -> bool:
        """Whether no score can be among the best k, quickly; false where it takes a closer look."""
        if self._scores is None or self._scores.shape[1] < self._k:
            return False
        bar = self._scores[:, -1:]
        return not bool((bar.isnan() | (scores > bar if self._largest else scores < bar)).any())

    def _order(self, scores: Tensor) -> Tensor:
        """Larger is better; NaN last."""
        return (scores if self._largest else -scores).nan_to_num(nan=-torch.inf)

    def _entering(self, order: Tensor) -> Tensor:
        """Which scores may be among the best k, bool [q, n]: most are not."""
        if self._scores is not None and self._scores.shape[1] == self._k:
            return order > self._order(self._scores[:, -1:])  # a tie goes to those before
        if order.shape[1] <= self._k:
            return torch.ones_like(order, dtype=torch.bool)
        return order >= order.topk(self._k, dim=1).values[:, -1:]


def _packed(entering: Tensor, scores: Tensor) -> tuple[Tensor, Tensor]:
    """Chosen columns of each row, in their order from the left: places [q, width], or -1, and scores, or NaN."""
    rows, columns = entering.nonzero(as_tuple=True)
    counts = entering.sum(1)
    slots = torch.arange(len(rows), device=rows.device) - (counts.cumsum(0) - counts)[rows]
    width = int(counts.max()) if len(counts) else 0
    places = columns.new_full((len(scores), width), -1)
    places[rows, slots] = columns
    found = scores.new_full((len(scores), width), torch.nan)
    found[rows, slots] = scores[rows, columns]
    return places, found
