"""Scores against closed-form leave-one-out, on linear models at their exact optimum.

A `LightningModule` starts at the minimiser of

    J(W) = (1/N) sum_n loss(W x_n, y_n) + (weight_decay / 2) ||W||²

and is captured in one epoch at learning rate 0, so that the rows are those of the converged weights.
The truth is the change of a query's loss when one example is taken out and J minimised again. What the
library inverts is not J's Hessian H but an estimate G + damping from the empirical Fisher; how near
the scores come to the truth is how near G + damping is to a multiple of H:

- Squared error, one output. The library's loss is r² (J has ½ r²), so gradients are 2 r x, and K-FAC's
  G is mean(4 r²) A. With damping = 4 mean(r²) weight_decay, G + damping = 4 mean(r²) H: scores are
  exact first-order influence up to a known factor, whatever the noise.
- EK-FAC's Lambda is mean(4 r² (q·x)²): the same number if the size of a residual says nothing about x,
  up to sampling (relative error about sqrt(8 / N) an eigenvalue); otherwise it is not the Hessian.
- Classification with labels drawn from the model: Fisher = Hessian of the mean loss, so that
  damping = weight_decay. What is left is the Kronecker approximation of E[(p - y)(p - y)ᵀ ⊗ x xᵀ],
  which is good where the probabilities depend little on x.

The features have standard deviations 1 to .1 in rotated directions, so that plain dot products do badly.
Pearson / Spearman correlations over the training examples, the mean of ten queries, the lowest of several
draws of the data (5 for ridge, 3 or 4 for the others):

| case | K-FAC | EK-FAC | EK-FAC, damping 0.1 times the mean | dot products |
|---|---|---|---|---|
| ridge, N = 1000 | .993 / 1.000 | .992 / .996 | .910 / .892 | .750 / .720 |
| ridge, noise that grows with x | .934 / .991 | .912 / .924 | .883 / .834 | .732 / .705 |
| logistic, 2 classes, weak signal, N = 2000 | .999 / .997 | .999 / .997 | .942 / .926 | .774 / .731 |
| logistic, 3 classes, weak signal, N = 2000 | .990 / .978 | .991 / .979 | .945 / .903 | .735 / .702 |
| logistic, 3 classes, strong signal, N = 1000 | .931 / .929 | .952 / .916 | .927 / .883 | .714 / .661 |

First-order influence itself, with the true Hessian, reaches .999 there: all that is missing is G for H.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from lightning_influence import InfluenceCallback, InfluenceModule
from tests.reference.linear_models import (
    LinearFit,
    binary_loss,
    exact_scores,
    fit,
    leave_one_out_changes,
    softmax_loss,
    squared_loss,
)
from tests.reference.models import random
from tests.reference.ridge import ridge_leave_one_out_changes

WEIGHT_DECAY = 1e-3
Loss = Callable[[Tensor, Tensor], Tensor]


class Converged(LightningModule):
    """A fitted linear model that is trained for another epoch, without moving."""

    def __init__(self, model: LinearFit, loss: Loss) -> None:
        super().__init__()
        self.layer = model.to_module(has_bias=True).float()
        self.loss = loss

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        return self.loss(self.layer(x), y)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.0)


@dataclass(frozen=True)
class Case:
    """Scores, and the true changes of the queries' losses by removing one example.

    Args:
        model: the fit.
        queries: features [q, i] and targets.
        influence: knows the captured file.
        changes: of the library's loss, [q, m] for `removed`.
        removed: indices of m examples.
        damping: that makes G + damping a multiple of the Hessian, if the theory above holds.
        hessian_factor: G + damping over the Hessian of the library's mean loss.
    """

    model: LinearFit
    queries: tuple[Tensor, Tensor]
    influence: InfluenceModule
    changes: Tensor
    removed: list[int]
    damping: float
    hessian_factor: float = 1.0

    def scores(self, curvature: str) -> Tensor:
        """Scores [q, N] at the damping that the objective asks for."""
        return self.influence.scores(_batch(*self.queries), damping=self.damping, curvature=curvature)

    def predictions(self, curvature: str) -> Tensor:
        """Predicted changes of the queries' losses, [q, m]: minus what removal does to f = -loss."""
        each = [
            self.influence.removal_effect(_batch(*self.queries), [m], damping=self.damping, curvature=curvature)
            for m in self.removed[:2]
        ]
        by_scores = self.scores(curvature)[:, self.removed] / len(self.model.features)
        torch.testing.assert_close(torch.stack(each, 1), -by_scores[:, :2])
        return by_scores * self.hessian_factor


def features(n: int, *, seed: int) -> Tensor:
    """Correlated features and the constant 1, shape [n, 5]."""
    Q, _ = torch.linalg.qr(random(4, 4, seed=77))
    deviations = torch.tensor([1, 0.5, 0.2, 0.1], dtype=torch.float64)
    return torch.cat([(random(n, 4, seed=seed) * deviations) @ Q, torch.ones(n, 1).double()], dim=1)


def _batch(x: Tensor, y: Tensor) -> list[Tensor]:
    """Without the constant, which is the module's bias."""
    return [x[:, :-1].float(), y.float() if y.is_floating_point() else y]


def capture(model: LinearFit, loss: Loss) -> InfluenceModule:
    """One epoch of training with capture, in float32 and shuffled batches with a short last one."""
    torch.manual_seed(0)
    module = Converged(model, loss)
    with TemporaryDirectory() as folder:
        path = Path(folder) / "run.h5"
        trainer = Trainer(
            max_epochs=1,
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=[InfluenceCallback(path, codec="pairs-float32", on_error="raise")],
        )
        data = TensorDataset(*_batch(model.features, model.targets))
        trainer.fit(module, DataLoader(data, batch_size=96, shuffle=True))
        return InfluenceModule.attach(module, path)  # maps the file, which may then go


@functools.cache
def ridge(noise_grows_with_x: bool = False, n: int = 1000, seed: int = 0) -> Case:
    def data(n: int, seed: int) -> tuple[Tensor, Tensor]:
        X = features(n, seed=seed)
        noise = 0.5 * random(n, 1, seed=seed + 50)
        if noise_grows_with_x:
            noise = noise * (0.2 + 2 * X[:, :1].abs())
        return X, X @ random(5, 1, seed=100) + noise

    X, y = data(n, 1000 * seed + 1)
    queries = data(10, 1000 * seed + 2)
    model = fit(squared_loss, X, y, 1, weight_decay=WEIGHT_DECAY)
    changes = 2 * ridge_leave_one_out_changes(X, y, *queries, weight_decay=WEIGHT_DECAY)  # of r², not ½ r²
    mean_square = ((X @ model.weights.T - y) ** 2).mean().item()
    return Case(
        model,
        queries,
        capture(model, F.mse_loss),
        changes,
        list(range(n)),
        damping=4 * mean_square * WEIGHT_DECAY,
        hessian_factor=2 * mean_square,
    )


@functools.cache
def logistic(n_outputs: int, n: int = 2000, signal: float = 0.3, seed: int = 0) -> Case:
    """Labels drawn from a linear teacher; one output is the logit of two classes."""

    def data(n: int, seed: int) -> tuple[Tensor, Tensor]:
        X = features(n, seed=seed)
        logits = signal * X @ random(5, n_outputs, seed=101)
        generator = torch.Generator().manual_seed(seed + 7)
        if n_outputs == 1:
            return X, torch.bernoulli(logits[:, 0].sigmoid(), generator=generator).long()
        return X, logits.softmax(1).multinomial(1, generator=generator)[:, 0]

    def binary(outputs: Tensor, targets: Tensor) -> Tensor:
        return F.binary_cross_entropy_with_logits(outputs[:, 0], targets.float())

    X, y = data(n, 1000 * seed + 1)
    queries = data(10, 1000 * seed + 2)
    output_loss = binary_loss if n_outputs == 1 else softmax_loss
    model = fit(output_loss, X, y, n_outputs, weight_decay=WEIGHT_DECAY)
    removed = list(range(0, n, n // 50))
    return Case(
        model,
        queries,
        capture(model, binary if n_outputs == 1 else F.cross_entropy),
        leave_one_out_changes(model, *queries, removed=removed),
        removed,
        damping=WEIGHT_DECAY,
    )


def correlation(predicted: Tensor, actual: Tensor) -> float:
    """Mean over the queries of Pearson's correlation over the examples."""
    pairs = zip(predicted.double(), actual.double(), strict=True)
    return float(torch.stack([torch.corrcoef(torch.stack(pair))[0, 1] for pair in pairs]).mean())


def rank_correlation(predicted: Tensor, actual: Tensor) -> float:
    """Spearman's in the same way."""
    return correlation(*(values.argsort(1).argsort(1) for values in (predicted, actual)))


def slope(predicted: Tensor, actual: Tensor) -> float:
    """The factor that fits the predictions to the actual changes best."""
    return float((predicted.double() * actual).sum() / (actual**2).sum())


def test_kfac_scores_of_ridge_regression_are_exact_first_order_influence() -> None:
    for case in (ridge(), ridge(noise_grows_with_x=True)):
        exact = 2 * exact_scores(case.model, *case.queries)  # ½ r² has a quarter of r²'s products, half its H
        found = case.scores("kfac").double() * case.hessian_factor
        # float32 gradients and factors: measured at most 9e-6 of the largest
        torch.testing.assert_close(found, exact, rtol=0, atol=5e-5 * float(exact.abs().max()))


def test_kfac_orders_removals_of_ridge_regression_as_retraining_does() -> None:
    case = ridge()
    predicted = case.predictions("kfac")
    assert rank_correlation(predicted, case.changes) > 0.999  # the first order itself: 1.000
    assert correlation(predicted, case.changes) > 0.98  # removal is not quite linear: lowest .993


def test_ekfac_predicts_removal_in_ridge_regression_of_equal_noise() -> None:
    case = ridge()
    predicted = case.predictions("ekfac")
    assert correlation(predicted, case.changes) > 0.98
    assert rank_correlation(predicted, case.changes) > 0.98
    assert slope(predicted, case.changes) == pytest.approx(1, abs=0.1)  # measured .977 to 1.024


def test_ekfac_loses_to_kfac_where_noise_grows_with_x() -> None:
    # the empirical Fisher weighs each x by its own residual, the Hessian does not
    case = ridge(noise_grows_with_x=True)
    ekfac, kfac = (rank_correlation(case.predictions(name), case.changes) for name in ("ekfac", "kfac"))
    assert kfac > ekfac + 0.02  # measured differences .037 to .070
    assert ekfac > 0.88  # lowest .924
    assert slope(case.predictions("ekfac"), case.changes) < 0.9  # G is too large: measured .56 to .75


@pytest.mark.parametrize("curvature", ["kfac", "ekfac", "empirical_fisher"])
@pytest.mark.parametrize(("n_outputs", "pearson", "spearman"), [(1, 0.99, 0.985), (3, 0.97, 0.95)])
def test_scores_predict_removal_in_well_specified_logistic_regression(
    n_outputs: int, pearson: float, spearman: float, curvature: str
) -> None:
    case = logistic(n_outputs)
    predicted = case.predictions(curvature)
    assert correlation(predicted, case.changes) > pearson
    assert rank_correlation(predicted, case.changes) > spearman
    assert slope(predicted, case.changes) == pytest.approx(1, abs=0.12)  # measured .954 to 1.042


@pytest.mark.parametrize("make", [ridge, functools.partial(logistic, 3)])
def test_curvature_beats_plain_dot_products(make: Callable[[], Case]) -> None:
    case = make()
    plain = rank_correlation(case.predictions("identity"), case.changes)
    assert rank_correlation(case.predictions("ekfac"), case.changes) > plain + 0.1


def test_removing_an_example_raises_its_own_predicted_loss() -> None:
    case = logistic(3)
    own = case.influence.self_influence(damping=case.damping)
    assert bool((own > 0).all())  # true of leave-one-out for any objective


def test_the_rows_are_those_of_the_converged_weights() -> None:
    attributes = ridge().influence.store.attributes
    assert attributes["weights_hash_start"] == attributes["weights_hash_end"]
    assert attributes["staleness_spearman"] == pytest.approx(1, abs=1e-6)
