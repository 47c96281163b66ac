"""The questions of a report that the file alone can answer."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lightning_influence.codecs import EigenCodec
from lightning_influence.curvature import AnyDamping, Damping, as_damping, get_curvature
from lightning_influence.evaluation.report import FAIR, Check
from lightning_influence.functional.eigenvalues import second_moment_sum
from lightning_influence.gradients import CHUNK_ELEMENTS, DenseGradient, LayerGradient
from lightning_influence.layers import Coverage
from lightning_influence.metrics import mean_rank_correlation
from lightning_influence.query import InfluenceQuery
from lightning_influence.scoring import ScoredLayer
from lightning_influence.store import StoreReader

QUERIES, RANKED = 16, 512  # rows that are drawn, as queries and as what is ranked
CHUNK = 128  # rows at a time
TOP = 10
Inverses = dict[str, Tensor]


@dataclass(frozen=True)
class Drawn:
    """Some rows to rank and the queries to rank them for.

    Args:
        rows: dataset indices, int64 [n].
        queries: gradients by layer; None where rows are the queries themselves.
        asked: places in `rows` of those rows.
    """

    rows: np.ndarray
    queries: Mapping[str, LayerGradient] | None
    asked: np.ndarray

    @classmethod
    def of(cls, store: StoreReader, queries: Mapping[str, LayerGradient] | None, seed: int) -> Drawn:
        """At random, but always the same for a seed."""
        valid = np.flatnonzero(store.column("valid"))
        rows = np.sort(np.random.default_rng(seed).permutation(valid)[:RANKED])
        step = max(1, len(rows) // QUERIES)
        return cls(rows, queries, np.arange(len(rows))[::step][:QUERIES])

    def scores(self, engine: InfluenceQuery, inverses: list[Inverses]) -> Tensor:
        """Scores by each of several damped inverses of the factors, [inverses, q, n]; NaN for a row's own."""
        total = torch.zeros(len(inverses), self._count, len(self.rows), dtype=torch.float32)
        for name, layer in engine.layers.items():
            arrays = _arrays(engine, name, self.rows)
            for number, inverse in enumerate(inverses):
                for part in _parts(self._count, layer):
                    asked = layer.basis.rotate(self._query(name, layer, arrays, part))
                    projected = layer.codec.project(asked * inverse[name], layer.basis)
                    total[number, part] += layer.scores(projected, arrays).cpu()
        if self.queries is None:
            total[:, torch.arange(self._count), torch.from_numpy(self.asked)] = torch.nan
        return total

    @property
    def _count(self) -> int:
        return len(self.asked) if self.queries is None else min(QUERIES, len(next(iter(self.queries.values()))))

    def _query(self, name: str, layer: ScoredLayer, arrays: Mapping[str, Tensor], part: slice) -> LayerGradient:
        if self.queries is not None:
            return self.queries[name][: self._count][part].to(layer.Lambda.device)
        return DenseGradient(layer.codec.decode({key: array[self.asked[part]] for key, array in arrays.items()}))

    @property
    def described(self) -> str:
        """The queries, in words."""
        if self.queries is None:
            return f"{self._count} of the rows as queries"
        return f"{self._count} of your queries" if self._count > 1 else "your query"


def coverage_check(store: StoreReader) -> Check:
    """How much of the model is in the scores."""
    question = "How much of the model do scores see?"
    found = Coverage.from_builtins(store.document("coverage"))
    missing = ", ".join(layer.name or "the model itself" for layer in found.uncovered[:5])
    answer = f"{found.share:.1%} of the trainable parameters are attributed."
    if found.uncovered:
        answer += f" What {missing} learnt is not in the scores; `influence.coverage` says why."
    return Check("coverage", question, answer, {"share": found.share}, found.share)


def staleness_check(store: StoreReader) -> Check:
    """What the file says of how its rows aged."""
    question = "Are the rows still those of the model?"
    facts = store.attributes
    if facts.get("rows") == "final":
        return Check("staleness", question, "Rows were made at the model's weights; nothing aged.", value=1.0)
    value = float(facts.get("staleness_spearman", math.nan))
    if math.isnan(value):
        why = facts.get("staleness_note") or "the file does not say"
        if facts.get("trajectory") == "merge":
            why = "rows are sums over epochs, on purpose not those of the final weights"
        return Check("staleness", question, left_out=f"not measured at capture ({why}).")
    answer = "Scores of rows as captured, in the last epoch, against scores of the same rows at the final weights."
    if value < FAIR:
        answer += ' Let the learning rate decay to zero, or capture with `rows="final"`.'
    return Check("staleness", question, answer, {"spearman": value}, value)


def storage_check(store: StoreReader) -> Check:
    """What the file says of what its codec loses."""
    question = "What does storing lose?"
    value, size = float(store.attributes.get("codec_spearman", math.nan)), store.attributes["bytes_per_row"]
    if math.isnan(value):
        return Check("storage", question, left_out="not measured at capture.")
    answer = f"Scores of rows of {size:,} bytes against scores of the gradients themselves."
    if value < FAIR:
        answer += " Capture with more `bytes_per_example`, or an `error_budget`."
    return Check("storage", question, answer, {"spearman": value, "bytes_per_row": int(size)}, value)


def damping_check(engine: InfluenceQuery, drawn: Drawn, damping: AnyDamping) -> Check:
    """Whether another damping would rank otherwise."""
    question, advice = "Does the damping matter?", engine.recommend_damping()
    scores = drawn.scores(engine, [inverses(engine, damping), inverses(engine, advice.damping)])
    value = agreement(scores[0], scores[1])
    listed = ", ".join(f"{factor:g}: {found:.3f}" for factor, found in advice.sensitivity.items())
    answer = (
        f"Scores at your damping against those at the advised one, {advice.damping}. The advised one against "
        f"HeuristicDamping with factor {listed}."
    )
    if value < FAIR:
        answer += " So the damping decides the answer: ask with `damping=influence.recommend_damping().damping`."
    figures = {"advised": str(advice.damping), "spearman": value, "by_factor": dict(advice.sensitivity)}
    return Check("damping", question, answer, figures, value)


def halves_check(engine: InfluenceQuery, drawn: Drawn, damping: AnyDamping, *, seed: int, seconds: float) -> Check:
    """Whether other training examples of the same kind would have given the same order.

    Lambda of each half is the file's times (mean square of the half's rows / mean square of both halves'), so
    that it is Lambda's noise whatever labels or epochs Lambda is of. The eigenbasis and the damping are the
    file's in both.
    """
    question = "How much of the order is chance?"
    first, second, rows = _half_moments(engine, seed=seed, seconds=seconds)
    if rows < 4:
        return Check("halves", question, left_out=f"too few rows ({rows}).")
    halves = []
    for own, other in ((first, second), (second, first)):
        ratios = {name: _ratio(own[name], other[name]) for name in own}
        halves.append(inverses(engine, damping, ratios))
    scores = drawn.scores(engine, halves)
    value, overlap = agreement(*scores), top_overlap(*scores)
    answer = (
        f"Scores with eigenvalues from one random half of {rows:,} rows against those from the other half "
        f"({drawn.described}); of each top {TOP} they share {overlap:.0%}. The eigenbasis is the same in both, so "
        "there is at least this much noise."
    )
    return Check("halves", question, answer, {"spearman": value, "top_overlap": overlap, "rows": rows}, value)


def inverses(engine: InfluenceQuery, damping: AnyDamping, ratios: Mapping[str, Tensor] | None = None) -> Inverses:
    """EK-FAC's damped inverse eigenvalues, by layer [o, i]; of Lambda times `ratios`, but at Lambda's damping."""
    kind = get_curvature("ekfac")
    rules = engine.dampings(kind, as_damping(damping))
    found = {}
    for name, layer in engine.layers.items():
        added = rules[name](layer.Lambda)
        eigenvalues = layer.Lambda if ratios is None else layer.Lambda * ratios[name]
        found[name] = kind.inverse_eigenvalues(layer.basis, eigenvalues, _constant(added))
    return found


def _constant(value: Tensor | float) -> Damping:
    return lambda eigenvalues: value


def _ratio(own: Tensor, other: Tensor) -> Tensor:
    """A half's mean square over both halves'; 1 where both are zero."""
    both = own + other
    return torch.where(both > 0, 2 * own / both.where(both > 0, 1), 1)


def _half_moments(
    engine: InfluenceQuery, *, seed: int, seconds: float
) -> tuple[dict[str, Tensor], dict[str, Tensor], int]:
    """Mean squares of the coordinates in the eigenbasis of two halves of the rows, and how many rows there are.

    Rows are taken in blocks of random order until the time is up; within a block, at random for either half.
    """
    generator, until = np.random.default_rng(seed), time.monotonic() + seconds
    valid = np.flatnonzero(engine.store.column("valid"))
    blocks = [valid[start : start + CHUNK] for start in range(0, len(valid), CHUNK)]
    sums = [{name: torch.zeros_like(layer.Lambda) for name, layer in engine.layers.items()} for _ in range(2)]
    rows = 0
    for number in generator.permutation(len(blocks)):
        halves = np.array_split(generator.permutation(blocks[number]), 2)
        size = min(map(len, halves))  # of both the same, so that sums compare as means do
        for half, total in zip(halves, sums, strict=True):
            for name, layer in engine.layers.items():
                total[name] += _squares(layer, _arrays(engine, name, np.sort(half[:size])))
        rows += 2 * size
        if time.monotonic() > until:
            break
    return sums[0], sums[1], rows


def _squares(layer: ScoredLayer, arrays: Mapping[str, Tensor]) -> Tensor:
    """Sum over rows of the squared coordinates, [o, i]."""
    if isinstance(layer.codec, EigenCodec):
        result = torch.zeros_like(layer.Lambda).flatten()
        result[layer.codec.coordinates] = layer.codec.vectors(arrays).square().sum(0)
        return result.view_as(layer.Lambda)
    decode = getattr(layer.codec, "decode_gradient", lambda rows: DenseGradient(layer.codec.decode(rows)))
    return second_moment_sum(decode(arrays), layer.basis)


def _arrays(engine: InfluenceQuery, name: str, rows: np.ndarray) -> dict[str, Tensor]:
    maps = engine.store.rows(name)
    return {key: torch.from_numpy(np.array(array[rows])).to(engine.device) for key, array in maps.items()}


def _parts(count: int, layer: ScoredLayer) -> Iterator[slice]:
    """Queries at a time, so that their dense gradients are small."""
    step = max(1, CHUNK_ELEMENTS // layer.Lambda.numel())
    return (slice(start, min(start + step, count)) for start in range(0, count, step))


def agreement(scores: Tensor, others: Tensor) -> float:
    """Mean Spearman correlation over queries, of the examples that have both scores."""
    found = []
    for one, other in zip(scores, others, strict=True):
        known = ~(one.isnan() | other.isnan())
        if int(known.sum()) > 2:
            found.append(mean_rank_correlation(one[known][None], other[known][None]))
    found = [value for value in found if not math.isnan(value)]
    return float(np.mean(found)) if found else math.nan


def mean_pearson(scores: Tensor, others: Tensor) -> float:
    """Mean linear correlation over queries, of scores [q, n] without NaN: large ones weigh most."""
    one, other = (each.double() - each.double().mean(1, keepdim=True) for each in (scores, others))
    sizes = one.norm(dim=1) * other.norm(dim=1)
    return float(((one * other).sum(1) / sizes)[sizes > 0].mean())


def top_overlap(scores: Tensor, others: Tensor, k: int = TOP) -> float:
    """Mean share of the k largest scores of each query that two sets of scores have in common; NaN is no score."""
    k = min(k, scores.shape[1])
    tops = (each.nan_to_num(nan=-torch.inf).topk(k, dim=1).indices for each in (scores, others))
    shares = [len({*one.tolist()} & {*other.tolist()}) / k for one, other in zip(*tops, strict=True)]
    return float(np.mean(shares))
