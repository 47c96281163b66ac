"""Labels drawn from predictions: their gradients' second moments are the loss's Gauss-Newton matrix."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_influence.errors import LossNotRecognizedError, UnsupportedTrainingError
from lightning_influence.fisher import LabelSource
from lightning_influence.losses import LossTap, predictives

N = 4


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


CLASSES = torch.tensor([0, 2, 1, 2])
TOKENS = torch.tensor([[0, 1], [2, -100], [1, 1], [-100, 0]])
CLASS_WEIGHTS = torch.tensor([0.5, 2.0, 1.0], dtype=torch.float64)
PROBABILITIES = random(N, 3, seed=5).softmax(-1)
BITS = (random(N, 3, seed=6) > 0).double()
COUNTS = random(N, 3, seed=7).exp().round()
MASK = torch.tensor([[1, 1, 0], [1, 0, 1], [1, 1, 1], [0, 1, 1]]).double()
POSITIVE = random(N, 3, seed=8).exp()


@dataclass(frozen=True)
class Case:
    """A loss of a leaf z in which its Gauss-Newton matrix is its Hessian."""

    name: str
    shape: tuple[int, ...]
    loss: Callable[[Tensor], Tensor]


def binary(z: Tensor, **options: Any) -> Tensor:
    return F.binary_cross_entropy_with_logits(z, BITS, **options)


def unreduced_tokens(z: Tensor) -> Tensor:
    mask = MASK[:, :2]
    return (F.cross_entropy(z, TOKENS.clamp(min=0), reduction="none") * mask).sum() / mask.sum()


def two_terms(z: Tensor) -> Tensor:
    return F.cross_entropy(z, CLASSES) + 0.25 * F.cross_entropy(2 * z, CLASSES)


def smoothed(z: Tensor) -> Tensor:
    return F.cross_entropy(z, CLASSES, weight=CLASS_WEIGHTS, label_smoothing=0.2)


CASES = [
    Case("cross entropy", (N, 3), lambda z: F.cross_entropy(z, CLASSES)),
    Case("summed", (N, 3), lambda z: F.cross_entropy(z, CLASSES, reduction="sum") * 0.3),
    Case("class weights", (N, 3), lambda z: F.cross_entropy(z, CLASSES, weight=CLASS_WEIGHTS)),
    Case("label smoothing", (N, 3), lambda z: F.cross_entropy(z, CLASSES, label_smoothing=0.2)),
    Case("smoothing and weights", (N, 3), smoothed),
    Case("probabilities", (N, 3), lambda z: F.cross_entropy(z, PROBABILITIES, weight=CLASS_WEIGHTS)),
    Case("positions", (N, 3, 2), lambda z: F.cross_entropy(z, TOKENS, ignore_index=-100)),
    Case("unreduced positions", (N, 3, 2), unreduced_tokens),
    Case("nll", (N, 3), lambda z: F.nll_loss(z.log_softmax(-1), CLASSES, weight=CLASS_WEIGHTS)),
    Case("binary", (N, 3), binary),
    Case("binary, weighted", (N, 3), lambda z: binary(z, weight=POSITIVE, pos_weight=CLASS_WEIGHTS)),
    Case("binary, masked", (N, 3), lambda z: (binary(z, reduction="none") * MASK).sum() / MASK.sum()),
    Case("binary, of one number", (N,), lambda z: F.binary_cross_entropy_with_logits(z, BITS[:, 0])),
    Case("binary, of probabilities", (N, 3), lambda z: F.binary_cross_entropy(z.sigmoid(), BITS)),
    Case("square", (N, 3), lambda z: F.mse_loss(z, COUNTS)),
    Case("square, swapped", (N, 3), lambda z: F.mse_loss(COUNTS, z, reduction="sum")),
    Case("square, weighted", (N, 3), lambda z: F.mse_loss(z, COUNTS, weight=POSITIVE)),
    Case("Gaussian", (N, 3), lambda z: F.gaussian_nll_loss(z, COUNTS, POSITIVE)),
    Case("Gaussian, one variance", (N, 3), lambda z: F.gaussian_nll_loss(z, COUNTS, POSITIVE[:, :1])),
    Case("Poisson", (N, 3), lambda z: F.poisson_nll_loss(z, COUNTS)),
    Case("Poisson, of rates", (N, 3), lambda z: F.poisson_nll_loss(z.exp(), COUNTS, log_input=False, eps=1e-12)),
    Case("two terms", (N, 3), two_terms),
]
each_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


def second_moments(case: Case, source: LabelSource) -> tuple[Tensor, Tensor]:
    """Mean over the pulls of their outer squares at z, [z, z], blocks of examples; and its standard error."""
    z = random(*case.shape).requires_grad_()
    with LossTap() as tap:
        tap.keeps_graph = True
        loss = case.loss(z)
    found = predictives(loss, tap.calls, N)
    squares = []
    for pulls in source.pulls(found, torch.Generator().manual_seed(0)):
        predictions, values = zip(*pulls, strict=True)
        (pulled,) = torch.autograd.grad(predictions, z, values, retain_graph=True)
        flat = pulled.reshape(N, -1)
        squares.append(torch.block_diag(*(torch.outer(row, row) for row in flat)))
    stacked = torch.stack(squares)
    return stacked.mean(0), stacked.std(0, correction=0) / len(squares) ** 0.5


def gauss_newton(case: Case) -> Tensor:
    """The Hessian of the sum of the examples' own losses, of which the step's loss is a multiple."""
    z = random(*case.shape).requires_grad_()
    with LossTap() as tap:
        case.loss(z).backward()
    factor = tap.scale(N).factor
    torch.testing.assert_close(factor.expand(N), factor.max().expand(N))  # one for all examples
    hessian = torch.autograd.functional.hessian(case.loss, z.detach())
    return hessian.reshape(z.numel(), z.numel()) * factor.max()


@each_case
def test_exact_second_moments_are_the_gauss_newton_matrix(case: Case) -> None:
    found, _ = second_moments(case, LabelSource("exact"))
    torch.testing.assert_close(found, gauss_newton(case), rtol=1e-7, atol=1e-9)


@each_case
def test_sampled_second_moments_converge_to_the_gauss_newton_matrix(case: Case) -> None:
    found, error = second_moments(case, LabelSource("sampled", 4000))
    expected = gauss_newton(case)
    # Five standard errors, of up to 144 entries; entries that do not vary are right to rounding.
    assert ((found - expected).abs() <= 5 * error + 1e-7).all()
    assert error.max() < 0.1 * expected.abs().max()


def test_other_losses_are_refused_with_the_ones_that_are_supported() -> None:
    z = random(N, 3).requires_grad_()
    with LossTap() as tap:
        tap.keeps_graph = True
        loss = F.huber_loss(z, COUNTS)
    with pytest.raises(LossNotRecognizedError, match=r"huber_loss has no known distribution.*mse_loss.*empirical"):
        predictives(loss, tap.calls, N)


def test_a_negative_weight_is_refused() -> None:
    z = random(N, 3).requires_grad_()
    with LossTap() as tap:
        tap.keeps_graph = True
        loss = F.cross_entropy(z, CLASSES) - 0.5 * F.cross_entropy(2 * z, CLASSES)
    with pytest.raises(LossNotRecognizedError, match=r"weight -0\.5"):
        predictives(loss, tap.calls, N)


def test_a_variance_that_is_learnt_is_refused() -> None:
    z = random(N, 3).requires_grad_()
    with LossTap() as tap:
        tap.keeps_graph = True
        loss = F.gaussian_nll_loss(z, COUNTS, z.exp())
    with pytest.raises(LossNotRecognizedError, match="'input' and 'var'"):
        predictives(loss, tap.calls, N)


def test_scores_that_are_no_log_probabilities_are_refused() -> None:
    z = random(N, 3).requires_grad_()
    with LossTap() as tap:
        tap.keeps_graph = True
        loss = F.nll_loss(z, CLASSES)
    with pytest.raises(LossNotRecognizedError, match="log_softmax"):
        predictives(loss, tap.calls, N)


@pytest.mark.parametrize(("shape", "message"), [((N, 65), "65 backwards"), ((2 * N, 3), "one dimension")])
def test_exact_labels_are_refused_where_they_are_many_or_nobody_knows_whose(shape: tuple, message: str) -> None:
    z = random(*shape).requires_grad_()
    with LossTap() as tap:
        tap.keeps_graph = True
        loss = F.cross_entropy(z, torch.zeros(len(z), dtype=torch.int64))
    with pytest.raises(UnsupportedTrainingError, match=message):
        list(LabelSource("exact").pulls(predictives(loss, tap.calls, N), torch.Generator()))


def test_predictions_that_are_no_numbers_draw_labels_without_an_end() -> None:
    z = random(N, 3)
    z[0, 0] = torch.nan
    z.requires_grad_()
    for function, target in ((F.cross_entropy, CLASSES), (F.poisson_nll_loss, COUNTS)):
        with LossTap() as tap:
            tap.keeps_graph = True
            loss = function(z, target)
        found = predictives(loss, tap.calls, N)
        ((_, value),) = next(LabelSource("sampled").pulls(found, torch.Generator().manual_seed(0)))
        assert not value[0].isfinite().all()
        assert value[1:].isfinite().all()


def test_the_calls_let_go_of_the_graph() -> None:
    z = random(N, 3).requires_grad_()
    with LossTap() as tap:
        tap.keeps_graph = True
        F.cross_entropy(z, CLASSES)
    tap.forget_graph()
    assert tap.calls[0].graph is None
