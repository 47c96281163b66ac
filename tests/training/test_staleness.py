"""How much rows aged within their epoch: the number in the file, and training that goes on regardless."""

import math
import re
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_influence import InfluenceCallback
from lightning_influence.store import StoreReader
from tests.integration.lifecycle_models import Classifier, HandwrittenLoss, Manual, dataset, fit

MANY = 60


def train(folder: Path, model: Classifier, batch_size: int = 8, **options: Any) -> dict[str, Any]:
    """The file's attributes after training, with rows stored exactly."""
    path = folder / "influence.h5"
    callback = InfluenceCallback(path, **({"codec": "pairs-float32"} | options))
    fit(folder, model, DataLoader(dataset(MANY), batch_size, shuffle=True), callback)
    return StoreReader(path).attributes


def assert_trained_alike(folder: Path, model: Classifier, alone: Classifier, batch_size: int = 8) -> None:
    fit(folder, alone, DataLoader(dataset(MANY), batch_size, shuffle=True))
    assert all(map(torch.equal, model.parameters(), alone.parameters()))


@pytest.mark.parametrize("codec", ["pairs-float32", "pairs", "eigen"])
def test_staleness_is_one_at_learning_rate_zero(tmp_path: Path, codec: str) -> None:
    # Rows are rounded the same way both times; only the last bits of the forwards differ.
    found = train(tmp_path, Classifier(learning_rate=0.0), codec=codec)
    assert found["staleness_spearman"] == pytest.approx(1, abs=1e-3)
    assert found["staleness_note"] == ""


@pytest.mark.filterwarnings("ignore:.*rows aged")
def test_staleness_falls_as_the_learning_rate_grows(tmp_path: Path) -> None:
    slow, fast = (train(tmp_path, Classifier(learning_rate=rate))["staleness_spearman"] for rate in (0.001, 3.0))
    assert 1 >= slow > 0.99
    assert fast < 0.9


def test_rows_that_aged_are_warned_of(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=r"rows aged within the epoch \(Spearman .*learning rate decay"):
        train(tmp_path, Classifier(learning_rate=3.0))


class Dropped(Classifier):
    """Half of the inputs are dropped in training, none in the evaluation."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(nn.functional.dropout(x, 0.5, self.training))


@pytest.mark.filterwarnings("ignore:.*rows aged")
def test_dropout_lowers_the_number_at_learning_rate_zero(tmp_path: Path) -> None:
    assert train(tmp_path, Dropped(learning_rate=0.0))["staleness_spearman"] < 0.99


class UsesItsTrainer(Classifier):
    """Cannot be asked outside of training."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor | None:
        assert self.trainer.training
        return super().training_step(batch, batch_idx)


class WithoutCopies(Classifier):
    """Holds what cannot be copied."""

    def __init__(self) -> None:
        super().__init__()
        self.lock = threading.Lock()


class CountsItsSteps(Classifier):
    """Raises when it is asked once more than training asks it."""

    def __init__(self) -> None:
        super().__init__()
        self.left = 2 * math.ceil(MANY / 8)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor | None:
        self.left -= 1
        if self.left < 0:
            raise ValueError("asked too often")
        return super().training_step(batch, batch_idx)


@pytest.mark.parametrize(
    ("model", "note"),
    [
        (UsesItsTrainer, "QueryError: .*is not attached to a `Trainer`"),
        (WithoutCopies, "TypeError: cannot pickle"),
        (CountsItsSteps, "QueryError: .*ValueError: asked too often"),
        (Manual, "not measured with manual optimization"),
    ],
)
def test_staleness_that_cannot_be_measured_is_nan_with_a_note_and_training_goes_on(
    tmp_path: Path, model: type[Classifier], note: str
) -> None:
    watched = model()
    found = train(tmp_path, watched)
    assert math.isnan(found["staleness_spearman"])
    assert re.match(note, found["staleness_note"])
    assert found["rows_missing"] == 0
    assert_trained_alike(tmp_path, watched, model())


def first_column(batch: Any) -> list[int]:
    x, _ = batch
    return [int((dataset(MANY).tensors[0] == row).all(1).nonzero()) for row in x]


def test_staleness_is_measured_with_index_fn(tmp_path: Path) -> None:
    found = train(tmp_path, Classifier(learning_rate=0.0), index_fn=first_column)
    assert found["staleness_spearman"] == pytest.approx(1, abs=1e-3)


def test_staleness_of_a_declared_loss_is_measured(tmp_path: Path) -> None:
    found = train(tmp_path, HandwrittenLoss(learning_rate=0.0), loss="mean")
    assert found["staleness_spearman"] == pytest.approx(1, abs=1e-3)


class Counting(Classifier):
    """Keeps state that a further forward would change, and has dropout and batch statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(3)
        self.register_buffer("calls", torch.zeros(()))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor | None:
        x, y = batch
        self.calls += 1
        return super().training_step((nn.functional.dropout(self.norm(x), 0.2, self.training), y), batch_idx)


@pytest.mark.filterwarnings("ignore:.*InfluenceCallback")
def test_measuring_changes_no_weight_buffer_or_random_state(tmp_path: Path) -> None:
    watched, alone = Counting(), Counting()
    train(tmp_path, watched)
    after = torch.get_rng_state(), np.random.get_state()[1].tolist()
    assert_trained_alike(tmp_path, watched, alone)
    assert all(map(torch.equal, watched.buffers(), alone.buffers()))
    assert torch.equal(after[0], torch.get_rng_state())
    assert after[1] == np.random.get_state()[1].tolist()


def test_two_examples_are_too_few_to_rank(tmp_path: Path) -> None:
    path = tmp_path / "influence.h5"
    fit(tmp_path, Classifier(), DataLoader(dataset(2), 2), InfluenceCallback(path))
    assert math.isnan(StoreReader(path).attributes["staleness_spearman"])


def test_examples_of_invalid_rows_are_left_out(tmp_path: Path) -> None:
    path = tmp_path / "influence.h5"
    x, y = dataset(MANY).tensors
    examples = TensorDataset(x.clone(), y)
    examples.tensors[0][3] = torch.nan

    class Cleaning(Classifier):
        def on_after_backward(self) -> None:
            for parameter in self.parameters():
                parameter.grad.nan_to_num_()

    callback = InfluenceCallback(path, codec="pairs-float32")
    with pytest.warns(UserWarning, match="1 rows have non-finite gradients"):
        fit(tmp_path, Cleaning(learning_rate=0.0), DataLoader(examples, 8), callback)
    facts = StoreReader(path).attributes
    assert facts["rows_invalid"] == 1
    assert facts["staleness_spearman"] == pytest.approx(1, abs=1e-3)


@pytest.mark.filterwarnings("ignore:.*InfluenceCallback")
def test_of_a_compiled_model_the_copy_is_asked(tmp_path: Path) -> None:
    watched, alone = (torch.compile(Counting(), backend="eager") for _ in range(2))
    assert not math.isnan(train(tmp_path, watched)["staleness_spearman"])
    assert_trained_alike(tmp_path, watched, alone)
    assert all(map(torch.equal, watched.buffers(), alone.buffers()))
