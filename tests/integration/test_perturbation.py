"""`InfluenceModule.perturbation`: derivatives of scores by a training example's own features."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_influence import InfluenceModule, capture
from lightning_influence.errors import QueryError
from tests.integration.lifecycle_models import Classifier
from tests.integration.nets import SmallConvNet
from tests.reference.curvature import ekfac_matrix, kfac_matrix
from tests.reference.gradients import per_example_gradients
from tests.reference.models import random
from tests.reference.perturbation import perturbation
from tests.reference.scores import precondition

DAMPING = 0.01


def examples(n: int, features: int = 3, classes: int = 2, seed: int = 0) -> tuple[Tensor, Tensor]:
    labels = torch.randint(0, classes, (n,), generator=torch.Generator().manual_seed(seed))
    return random(n, features, seed=seed).float(), labels


def asked(model: Any, folder: Path, data: tuple[Tensor, Tensor], **options: Any) -> InfluenceModule:
    loader = DataLoader(TensorDataset(*data), batch_size=5)
    return InfluenceModule.attach(model, capture(model, loader, folder / "influence.h5", **options))


@pytest.fixture
def influence(tmp_path: Path) -> InfluenceModule:
    return asked(Classifier(), tmp_path, examples(12), codec="pairs-float32")


@pytest.mark.parametrize("curvature", ["ekfac", "kfac"])
def test_perturbation_equals_the_dense_definition(influence: InfluenceModule, curvature: str) -> None:
    queries, chosen = examples(2, seed=1), examples(3, seed=2)
    model = influence.model
    gradients = per_example_gradients(
        model,
        list(zip(*queries, strict=True)),
        lambda m, e: F.cross_entropy(m(e[0][None]), e[1][None]),
        ["layers.0", "layers.2"],
    )
    preconditioned = {}
    for name, layer in influence._engine().layers.items():
        Q_A, Q_S = layer.basis.Q_A.double(), layer.basis.Q_S.double()
        if curvature == "ekfac":
            H = ekfac_matrix(Q_A, Q_S, layer.Lambda.double(), DAMPING)
        else:
            H = kfac_matrix(
                Q_A * layer.basis.eigenvalues_A @ Q_A.T, Q_S * layer.basis.eigenvalues_S @ Q_S.T, DAMPING
            )
        preconditioned[name] = precondition(gradients[name], H)
    expected = perturbation(model, F.cross_entropy, preconditioned, chosen)
    found = influence.perturbation(queries, chosen, damping=DAMPING, curvature=curvature)
    assert found.shape == (2, 3, 3)
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


class ConvClassifier(Classifier):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.layers = SmallConvNet().eval()


def test_perturbation_is_the_slope_of_the_scores_of_a_moved_example(tmp_path: Path) -> None:
    """Every kind of layer in the net is part of it."""
    torch.manual_seed(0)
    model, data = ConvClassifier().double(), examples(8, 5, 3)
    data = (data[0].double(), data[1])
    influence = asked(model, tmp_path, data)
    queries = (random(2, 5, seed=1), torch.tensor([0, 2]))
    found = influence.perturbation(queries, data, damping=DAMPING)

    direction, step = random(8, 5, seed=4), 1e-4
    engine = influence._engine()
    asked_gradients = influence._gradients(queries, None)

    def scores(inputs: Tensor) -> Tensor:
        rows = influence._gradients((inputs, data[1]), None)
        total = torch.zeros(2, 8, dtype=torch.float64)
        for name, layer in engine.layers.items():
            inverse = 1 / (layer.Lambda + DAMPING)
            queried = layer.basis.rotate(asked_gradients[name]) * inverse
            total += torch.einsum("qoi,noi->qn", queried.double(), layer.basis.rotate(rows[name]).double())
        return total

    slope = (scores(data[0] + step * direction) - scores(data[0] - step * direction)) / (2 * step)
    expected = (found.double() * direction).sum(-1)
    torch.testing.assert_close(expected, slope, rtol=0, atol=2e-2 * float(slope.abs().max()))  # float32 gradients


def test_perturbation_of_examples_does_not_depend_on_company(influence: InfluenceModule) -> None:
    queries, (x, y) = examples(2, seed=1), examples(4, seed=2)
    together = influence.perturbation(queries, (x, y))
    alone = [influence.perturbation(queries, (x[n : n + 1], y[n : n + 1])) for n in range(4)]
    torch.testing.assert_close(torch.cat(alone, dim=1), together)


def test_a_plain_module_takes_a_training_loss(tmp_path: Path) -> None:
    def losses(model: nn.Module, batch: Any) -> Tensor:
        return F.cross_entropy(model(batch[0]), batch[1], reduction="none")

    model = Classifier()
    plain = asked(model.layers, tmp_path, examples(12), codec="pairs-float32", training_loss=losses)
    queries, chosen = examples(2, seed=1), examples(3, seed=2)
    found = plain.perturbation(
        queries, chosen, measurement=lambda model, batch: -losses(model, batch), training_loss=losses
    )
    (tmp_path / "own").mkdir()
    own = asked(model, tmp_path / "own", examples(12), codec="pairs-float32")
    torch.testing.assert_close(found, own.perturbation(queries, chosen))


def test_the_model_is_left_as_it_was(influence: InfluenceModule) -> None:
    influence.model.train()
    influence.perturbation(examples(1), examples(2))
    assert influence.model.training
    assert all(p.grad is None for p in influence.model.parameters())


def test_what_has_no_derivative_is_refused(influence: InfluenceModule) -> None:
    x, y = examples(2)
    with pytest.raises(QueryError, match=r"`inputs` 1 must be a tensor of floating-point numbers.*torch.int64"):
        influence.perturbation((x, y), (x, y), inputs=1)
    with pytest.raises(QueryError, match="`inputs` 'pixels' is not in the examples"):
        influence.perturbation((x, y), (x, y), inputs="pixels")
    with pytest.raises(QueryError, match="is made of the file's rows"):
        influence.perturbation((x, y), (x, y), curvature="empirical_fisher")


def test_a_model_that_detaches_its_inputs_is_refused(tmp_path: Path) -> None:
    class Detaching(Classifier):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.detach())

    influence = asked(Detaching(), tmp_path, examples(12))
    with pytest.raises(QueryError, match="do not depend on `inputs` 0"):
        influence.perturbation(examples(1), examples(2))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_perturbation_and_scores_do_not_ask_for_gradients_to_be_on(influence: InfluenceModule, mode: Any) -> None:
    expected = influence.perturbation(examples(2), examples(3))
    with mode():
        found = influence.perturbation(examples(2), examples(3))
    assert torch.equal(found, expected)


def test_nothing_is_left_in_the_batch_of_the_user(influence: InfluenceModule) -> None:
    x, y = examples(3)
    x.requires_grad_()
    for answer in (influence.perturbation((x, y), (x, y)), influence.scores_of((x, y), (x, y))):
        assert not answer.requires_grad
    assert x.grad is None


class OfMapping(Classifier):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return super().training_step((batch["x"], batch["y"]), batch_idx)


def test_a_batch_of_another_kind_of_mapping_is_moved(tmp_path: Path) -> None:
    x, y = examples(12)
    rows = [{"x": each, "y": label} for each, label in zip(x, y, strict=True)]
    model = OfMapping()
    path = capture(model, DataLoader(rows, batch_size=5), tmp_path / "influence.h5")
    influence = InfluenceModule.attach(model, path)
    batch = {"x": x[:3], "y": y[:3]}
    odd = defaultdict(list, batch)
    found, expected = (influence.perturbation(batch, each, inputs="x") for each in (odd, batch))
    assert torch.equal(found, expected)
    assert odd["x"] is batch["x"]


def test_a_batch_without_examples_is_refused(influence: InfluenceModule) -> None:
    for queries, chosen in ((examples(0), examples(2)), (examples(2), examples(0))):
        for ask in (influence.scores_of, influence.perturbation):
            with pytest.raises(QueryError, match="holds no example"):
                ask(queries, chosen)
