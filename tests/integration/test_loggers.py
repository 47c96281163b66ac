"""The user's loggers show what was captured, with units in the names."""

from __future__ import annotations

import csv
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger

from lightning_influence import InfluenceCallback
from lightning_influence.store import StoreReader
from tests.integration.lifecycle_models import Classifier, fit, loader, make_trainer

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*the stored rows are coarse"),
    pytest.mark.filterwarnings("ignore:.*rows aged within the epoch"),
]
NAMES = {
    "influence/rows_written",
    "influence/rows_missing",
    "influence/rows_invalid",
    "influence/staleness_spearman",
    "influence/codec_spearman",
    "influence/file_megabytes",
    "influence/coverage_percent",
    "influence/finish_seconds",
}


def train(folder: Path, logger: Any, **options: Any) -> Path:
    """Train on 8 of 10 examples; the path of the file."""
    own = {name: options.pop(name) for name in ("epochs", "rows", "trajectory") if name in options}
    path = folder / "influence.h5"
    fit(folder, Classifier(), loader(drop_last=True), InfluenceCallback(path, **own), logger=logger, **options)
    return path


def from_csv(logger: CSVLogger) -> dict[int, dict[str, float]]:
    """Our metrics by step."""
    with (Path(logger.log_dir) / "metrics.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row.get("influence/rows_written")]
    return {int(row["step"]): {name: float(row[name]) for name in row if name in NAMES} for row in rows}


def from_tensorboard(logger: TensorBoardLogger) -> dict[int, dict[str, float]]:
    """Our metrics by step, as TensorBoard itself reads them."""
    accumulators = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    found = accumulators.EventAccumulator(logger.log_dir).Reload()
    metrics: dict[int, dict[str, float]] = {}
    for name in [tag for tag in found.Tags()["scalars"] if tag.startswith("influence/")]:
        for event in found.Scalars(name):
            metrics.setdefault(event.step, {})[name] = event.value
    return metrics


READERS = {CSVLogger: from_csv, TensorBoardLogger: from_tensorboard}


def make(kind: type[Logger], folder: Path) -> Logger:
    if kind is TensorBoardLogger:
        pytest.importorskip("tensorboard")
    return kind(folder, "logs", 0)  # type: ignore[call-arg]


def assert_right(found: dict[str, float], path: Path, epoch: int | None = None) -> None:
    assert found.keys() == NAMES
    attributes = StoreReader(path, epoch).attributes
    for name in ("rows_written", "rows_missing", "rows_invalid", "staleness_spearman", "codec_spearman"):
        assert found[f"influence/{name}"] == pytest.approx(attributes[name], rel=1e-6), name
    assert found["influence/coverage_percent"] == pytest.approx(80)
    assert 0 < found["influence/finish_seconds"] < 60


@pytest.mark.parametrize("rows", ["online", "final"])
@pytest.mark.parametrize("kind", READERS)
def test_a_logger_shows_the_metrics_with_their_units(tmp_path: Path, kind: type[Logger], rows: str) -> None:
    logger = make(kind, tmp_path)
    path = train(tmp_path, logger, rows=rows)
    (step, found), *others = READERS[kind](logger).items()
    assert not others
    assert step == 4
    assert_right(found, path)
    assert found["influence/file_megabytes"] == pytest.approx(os.path.getsize(path) / 1e6, rel=1e-6)


@pytest.mark.parametrize("kind", READERS)
def test_each_captured_epoch_is_logged_at_its_step(tmp_path: Path, kind: type[Logger]) -> None:
    logger = make(kind, tmp_path)
    path = train(tmp_path, logger, epochs="every", trajectory="segments", max_epochs=3)
    found = READERS[kind](logger)
    assert list(found) == [2, 4, 6]
    for epoch, step in enumerate(found):
        assert_right(found[step], path, epoch)


def test_two_loggers_show_the_same(tmp_path: Path) -> None:
    loggers = [make(kind, tmp_path / kind.__name__) for kind in READERS]
    train(tmp_path, loggers)
    (first,), (second,) = (READERS[type(logger)](logger).values() for logger in loggers)
    assert first == pytest.approx(second, rel=1e-6)


def test_a_barebones_trainer_captures_without_a_logger(tmp_path: Path) -> None:
    path = tmp_path / "influence.h5"
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"))
    trainer = make_trainer(tmp_path, InfluenceCallback(path, on_error="raise"), barebones=True, **quiet)
    trainer.fit(Classifier(), loader())
    assert trainer.loggers == []
    assert StoreReader(path).column("written").all()


class Broken(CSVLogger):
    """Takes none of our metrics."""

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        if NAMES & metrics.keys():
            raise RuntimeError("no room")
        super().log_metrics(metrics, step)


def test_a_logger_that_fails_is_a_warning_and_no_more(tmp_path: Path) -> None:
    healthy = CSVLogger(tmp_path / "healthy", "logs", 0)
    with pytest.warns(UserWarning, match="Broken did not take .*rows_written.*: no room"):
        path = train(tmp_path, [Broken(tmp_path / "broken", "logs", 0), healthy])
    assert_right(from_csv(healthy)[4], path)


def test_what_is_logged_leaves_training_bit_identical(tmp_path: Path) -> None:
    captured, alone = Classifier(), Classifier()
    capture = InfluenceCallback(tmp_path / "influence.h5")
    fit(tmp_path, captured, loader(), capture, logger=CSVLogger(tmp_path / "a", "logs", 0))
    fit(tmp_path, alone, loader(), logger=CSVLogger(tmp_path / "b", "logs", 0))
    assert all(map(torch.equal, captured.parameters(), alone.parameters()))
