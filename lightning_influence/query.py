"""The core of queries without any framework: scores from a file's arrays, chunk by chunk.

All scores are sums over the layers of inner products of preconditioned query gradients with stored rows
(see `scoring`), and over the segments of the file that are asked for (see `segments`). Damping and
curvature are arguments of the call and leave nothing behind: the same call twice gives the same bits. A curvature
that is made of the rows (`RowCurvature`) corrects each layer's scores under its diagonal part.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from lightning_influence.curvature import (
    AnyDamping,
    Curvature,
    DampedLayer,
    Damping,
    DampingOfLayers,
    HeuristicDamping,
    RowCurvature,
    as_damping,
    damping_by_layer,
    get_curvature,
)
from lightning_influence.damping_advice import DampingAdvice, advise_damping
from lightning_influence.errors import CorruptStoreError, QueryError
from lightning_influence.functional.ranking import top_k
from lightning_influence.functional.structure import KroneckerStructure
from lightning_influence.gradients import LayerGradient
from lightning_influence.penalties import read_penalties
from lightning_influence.scoring import ScoredLayer
from lightning_influence.segments import Segments, answerable, check_is_mean, segments_up_to, weighted_segments
from lightning_influence.store import StoreReader
from lightning_influence.stored_rows import StoredRows

CHUNK_EXAMPLES = 4096
DEFAULT_DAMPING = HeuristicDamping()


class Attribution(NamedTuple):
    """The training examples that speak loudest for each query.

    Args:
        indices: dataset indices, int64 [q, k], best first.
        scores: their scores, [q, k], in the measurement's units times the number of training
            examples; positive: up-weighting the example raises the measurement (a proponent).
    """

    indices: Tensor
    scores: Tensor


class InfluenceQuery:
    """Answers from one file, given the queries' gradients.

    Args:
        store: the file.
        device: where to compute; rows are read in chunks and moved there.

    Raises:
        CorruptStoreError: if what the file says of its layers does not fit its arrays.
    """

    def __init__(self, store: StoreReader, device: torch.device | str = "cpu") -> None:
        self.store = store
        self.device = torch.device(device)
        self.layers = {entry["name"]: _load_layer(store, entry, self.device) for entry in described_layers(store)}
        self._row_products: dict[str, Tensor] = {}
        self.valid = torch.from_numpy(store.column("valid").astype(bool))
        written = store.column("written").astype(bool)
        self._occurrences = torch.from_numpy(np.where(written, store.column("occurrences"), 0))

    @property
    def num_examples(self) -> int:
        """Length of the dataset, N."""
        return self.store.num_examples

    def recommend_damping(self) -> DampingAdvice:
        """Which damping to ask this file with, and how much that matters; nothing but the file is read."""
        return advise_damping(self.store, self.layers, DEFAULT_DAMPING)

    def scores(
        self,
        queries: Mapping[str, LayerGradient],
        *,
        damping: AnyDamping = DEFAULT_DAMPING,
        curvature: str | Curvature = "ekfac",
        segments: Segments = None,
    ) -> Tensor:
        """Scores of every training example for every query.

        Args:
            queries: by layer, the gradients of *minus* the measurement, q of them.
            damping: a rule, a number added to every eigenvalue, or a mapping from names or patterns of
                layers to these.
            curvature: "ekfac", "kfac", "diagonal", "empirical_fisher", "identity", or one's own.
            segments: which segments of the file to sum over, and their weights; None for the store's own.

        Returns:
            Shape [q, N], NaN for examples without a valid row; `segments` says what one of several adds that
            has none.
        """
        kind, rule = get_curvature(curvature), as_damping(damping)
        return self._summed(segments, lambda each: each._own_scores(queries, kind, rule, lambda name: ""))[""]

    def scores_by_layer(
        self,
        queries: Mapping[str, LayerGradient],
        *,
        damping: AnyDamping = DEFAULT_DAMPING,
        curvature: str | Curvature = "ekfac",
        segments: Segments = None,
    ) -> dict[str, Tensor]:
        """What each layer adds to the scores: by its name, shape [q, N]; arguments as in `scores`."""
        kind, rule = get_curvature(curvature), as_damping(damping)
        return self._summed(segments, lambda each: each._own_scores(queries, kind, rule, lambda name: name))

    def scores_by_segment(
        self,
        queries: Mapping[str, LayerGradient],
        *,
        damping: AnyDamping = DEFAULT_DAMPING,
        curvature: str | Curvature = "ekfac",
    ) -> dict[int, Tensor]:
        """Scores of this segment and of each before it: by its number, shape [q, N]; arguments as in `scores`."""
        engines = map(self._of, segments_up_to(self.store))
        return {each.store.number: each.scores(queries, damping=damping, curvature=curvature) for each in engines}

    def top_k(
        self,
        queries: Mapping[str, LayerGradient],
        k: int = 10,
        *,
        largest: bool = True,
        damping: AnyDamping = DEFAULT_DAMPING,
        curvature: str | Curvature = "ekfac",
        segments: Segments = None,
    ) -> Attribution:
        """The k training examples with the largest (or smallest) scores of each query."""
        self.check_k(k, segments)
        scores = self.scores(queries, damping=damping, curvature=curvature, segments=segments)
        values, indices = top_k(scores, k, largest=largest)
        return Attribution(indices, values)

    def check_k(self, k: int, segments: Segments = None) -> None:
        """Refuse a k that the file cannot give.

        Raises:
            ValueError: unless 1 <= k <= number of valid rows.
        """
        rows = int(self._answerable(segments).sum())
        if isinstance(k, bool) or not isinstance(k, int) or not 1 <= k <= rows:
            raise ValueError(f"`k` must be an integer from 1 to {rows}, the number of valid rows, got {k!r}.")

    def self_influence(
        self,
        *,
        damping: AnyDamping = DEFAULT_DAMPING,
        curvature: str | Curvature = "ekfac",
        segments: Segments = None,
    ) -> Tensor:
        """Grad L_n^T (G + damping)^-1 grad L_n of every training example.

        Large where the model has to bend for one example: mislabelled and atypical ones. Summed over
        `segments` with their weights; both gradients are then those of the segment's row.

        Returns:
            Shape [N], NaN for examples without a valid row.
        """
        kind, rule = get_curvature(curvature), as_damping(damping)
        return self._summed(segments, lambda each: {"": each._own_self_influence(kind, rule)})[""]

    def removal_effect(
        self,
        queries: Mapping[str, LayerGradient],
        indices: Tensor | np.ndarray | list[int],
        *,
        damping: AnyDamping = DEFAULT_DAMPING,
        curvature: str | Curvature = "ekfac",
        segments: Segments = None,
    ) -> Tensor:
        """Predicted change of the measurement if these training examples were removed.

        The first-order estimate -sum_m c[m] score[q, m] / sum_n c[n] with c how often the captured
        epoch trained on each example (Koh & Liang 2017, arXiv:1703.04730, where c is 1), in the
        measurement's units. So an example that was seen twice is removed twice. Of several segments
        it is the weighted mean of their estimates, each with its own c. Rows that are merged from E epochs
        have c in their sums already: -sum_m score[q, m] E / sum_n c[n].

        Args:
            queries: as in `scores`.
            indices: dataset indices, each once.
            damping: as in `scores`.
            curvature: as in `scores`.
            segments: as in `scores`; the weights must sum to 1.

        Returns:
            Shape [q].

        Raises:
            QueryError: if an index occurs twice, is out of range or has no valid row; if the weights
                do not sum to 1.
        """
        chosen = torch.as_tensor(indices).flatten()
        if len(chosen) and (chosen.is_floating_point() or chosen.dtype == torch.bool):
            raise QueryError(f"`indices` must be integers, dataset indices, got {chosen.dtype}.")
        chosen = chosen.long()
        check_is_mean(weighted_segments(self.store, segments))
        self._check_removed(chosen, segments)
        kind, rule = get_curvature(curvature), as_damping(damping)

        def shares(each: InfluenceQuery) -> dict[str, Tensor]:
            scores = each._own_scores(queries, kind, rule, lambda name: "")[""]
            return {"": scores * each._removal_shares}

        return -self._summed(segments, shares)[""][:, chosen].sum(1)

    @property
    def _removal_shares(self) -> Tensor:
        """What an example's score counts for its removal, [N] or []."""
        total = self._occurrences.sum()
        if self.store.attributes.get("trajectory") == "merge":
            return torch.tensor(float(self.store.attributes["epochs_merged"])) / total
        return self._occurrences / total

    def _summed(
        self, segments: Segments, answer: Callable[[InfluenceQuery], dict[str, Tensor]]
    ) -> dict[str, Tensor]:
        """Weighted sums over segments, of which one's factors at a time are in memory."""
        added: dict[str, Tensor] = {}
        for store, weight in weighted_segments(self.store, segments):
            each = self._of(store)
            for name, found in answer(each).items():
                term = weight * found.masked_fill(~each.valid, 0.0)
                added[name] = added[name] + term if name in added else term
        unknown = ~self._answerable(segments)
        return {name: values.masked_fill(unknown, torch.nan) for name, values in added.items()}

    def _of(self, store: StoreReader) -> InfluenceQuery:
        return self if store.number == self.store.number else InfluenceQuery(store, self.device)

    def _answerable(self, segments: Segments) -> Tensor:
        """Which examples have a score, bool [N]."""
        return torch.from_numpy(answerable(each.store for each in weighted_segments(self.store, segments)))

    def _own_scores(
        self,
        queries: Mapping[str, LayerGradient],
        curvature: Curvature,
        damping: Damping | DampingOfLayers,
        group_of: Callable[[str], str],
    ) -> dict[str, Tensor]:
        """This segment's scores, added up over groups of layers; without a valid row they mean nothing."""
        scores: dict[str, Tensor] = {}
        rules = self.dampings(curvature, damping)
        for name, layer in self.layers.items():
            preconditioned = layer.precondition(queries[name].to(self.device), curvature, rules[name])
            added = scores.setdefault(group_of(name), torch.zeros(len(preconditioned), self.num_examples))
            own = torch.zeros_like(added) if isinstance(curvature, RowCurvature) else added
            for rows, arrays in self._chunks(name):
                own[:, rows] += layer.scores(preconditioned, arrays).cpu()
            if isinstance(curvature, RowCurvature):
                part = curvature.rows_part(self._rows(name), layer.Lambda, rules[name])
                added[:, self.valid] += part.scores(own[:, self.valid]).float().cpu()
        return scores

    def _own_self_influence(self, curvature: Curvature, damping: Damping | DampingOfLayers) -> Tensor:
        result, rules = torch.zeros(self.num_examples), self.dampings(curvature, damping)
        for name, layer in self.layers.items():
            if isinstance(curvature, RowCurvature):
                part = curvature.rows_part(self._rows(name), layer.Lambda, rules[name])
                result[self.valid] += part.self_influence().float().cpu()
                continue
            for rows, arrays in self._chunks(name):
                result[rows] += layer.self_influence(arrays, curvature, rules[name]).cpu()
        return result

    def _rows(self, name: str) -> StoredRows:
        """A layer's valid rows, for a curvature that is made of them."""
        where, maps = f"layer {name!r} of {self.store.path}", self.store.rows(name)
        codec, valid = self.layers[name].codec, self.valid
        return StoredRows(where, maps, codec, valid, device=self.device, kept=self._row_products)

    def dampings(self, curvature: Curvature, damping: Damping | DampingOfLayers) -> Mapping[str, Damping]:
        """Each layer's rule, by name, of one that may look at all of them."""
        if not isinstance(damping, DampingOfLayers):
            return dict.fromkeys(self.layers, damping)
        penalties = read_penalties(self.store, self.layers)
        seen = {n: DampedLayer(each.eigenvalues(curvature), *penalties[n]) for n, each in self.layers.items()}
        return damping_by_layer(damping, seen)

    def _check_removed(self, chosen: Tensor, segments: Segments) -> None:
        if len(chosen.unique()) < len(chosen):
            raise QueryError("`indices` names an example twice; an example can be removed once.")
        if len(chosen) and not 0 <= int(chosen.min()) <= int(chosen.max()) < self.num_examples:
            raise QueryError(
                f"`indices` must lie in 0..{self.num_examples - 1}, the dataset of {self.store.path}, "
                f"got {int(chosen.min())}..{int(chosen.max())}."
            )
        without = chosen[~self._answerable(segments)[chosen]]
        if len(without):
            raise QueryError(
                f"{len(without)} of `indices` have no valid row in {self.store.path} (the first is "
                f"{int(without[0])}): training did not see them, or their gradient was not finite."
            )

    def _chunks(self, name: str) -> Iterator[tuple[slice, dict[str, Tensor]]]:
        maps = self.store.rows(name)
        for start in range(0, self.num_examples, CHUNK_EXAMPLES):
            rows = slice(start, min(start + CHUNK_EXAMPLES, self.num_examples))
            arrays = {key: torch.from_numpy(np.array(a[rows])) for key, a in maps.items()}
            yield rows, {key: array.to(self.device) for key, array in arrays.items()}


def described_layers(store: StoreReader) -> list[dict]:
    """What a file says of each of its layers, in the model's order.

    Raises:
        CorruptStoreError: unless it names just the layers that there are arrays for.
    """
    try:
        described = store.document("layers")
        names = [entry["name"] for entry in described]
        fits = bool(names) and sorted(names) == sorted(store.layers)
    except (ValueError, TypeError, LookupError) as error:
        raise CorruptStoreError(
            f"{store.path}: the document 'layers' cannot be read: {error}. Restore a copy or capture again."
        ) from error
    if not fits:
        raise CorruptStoreError(
            f"{store.path}: the document 'layers' names {names}, but there are arrays for "
            f"{list(store.layers)}. Restore a copy or capture again."
        )
    return described


def _load_layer(store: StoreReader, entry: Mapping, device: torch.device) -> ScoredLayer:
    name = entry["name"]
    try:
        factors = store.factors(name)
        structure = KroneckerStructure(**entry.get("structure", {}))
        layer = ScoredLayer.from_arrays(factors, entry["codec"], entry["config"], structure, device)
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        raise CorruptStoreError(
            f"{store.path}: layer {name!r} cannot be read: {type(error).__name__}: {error}. Restore a copy "
            "or capture again."
        ) from error
    found = {key: (array.shape[1:], array.dtype.str[1:]) for key, array in store.rows(name).items()}
    if found != layer.codec.arrays():
        raise CorruptStoreError(
            f"{store.path}: layer {name!r} must have the row arrays {layer.codec.arrays()}, found {found}. "
            "Restore a copy or capture again."
        )
    return layer
