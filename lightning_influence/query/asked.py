"""A question, put to a file: the pass over its rows that answers it.

The outer loop is over chunks of examples, the inner ones over the segments that are asked and their layers, so
that one pass over the file serves all layers and all queries that fit the memory budget. A curvature that is made
of the rows (`RowCurvature`) needs all scores of a query at once, and has one chunk.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from lightning_influence.codecs.base import split_rows
from lightning_influence.curvature import (
    Curvature,
    Damping,
    RowCurvature,
    as_damping,
    basis_of,
    get_curvature,
)
from lightning_influence.errors import QueryError
from lightning_influence.gradients import LayerGradient
from lightning_influence.query.budget import queries_at_once, rows_at_once
from lightning_influence.query.options import Question, chosen_layers
from lightning_influence.query.places import Places, as_indices
from lightning_influence.query.prepared import AnswerOfLayer, PreparedLayer, check_positions, prepare
from lightning_influence.query.reading import read_chunks
from lightning_influence.query.segment import OpenSegment
from lightning_influence.query.truncated import log_truncated
from lightning_influence.scoring import ScoredLayer
from lightning_influence.segments import WeightedSegment, answerable, weighted_segments

BLOCK_ROWS = 1024  # whose squares are made at a time
QueriesOf = Callable[[OpenSegment, str, slice], LayerGradient]
"""Some of the queries' gradients of a layer, for a segment."""
Prepared = Mapping[tuple[int, str], PreparedLayer]
"""By the segment's place and the layer."""


class Block(NamedTuple):
    """Answers about some examples.

    Args:
        queries: which.
        part: which of the places.
        scores: by group of layers, [q, n] or [q, n, s]; NaN without a valid row.
        effects: predicted effects of removing each example alone, [q, n], if asked for.
    """

    queries: slice
    part: slice
    scores: dict[str, Tensor]
    effects: Tensor | None


@dataclass(frozen=True)
class Part:
    """A segment that counts.

    Args:
        segment: opened.
        weight: positive.
        rules: each layer's damping.
    """

    segment: OpenSegment
    weight: float
    rules: Mapping[str, Damping]


@dataclass(frozen=True)
class Asked:
    """A question with what a file says to it.

    Args:
        parts: the segments.
        layers: names of the layers to sum over.
        curvature: of each.
        places: the examples that are asked about.
        known: which of all examples have an answer, bool [N].
        budget: bytes.
        rank: that queries are truncated to; None for exact products.
    """

    parts: Sequence[Part]
    layers: Sequence[str]
    curvature: Curvature
    places: Places
    known: Tensor = field(repr=False)
    budget: int
    rank: int | None = None

    @classmethod
    def of(cls, own: OpenSegment, question: Question, budget: int, places: Places | None = None) -> Asked:
        """Look up all that a question names.

        Args:
            own: the segment of the model's weights.
            question: checked here.
            budget: bytes.
            places: the examples, instead of the question's subset.
        """
        curvature, rule = get_curvature(question.curvature), as_damping(question.damping)
        where, N = str(own.store.path), own.num_examples
        layers = chosen_layers(question.layers, own.layers, where)
        if places is None:
            subset = question.subset
            places = Places(N, None if subset is None else as_indices(subset, N, "subset", where))
        weighted = weighted_segments(own.store, question.segments)
        parts = []
        for store, weight in weighted:
            segment = own if store.number == own.store.number else OpenSegment(store, own.device)
            parts.append(Part(segment, weight, segment.dampings(curvature, rule)))
        return cls(parts, layers, curvature, places, known_examples(weighted), budget, question.rank)

    @property
    def device(self) -> torch.device:
        """Where to compute."""
        return self.parts[0].segment.device

    @property
    def weights(self) -> list[WeightedSegment]:
        """The segments' weights."""
        return [WeightedSegment(part.segment.store, part.weight) for part in self.parts]

    def count_known(self) -> int:
        """How many of the examples asked about have an answer."""
        return int(self.known[self.places.rows(slice(0, len(self.places)))].sum())

    def check_positions(self, *, added_up: bool) -> None:
        """Refuse a question about positions that rows do not keep.

        Raises:
            QueryError: if there are none, or layers that are to be added up have not the same number.
        """
        segment = self.parts[0].segment
        if self.rank is not None:
            raise ValueError("`rank` cannot be combined with `per_token`; leave one of them out.")
        if isinstance(self.curvature, RowCurvature):
            raise QueryError(
                "`per_token` cannot be had with a curvature that is made of the rows, such as 'empirical_fisher', "
                "which corrects scores of whole examples; ask with `curvature='ekfac'`."
            )
        check_positions({n: segment.layers[n] for n in self.layers}, str(segment.store.path), added_up)

    def blocks(
        self,
        count: int,
        queries_of: QueriesOf,
        *,
        group_of: Callable[[str], str] = lambda name: "",
        answer: AnswerOfLayer = PreparedLayer.scores,
        with_effects: bool = False,
    ) -> Iterator[Block]:
        """Answers to all queries about all examples: of some queries, all examples in their order; then of others.

        Args:
            count: number of queries.
            queries_of: their gradients.
            group_of: layers of the same group are added up.
            answer: what a layer says of its rows.
            with_effects: whether removals are asked about, too.
        """
        step = self._queries_at_once()
        for start in range(0, count, step):
            queries = slice(start, min(start + step, count))
            prepared = self._prepared(queries_of, queries)
            scored = self._whole if isinstance(self.curvature, RowCurvature) else self._chunks
            for part, each in scored(prepared, queries.stop - queries.start, group_of, answer):
                yield self._joined(queries, part, each, with_effects)

    def self_influence(self) -> Tensor:
        """Grad L_n^T (G + damping)^-1 grad L_n of the examples asked about, in their order."""
        result = torch.zeros(len(self.places), dtype=torch.float32)
        if isinstance(self.curvature, RowCurvature):
            return self._self_influence_by_rows(self.curvature)
        inverses = {
            (number, name): self.curvature.inverse_eigenvalues(layer.basis, layer.Lambda, part.rules[name])
            for number, part, name, layer in self._each_layer()
        }
        bases = {(n, name): basis_of(self.curvature, layer.basis) for n, _, name, layer in self._each_layer()}
        step = rows_at_once([layer.codec for *_, layer in self._each_layer()], 1, self.budget)
        for chunk in read_chunks(self._maps(), self.places, step, self.device):
            total = torch.zeros(chunk.part.stop - chunk.part.start, dtype=torch.float32)
            for number, part in enumerate(self.parts):
                own = torch.zeros_like(total)
                for name in self.layers:
                    key = number, name
                    codec = part.segment.layers[name].codec
                    for some, arrays in split_rows(chunk.arrays[key], BLOCK_ROWS):
                        own[some] += codec.quadratic(inverses[key], bases[key], arrays).cpu()
                total += part.weight * own.masked_fill_(~part.segment.valid[chunk.rows], 0)
            result[self.places.columns(chunk.part)] = total.masked_fill_(~self.known[chunk.rows], torch.nan)
        return result

    def _self_influence_by_rows(self, curvature: RowCurvature) -> Tensor:
        total = torch.zeros(len(self.known), dtype=torch.float32)
        for _, part, name, layer in self._each_layer():
            found = curvature.rows_part(part.segment._rows(name), layer.Lambda, part.rules[name]).self_influence()
            total[part.segment.valid] += part.weight * found.float().cpu()
        every = slice(0, len(self.places))
        result = torch.zeros(len(self.places), dtype=torch.float32)
        result[self.places.columns(every)] = total.masked_fill_(~self.known, torch.nan)[self.places.rows(every)]
        return result

    def _each_layer(self) -> Iterator[tuple[int, Part, str, ScoredLayer]]:
        for number, part in enumerate(self.parts):
            for name in self.layers:
                yield number, part, name, part.segment.layers[name]

    def _maps(self) -> dict[tuple[int, str], dict[str, np.memmap]]:
        return {(number, name): part.segment.store.rows(name) for number, part, name, _ in self._each_layer()}

    def _queries_at_once(self) -> int:
        step = queries_at_once((layer for *_, layer in self._each_layer()), self.budget)
        if isinstance(self.curvature, RowCurvature):  # all scores of a query, in float64 as well
            step = min(step, max(1, self.budget // 4 // (24 * len(self.known))))
        return step

    def _prepared(self, queries_of: QueriesOf, queries: slice) -> dict[tuple[int, str], PreparedLayer]:
        found = {}
        for number, part in enumerate(self.parts):
            for name in self.layers:
                query_of = functools.partial(queries_of, part.segment, name)
                layer, rule = part.segment.layers[name], part.rules[name]
                found[number, name] = prepare(
                    layer, query_of, queries, self.curvature, rule, budget=self.budget, rank=self.rank
                )
        log_truncated({name: each.projected for (_, name), each in found.items()})
        return found

    def _chunks(
        self, prepared: Prepared, count: int, group_of: Callable[[str], str], answer: AnswerOfLayer
    ) -> Iterator[tuple[slice, list[dict[str, Tensor]]]]:
        """Scores of each segment, added up over groups of layers: without a valid row they mean nothing."""
        step = rows_at_once([layer.codec for *_, layer in self._each_layer()], count, self.budget)
        for chunk in read_chunks(self._maps(), self.places, step, self.device):
            found: list[dict[str, Tensor]] = [{} for _ in self.parts]
            for number, _, name, _ in self._each_layer():
                own = answer(prepared[number, name], chunk.arrays[number, name])
                _add(found[number], group_of(name), own)
            yield chunk.part, found

    def _whole(
        self, prepared: Prepared, count: int, group_of: Callable[[str], str], answer: AnswerOfLayer
    ) -> Iterator[tuple[slice, list[dict[str, Tensor]]]]:
        """The same of a curvature that needs the scores of all rows."""
        assert isinstance(self.curvature, RowCurvature)
        places, every = Places(len(self.known)), slice(0, len(self.places))
        found: list[dict[str, Tensor]] = [{} for _ in self.parts]
        for number, part, name, layer in self._each_layer():
            segment, own = part.segment, torch.zeros(count, len(places), dtype=torch.float32)
            maps = {name: segment.store.rows(name)}
            for chunk in read_chunks(maps, places, rows_at_once([layer.codec], count, self.budget), self.device):
                own[:, chunk.part] = answer(prepared[number, name], chunk.arrays[name]).cpu()
            rows_part = self.curvature.rows_part(segment._rows(name), layer.Lambda, part.rules[name])
            scores = torch.zeros_like(own)
            scores[:, segment.valid] = rows_part.scores(own[:, segment.valid]).float().cpu()
            _add(found[number], group_of(name), scores[:, self.places.rows(every)])
        yield every, found

    def _joined(
        self, queries: slice, part: slice, found: Sequence[dict[str, Tensor]], with_effects: bool
    ) -> Block:
        """The weighted sum over segments."""
        rows = self.places.rows(part)
        scores: dict[str, Tensor] = {}
        effects: dict[str, Tensor] = {}
        for each, groups in zip(self.parts, found, strict=True):
            invalid = ~each.segment.valid[rows]
            for group, own in groups.items():
                term = _filled(own, invalid, 0.0)
                term = term if each.weight == 1 else each.weight * term
                _add(scores, group, term)
                if with_effects:
                    _add(effects, "", -term * each.segment.removal_shares(rows).to(term))
        unknown = ~self.known[rows]
        scores = {group: _filled(own, unknown, torch.nan) for group, own in scores.items()}
        return Block(queries, part, scores, _filled(effects[""], unknown, torch.nan) if with_effects else None)


def known_examples(weighted: Sequence[WeightedSegment]) -> Tensor:
    """Which examples have an answer from these segments together, bool [N]."""
    return torch.from_numpy(answerable(each.store for each in weighted))


def _add(sums: dict[str, Tensor], group: str, term: Tensor) -> None:
    sums[group] = sums[group] + term if group in sums else term


def _filled(scores: Tensor, where: Tensor, value: float) -> Tensor:
    """Scores [q, n] or [q, n, s] with a value for some examples, bool [n]."""
    if not where.any():
        return scores
    where = where.to(scores.device)
    return scores.masked_fill(where if scores.ndim == 2 else where[:, None], value)
