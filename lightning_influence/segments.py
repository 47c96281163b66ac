"""Which of a file's segments a question is put to, and how much each of them counts.

With e a segment, H_e its damped curvature, g_em its row of training example m, f the query's measurement and w_e
the segment's weight,

    score[q, m] = -sum_e w_e grad f_q^T H_e^-1 g_em.

It is the sum over checkpoints of TracIn (Pruthi et al. 2020, arXiv:2002.08484), whose weights are learning rates,
in each epoch's own curvature, and with one more difference: TracIn takes the query's gradient at each checkpoint,
here grad f_q is that of the model's own weights in all terms. So a query costs one backward pass.

What a segment adds for an example that has no valid row in it:

- nothing, if the epoch did not train on it, or had no finite gradient of it: TracIn's sum is over what training
  did with the example;
- NaN, if the segment holds a part of its epoch only (it was resumed, or cut short), so that nobody knows.

An example without a valid row in any of the segments has NaN.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Iterable, Mapping
from typing import Literal, NamedTuple

import numpy as np

from lightning_influence.errors import QueryError
from lightning_influence.store import StoreReader

Segments = Literal["last", "mean", "learning_rate"] | Mapping[int, float] | None
"""None or "last": the segment of the model's weights alone. "learning_rate", "mean": the mean over all segments
up to and including it, weighted by their mean learning rates, or equally. A mapping {segment number: weight}: the
sum of weight times scores, as given."""

SUM_TOLERANCE = 1e-6


class WeightedSegment(NamedTuple):
    """A segment and how much it counts.

    Args:
        store: reads the segment.
        weight: positive.
    """

    store: StoreReader
    weight: float


def weighted_segments(store: StoreReader, segments: Segments = None) -> list[WeightedSegment]:
    """The segments that count, in the order of their epochs.

    Args:
        store: reads the segment of the model's weights.
        segments: see `Segments`. Those of weight 0 are left out.

    Raises:
        ValueError: if `segments` is none of these, or a weight is negative or not finite.
        QueryError: if there is no such segment, or it is later than the model's; if no weight is positive; if a
            learning rate is not known; if segments have other layers than the model's.
    """
    weights = _weights(store, segments)
    chosen = [WeightedSegment(store.segment(number), weights[number]) for number in sorted(weights)]
    chosen = [each for each in chosen if each.weight > 0]
    if not chosen:
        raise QueryError(
            f"`segments` must give a segment of {store.path} a positive weight; "
            f"those of {segments!r} are {weights or 'none'}."
        )
    _check_layers(store, [each.store for each in chosen])
    return chosen


def segments_up_to(store: StoreReader) -> list[StoreReader]:
    """This segment and all before it, in the order of their epochs.

    Raises:
        QueryError: if some have other layers.
    """
    stores = [store.segment(number) for number in store.segments if number <= store.number]
    _check_layers(store, stores)
    return stores


def mean_learning_rate(store: StoreReader) -> float:
    """Of the segment's written rows, as far as it is known; NaN if it is not."""
    rates = store.column("learning_rate")[store.column("written").astype(bool)].astype(np.float64)
    rates = rates[~np.isnan(rates)]
    return float(rates.mean()) if len(rates) else math.nan


def answerable(stores: Iterable[StoreReader]) -> np.ndarray:
    """Which examples have a score from these segments together, bool [N].

    Those with a valid row in at least one, unless a segment that is a part of its epoch has none.
    """
    seen: np.ndarray | bool = False
    unknown: np.ndarray | bool = False
    for store in stores:
        valid, written = (store.column(name).astype(bool) for name in ("valid", "written"))
        seen = seen | valid
        if not store.attributes.get("is_whole", True):
            unknown = unknown | ~written
    return np.asarray(seen & ~np.asarray(unknown))


def check_is_mean(weighted: Iterable[WeightedSegment]) -> None:
    """Refuse weights that do not sum to 1: the effects of several epochs then have no scale.

    Raises:
        QueryError: naming their sum.
    """
    weighted = list(weighted)
    if not is_mean(weighted):
        total = math.fsum(each.weight for each in weighted)
        raise QueryError(
            f"the weights of `segments` must sum to 1 for `removal_effect`, got {total:.6g}: each segment "
            "predicts the whole effect, so that only a weighted mean of them has its units. Divide the weights by "
            'their sum, or pass "learning_rate" or "mean".'
        )


def is_mean(weighted: Iterable[WeightedSegment]) -> bool:
    """Whether weights sum to 1."""
    return abs(math.fsum(each.weight for each in weighted) - 1) <= SUM_TOLERANCE


def _weights(store: StoreReader, segments: Segments) -> dict[int, float]:
    if segments is None or isinstance(segments, str):
        earlier = [number for number in store.segments if number <= store.number]
        if segments is None or segments == "last":
            return {store.number: 1.0}
        if segments == "mean":
            return dict.fromkeys(earlier, 1 / len(earlier))
        if segments == "learning_rate":
            return _learning_rate_weights([store.segment(number) for number in earlier])
    if not isinstance(segments, Mapping):
        raise ValueError(
            '`segments` must be None, "last", "mean", "learning_rate" or a mapping {segment number: weight}, '
            f"got {segments!r}."
        )
    for number, weight in segments.items():
        if isinstance(weight, bool) or not isinstance(weight, numbers.Real) or not 0 <= float(weight) < math.inf:
            raise ValueError(
                f"the weights of `segments` must be finite numbers >= 0, got {{{number!r}: {weight!r}}}."
            )
        _check_number(store, number)
    return {int(number): float(weight) for number, weight in segments.items()}


def _check_number(store: StoreReader, number: int) -> None:
    if isinstance(number, bool) or number not in store.segments:
        raise QueryError(f"`segments` names {number!r}, but {store.path} has the segments {[*store.segments]}.")
    if number > store.number:
        raise QueryError(
            f"`segments` names {number}, but the model has the weights of segment {store.number} of {store.path}: "
            "later epochs had no part in them. Load the later weights, or leave it out."
        )


def _learning_rate_weights(stores: list[StoreReader]) -> dict[int, float]:
    rates = {store.number: mean_learning_rate(store) for store in stores}
    total = math.fsum(rates.values())
    unusable = {number: rate for number, rate in rates.items() if not 0 <= rate < math.inf}
    if unusable or total == 0:
        raise QueryError(
            f'`segments="learning_rate"` needs the learning rate of each epoch, at least one above 0; those of '
            f"{stores[0].path} are {unusable or rates}, by segment (NaN: unknown). Pass "
            '`segments="mean"` or a mapping {segment number: weight}.'
        )
    return {number: rate / total for number, rate in rates.items()}


def _check_layers(store: StoreReader, others: Iterable[StoreReader]) -> None:
    own = _layer_shapes(store)
    differences = {}
    for other in others:
        found = _layer_shapes(other)
        names = [name for name in {**own, **found} if own.get(name) != found.get(name)]
        if names:
            differences[other.number] = names
    if differences:
        listed = "; ".join(f"segment {number}: {', '.join(names)}" for number, names in differences.items())
        raise QueryError(
            f"some segments of {store.path} do not have the layers of segment {store.number}, whose weights the "
            f"model has; they differ in ({listed}), which are missing on one side or of another shape. Ask the "
            "other segments only, with `scores(..., segments={segment number: weight})`."
        )


def _layer_shapes(store: StoreReader) -> dict[str, tuple[int, ...]]:
    """Shapes [o, i] of the layers' gradients; a bias is one more input."""
    lambdas = {name: data.shape for name, data, _ in store.datasets() if name.endswith("/factors/Lambda")}
    return {layer: lambdas.get(f"layers/{layer}/factors/Lambda", ()) for layer in store.layers}
