"""Other ways to make gradients small, for `fidelity.py`: random projections, and low rank.

Both are given all that our rows have: EK-FAC's curvature of the final weights, in full, on the side of the query,
so that what is compared is only what is stored of an example.
"""

# %%
from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_influence.functional.quantize import dequantize_int8, quantize_int8
from lightning_influence.gradients import LayerGradient
from lightning_influence.query import InfluenceQuery
from lightning_influence.scoring import ScoredLayer

DAMPING = 0.1  # times the layer's mean eigenvalue, everywhere
CHUNK_ELEMENTS = 2**24  # of dense gradients


@dataclass(frozen=True)
class Layer:
    """A layer's exact gradients in a file.

    Args:
        scored: basis and Lambda.
        queries: gradients of the queries in the eigenbasis, [q, o, i].
        examples: all examples' gradients, some at a time.
    """

    scored: ScoredLayer
    queries: Tensor
    examples: list[LayerGradient]

    @property
    def shape(self) -> tuple[int, int]:
        return self.scored.basis.shape

    @property
    def whitening(self) -> Tensor:
        """(Lambda + damping)^1/2, [o, i]."""
        Lambda = self.scored.Lambda
        return (Lambda + DAMPING * Lambda.mean()).sqrt()

    def rotated(self) -> Iterator[Tensor]:
        """The examples' gradients in the eigenbasis, [n, o, i], some at a time."""
        o, i = self.shape
        for gradient in self.examples:
            for start in range(0, len(gradient), step := max(1, CHUNK_ELEMENTS // (o * i))):
                yield self.scored.basis.rotate(gradient[start : start + step])


def read_layers(training: InfluenceQuery, queries: InfluenceQuery) -> dict[str, Layer]:
    """Of a file of the training examples and one of the queries, both with exact gradients."""
    found = {}
    for name, scored in training.layers.items():
        (asked,) = _gradients(queries, name, queries.num_examples)
        found[name] = Layer(scored, scored.basis.rotate(asked), list(_gradients(training, name, 512)))
    return found


def _gradients(query: InfluenceQuery, name: str, step: int) -> Iterator[LayerGradient]:
    maps, codec = query.store.rows(name), query.layers[name].codec
    for start in range(0, query.num_examples, step):
        arrays = {key: torch.from_numpy(array[start : start + step].copy()) for key, array in maps.items()}
        yield codec.decode_gradient(arrays)  # type: ignore[attr-defined]


# %%
# Kronecker random projections
# ----------------------------
# P_S G P_A^T with Gaussian P_S and P_A of a fixed seed (LoGra, Choe et al. 2024, arXiv:2405.13954), in float16.
# LoGra projects the gradient itself; whitened is what it would be for a user who has the curvature beforehand.


def random_scores(layers: Mapping[str, Layer], budget: int, *, is_whitened: bool) -> tuple[Tensor, float]:
    """Scores [q, n] and bytes an example: every layer has the same r x r numbers, if it has as many."""
    rank = max(r for r in range(1, 512) if r == 1 or _random_bytes(layers, r) <= budget)
    total: Tensor | float = 0.0
    for number, layer in enumerate(layers.values()):
        generator = torch.Generator().manual_seed(number)
        P_S, P_A = (_projection(size, rank, generator) for size in layer.shape)
        scale = layer.whitening if is_whitened else torch.ones(layer.shape)
        asked = layer.queries * scale / layer.whitening.square()
        rows = [(P_S @ (rotated / scale) @ P_A.mT).flatten(1).half().float() for rotated in layer.rotated()]
        total = total + (P_S @ asked @ P_A.mT).flatten(1) @ torch.cat(rows).T
    assert isinstance(total, Tensor)
    return total, _random_bytes(layers, rank)


def _projection(size: int, rank: int, generator: torch.Generator) -> Tensor:
    """[r, size] with E[P^T P] = 1; nothing is projected where r is the size."""
    if rank >= size:
        return torch.eye(size)
    return torch.randn(rank, size, generator=generator) / math.sqrt(rank)


def _random_bytes(layers: Mapping[str, Layer], rank: int) -> int:
    return sum(2 * min(rank, layer.shape[0]) * min(rank, layer.shape[1]) for layer in layers.values())


# %%
# Low rank
# --------
# The leading factors of each example's gradient (LoRIF, arXiv:2601.21929), here the best ones there are, from a
# singular value decomposition; int8 in groups of 64.


def low_rank_scores(layers: Mapping[str, Layer], ranks: tuple[int, ...]) -> Iterator[tuple[Tensor, float]]:
    """Scores [q, n] and bytes an example, at each rank."""
    totals = dict.fromkeys(ranks, torch.zeros(()))
    for layer in layers.values():
        asked = layer.queries / layer.whitening.square()
        parts: dict[int, list[Tensor]] = {rank: [] for rank in ranks}
        for rotated in layer.rotated():
            left, values, right = _leading(rotated, max(ranks))
            for rank in ranks:
                root = values[:, None, :rank].sqrt()
                U, V = (_rounded(factor[..., :rank] * root) for factor in (left, right))
                parts[rank].append(asked.flatten(1) @ (U @ V.mT).flatten(1).T)
        totals = {rank: totals[rank] + torch.cat(parts[rank], dim=1) for rank in ranks}
    for rank, scores in totals.items():
        entries = sum(min(rank, *layer.shape) * sum(layer.shape) for layer in layers.values())
        yield scores, entries * (1 + 4 / 64)


def _leading(matrices: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """The first singular vectors [n, o, r] and [n, i, r] of matrices [n, o, i], and values [n, r]."""
    if matrices.shape[1] > matrices.shape[2]:
        right, values, left = _leading(matrices.mT, rank)
        return left, values, right
    squares, vectors = torch.linalg.eigh((matrices @ matrices.mT).double())
    left = vectors[..., -rank:].flip(-1).float()
    values = squares[:, -rank:].flip(-1).clamp(min=0).sqrt().float()
    return left, values, matrices.mT @ left / values.clamp(min=1e-30)[:, None]


def _rounded(factors: Tensor) -> Tensor:
    """Each factor [n, side, r] as int8 and back."""
    return dequantize_int8(*quantize_int8(factors.mT.contiguous())).mT
