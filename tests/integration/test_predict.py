"""`trainer.predict(influence, loader)` answers as `top_k` does, in any precision and number of processes."""

import csv
import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.callbacks import BasePredictionWriter
from torch import Tensor, distributed, nn
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset

from lightning_influence import Attribution, AttributionWriter, InfluenceCallback, InfluenceModule
from lightning_influence.errors import QueryError
from tests.integration.lifecycle_models import Classifier, dataset, fit, loader, make_trainer
from tests.matrix.children import run_forked, tail_of

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*rows aged within the epoch"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
]
EXAMPLES, QUERIES, K = 22, 7, 3  # two processes have 4 queries and 3


class Noisy(Classifier):
    """Dropout, batch statistics, logging, and metrics of all processes."""

    def __init__(self) -> None:
        super().__init__()
        self.dropout, self.norm = nn.Dropout(0.5), nn.BatchNorm1d(3, affine=False)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.norm(self.dropout(x)))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        self.log("loss", loss, sync_dist=True)
        return loss


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, LightningModule]:
    folder, model = tmp_path_factory.mktemp("predict"), Noisy()
    fit(folder, model, loader(EXAMPLES), InfluenceCallback(folder / "influence.h5", codec="pairs-float32"))
    return folder / "influence.h5", model


@pytest.fixture
def influence(trained: tuple[Path, LightningModule]) -> InfluenceModule:
    path, model = trained
    fresh = type(model)()
    fresh.load_state_dict(model.state_dict())
    influence = InfluenceModule.attach(fresh, path)
    influence.query_options = {"k": K}
    return influence


def queries(batch_size: int = 2, **options: Any) -> DataLoader:
    x, y = dataset(EXAMPLES + QUERIES)[EXAMPLES:]
    return DataLoader(torch.utils.data.TensorDataset(x + 0.1, y), batch_size=batch_size, **options)


def asked(influence: InfluenceModule) -> Attribution:
    """All queries at once."""
    return influence.top_k(list(queries().dataset.tensors), K)


def joined(found: list[Attribution]) -> Attribution:
    return Attribution(*(torch.cat(parts) for parts in zip(*found, strict=True)))


def check_same(found: Attribution, expected: Attribution, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(found.scores.float(), expected.scores, rtol=tolerance, atol=tolerance)
    assert torch.equal(found.indices, expected.indices)


# --- one process ----------------------------------------------------------------------------------


@pytest.mark.parametrize("inference_mode", [True, False])
def test_batches_are_answered_as_one_question(influence, tmp_path, inference_mode):
    found = make_trainer(tmp_path, inference_mode=inference_mode).predict(influence, queries())
    assert [len(each.indices) for each in found] == [2, 2, 2, 1]
    check_same(joined(found), asked(influence))


def test_double_precision_is_single_precision_refined(influence, tmp_path):
    expected = asked(influence)
    found = make_trainer(tmp_path, precision="64-true").predict(influence, queries())
    check_same(joined(found), expected)
    assert torch.get_default_dtype() == torch.float32


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_half_precision_is_close(influence, tmp_path, precision):
    expected = influence.scores(list(queries().dataset.tensors))
    influence.query_options = {"k": EXAMPLES}
    found = joined(make_trainer(tmp_path, precision=precision).predict(influence, queries()))
    scores = torch.zeros_like(expected).scatter(1, found.indices, found.scores.float())
    assert (scores - expected).norm() < 0.05 * expected.norm()  # bfloat16 has 8 bits


@pytest.mark.parametrize("is_training", [True, False])
def test_a_model_is_left_as_it_was(influence, tmp_path, is_training):
    model = influence.model.train(is_training)
    influence.train(is_training)
    model.layers[2].bias.requires_grad_(False)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    expected = asked(influence)
    check_same(joined(make_trainer(tmp_path).predict(influence, queries())), expected)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(module.training == is_training for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert [p.requires_grad for p in model.parameters()] == [True, True, True, False]
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    assert not any(getattr(module, name) for module in model.modules() for name in hooks)


def test_a_frozen_model_answers_too(influence, tmp_path):
    influence.requires_grad_(False)
    check_same(joined(make_trainer(tmp_path).predict(influence, queries())), asked(influence))


def test_several_loaders_have_their_own_answers(influence, tmp_path):
    first, second = make_trainer(tmp_path).predict(influence, [queries(), queries(batch_size=7)])
    check_same(joined(first), joined(second))


class Collecting(BasePredictionWriter):
    """What a user would write."""

    def __init__(self) -> None:
        super().__init__("batch")
        self.found: dict[int, list[int]] = {}

    def write_on_batch_end(self, trainer, pl_module, prediction, batch_indices, *rest):
        self.found |= dict(zip(batch_indices, prediction.indices.tolist(), strict=True))


def test_a_prediction_writer_is_told_which_queries_it_gets(influence, tmp_path):
    writer = Collecting()
    make_trainer(tmp_path, writer).predict(influence, queries(), return_predictions=False)
    assert [writer.found[query] for query in range(QUERIES)] == asked(influence).indices.tolist()


# --- the table ------------------------------------------------------------------------------------


def table_of(path: Path) -> dict[str, np.ndarray]:
    with np.load(path) as file:
        return dict(file)


def check_table(table: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert list(table) == list(expected)
    for name, column in expected.items():
        np.testing.assert_allclose(table[name], column, rtol=1e-5, atol=1e-5, err_msg=name)


def test_answers_and_examples_make_tables(influence, tmp_path):
    found = make_trainer(tmp_path).predict(influence, queries())
    table, expected = influence.to_columns(found), asked(influence)
    assert list(table) == ["query", "rank", "index", "score", "label", "loss", "step"]
    assert table["query"].tolist() == [query for query in range(QUERIES) for _ in range(K)]
    assert table["rank"].tolist() == [1, 2, 3] * QUERIES
    assert table["index"].tolist() == expected.indices.flatten().tolist()
    np.testing.assert_allclose(table["score"], expected.scores.flatten(), rtol=1e-4)
    examples = influence.to_columns()
    assert examples["label"].tolist() == dataset(EXAMPLES).tensors[1].tolist()
    for name in ("label", "loss", "step"):
        assert table[name].tolist() == examples[name][table["index"]].tolist()


def test_a_table_has_each_query_in_order(influence, tmp_path):
    writer = AttributionWriter(tmp_path / "answers.npz")
    make_trainer(tmp_path, writer).predict(influence, queries(sampler=[3, 1, 0, 2, 6, 5, 4, 4, 3]))
    check_table(table_of(writer.path), influence.to_columns(asked(influence)))


def test_a_table_names_the_loader_where_there_are_several(influence, tmp_path):
    writer = AttributionWriter(tmp_path / "answers.csv")
    make_trainer(tmp_path, writer).predict(influence, [queries(), queries(batch_size=7)])
    with writer.path.open() as file:
        rows = list(csv.DictReader(file))
    expected = influence.to_columns(asked(influence))["index"].tolist()
    for loader_ in ("0", "1"):
        assert [int(row["index"]) for row in rows if row["dataloader"] == loader_] == expected


class Stream(IterableDataset):
    def __iter__(self):
        return iter(queries().dataset)


def test_queries_of_a_stream_are_counted(influence, tmp_path):
    writer = AttributionWriter(tmp_path / "answers.npz")
    with pytest.warns(UserWarning, match="Couldn't infer the batch indices"):
        make_trainer(tmp_path, writer).predict(influence, DataLoader(Stream(), batch_size=3))
    check_table(table_of(writer.path), influence.to_columns(asked(influence)))


def test_a_table_of_another_model_is_refused(tmp_path):
    trainer = make_trainer(tmp_path, AttributionWriter(tmp_path / "answers.csv"))
    with pytest.raises(QueryError, match="needs an InfluenceModule, got Answering"):
        trainer.predict(Answering(), queries())


class Answering(Classifier):
    def predict_step(self, batch: Any) -> Tensor:
        return batch[1]


@pytest.mark.parametrize(("name", "match"), [("a.xls", "must end in .csv"), ("no/a.csv", "there is no folder")])
def test_a_table_that_cannot_be_written_is_refused_at_once(tmp_path, name, match):
    with pytest.raises(ValueError, match=match):
        AttributionWriter(tmp_path / name)


# --- two processes --------------------------------------------------------------------------------


def predict_by_two(influence: InfluenceModule, folder: Path, strategy: str, *, is_padded: bool = False) -> None:
    """The samplers are Lightning's own, or the user's, who gives both processes the same number of queries."""
    torch.set_num_threads(1)
    options = {"strategy": strategy, "devices": 2, "use_distributed_sampler": not is_padded}
    trainer = make_trainer(folder, AttributionWriter(folder / "answers.npz"), **options)
    trainer.predict(influence, datamodule=Questions(is_padded), return_predictions=False)


class Questions(LightningDataModule):
    def __init__(self, is_padded: bool) -> None:
        super().__init__()
        self.is_padded = is_padded

    def predict_dataloader(self) -> DataLoader:
        return queries(sampler=DistributedSampler(queries().dataset) if self.is_padded else None)


@pytest.mark.ddp
@pytest.mark.parametrize("is_padded", [False, True])
@pytest.mark.parametrize("strategy", ["ddp_fork", pytest.param("ddp_spawn", marks=pytest.mark.slow)])
def test_two_processes_answer_as_one(influence, tmp_path, strategy, is_padded):
    """Of 7 queries, the processes get 4 and 3, or 4 and 4."""
    log = tmp_path / "log"
    ask = partial(predict_by_two, influence, tmp_path, strategy, is_padded=is_padded)
    assert run_forked(ask, log) == 0, tail_of(log)
    check_table(table_of(tmp_path / "answers.npz"), influence.to_columns(asked(influence)))


SCRIPT = """
import sys, torch
from pathlib import Path
from lightning_influence import AttributionWriter, InfluenceModule
from tests.integration.test_predict import Noisy, make_trainer, queries

torch.set_num_threads(1)
folder = Path(sys.argv[1])
model = Noisy()
model.load_state_dict(torch.load(folder / "weights.pt"))
influence = InfluenceModule.attach(model, folder / "influence.h5")
influence.query_options = {"k": 3}
trainer = make_trainer(folder, AttributionWriter(folder / "answers.npz"), strategy="ddp", devices=2)
found = trainer.predict(influence, queries())
assert sum(len(each.indices) for each in found) == (4 if trainer.is_global_zero else 3)
"""


@pytest.mark.slow
def test_processes_of_their_own_answer_as_one(influence, trained, tmp_path):
    torch.save(influence.model.state_dict(), tmp_path / "weights.pt")
    (tmp_path / "influence.h5").symlink_to(trained[0])
    (tmp_path / "script.py").write_text(SCRIPT)
    root = Path(__file__).parents[2]
    environment = os.environ | {"PYTHONPATH": str(root)}
    command = [sys.executable, str(tmp_path / "script.py"), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, cwd=root, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    check_table(table_of(tmp_path / "answers.npz"), influence.to_columns(asked(influence)))


class Contrastive(Noisy):
    """Talks to other processes, which may have no batch left."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        distributed.all_reduce(batch[1].clone())
        return super().training_step(batch, batch_idx)


def refused_in_two(influence: InfluenceModule, folder: Path) -> None:
    try:
        predict_by_two(influence, folder, "ddp_fork")
    except Exception as error:
        (folder / "error").write_text(f"{type(error).__name__}: {error}")


@pytest.mark.ddp
def test_a_step_that_would_wait_for_the_others_is_refused(influence, trained, tmp_path):
    model = Contrastive()
    model.load_state_dict(influence.model.state_dict())
    asking = InfluenceModule.attach(model, trained[0])
    target: Callable[[], None] = partial(refused_in_two, asking, tmp_path)
    assert run_forked(target, tmp_path / "log", 60.0) == 0, tail_of(tmp_path / "log")
    assert "talks to other processes" in (tmp_path / "error").read_text()
