"""The question of a report that changes the weights of training examples: the proximal Bregman response."""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from lightning_influence.errors import InfluenceError
from lightning_influence.evaluation.pbrf import pbrf
from lightning_influence.evaluation.report import FAIR, Check
from lightning_influence.evaluation.report_file import agreement, mean_pearson
from lightning_influence.evaluation.report_reference import GaussNewtonReference, Sample, Subject
from lightning_influence.evaluation.step_curvature import LayerVectors
from lightning_influence.solvers.objective import Loss, Objective
from lightning_influence.training.asking import example_gradients

EXAMPLES = 12  # half of them the ends of the queries' lists, half random
FIRST = 4  # that are tried, to see what one costs
GRADIENTS = 80  # that a response takes, as a guess for the plan; in float64 one costs as a product does
LEAST = 64
BATCH = 512  # examples at a time
RTOL, MAXITER = 1e-2, 150
MOST_LEFT = 0.5  # of the first gradient, with which a response is still one
QUESTION = "Do scores predict what the model does if one example weighs less?"


@dataclass(frozen=True)
class Pairs:
    """A model as a function of inputs, and its loss.

    Args:
        net: called as `net(inputs)`.
        loss: `loss(outputs, targets) -> [n]`.
    """

    net: nn.Module
    loss: Loss


def pbrf_check(
    subject: Subject,
    pairs: Pairs,
    query_batch: Any,
    sample: Sample,
    reference: GaussNewtonReference,
    *,
    seconds: float,
) -> Check:
    """How scores agree with proximal Bregman responses of a few examples at the same damping."""
    until = time.monotonic() + seconds
    _check_loss(subject, pairs, query_batch)
    per_vector = 2 * reference.seconds_per_example / subject.num_queries
    affordable = int(seconds / (EXAMPLES * GRADIENTS * per_vector))
    if affordable < LEAST:
        return Check(
            "pbrf",
            QUESTION,
            left_out=f"the time is enough for {affordable} training examples only; pass more `minutes=`.",
        )
    used = sample.first(affordable)
    chosen = _chosen(subject, used)
    batches = _joined(used)
    found: list[Tensor] = []
    residuals, done, count = [], 0, FIRST
    with _frozen(subject, pairs) as damping, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the residual is in the report
        wanted = [p for p in pairs.net.parameters() if p.requires_grad]
        preconditioner = reference.preconditioner(LayerVectors(subject.layers, wanted), reference.damping)
        while done < len(chosen) and count > 0:
            began = time.monotonic()
            part = chosen[done : done + count]
            responses = pbrf(
                pairs.net,
                batches,
                _rows(used, part),
                loss=pairs.loss,
                damping=damping,
                epsilon=-1 / int(subject.engine.valid.sum()),
                preconditioner=preconditioner,
                rtol=RTOL,
                maxiter=MAXITER,
            )
            found.append(responses.scores([query_batch])[: subject.num_queries].float().cpu())
            residuals.append(float(responses.info.residual.max()))
            done += len(part)
            count = int((until - time.monotonic()) * len(part) / (time.monotonic() - began))
    return _answer(subject, used, chosen[:done], torch.cat(found, dim=1), max(residuals))


def _answer(subject: Subject, used: Sample, chosen: np.ndarray, responses: Tensor, residual: float) -> Check:
    stored = subject.file_scores[:, used.rows[torch.from_numpy(chosen)]]
    value, pearson = agreement(stored, responses), mean_pearson(stored, responses)
    slope = float((stored * responses).sum() / stored.square().sum())
    figures = {
        "spearman": value,
        "pearson": pearson,
        "slope": slope,
        "changed_examples": len(chosen),
        "examples": len(used),
        "largest_residual": residual,
    }
    answer = (
        "Scores from the file against proximal Bregman responses (Bae et al. 2022) to removing each of "
        f"{len(chosen)} examples, half of them from the ends of the queries' lists, half random; the outputs of "
        f"{len(used):,} examples are held, at the same damping."
    )
    left = f"gradient left: {residual:.2g} of the first"
    if residual > MOST_LEFT:
        answer += f" The responses did not converge ({left}), so that this says nothing of the scores; with more "
        return Check("pbrf", QUESTION, f"{answer}damping they would.", figures)
    answer += f" Pearson {pearson:.3f}; responses are {slope:.2g} times as large as scores say."
    if residual > 2 * RTOL:
        answer += f" The responses did not converge ({left})."
    if value < FAIR:
        answer += " Few examples make this figure rough; see gauss-newton for what the difference is made of."
    return Check("pbrf", QUESTION, answer, figures, value)


def _chosen(subject: Subject, used: Sample) -> np.ndarray:
    """Places in the sample: of the best and worst of the first queries, and random ones."""
    scores = subject.file_scores[:, used.rows].nan_to_num()
    ends = torch.stack([scores.argmax(1), scores.argmin(1)], dim=1).flatten()
    extreme = [*dict.fromkeys(ends.tolist())][: EXAMPLES // 2]
    others = np.setdiff1d(np.arange(len(used)), extreme)
    drawn = np.random.default_rng(0).permutation(others)[: EXAMPLES - len(extreme)].tolist()
    mixed = [place for both in zip(extreme, drawn, strict=False) for place in both]  # some of each kind first
    return np.array([*mixed, *(place for place in (*extreme, *drawn) if place not in mixed)])


def _rows(used: Sample, places: np.ndarray) -> Any:
    """Some of the sample's examples as one batch."""
    ends = np.cumsum([len(own) for own in used.indices])
    parts = []
    for place in places.tolist():
        number = int(np.searchsorted(ends, place, side="right"))
        row = place - int(ends[number] - len(used.indices[number]))
        parts.append(tree_map(lambda value, row=row: _row(value, row), tuple(used.batches[number])))
    return tree_map(lambda *values: torch.cat(values), *parts)


def _joined(used: Sample) -> list[Any]:
    """The sample in larger batches: each has its overhead."""
    batches: list[Any] = []
    size = 0
    for n, batch in used.sizes:
        if not batches or size + n > BATCH:
            batches.append([])
            size = 0
        batches[-1].append(tuple(batch))
        size += n
    return [tree_map(lambda *values: torch.cat(values), *own) for own in batches]


def _row(value: Any, row: int) -> Tensor:
    if not isinstance(value, Tensor):
        raise InfluenceError(f"batches must hold tensors to take examples out of, got {type(value).__name__}.")
    return value[row : row + 1]


@contextmanager
def _frozen(subject: Subject, pairs: Pairs) -> Iterator[Mapping[str, float]]:
    """The damping by the net's parameters' names; parameters without one are held fixed."""
    numbers = {
        id(p): subject.damping_of(name)
        for name, layer in subject.layers.items()
        for p in layer.parameters.values()
    }
    wants = [(p, p.requires_grad) for p in pairs.net.parameters()]
    missing = numbers.keys() - {id(p) for p, _ in wants}
    if missing:
        raise InfluenceError("`net` does not hold all attributed layers; pass the module that does, as `net=`.")
    try:
        for p, _ in wants:
            p.requires_grad_(id(p) in numbers)
        yield {name: numbers[id(p)] for name, p in pairs.net.named_parameters() if id(p) in numbers}
    finally:
        for p, wanted in wants:
            p.requires_grad_(wanted)


def _check_loss(subject: Subject, pairs: Pairs, batch: Any) -> None:
    """Refuse a loss that is not what the step minimizes."""
    objective = Objective(pairs.net, pairs.loss)
    with torch.no_grad():
        own = objective.losses(objective.parameters, objective.batches([batch], "query_batch")[0])
    step = example_gradients(subject.model, subject.layers, batch, loss=subject.loss).scale.losses
    known = step.isfinite()
    if own.shape != step.shape or not torch.allclose(own[known].to(step), step[known], rtol=1e-3, atol=1e-5):
        raise InfluenceError(
            f"`loss` of (net(inputs), targets) is not what `training_step` minimizes: {float(own.mean()):.4g} and "
            f"{float(step[known].mean()):.4g} on the queries; pass the one that is, one number an example."
        )
