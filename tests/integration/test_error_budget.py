"""`error_budget`: the file's rows lose no more than asked for, or a warning says so."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from lightning_influence import InfluenceCallback, capture, recorder
from lightning_influence.layer_plan import LayerPlan
from lightning_influence.store import StoreReader
from lightning_influence.training.options import CaptureOptions
from lightning_influence.training.report import warn_of_losses
from lightning_influence.training.staleness import Agreement


class Convolutions(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 12, 3), nn.ReLU(), nn.Flatten(), nn.Linear(192, 4)
        )

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.02)


def data() -> TensorDataset:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(300, 1, 8, 8, generator=generator)
    return TensorDataset(
        images, (images[:, 0, :4].mean((1, 2)) > 0).long() + 2 * (images[:, 0, 4:].mean((1, 2)) > 0)
    )


def file_of(path: Path, max_epochs: int = 3, batch_size: int = 50, **options) -> StoreReader:
    seed_everything(0, verbose=False)
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    callback = InfluenceCallback(path, on_error="raise", **options)
    trainer = Trainer(
        max_epochs=max_epochs, accelerator="cpu", callbacks=[callback], enable_model_summary=False, **quiet
    )
    trainer.fit(Convolutions(), DataLoader(data(), batch_size, shuffle=True))
    return StoreReader(path)


@pytest.mark.parametrize(
    "options",
    [{}, {"epochs": "every"}, {"rows": "final"}, {"codec": "eigen"}],
    ids=["online", "merged", "final", "eigen"],
)
def test_the_measured_error_is_about_the_budget_and_in_the_file(options: dict, tmp_path: Path) -> None:
    stores = {error: file_of(tmp_path / f"{error}.h5", error_budget=error, **options) for error in (0.2, 0.04)}
    for error, store in stores.items():
        assert store.attributes["error_budget"] == error
        # at most twice: rows of other weights than the first block's, by which bytes were chosen
        assert 1 - store.attributes["codec_spearman"] <= 2 * error
    assert stores[0.2].attributes["bytes_per_row"] < stores[0.04].attributes["bytes_per_row"]


def test_one_epoch_whose_rows_are_spooled_reaches_it(tmp_path: Path) -> None:
    store = file_of(tmp_path / "influence.h5", max_epochs=1, error_budget=0.05)
    assert 1 - store.attributes["codec_spearman"] <= 0.1


@pytest.mark.parametrize("batch_size", [4, 20])
def test_small_blocks_of_a_spool_decide_together(
    batch_size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Layers of large activations spool every step by itself, of four examples here."""
    monkeypatch.setattr(recorder, "BLOCK_BYTES", 1)
    options = {"max_epochs": 1, "codec": "eigen", "error_budget": 0.1}
    store = file_of(tmp_path / "influence.h5", batch_size=batch_size, **options)
    assert store.attributes["codec_spearman"] > 0.8
    everything = file_of(tmp_path / "whole.h5", max_epochs=1, codec="eigen", bytes_per_example=10**6)
    assert store.attributes["bytes_per_row"] < everything.attributes["bytes_per_row"] / 2


def test_an_epoch_of_a_few_examples_gets_the_usual_bytes_and_a_warning(tmp_path: Path) -> None:
    few = DataLoader(torch.utils.data.Subset(data(), range(6)), 3)
    with pytest.warns(UserWarning, match=r"6 are too few"):
        capture(Convolutions(), few, tmp_path / "influence.h5", error_budget=0.1, codec="eigen")


@pytest.mark.parametrize(
    ("fine_bytes", "codec", "options", "advice"),
    [
        (900, "eigen", {}, "pass `bytes_per_example=900` for 0.95, or an `error_budget`. "),
        (900, "eigen", {"error_budget": 0.01}, "pass a smaller `error_budget`. "),
        (900, "eigen", {"error_budget": 0.01, "bytes_per_example": 800}, "`bytes_per_example=900` for 0.99. "),
        (
            900,
            "eigen",
            {"error_budget": 0.01, "bytes_per_example": 1000},
            "helps: pass a smaller `error_budget`. ",
        ),
        (0, "eigen", {}, "helps: shuffle the data"),
        (None, "eigen", {}, "helps: pass a larger `bytes_per_example`, or an `error_budget`. "),
        (0, "pairs", {}, 'helps: bring the inputs to one scale, or pass `codec="pairs-float16"`. '),
        (0, "pairs", {"error_budget": 0.05}, "to one scale, or pass an `error_budget` below 0.02. "),
    ],
)
def test_the_advice_on_coarse_rows_can_be_followed(
    fine_bytes: int | None, codec: str, options: dict, advice: str
) -> None:
    plans = {"layer": LayerPlan((3, 4), True, codec, 1)}
    with pytest.warns(UserWarning, match="coarse") as caught:
        warn_of_losses(
            Agreement(codec=0.7, fine_bytes=fine_bytes), plans, (), CaptureOptions(Path("x.h5"), **options)
        )
    assert advice in str(caught[0].message)


def test_bytes_of_an_error_budget_are_announced_as_a_bound(tmp_path: Path, lines: Callable[[], list[str]]) -> None:
    file_of(tmp_path / "influence.h5", error_budget=0.2)
    assert any(" at most " in message and "bytes per row" in message for message in lines())


def test_pairs_are_float16_where_int8_may_lose_too_much(tmp_path: Path) -> None:
    for error, dtype in ((0.1, "int8"), (0.001, "float16")):
        store = file_of(tmp_path / f"{dtype}.h5", error_budget=error)
        (head,) = [entry for entry in store.document("layers") if entry["codec"] == "pairs"]
        assert head["config"]["dtype"] == dtype


def test_bytes_that_do_not_reach_the_budget_are_warned_of(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=r"coarse \(Spearman .*below 0\.99\).*pass `bytes_per_example=\d+`"):
        store = file_of(tmp_path / "influence.h5", error_budget=0.01, bytes_per_example=40)
    assert store.attributes["bytes_per_row"] < 600  # the budget, and the head's pairs


def test_a_budget_that_is_reached_is_not_warned_of(tmp_path: Path) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        file_of(tmp_path / "influence.h5", error_budget=0.3)
    assert not [warning for warning in caught if "coarse" in str(warning.message)]


def test_capture_takes_it_too(tmp_path: Path) -> None:
    path = capture(Convolutions(), DataLoader(data(), 50), tmp_path / "influence.h5", error_budget=0.05)
    store = StoreReader(path)
    assert store.attributes["error_budget"] == 0.05
    assert 1 - store.attributes["codec_spearman"] <= 0.1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"error_budget": 0.0}, "`error_budget` is 1 minus a rank correlation, between 0 and 1, got 0.0"),
        ({"error_budget": 1}, "between 0 and 1, got 1"),
        ({"error_budget": 0.1, "codec": "pairs"}, "`error_budget` chooses bytes of eigen-coordinates"),
        ({"bytes_per_example": 0}, "`bytes_per_example` must be positive or None, got 0"),
    ],
)
def test_impossible_budgets_are_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        InfluenceCallback(**options)
