"""Steps that look right at the end of a batch and are not, or the other way round."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from sklearn.datasets import load_breast_cancer
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_influence import InfluenceCallback, InfluenceModule
from lightning_influence.errors import LayerError, QueryError
from lightning_influence.store import StoreReader
from tests.integration.lifecycle_models import Classifier, dataset, fit, loader
from tests.integration.models import stored_gradients
from tests.reference.gradients import per_example_gradients


def true_gradients(model: Classifier) -> dict[str, Tensor]:
    """At the present weights; tests train at learning rate zero."""
    examples = [(x[None], y[None]) for x, y in dataset(10)]
    names = ["layers.0", "layers.2"]
    found = per_example_gradients(
        copy.deepcopy(model.layers),
        examples,
        lambda net, example: F.cross_entropy(net(example[0]), example[1]),
        [name.removeprefix("layers.") for name in names],
    )
    return {name: found[name.removeprefix("layers.")] for name in names}


def capture(folder: Path, model: Classifier, *callbacks: Callback, **options: Any) -> Path:
    path = folder / "influence.h5"
    ours = InfluenceCallback(path, **({"codec": "pairs-float32", "on_error": "raise"} | options))
    fit(folder, model, loader(), *callbacks, ours)
    return path


def assert_rows_are_true(path: Path, model: Classifier) -> None:
    for name, expected in true_gradients(model).items():
        torch.testing.assert_close(stored_gradients(path)[name].double(), expected, rtol=1e-5, atol=1e-6)


class Unnormalizes(Callback):
    def on_train_batch_end(self, trainer: Any, model: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        batch[0].mul_(3).add_(1)


def test_a_batch_that_another_callback_changes_afterwards_is_stored_as_it_was(tmp_path: Path) -> None:
    model = Classifier(learning_rate=0.0)
    assert_rows_are_true(capture(tmp_path, model, Unnormalizes()), model)


class Adversarial(Classifier):
    """Computes a gradient with respect to its inputs before its own backward, from the second epoch on."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor | None:
        if self.current_epoch:
            x = batch[0].clone().requires_grad_()
            torch.autograd.grad(F.cross_entropy(self(x), batch[1]), x)
        return super().training_step(batch, batch_idx)


def test_inner_gradients_are_no_part_of_the_rows(tmp_path: Path) -> None:
    model = Adversarial(learning_rate=0.0)
    assert_rows_are_true(capture(tmp_path, model), model)


class LaterElsewhere(Classifier):
    """Uses a weight outside of its layer's forward, but not in the first epoch."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor | None:
        loss = super().training_step(batch, batch_idx)
        assert loss is not None
        layer = next(module for module in self.modules() if isinstance(module, nn.Linear))
        return loss + F.linear(batch[0], layer.weight).square().mean() if self.current_epoch else loss


def test_a_weight_that_is_used_elsewhere_only_later_is_noticed(tmp_path: Path) -> None:
    with pytest.raises(LayerError, match=r"also used outside of its forward, .* not so in the first batch"):
        capture(tmp_path, LaterElsewhere(learning_rate=0.0))


class Penalized(Classifier):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor | None:
        loss = super().training_step(batch, batch_idx)
        assert loss is not None
        return loss + 0.1 * sum(p.square().sum() for p in self.parameters())


def test_a_penalty_on_the_weights_is_no_part_of_the_rows_and_is_said(tmp_path: Path) -> None:
    model = Penalized(learning_rate=0.0)
    with pytest.warns(UserWarning, match="% of the loss does not come from a recognised loss function"):
        path = capture(tmp_path, model)
    assert_rows_are_true(path, model)


class Weighted(Classifier):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor | None:
        losses = F.cross_entropy(self(batch[0]), batch[1], reduction="none")
        return (losses * torch.linspace(0.1, 1, len(losses))).mean()


def test_weights_of_examples_are_divided_out_and_said(tmp_path: Path) -> None:
    model = Weighted(learning_rate=0.0)
    with pytest.warns(UserWarning, match="weighted differently .* 10 times the smallest"):
        path = capture(tmp_path, model)
    assert_rows_are_true(path, model)


class LabelTable(Classifier):
    """A layer that runs on a table of as many rows as a batch has examples."""

    def __init__(self) -> None:
        super().__init__(learning_rate=0.0)
        self.table, self.labels = nn.Linear(3, 2), torch.eye(4, 3)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor | None:
        loss = super().training_step(batch, batch_idx)
        assert loss is not None
        return loss + self.table(self.labels).square().mean()


@pytest.mark.filterwarnings("ignore:.*InfluenceCallback")
def test_a_layer_on_other_rows_than_the_examples_is_left_out(tmp_path: Path) -> None:
    path = capture(tmp_path, LabelTable())
    (left,) = [layer for layer in StoreReader(path).document("coverage") if layer["reason"]]
    assert left["name"] == "table"
    assert "of 3 examples it saw (4, 2)" in left["reason"]


class Normalized(Classifier):
    def __init__(self) -> None:
        super().__init__(learning_rate=0.0)
        self.norm = nn.BatchNorm1d(3)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.norm(x))


def test_batch_statistics_are_warned_of(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="norm normalize over the batch"):
        capture(tmp_path, Normalized())


class Teacher(Classifier):
    """Keeps an average of its own weights, and counts its steps."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("steps", torch.zeros(()))
        self.teacher = nn.Linear(2, 2).requires_grad_(False)
        self.moves = True

    def training_step(self, batch: Any, batch_idx: int) -> Tensor | None:
        self.steps += 1
        if self.moves:
            self.teacher.weight.data.mul_(0.9)
            self.teacher.weight.add_(1)
        return super().training_step(batch, batch_idx)


def test_a_query_that_would_move_a_teacher_is_refused(tmp_path: Path) -> None:
    model = Teacher()
    path = capture(tmp_path, model)
    with pytest.raises(QueryError, match=r"wrote to its parameters teacher\.weight"):
        InfluenceModule.attach(model, path).scores(dataset(10)[:2])


def test_a_query_puts_buffers_back(tmp_path: Path) -> None:
    model = Teacher()
    model.moves = False
    path, before = capture(tmp_path, model), model.steps.clone()
    InfluenceModule.attach(model, path).scores(dataset(10)[:2])
    assert torch.equal(model.steps, before)


class TwoOptimizers(Classifier):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD(self.parameters(), 0.1) for _ in range(2)], []

    def training_step(self, batch: Any, batch_idx: int) -> None:
        for optimizer in self.optimizers():
            optimizer.zero_grad()
            self.manual_backward(F.cross_entropy(self(batch[0]), batch[1]))
            optimizer.step()


def test_layers_that_several_optimizers_backwards_reach_are_refused(tmp_path: Path) -> None:
    with pytest.raises(LayerError, match=r"(?s)several backwards of one batch reach it.*toggle_optimizer"):
        capture(tmp_path, TwoOptimizers())


class Tabular(Classifier):
    """Columns of very different scales share the int8 groups of 64."""

    def __init__(self) -> None:
        super().__init__(learning_rate=1e-4)
        self.layers = nn.Sequential(nn.Linear(30, 32), nn.ReLU(), nn.Linear(32, 2))

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), self.learning_rate)


@pytest.mark.filterwarnings("ignore:.*rows aged")
def test_coarse_rows_are_measured_and_warned_of(tmp_path: Path) -> None:
    x, y = load_breast_cancer(return_X_y=True)
    data = TensorDataset(torch.tensor(x, dtype=torch.float32), torch.tensor(y))
    path, batches = tmp_path / "influence.h5", DataLoader(data, 32, shuffle=True)
    with pytest.warns(UserWarning, match=r"rows are coarse .* `codec=\"pairs-float16\"`"):
        fit(tmp_path, Tabular(), batches, InfluenceCallback(path), max_epochs=20)
    coarse = StoreReader(path).attributes["codec_spearman"]
    fit(tmp_path, Tabular(), batches, InfluenceCallback(path, codec="pairs-float16"), max_epochs=20)
    assert coarse < 0.95 < StoreReader(path).attributes["codec_spearman"]
