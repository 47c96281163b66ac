"""The questions of a report that need training data: fresh gradients, and conjugate gradients on the Gauss-Newton."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from lightning_influence.curvature import AnyDamping, as_damping, get_curvature
from lightning_influence.errors import InfluenceError
from lightning_influence.evaluation.handed_in import precondition, scores_along
from lightning_influence.evaluation.report import FAIR, Check
from lightning_influence.evaluation.report_file import TOP, agreement, top_overlap
from lightning_influence.evaluation.step_curvature import LayerVectors, StepGaussNewton
from lightning_influence.gradients import LayerGradient
from lightning_influence.layers import TrackedLayer
from lightning_influence.query import InfluenceQuery
from lightning_influence.solvers import ConjugateGradient, EKFACPreconditioner, Solution
from lightning_influence.solvers.preconditioner import KroneckerBlock
from lightning_influence.step import LossKind
from lightning_influence.training.asking import example_gradients
from lightning_influence.training.example_batches import ExampleBatches

QUERIES = 8
QUESTION = "Does EK-FAC stand in for the Gauss-Newton matrix?"
ITERATIONS, RTOL = 60, 1e-3  # of conjugate gradients
PROBES, PROBED = 4, 256  # random vectors a layer, and examples, for the size of the matrix
EXPECTED_ITERATIONS = 30  # with EK-FAC as the preconditioner, for the plan
LEAST, MOST = 64, 4096  # training examples
MOST_BYTES = 2**30  # of batches that are kept


@dataclass(frozen=True)
class Subject:
    """Whom the questions are about.

    Args:
        engine: of the file.
        model: at the file's weights, with a `training_step`.
        layers: the tracked ones.
        damping: that is asked with.
        queries: their gradients, by layer.
        file_scores: of the queries, by the file, [q, N].
        loss: how the loss's scale is known.
    """

    engine: InfluenceQuery
    model: nn.Module
    layers: Mapping[str, TrackedLayer]
    damping: AnyDamping
    queries: Mapping[str, LayerGradient]
    file_scores: Tensor
    loss: LossKind

    @property
    def num_queries(self) -> int:
        """q."""
        return len(self.file_scores)

    def gradients(self, batch: Any) -> dict[str, LayerGradient]:
        """Of a batch's training examples, now."""
        return example_gradients(self.model, self.layers, batch, loss=self.loss).gradients


@dataclass(frozen=True)
class Sample:
    """Training examples that were loaded.

    Args:
        indices: of each batch, in the dataset.
        batches: on the model's device.
    """

    indices: list[np.ndarray]
    batches: list[Any]

    @property
    def sizes(self) -> list[tuple[int, Any]]:
        """Batches with their sizes."""
        return [(len(own), batch) for own, batch in zip(self.indices, self.batches, strict=True)]

    @property
    def rows(self) -> Tensor:
        """All indices, int64 [n]."""
        return torch.from_numpy(np.concatenate(self.indices))

    def __len__(self) -> int:
        return sum(map(len, self.indices))

    def first(self, examples: int) -> Sample:
        """Whole batches with at least that many examples, if there are."""
        ends = np.cumsum([len(own) for own in self.indices])
        count = min(int(np.searchsorted(ends, examples)) + 1, len(ends))
        return Sample(self.indices[:count], self.batches[:count])

    def every_second(self, start: int) -> Sample:
        """One half of the batches."""
        return Sample(self.indices[start::2], self.batches[start::2])


def load_sample(engine: InfluenceQuery, model: nn.Module, loader: Iterable[Any], seed: int) -> Sample:
    """Random training examples with valid rows, in the loader's kind of batches.

    Raises:
        InfluenceError: if their indices cannot be known, or the loader is not of the file's dataset.
    """
    valid = np.flatnonzero(engine.store.column("valid"))
    wanted = np.random.default_rng(seed).permutation(valid)[:MOST]
    batches = ExampleBatches(loader, model, wanted=wanted)
    if batches.num_examples != engine.num_examples:
        raise InfluenceError(
            f"`train_loader` has {batches.num_examples:,} examples, the file has rows of "
            f"{engine.num_examples:,}; pass a loader of the dataset that was trained on."
        )
    sample, kept = Sample([], []), 0
    for indices, batch in batches:
        sample.indices.append(indices)
        sample.batches.append(batch)
        kept += sum(leaf.nbytes for leaf in tree_leaves(batch) if isinstance(leaf, Tensor))
        if kept > MOST_BYTES:
            break
    return sample


def rows_check(subject: Subject, sample: Sample) -> Check:
    """Whether stored rows say what the examples' gradients say now."""
    question = "Do stored rows say what the training examples' gradients say now?"
    directions = precondition(subject.engine, subject.queries, damping=subject.damping)
    fresh = _scores(subject, sample, directions)
    stored = subject.file_scores[:, sample.rows]
    value, overlap = agreement(stored, fresh), top_overlap(stored, fresh)
    answer = (
        f"Scores of {subject.num_queries} queries from the file against the same factors with gradients made anew "
        f"of {len(sample):,} training examples, augmentation included; of each top {TOP} they share {overlap:.0%}."
    )
    if subject.engine.store.attributes.get("trajectory") == "merge":
        answer += " The rows are sums over epochs, which are meant to say something else."
    elif value < FAIR:
        answer += " The rows have aged, or are stored too coarsely: see staleness and storage."
    return Check("rows", question, answer, {"spearman": value, "top_overlap": overlap}, value)


def gauss_newton_check(subject: Subject, sample: Sample, *, seconds: float, seed: int) -> Check:
    """How scores agree with those of the Gauss-Newton matrix, solved for.

    At the same damping, and at the same relative one: each layer's damping times mean eigenvalue of the layer's
    block of the matrix / mean eigenvalue of the factors. Where training labels are fitted, their gradients, and so
    the factors, are small against the matrix, and the same damping does little to it.
    """
    reference = GaussNewtonReference(subject, sample, seconds=seconds, seed=seed)
    if reference.affordable < LEAST:
        return Check(
            "gauss-newton",
            QUESTION,
            left_out=f"a product with the matrix takes {reference.seconds_per_example:.2g} s an example, so that the "
            f"time is enough for {reference.affordable} examples only; pass more `minutes=`, or fewer queries.",
        )
    used = reference.used
    stored = subject.file_scores[:, used.rows]
    fresh = _scores(subject, used, precondition(subject.engine, subject.queries, damping=subject.damping))
    same, solution = reference.solve(used, is_relative=False)
    relative, relative_solution = reference.solve(used, is_relative=True)
    infos = solution.info, relative_solution.info
    figures: dict[str, Any] = {
        "spearman": agreement(stored, same),
        "top_overlap": top_overlap(stored, same),
        "spearman_at_relative_damping": agreement(stored, relative),
        "top_overlap_at_relative_damping": top_overlap(stored, relative),
        "spearman_with_new_gradients": agreement(fresh, same),
        "size_against_factors": reference.ratio,
        "examples": len(used),
        "queries": subject.num_queries,
        "iterations": max(int(info.iterations.max()) for info in infos),
        "largest_residual": max(float(info.residual.max()) for info in infos),
    }
    if not reference.is_whole and len(used.batches) > 1:
        halves = [reference.solve(used.every_second(start), is_relative=False)[0] for start in (0, 1)]
        figures["ceiling"] = agreement(*halves)
    return Check("gauss-newton", QUESTION, _words(figures), figures, figures["spearman"])


def _words(figures: Mapping[str, Any]) -> str:
    answer = (
        f"Scores from the file against conjugate gradients on the Gauss-Newton matrix of {figures['examples']:,} "
        f"training examples, at the same damping; {figures['queries']} queries. Of each top {TOP} they share "
        f"{figures['top_overlap']:.0%}. The matrix is {figures['size_against_factors']:.2g} times as large as the "
        "file's factors; with the damping as much larger, Spearman "
        f"{figures['spearman_at_relative_damping']:.3f}, shared {figures['top_overlap_at_relative_damping']:.0%}."
    )
    if "ceiling" in figures:
        answer += (
            f" Solved on either half of these examples, the reference agrees with itself at {figures['ceiling']:.3f}: "
            "do not expect more."
        )
    if figures["largest_residual"] > 10 * RTOL:
        answer += (
            f" Conjugate gradients did not converge in {ITERATIONS} iterations (relative residual "
            f"{figures['largest_residual']:.2g}): with more damping they would."
        )
    if figures["spearman"] < FAIR:
        answer += (
            " Read scores as those of the labels' own (empirical) Fisher matrix, or capture with "
            '`fisher="sampled"`; what is left is the Kronecker form, and that layers are taken one by one.'
        )
    return answer


class GaussNewtonReference:
    """Solves for queries by conjugate gradients on the Gauss-Newton matrix of training examples.

    Args:
        subject: with the queries.
        sample: of training examples.
        seconds: for two solves, and two more of halves where the sample is not the whole training set.
        seed: of the probes of the matrix's size.

    Attributes:
        affordable: how many examples the matrix can be of in that time.
        used: the examples that it is of.
        is_whole: whether these are all of the training set.
        ratio: mean eigenvalue of the matrix over that of the file's factors, of all layers.
    """

    def __init__(self, subject: Subject, sample: Sample, *, seconds: float, seed: int) -> None:
        self.subject, self.space = subject, LayerVectors(subject.layers)
        self.damping = {name: _number(value) for name, value in _dampings(subject).items()}
        self._queries = self.space.flat({name: each.dense() for name, each in subject.queries.items()})
        self.seconds_per_example = self._time(sample)
        solves = 2 * (EXPECTED_ITERATIONS + 2)
        self.affordable = int(seconds / (solves * self.seconds_per_example))
        rows = int(subject.engine.valid.sum())
        self.is_whole = len(sample) == rows and self.affordable >= rows
        self.used = sample if self.is_whole else sample.first(self.affordable * 2 // 3)
        self._sizes = self._block_sizes(self.used.first(PROBED), seed)
        means = [float(layer.Lambda.double().sum()) for layer in subject.engine.layers.values()]
        elements = [layer.Lambda.numel() for layer in subject.engine.layers.values()]
        total = sum(size * n for size, n in zip(self._sizes.values(), elements, strict=True))
        self.ratio = total / sum(means) if sum(means) else math.nan

    def solve(self, sample: Sample, *, is_relative: bool) -> tuple[Tensor, Solution]:
        """Scores of `used` [q, n] by the matrix of a sample, at the same damping or at the same relative one."""
        layers, ratios = self.subject.engine.layers, {}
        for name, layer in layers.items():
            mean = float(layer.Lambda.mean())
            ratios[name] = self._sizes[name] / mean if mean > 0 and self._sizes[name] > 0 else 1.0
        damping = {name: value * (ratios[name] if is_relative else 1) for name, value in self.damping.items()}
        blocks = [
            KroneckerBlock(
                self.space.positions[name], layer.basis, _inverse(layer.Lambda * ratios[name] + damping[name])
            )
            for name, layer in layers.items()
        ]
        operator = StepGaussNewton(self.subject.model, self.space, sample.sizes, damping)
        preconditioner = EKFACPreconditioner(self.space.size, blocks)
        solver = ConjugateGradient(rtol=RTOL, maxiter=ITERATIONS, preconditioner=preconditioner, block=True)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what did not converge: the residual is in the report
            solution = solver.solve(operator, self._queries)
        return _scores(self.subject, self.used, self.space.matrices(solution.value)), solution

    def _time(self, sample: Sample) -> float:
        """Seconds per example of a product with all queries, by a second product; the first one warms up."""
        operator = StepGaussNewton(self.subject.model, self.space, sample.sizes[:1], self.damping)
        operator.product(self._queries[:1])
        start = time.monotonic()
        operator.product(self._queries)
        return max(time.monotonic() - start, 1e-9) / operator.num_examples

    def _block_sizes(self, sample: Sample, seed: int) -> dict[str, float]:
        """Mean eigenvalue of each layer's block, by random signs (Hutchinson 1990)."""
        generator = torch.Generator().manual_seed(seed)
        draws = torch.randint(2, (PROBES, self.space.size), generator=generator)
        signs = (2 * draws - 1).to(self._queries)
        nothing = dict.fromkeys(self.damping, 0.0)
        operator = StepGaussNewton(self.subject.model, self.space, sample.sizes, nothing)
        found = {}
        for name, where in self.space.positions.items():  # a layer at a time: others would only add noise
            own = torch.zeros_like(signs)
            own[:, where] = signs[:, where]
            found[name] = max(0.0, float((own * operator.product(own)).sum(1).mean()) / where.numel())
        return found


def _inverse(eigenvalues: Tensor) -> Tensor:
    """Positive, as a preconditioner's must be."""
    usual = float(eigenvalues[eigenvalues > 0].mean()) if bool((eigenvalues > 0).any()) else 1.0
    return 1 / eigenvalues.where(eigenvalues > 0, usual)


def _dampings(subject: Subject) -> dict[str, Tensor | float]:
    kind = get_curvature("ekfac")
    rules = subject.engine.dampings(kind, as_damping(subject.damping))
    return {name: rules[name](layer.Lambda) for name, layer in subject.engine.layers.items()}


def _number(damping: Tensor | float) -> float:
    if isinstance(damping, Tensor) and damping.numel() != 1:
        raise InfluenceError("the damping is not one number a layer, so there is no such Gauss-Newton matrix.")
    return float(damping)


def _scores(subject: Subject, sample: Sample, directions: Mapping[str, Tensor]) -> Tensor:
    """[q, n] in the sample's order."""
    return torch.cat([scores_along(directions, subject.gradients(batch)) for batch in sample.batches], dim=1)
