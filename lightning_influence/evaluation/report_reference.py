"""The questions of a report that need training data: new gradients, and a solver of the Gauss-Newton matrix."""

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
from lightning_influence.evaluation.report_file import TOP, agreement, mean_pearson, top_overlap
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
        """Q."""
        return len(self.file_scores)

    def damping_of(self, name: str) -> float:
        """A layer's damping, in units of the eigenvalues.

        Raises:
            InfluenceError: if it is not one number.
        """
        rules = self.engine.dampings(get_curvature("ekfac"), as_damping(self.damping))
        found = rules[name](self.engine.layers[name].Lambda)
        if isinstance(found, Tensor) and found.numel() != 1:
            raise InfluenceError(f"the damping of layer {name!r} is not one number, so there is no such matrix.")
        return float(found)

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


def gauss_newton_check(subject: Subject, reference: GaussNewtonReference) -> Check:
    """How scores agree with those of the Gauss-Newton matrix, solved for.

    At the same damping, and at the same relative one: each layer's damping times mean eigenvalue of the layer's
    block of the matrix / mean eigenvalue of the factors. Where training labels are fitted, their gradients, and so
    the factors, are small against the matrix, and the same damping does little to it.
    """
    if reference.affordable < LEAST:
        return Check(
            "gauss-newton",
            QUESTION,
            left_out=f"a product with the matrix takes {reference.seconds_per_example:.2g} s an example, so that "
            f"there is time for {reference.affordable} examples only; pass more `minutes=`, or fewer queries.",
        )
    used = reference.used
    stored = subject.file_scores[:, used.rows]
    fresh = _scores(subject, used, precondition(subject.engine, subject.queries, damping=subject.damping))
    same, solution = reference.solve(used, is_relative=False)
    relative, relative_solution = reference.solve(used, is_relative=True)
    infos = solution.info, relative_solution.info
    figures: dict[str, Any] = {
        "spearman": agreement(stored, same),
        "pearson": mean_pearson(stored, same),
        "top_overlap": top_overlap(stored, same),
        "spearman_at_relative_damping": agreement(stored, relative),
        "pearson_at_relative_damping": mean_pearson(stored, relative),
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
        figures["reference_halves"] = agreement(*halves)
        figures["reference_ceiling"] = ceiling_of(figures["reference_halves"])
    return Check("gauss-newton", QUESTION, _words(figures), figures, judged(figures))


def ceiling_of(halves: float) -> float:
    """What perfect scores would have, by how halves of a reference agree (Spearman and Brown's formula)."""
    return math.sqrt(2 * halves / (1 + halves)) if halves > 0 else 0.0


def judged(found: Mapping[str, Any]) -> float:
    """The figure of the verdict; NaN if it is poor, but perfect scores would not have looked fair either."""
    ceiling = found.get("reference_ceiling", 1.0)
    return math.nan if max(found["spearman"], ceiling) < FAIR else found["spearman"]


def _words(found: Mapping[str, Any]) -> str:
    answer = (
        "Scores from the file against conjugate gradients on the Gauss-Newton matrix of "
        f"{found['examples']:,} training examples, at the same damping; {found['queries']} queries. "
        f"Spearman {found['spearman']:.3f}, Pearson {found['pearson']:.3f}; of each top {TOP} they share "
        f"{found['top_overlap']:.0%}. The matrix is {found['size_against_factors']:.2g} times as large as the "
        f"file's factors; with the damping as much larger, Spearman {found['spearman_at_relative_damping']:.3f}, "
        f"Pearson {found['pearson_at_relative_damping']:.3f}, shared "
        f"{found['top_overlap_at_relative_damping']:.0%}."
    )
    if "reference_halves" in found:
        answer += (
            " Solved on either half of these examples, the reference agrees with itself at "
            f"{found['reference_halves']:.3f}, so that perfect scores would have about "
            f"{found['reference_ceiling']:.2f}; more `minutes=` leave less noise."
        )
    if found["largest_residual"] > 10 * RTOL:
        answer += (
            f" Conjugate gradients did not converge in {ITERATIONS} iterations (relative residual "
            f"{found['largest_residual']:.2g}): with more damping they would."
        )
    if found["spearman"] < FAIR:
        answer += (
            " What differs: the file's factors are those of the training labels unless captured with another "
            "`fisher`; they are Kronecker products; and layers are taken one by one. Read scores as EK-FAC's own, "
            "not as those of this matrix."
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
        self.damping = {name: subject.damping_of(name) for name in subject.layers}
        self._queries = self.space.flat({name: each.dense() for name, each in subject.queries.items()})
        self.seconds_per_example = self._time(sample)
        products = 2 * (ITERATIONS + 2) + PROBES * len(subject.layers) / subject.num_queries
        self.affordable = int(seconds / (products * self.seconds_per_example))
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
        ratios = self._ratios()
        damping = {name: value * (ratios[name] if is_relative else 1) for name, value in self.damping.items()}
        operator = StepGaussNewton(self.subject.model, self.space, sample.sizes, damping)
        preconditioner = self.preconditioner(self.space, damping)
        solver = ConjugateGradient(rtol=RTOL, maxiter=ITERATIONS, preconditioner=preconditioner, block=True)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what did not converge: the residual is in the report
            solution = solver.solve(operator, self._queries)
        return _scores(self.subject, self.used, self.space.matrices(solution.value)), solution

    def preconditioner(self, space: LayerVectors, damping: Mapping[str, float]) -> EKFACPreconditioner:
        """EK-FAC with each layer's eigenvalues as large as the matrix's, and a damping; for vectors of `space`."""
        ratios, blocks = self._ratios(), []
        for name, layer in self.subject.engine.layers.items():
            inverse = _inverse(layer.Lambda * ratios[name] + damping[name])
            blocks.append(KroneckerBlock(space.positions[name], layer.basis, inverse))
        return EKFACPreconditioner(space.size, blocks)

    def _ratios(self) -> dict[str, float]:
        """How many times as large as a layer's eigenvalues are those of the matrix, in the mean."""
        means = {name: float(layer.Lambda.mean()) for name, layer in self.subject.engine.layers.items()}
        sizes = self._sizes
        return {name: sizes[name] / mean if min(mean, sizes[name]) > 0 else 1.0 for name, mean in means.items()}

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


def _scores(subject: Subject, sample: Sample, directions: Mapping[str, Tensor]) -> Tensor:
    """[q, n] in the sample's order."""
    return torch.cat([scores_along(directions, subject.gradients(batch)) for batch in sample.batches], dim=1)
