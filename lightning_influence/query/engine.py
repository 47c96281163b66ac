"""The core of queries without any framework: scores from a file's arrays, chunk by chunk.

All scores are sums over the layers of inner products of preconditioned query gradients with stored rows
(see `scoring`), and over the segments of the file that are asked for (see `segments`). Damping and
curvature are arguments of the call and leave nothing behind: the same call twice gives the same bits. A curvature
that is made of the rows (`RowCurvature`) corrects each layer's scores under its diagonal part.

Memory is flat in the number of training examples N, but for what is returned and for vectors [N] of a few bytes an
example, such as which rows are valid.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import Tensor
from typing_extensions import Unpack

from lightning_influence.damping_advice import DampingAdvice, advise_damping
from lightning_influence.errors import QueryError
from lightning_influence.gradients import LayerGradient
from lightning_influence.query.answers import Attribution, GroupAttribution
from lightning_influence.query.asked import Asked, QueriesOf, known_examples
from lightning_influence.query.best import BestSoFar
from lightning_influence.query.budget import MEMORY_BUDGET, parse_bytes
from lightning_influence.query.groups import Groups, Membership
from lightning_influence.query.options import DEFAULT_DAMPING, QueryOptions, Question, ScoreOptions
from lightning_influence.query.places import Places, Subset, as_indices
from lightning_influence.query.prepared import AnswerOfLayer, PreparedLayer
from lightning_influence.query.segment import OpenSegment
from lightning_influence.segments import (
    Segments,
    check_is_mean,
    is_mean,
    segments_up_to,
    weighted_segments,
)
from lightning_influence.store import StoreReader

Queries = Mapping[str, LayerGradient]


class InfluenceQuery(OpenSegment):
    """Answers from one file, given the queries' gradients.

    Wherever `queries` are asked for, they are the gradients of *minus* the measurement, q of them, by layer; other
    keywords are those of `QueryOptions` and `ScoreOptions`.

    Args:
        store: the file.
        device: where to compute; rows are read in chunks and moved there.
        memory_budget: of a question, beyond the file's factors, the queries' gradients and what is returned: a
            number of bytes, or such as "1GB". Many queries are answered some at a time, with a pass over the file
            for each lot. A single preconditioned query is not split.

    Raises:
        CorruptStoreError: if what the file says of its layers does not fit its arrays.
        ValueError: if the budget is no number of bytes.
    """

    def __init__(
        self,
        store: StoreReader,
        device: torch.device | str = "cpu",
        memory_budget: str | int = MEMORY_BUDGET,
    ) -> None:
        self.memory_budget = parse_bytes(memory_budget)
        super().__init__(store, device)

    def recommend_damping(self) -> DampingAdvice:
        """Which damping to ask this file with, and how much that matters; nothing but the file is read."""
        return advise_damping(self.store, self.layers, DEFAULT_DAMPING)

    def scores(self, queries: Queries, *, per_token: bool = False, **options: Unpack[ScoreOptions]) -> Tensor:
        """Scores of every training example for every query.

        Args:
            queries: see the class.
            per_token: return what each position of the training examples adds instead.
            options: see `ScoreOptions`.

        Returns:
            Shape [q, N] or [q, len(subset)], with `per_token` [..., s], on the CPU. NaN for examples without a
            valid row; `segments` says what one of several adds that has none.
        """
        return self._scores(queries, Question(**options), lambda name: "", per_token)[""]

    def scores_by_layer(
        self, queries: Queries, *, per_token: bool = False, **options: Unpack[ScoreOptions]
    ) -> dict[str, Tensor]:
        """What each layer adds to the scores: by its name, as `scores`."""
        return self._scores(queries, Question(**options), lambda name: name, per_token)

    def scores_by_segment(self, queries: Queries, **options: Unpack[ScoreOptions]) -> dict[int, Tensor]:
        """Scores of this segment and of each before it: by its number, as `scores`.

        Raises:
            ValueError: if `segments` is given.
        """
        if options.get("segments") is not None:
            raise ValueError("`segments` cannot be chosen where each is answered; leave it out.")
        numbers = [store.number for store in segments_up_to(self.store)]
        options["segments"] = None
        return {number: self._of(number).scores(queries, **options) for number in numbers}

    def top_k(
        self, queries: Queries, k: int = 10, *, largest: bool = True, **options: Unpack[ScoreOptions]
    ) -> Attribution:
        """The k training examples with the largest (or smallest) scores of each query; [q, N] is never made.

        Ties go to the lower index.

        Raises:
            ValueError: unless 1 <= k <= number of valid rows that are asked about.
        """
        asked = self._asked(Question(**options))
        _check_k(k, asked.count_known())
        lots: dict[int, BestSoFar] = {}
        if not (count := _count(queries, asked)):
            return Attribution(torch.zeros(0, k, dtype=torch.int64), torch.zeros(0, k, dtype=torch.float32))
        for block in asked.blocks(count, _same_for_all(queries)):
            best = lots.setdefault(block.queries.start, BestSoFar(k, largest=largest))
            best.add(asked.places.indices(block.part), block.scores[""])
        found = [best.result() for best in lots.values()]
        return Attribution(torch.cat([i for i, _ in found]).cpu(), torch.cat([s for _, s in found]).cpu())

    def check_k(self, k: int, segments: Segments = None, subset: Subset | None = None) -> None:
        """Refuse a k that the file cannot give.

        Raises:
            ValueError: unless 1 <= k <= number of valid rows.
        """
        known = known_examples(weighted_segments(self.store, segments))
        if subset is not None:
            known = known[as_indices(subset, self.num_examples, "subset", str(self.store.path))]
        _check_k(k, int(known.sum()))

    def self_influence(self, **options: Unpack[ScoreOptions]) -> Tensor:
        """Grad L_n^T (G + damping)^-1 grad L_n of every training example, in one pass over the file.

        Large where the model has to bend for one example: mislabelled and atypical ones. Summed over
        `segments` with their weights; both gradients are then those of the segment's row.

        Returns:
            Shape [N] or [len(subset)], NaN for examples without a valid row.
        """
        return self._asked(Question(**options)).self_influence()

    def removal_effect(self, queries: Queries, indices: Subset, **options: Unpack[QueryOptions]) -> Tensor:
        """Predicted change of the measurement if these training examples were removed.

        The first-order estimate -sum_m c[m] score[q, m] / sum_n c[n] with c how often the captured
        epoch trained on each example (Koh & Liang 2017, arXiv:1703.04730, where c is 1), in the
        measurement's units. So an example that was seen twice is removed twice. Of several segments
        it is the weighted mean of their estimates, each with its own c. Rows that are merged from E epochs
        have c in their sums already: -sum_m score[q, m] E / sum_n c[n].

        Args:
            queries: see the class.
            indices: dataset indices, each once, or a mask bool [N]. Only their rows are read.
            options: see `QueryOptions`; the weights of `segments` must sum to 1.

        Returns:
            Shape [q].

        Raises:
            QueryError: if an index occurs twice, is out of range or has no valid row; if the weights
                do not sum to 1.
        """
        chosen = np.sort(as_indices(indices, self.num_examples, "indices", str(self.store.path)))
        asked = self._asked(Question(**options, subset=chosen))
        check_is_mean(asked.weights)
        self._check_known(chosen, asked)
        effect = torch.zeros(_count(queries, asked), dtype=torch.float32)
        for block in asked.blocks(len(effect), _same_for_all(queries), with_effects=True):
            assert block.effects is not None
            effect[block.queries] += block.effects.sum(1).cpu()
        return effect

    def group_scores(self, queries: Queries, groups: Groups, **options: Unpack[QueryOptions]) -> GroupAttribution:
        """Sums of scores over groups of training examples, in one pass over the file.

        Args:
            queries: see the class.
            groups: a label for each training example (its class, its source, ...), or a mapping from names to
                dataset indices or masks. Only rows in a group are read.
            options: see `QueryOptions`.

        Returns:
            Examples without a valid row add nothing; `counts` says how many have one. A query that is not finite
            has sums that are not.

        Raises:
            QueryError: if the groups do not fit the file.
        """
        membership = Membership(groups, self.num_examples, str(self.store.path))
        asked = self._asked(Question(**options), membership.places)
        has_effects, count = is_mean(asked.weights), _count(queries, asked)
        counts = membership.count(asked.known)
        sums = torch.zeros(2, count, len(counts), dtype=torch.float64)
        for block in asked.blocks(count, _same_for_all(queries), with_effects=has_effects):
            rows = asked.places.rows(block.part)
            for each, values in zip(sums, (block.scores[""], block.effects), strict=True):
                if values is not None:
                    known = values.cpu().masked_fill(~asked.known[rows], 0.0)
                    membership.add(each[block.queries], rows, known)
        scores, effects = sums.masked_fill(counts == 0, torch.nan).float()
        return GroupAttribution(membership.names, scores, effects if has_effects else None, counts)

    def scores_between(
        self, indices: Subset, other_indices: Subset | None = None, **options: Unpack[QueryOptions]
    ) -> Tensor:
        """Scores of training examples for training examples: grad L_m^T (G + damping)^-1 grad L_n of stored rows.

        Both gradients carry the rows' errors; of several segments, both are the segment's rows.

        Args:
            indices: the queries, dataset indices, each once, or a mask bool [N].
            other_indices: likewise; None for the same.
            options: see `QueryOptions`.

        Returns:
            Shape [m, n], symmetric for the same indices, with `self_influence` on the diagonal, to rounding (with
            `rank` nearly); NaN for examples without a valid row.
        """
        where = str(self.store.path)
        chosen = as_indices(indices, self.num_examples, "indices", where)
        others = chosen if other_indices is None else other_indices
        others = as_indices(others, self.num_examples, "other_indices", where)
        asked = self._asked(Question(**options, subset=others))

        def rows_of(segment: OpenSegment, name: str, part: slice) -> LayerGradient:
            return segment.decoded(name, chosen[part])

        found = _collected(asked, len(chosen), rows_of)[""]
        return found.masked_fill(~asked.known[chosen][:, None], torch.nan)

    def _scores(
        self, queries: Queries, question: Question, group_of: Callable[[str], str], per_token: bool
    ) -> dict[str, Tensor]:
        asked = self._asked(question)
        answer: AnswerOfLayer = PreparedLayer.scores
        if per_token:
            asked.check_positions(added_up=group_of("a") == group_of("b"))
            answer = PreparedLayer.position_scores
        return _collected(asked, _count(queries, asked), _same_for_all(queries), group_of, answer)

    def _asked(self, question: Question, places: Places | None = None) -> Asked:
        return Asked.of(self, question, self.memory_budget, places)

    def _of(self, number: int) -> InfluenceQuery:
        if number == self.store.number:
            return self
        return InfluenceQuery(self.store.segment(number), self.device, self.memory_budget)

    def _check_known(self, chosen: np.ndarray, asked: Asked) -> None:
        without = chosen[~asked.known.numpy()[chosen]]
        if len(without):
            raise QueryError(
                f"{len(without)} of `indices` have no valid row in {self.store.path} (the first is "
                f"{int(without[0])}): training did not see them, or their gradient was not finite."
            )


def _collected(
    asked: Asked,
    count: int,
    queries_of: QueriesOf,
    group_of: Callable[[str], str] = lambda name: "",
    answer: AnswerOfLayer = PreparedLayer.scores,
) -> dict[str, Tensor]:
    """All scores, by group of layers, [q, n] or [q, n, s]."""
    result = {group_of(name): torch.zeros(count, len(asked.places), dtype=torch.float32) for name in asked.layers}
    for block in asked.blocks(count, queries_of, group_of=group_of, answer=answer):
        for group, scores in block.scores.items():
            if scores.ndim > result[group].ndim:
                result[group] = torch.zeros(count, len(asked.places), scores.shape[2], dtype=torch.float32)
            result[group][block.queries][:, asked.places.columns(block.part)] = scores.cpu()
    return result


def _count(queries: Queries, asked: Asked) -> int:
    """How many queries there are, of each of the layers asked about as many."""
    counts = {name: len(queries[name]) if name in queries else None for name in asked.layers}
    count = counts[asked.layers[0]]
    if count is None or len({*counts.values()}) > 1:
        raise QueryError(
            "`queries` must hold gradients of as many queries for each layer that is asked about, got "
            f"{counts} (None: no such layer); choose some by `layers`, or add the others."
        )
    return count


def _same_for_all(queries: Queries) -> QueriesOf:
    """The queries for whatever segment: their gradients are those of the model's weights."""
    return lambda segment, name, part: queries[name][part]


def _check_k(k: int, rows: int) -> None:
    if isinstance(k, bool) or not isinstance(k, int) or not 1 <= k <= rows:
        raise ValueError(f"`k` must be an integer from 1 to {rows}, the number of valid rows, got {k!r}.")
