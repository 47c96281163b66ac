"""Preconditioned queries of each layer, ready to meet rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from lightning_influence.codecs import PairsCodec
from lightning_influence.curvature import Curvature, Damping
from lightning_influence.errors import QueryError
from lightning_influence.functional.products import inner_products
from lightning_influence.gradients import FactoredGradient, LayerGradient
from lightning_influence.query.budget import preconditioned_at_once
from lightning_influence.query.truncated import TruncatedQueries
from lightning_influence.scoring import ScoredLayer


@dataclass(frozen=True)
class PreparedLayer:
    """The queries of one layer of a segment.

    Args:
        layer: its factors and codec.
        projected: q queries, as the codec takes them; of rank r, for rows that are pairs, if that was asked for.
    """

    layer: ScoredLayer
    projected: Tensor | TruncatedQueries

    def scores(self, arrays: Mapping[str, Tensor]) -> Tensor:
        """Scores of rows, shape [q, n]."""
        if isinstance(self.projected, TruncatedQueries):
            return self.projected.scores(_pairs(self.layer).decode_gradient(arrays))
        return self.layer.scores(self.projected, arrays)

    def position_scores(self, arrays: Mapping[str, Tensor]) -> Tensor:
        """What each position of the rows adds to its score, shape [q, n, s]; of rows that are pairs."""
        assert isinstance(self.projected, Tensor)  # as `check_positions` has it
        rows = _pairs(self.layer).decode_gradient(arrays)
        each = FactoredGradient(rows.inputs.flatten(0, 1)[:, None], rows.output_grads.flatten(0, 1)[:, None])
        return inner_products(each, self.projected).unflatten(1, (len(rows), rows.positions))


class AnswerOfLayer(Protocol):
    """`PreparedLayer.scores` or `PreparedLayer.position_scores`."""

    def __call__(self, layer: PreparedLayer, arrays: Mapping[str, Tensor], /) -> Tensor:
        """What the layer says of rows."""


def prepare(
    layer: ScoredLayer,
    query_of: Callable[[slice], LayerGradient],
    queries: slice,
    curvature: Curvature,
    damping: Damping,
    *,
    budget: int,
    rank: int | None = None,
) -> PreparedLayer:
    """Precondition a layer's queries, in float32, some at a time: of a rank if cheaper."""
    count, step = queries.stop - queries.start, preconditioned_at_once(layer, budget)
    projected = None
    for start in range(0, count, step):
        some = slice(start, min(start + step, count))
        query = _as_float32(query_of(slice(queries.start + some.start, queries.start + some.stop)), layer.Lambda)
        part = layer.precondition(query, curvature, damping)
        if projected is None:  # made once: parts that are kept would lie between what is given back
            projected = part if len(part) == count else part.new_empty(count, *part.shape[1:])
        if projected is not part:
            projected[some] = part
    assert projected is not None
    if rank is not None and _is_cheaper(layer, rank):
        return PreparedLayer(layer, TruncatedQueries(projected, rank))
    return PreparedLayer(layer, projected)


def _is_cheaper(layer: ScoredLayer, rank: int) -> bool:
    """Whether products with queries of a rank take fewer multiply-adds than with whole ones."""
    if not isinstance(layer.codec, PairsCodec):
        return False
    o, i = layer.codec.shape
    return 2 * rank * (o + i) < o * i


def _pairs(layer: ScoredLayer) -> PairsCodec:
    assert isinstance(layer.codec, PairsCodec)
    return layer.codec


def _as_float32(query: LayerGradient, like: Tensor) -> LayerGradient:
    """The gradients where the factors are, and of their dtype."""
    tensors = [t.to(like if t.is_floating_point() else like.device) for t in query.tensors]
    return query.with_tensors(tensors)


def check_positions(layers: Mapping[str, ScoredLayer], where: str, added_up: bool) -> None:
    """Refuse `per_token` of rows that do not keep their positions apart, or not as many where they are added up.

    Raises:
        QueryError: naming the layers, and how to capture.
    """
    codecs = {name: layer.codec for name, layer in layers.items()}
    summed = [f"{name} ({codec.codec_id})" for name, codec in codecs.items() if not isinstance(codec, PairsCodec)]
    if summed:
        raise QueryError(
            f"`per_token` needs rows that keep positions apart, but those of {', '.join(summed)} in {where} are "
            'sums over positions. Capture with `InfluenceCallback(codec="pairs")` and without merging epochs, or '
            "choose other `layers`."
        )
    positions = {name: codec.positions for name, codec in codecs.items() if isinstance(codec, PairsCodec)}
    if added_up and len(set(positions.values())) > 1:
        listed = ", ".join(f"{name}: {count}" for name, count in positions.items())
        raise QueryError(
            f"`per_token` needs layers with the same number of positions, but those of {where} have ({listed}); "
            "choose some by `layers`, or pass `per_layer=True` as well."
        )
