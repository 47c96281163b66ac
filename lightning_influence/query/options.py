"""The options that questions share."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TypedDict

from lightning_influence.curvature import AnyDamping, Curvature, HeuristicDamping
from lightning_influence.errors import QueryError
from lightning_influence.query.places import Subset
from lightning_influence.segments import Segments

DEFAULT_DAMPING = HeuristicDamping()


class QueryOptions(TypedDict, total=False):
    """Keywords of every question.

    Args:
        damping: added to each layer's eigenvalues: a rule, by default their mean, a number, or a mapping from
            layers' names or patterns to these. Another one needs no new capture; `recommend_damping` says which
            to take.
        curvature: "ekfac" (the default), "kfac", "diagonal" (of the parameters), "empirical_fisher" (the rows'
            own, which wants more damping: start at `HeuristicDamping(10.0)`), "identity" (plain dot products of
            gradients), or one's own.
        segments: of a file that holds several epochs, which to ask. None or "last": that of the model's weights.
            "learning_rate" or "mean": the mean over it and all before it, weighted by their mean learning rates,
            or equally: TracIn's sum over checkpoints, but for the query's gradient, which stays that of the
            model's weights. A mapping {segment number: weight}: the sum of weight times scores, as given. An
            epoch that did not train on an example adds nothing to its score; one that was resumed or cut short,
            and lacks its row, makes it NaN. The factors of all of them are in memory at a time.
        layers: names or glob patterns of the layers to sum over; None for all. Rules for damping see all
            layers, so that this is what these layers add to the scores.
        rank: None for exact products, or the rank that queries are truncated to where a layer's rows are pairs:
            2 rank (o + i) multiply-adds a row instead of o i. Layers with no fewer that way stay exact. The log
            (INFO) says what share of the queries' squared norm is left; `examples/benchmarks/query_speed.py`
            measures what that does to scores. Not with `per_token`; self-influence is exact always.
    """

    damping: AnyDamping
    curvature: str | Curvature
    segments: Segments
    layers: str | Sequence[str] | None
    rank: int | None


class ScoreOptions(QueryOptions, total=False):
    """Keywords of questions about each training example: those of `QueryOptions` and one more.

    Args:
        subset: the training examples to ask about, dataset indices, each once, or a mask bool [N]; None for all.
            Only their rows are read, and answers are in its order.
    """

    subset: Subset | None


@dataclass(frozen=True)
class Question:
    """The options with their defaults; see `ScoreOptions`."""

    damping: AnyDamping = DEFAULT_DAMPING
    curvature: str | Curvature = "ekfac"
    segments: Segments = None
    layers: str | Sequence[str] | None = None
    rank: int | None = None
    subset: Subset | None = None

    def __post_init__(self) -> None:
        if self.rank is not None and (
            isinstance(self.rank, bool) or not isinstance(self.rank, int) or self.rank < 1
        ):
            raise ValueError(f"`rank` must be a positive integer, or None for exact products, got {self.rank!r}.")


def chosen_layers(layers: str | Sequence[str] | None, known: Iterable[str], where: str) -> list[str]:
    """Names of the layers that patterns fit, in the model's order.

    Args:
        layers: names or glob patterns; None for all.
        known: the file's layers.
        where: the file, for messages.

    Raises:
        QueryError: if there is no pattern, or one fits no layer.
    """
    known = list(known)
    if layers is None:
        return known
    patterns = [layers] if isinstance(layers, str) else list(layers)
    unknown = [p for p in patterns if not isinstance(p, str) or not any(fnmatchcase(n, p) for n in known)]
    if unknown or not patterns:
        fitting = f"{', '.join(map(repr, unknown))} fits none" if unknown else "none is named"
        raise QueryError(
            f"`layers` must be names or patterns of layers of {where}, but {fitting}. The layers are "
            f"{', '.join(known)}."
        )
    return [name for name in known if any(fnmatchcase(name, pattern) for pattern in patterns)]
