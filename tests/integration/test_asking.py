"""What a query does with models and checkpoints that are not made for it."""

from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_influence import InfluenceCallback, InfluenceModule
from lightning_influence.errors import QueryError
from tests.integration.lifecycle_models import Classifier, dataset, fit

QUERY = dataset(10)[:3]


def captured(folder: Path, model: Classifier, **loader: Any) -> tuple[Trainer, Path]:
    path = folder / "influence.h5"
    trainer = fit(folder, model, DataLoader(dataset(10), 4, shuffle=True, **loader), InfluenceCallback(path))
    return trainer, path


class NeedsTrainer(Classifier):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor | None:
        assert self.trainer.training
        return super().training_step(batch, batch_idx)


def test_a_training_step_that_needs_its_trainer_is_an_error_with_the_way_out(
    tmp_path: Path,
) -> None:
    model = NeedsTrainer()
    _, path = captured(tmp_path, model)
    model._trainer = None
    with pytest.raises(QueryError, match=r"`training_step` of NeedsTrainer failed .* pass `measurement=`"):
        InfluenceModule.attach(model, path).scores(QUERY)


def test_a_module_keeps_a_log_attribute_of_its_own(tmp_path: Path) -> None:
    model = Classifier()
    _, path = captured(tmp_path, model)
    own = lambda *args, **kwargs: None  # noqa: E731 (any object will do)
    model.log = own  # type: ignore[method-assign]
    InfluenceModule.attach(model, path).scores(QUERY)
    assert vars(model)["log"] is own
    assert "log_dict" not in vars(model)


def test_grads_that_a_model_holds_are_put_back_as_they_were(tmp_path: Path) -> None:
    model = Classifier()
    _, path = captured(tmp_path, model)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    before = [parameter.grad for parameter in model.parameters()]
    InfluenceModule.attach(model, path).scores(QUERY)
    assert all(parameter.grad is grad for parameter, grad in zip(model.parameters(), before, strict=True))
    assert all(bool((grad == 1).all()) for grad in before if grad is not None)


def test_examples_without_a_row_are_no_suspects(tmp_path: Path) -> None:
    model = Classifier()
    _, path = captured(tmp_path, model, drop_last=True)
    influence = InfluenceModule.attach(model, path)
    suspects = influence.self_influence().nan_to_num().topk(3).indices  # as README does
    assert influence.removal_effect(QUERY, suspects).isfinite().all()


@pytest.mark.parametrize("indices", [[0.5, 1.7], torch.ones(3)])
def test_indices_that_are_no_integers_are_refused(tmp_path: Path, indices: Any) -> None:
    model = Classifier()
    _, path = captured(tmp_path, model)
    with pytest.raises(QueryError, match="`indices` must be integers"):
        InfluenceModule.attach(model, path).removal_effect(QUERY, indices)


class WithHyperparameter(Classifier):
    def __init__(self, share: Any = None) -> None:
        super().__init__()
        self.save_hyperparameters()


def test_a_checkpoint_of_more_than_plain_values_says_how_to_load_it(tmp_path: Path) -> None:
    trainer, _ = captured(tmp_path, WithHyperparameter(Fraction(1, 2)))
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    with pytest.raises(QueryError, match="pass `weights_only=False`"):
        InfluenceModule.from_checkpoint(tmp_path / "last.ckpt", WithHyperparameter)
    influence = InfluenceModule.from_checkpoint(tmp_path / "last.ckpt", WithHyperparameter, weights_only=False)
    assert influence.scores(QUERY).shape == (3, 10)
