"""How many bytes rows need for scores that are as good as wanted: found out by trying, on a sample of examples.

The error of compressed rows is 1 minus the mean Spearman correlation, over some of the examples as queries, of
their EK-FAC scores with those of exact gradients. `codecs.expected_spearman` would be cheaper, but coordinates of
real gradients depend on one another, and for transformers it expects far too much error.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping

import torch
from torch import Tensor

from lightning_influence.codecs import Allocation, EigenCodec, allocate
from lightning_influence.curvature import HeuristicDamping, get_curvature
from lightning_influence.functional.kronecker import Eigenbasis
from lightning_influence.functional.products import inner_products
from lightning_influence.gradients import LayerGradient
from lightning_influence.metrics import mean_rank_correlation

EXAMPLES, QUERIES = 128, 16  # of a sample
LEAST_EXAMPLES = 8  # that tell anything of an error
PRECISION = 1.05  # of the bytes
DEFAULT_BYTES = 8192  # of a row
UNLIMITED = 2**40  # more than any row has


def bytes_untried(examples: int, most: int, *, warns: bool = True) -> int:
    """Bytes of a row for an error that so few examples cannot tell, with a warning."""
    nbytes = min(most, DEFAULT_BYTES)
    if warns:
        warnings.warn(
            f"`error_budget` chooses the bytes of rows by the first examples, and {examples} are too few (a "
            f"process needs {LEAST_EXAMPLES}): rows get up to {nbytes:,} bytes; for another number pass "
            "`bytes_per_example`.",
            stacklevel=2,
        )
    return nbytes


class RowTrial:
    """Measures what rows of the eigen codec would lose.

    Args:
        bases: of the layers.
        Lambdas: EK-FAC's eigenvalues of each layer, [o, i].
        gradients: exact ones of some examples, at least three; the first are the queries, too.
    """

    def __init__(
        self,
        bases: Mapping[str, Eigenbasis],
        Lambdas: Mapping[str, Tensor],
        gradients: Mapping[str, LayerGradient],
    ) -> None:
        self._bases, self._Lambdas = bases, Lambdas
        self._gradients = {name: gradients[name][:EXAMPLES] for name in Lambdas}
        examples = len(next(iter(self._gradients.values())))
        self._others = ~torch.eye(
            min(QUERIES, examples), examples, dtype=torch.bool
        )  # a query's own row is no news
        self._asked = {name: self._preconditioned(name) for name in Lambdas}
        exact = (inner_products(self._gradients[n], bases[n].rotate_back(a)) for n, a in self._asked.items())
        self._exact = self._without_own(sum(scores.cpu() for scores in exact))  # type: ignore[arg-type]

    def error(self, allocations: Mapping[str, Allocation]) -> float:
        """1 - Spearman of the scores of such rows with exact ones."""
        found = torch.zeros(self._others.shape, dtype=torch.float32)
        for name, allocation in allocations.items():
            codec = EigenCodec.of(self._bases[name], allocation)
            projected = codec.project(self._asked[name], self._bases[name])
            found += codec.scores(projected, codec.encode(self._gradients[name])).cpu()
        return 1 - mean_rank_correlation(self._without_own(found), self._exact)

    def least_bytes(self, error_budget: float, most: int = UNLIMITED) -> int:
        """The fewest bytes, to 5 %, with which the error is within the budget; `most` where none are enough.

        Args:
            error_budget: above 0.
            most: bytes that rows may take.
        """
        everything = sum(allocation.nbytes for allocation in allocate(self._Lambdas, most).values())
        low, high = 4 * len(self._bases), min(everything, most)
        while high > PRECISION * low + 16:
            middle = int((low * high) ** 0.5)
            if self.error(allocate(self._Lambdas, middle)) <= error_budget:
                high = middle
            else:
                low = middle
        return high

    def _preconditioned(self, name: str) -> Tensor:
        basis, queries = self._bases[name], self._gradients[name][: len(self._others)]
        inverse = get_curvature("ekfac").inverse_eigenvalues(basis, self._Lambdas[name], HeuristicDamping(0.1))
        return basis.rotate(queries) * inverse

    def _without_own(self, scores: Tensor) -> Tensor:
        return scores[self._others].view(len(scores), -1)
