"""Rows that training makes of several examples: a warning at the first batch, refused where they are captured."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_influence import InfluenceCallback
from lightning_influence.errors import UnsupportedTrainingError
from lightning_influence.store import StoreReader
from tests.integration.lifecycle_models import Classifier, fit, loader

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*rows aged within the epoch"),
    pytest.mark.filterwarnings("ignore:.*the stored rows are coarse"),
]
SAID = "makes rows of several examples, as mixup and cutmix do"


class Mixup(Classifier):
    """Trains on mixtures of two examples, in all epochs or the first ones only."""

    def __init__(self, until: int = 1000) -> None:
        super().__init__()
        self.until, self.batches = until, 0

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        self.batches += 1
        if self.current_epoch >= self.until:
            return F.cross_entropy(self(x), y)
        other = torch.randperm(len(x))
        outputs = self(0.7 * x + 0.3 * x[other])
        return 0.7 * F.cross_entropy(outputs, y) + 0.3 * F.cross_entropy(outputs, y[other])


def train(folder: Path, model: Mixup, **options: Any) -> Path:
    path = folder / "influence.h5"
    on_error = options.pop("on_error", "raise")
    rows = {"rows": options.pop("rows")} if "rows" in options else {}
    fit(folder, model, loader(8), InfluenceCallback(path, on_error=on_error, **rows), **options)
    return path


@contextmanager
def said() -> Iterator[list[str]]:
    """What the callback says of mixing meanwhile."""
    messages: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield messages
    messages += [str(each.message) for each in caught if SAID in str(each.message)]


@pytest.mark.parametrize("options", [{"max_epochs": 1}, {"max_epochs": -1, "max_steps": 6}], ids=str)
def test_mixing_in_the_first_captured_epoch_is_refused_at_its_first_batch(
    tmp_path: Path, options: dict[str, Any]
) -> None:
    model = Mixup()
    with pytest.raises(UnsupportedTrainingError, match=SAID):
        train(tmp_path, model, **options)
    assert model.batches == 1
    assert list(tmp_path.iterdir()) == []


def test_mixing_is_warned_of_at_the_first_batch_and_refused_in_the_captured_epoch(tmp_path: Path) -> None:
    model = Mixup()
    with said() as messages, pytest.raises(UnsupportedTrainingError, match=SAID):
        train(tmp_path, model, max_epochs=3)
    assert len(messages) == 1
    assert model.batches == 2 * 2 + 1
    assert list(tmp_path.iterdir()) == []


def test_training_goes_on_after_the_refusal_and_is_bit_identical(tmp_path: Path) -> None:
    captured, alone = Mixup(), Mixup()
    with said() as messages:
        train(tmp_path, captured, on_error="warn", max_epochs=3)
    assert [("stopped capturing" in message) for message in messages] == [False, True]
    fit(tmp_path, alone, loader(8), max_epochs=3)
    assert all(map(torch.equal, captured.parameters(), alone.parameters()))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("rows", ["online", "final"])
def test_mixing_that_is_off_in_the_captured_epoch_is_a_warning_and_no_more(tmp_path: Path, rows: str) -> None:
    with said() as messages:
        path = train(tmp_path, Mixup(until=2), max_epochs=3, rows=rows)
    assert len(messages) == 1
    assert StoreReader(path).column("written").all()


def test_training_without_mixing_is_not_warned_of(tmp_path: Path) -> None:
    with said() as messages:
        path = train(tmp_path, Mixup(until=0), max_epochs=3)
    assert messages == []
    assert StoreReader(path).column("written").all()
