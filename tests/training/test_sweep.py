"""`capture` and the sweep that it is made of, against autograd one example at a time in float64."""

from __future__ import annotations

import copy
import random
import re
import threading
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

from lightning_influence import InfluenceCallback, InfluenceModule, capture
from lightning_influence.errors import CaptureError, LayerError, RowIndexError, UnsupportedTrainingError
from lightning_influence.metrics import mean_rank_correlation
from lightning_influence.recorder import Recorder
from lightning_influence.store import StoreReader, StoreWriter
from lightning_influence.training.asking import kept_random_states
from lightning_influence.training.example_batches import ExampleBatches
from lightning_influence.training.sweep import Sweep
from tests.integration.lifecycle_models import Classifier, dataset
from tests.integration.models import (
    Dropping,
    ManualTask,
    Mlp,
    Pooled,
    PositionsFirst,
    Task,
    Unbatched,
    float16,
    position_data,
    seeded,
    stored_factors,
    stored_gradients,
    token_data,
    train,
    vector_data,
)
from tests.integration.nets import SmallConvNet, SmallTransformer
from tests.reference.activations import collect_activations
from tests.reference.factors import covariances, eigenvalue_correction
from tests.reference.gradients import per_example_gradients

# Gradients are captured in float32; the sums have a few dozen terms of order 1.
CLOSE = {"rtol": 1e-4, "atol": 1e-5}
MLP_LAYERS = ["net.first", "net.middle", "net.last"]


def example_loss(model: Any, example: Sequence[Tensor]) -> Tensor:
    x, y = example
    return model.loss(model.net(x[None]), y[None])


def truth(model: nn.Module, data: Dataset, layers: Sequence[str], loss: Any = example_loss) -> dict[str, Tensor]:
    examples = [data[index] for index in range(len(data))]  # type: ignore[arg-type]
    return per_example_gradients(copy.deepcopy(model).eval(), examples, loss, layers)


def assert_rows_are(path: Path, expected: dict[str, Tensor], rows: Any = slice(None)) -> None:
    stored = stored_gradients(path)
    assert stored.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(stored[name][rows].double(), gradient[rows], **CLOSE)


def losses(model: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1], reduction="none")


# Rows and factors


def test_row_k_is_the_gradient_of_example_k_of_a_shuffled_loader_with_a_short_last_batch(tmp_path: Path) -> None:
    model, data = Task(seeded(Mlp)), vector_data()
    loader = DataLoader(data, 4, shuffle=True, drop_last=True)
    path = capture(model, loader, tmp_path / "x.h5", codec="pairs-float32")
    assert_rows_are(path, truth(model, data, MLP_LAYERS))
    assert StoreReader(path).attributes["rows_missing"] == 0
    assert np.array_equal(StoreReader(path).column("label"), data.tensors[1].numpy())


def test_rows_of_a_model_with_dropout_are_those_of_eval_mode(tmp_path: Path) -> None:
    model, data = Task(seeded(Dropping)).train(), vector_data()
    path = capture(model, DataLoader(data, 4), tmp_path / "x.h5", codec="pairs-float32")
    assert_rows_are(path, truth(model, data, ["net.first", "net.last"]))


@pytest.mark.parametrize("codec", ["pairs-float32", "eigen"])
def test_factors_equal_the_dense_ones(tmp_path: Path, codec: Any) -> None:
    model, data = Task(seeded(Mlp)), vector_data()
    path = capture(
        model,
        DataLoader(data, 4),
        tmp_path / "x.h5",
        codec=codec,
        bytes_per_example=10**6,
        covariance_positions=None,
    )
    gradients = truth(model, data, MLP_LAYERS)
    seen = collect_activations(model, [data[index] for index in range(len(data))], example_loss, MLP_LAYERS)
    for name, (basis, Lambda) in stored_factors(path).items():
        A, S = covariances(seen[name].inputs, seen[name].output_grads)
        torch.testing.assert_close(basis.Q_A @ basis.eigenvalues_A.diag() @ basis.Q_A.T, A, **CLOSE)
        torch.testing.assert_close(basis.Q_S @ basis.eigenvalues_S.diag() @ basis.Q_S.T, S, **CLOSE)
        expected = eigenvalue_correction(gradients[name], basis.Q_A, basis.Q_S)
        torch.testing.assert_close(Lambda, expected, **CLOSE)


@pytest.mark.parametrize("net", [SmallConvNet, Pooled])
def test_eigen_rows_of_all_coordinates_are_the_gradients(tmp_path: Path, net: Any) -> None:
    model = Task(seeded(net))
    data = vector_data() if net is SmallConvNet else position_data()
    path = capture(
        model, DataLoader(data, 4, shuffle=True), tmp_path / "x.h5", codec="eigen", bytes_per_example=10**6
    )
    stored = stored_gradients(path)
    linear = ["net.head"] if net is SmallConvNet else ["net.body.first", "net.body.middle", "net.body.last"]
    for name, gradient in truth(model, data, linear).items():
        error = (stored[name].double() - gradient).norm() / gradient.norm()
        assert error < 0.02  # int8 in groups of 64


def test_running_statistics_are_used_and_no_coupling_is_warned_of(tmp_path: Path, recwarn: Any) -> None:
    model = Task(seeded(SmallConvNet))
    model.net.norm.running_mean.fill_(0.3)
    data = vector_data()
    path = capture(model, DataLoader(data, 4), tmp_path / "x.h5", codec="pairs-float32", layers=["net.head"])
    assert_rows_are(path, truth(model, data, ["net.head"]))
    assert not any("normalize over the batch" in str(warning.message) for warning in recwarn)


def test_a_transformer_is_captured_whole(tmp_path: Path) -> None:
    def token_loss(outputs: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(outputs.transpose(1, 2), targets, reduction="sum")

    model, data = Task(seeded(SmallTransformer, dropout=0.1), token_loss), token_data()
    path = capture(model, DataLoader(data, 4), tmp_path / "x.h5", bytes_per_example=10**6)
    expected = truth(model, data, ["net.block.linear1", "net.block.linear2"])
    stored = stored_gradients(path)
    for name, gradient in expected.items():
        assert (stored[name].double() - gradient).norm() / gradient.norm() < 0.02
    assert InfluenceModule.attach(model, path).coverage.share == 1


@pytest.mark.parametrize("codec", ["pairs", "eigen"])
@pytest.mark.filterwarnings("ignore:.*InfluenceCallback")
def test_the_file_of_a_sweep_is_that_of_the_callback_at_learning_rate_zero(tmp_path: Path, codec: Any) -> None:
    model, data = Task(seeded(Mlp)), vector_data(60)
    train(model, data, InfluenceCallback(tmp_path / "a.h5", codec=codec), max_epochs=2)
    capture(model, DataLoader(data, 4), tmp_path / "b.h5", codec=codec)
    by_callback, by_sweep = (InfluenceModule.attach(model, tmp_path / name) for name in ("a.h5", "b.h5"))
    scores = by_callback.scores(data[:10]), by_sweep.scores(data[:10])
    assert mean_rank_correlation(*scores) > 0.9999
    torch.testing.assert_close(*scores, rtol=0.05, atol=0.01 * float(scores[0].abs().max()))


# Data


class Stream(IterableDataset):
    """Examples of `vector_data` with their indices, in an order of its own."""

    def __init__(self, length: int | None = None, passes: int = 10) -> None:
        self.data, self.order, self.passes = vector_data(), np.random.default_rng(1).permutation(22), passes

    def __iter__(self) -> Iterator[Any]:
        self.passes -= 1
        order = self.order if self.passes >= 0 else self.order[:8]
        return ((*self.data[index], index) for index in order)


class WithIndices(Task):
    """Takes batches with the indices as their last part."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return super().training_step(batch[:2], batch_idx)


def last_part(batch: Any) -> Tensor:
    return batch[2]


@pytest.mark.parametrize("codec", ["pairs-float32", "eigen"])
def test_rows_of_a_stream_are_placed_by_index_fn(tmp_path: Path, codec: Any) -> None:
    model = WithIndices(seeded(Mlp))
    loader = DataLoader(Stream(), 4)
    path = capture(model, loader, tmp_path / "x.h5", codec=codec, index_fn=last_part, num_examples=24)
    reader = StoreReader(path)
    assert reader.attributes["rows_missing"] == 2
    assert reader.column("label")[:22].tolist() == vector_data().tensors[1].tolist()
    if codec == "pairs-float32":
        assert_rows_are(path, truth(model, vector_data(), MLP_LAYERS), slice(22))


def collated(examples: Sequence[tuple[Tensor, Tensor]]) -> dict[str, Any]:
    x, y = zip(*examples, strict=True)
    return {"inputs": torch.stack(x), "nested": [{"targets": torch.stack(y)}], "name": "batch"}


class FromDict(Task):
    def training_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        return {"loss": self.loss(self.net(batch["inputs"]), batch["nested"][0]["targets"])}


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_are_collated_as_in_training_by_as_many_workers(tmp_path: Path, workers: int) -> None:
    model, data = FromDict(seeded(Mlp)), vector_data()
    loader = DataLoader(data, 4, shuffle=True, collate_fn=collated, num_workers=workers)
    path = capture(model, loader, tmp_path / "x.h5", codec="pairs-float32")
    assert_rows_are(path, truth(model, data, MLP_LAYERS))


class Buckets:
    """Batches of different sizes, as by length; it does not say of which size."""

    def __iter__(self) -> Iterator[list[int]]:
        return iter([[0, 1, 2], [3, 4], list(range(5, 22))])


@pytest.mark.parametrize(
    "options",
    [
        {"batch_sampler": Buckets()},
        {"batch_size": None, "sampler": BatchSampler(RandomSampler(range(22)), 4, drop_last=True)},
        {"batch_size": 4, "sampler": RandomSampler(range(22), replacement=True, num_samples=5)},
    ],
)
def test_every_example_that_the_sampler_can_draw_has_a_row(tmp_path: Path, options: dict[str, Any]) -> None:
    model, data = Task(seeded(Mlp)), vector_data()
    path = capture(model, DataLoader(data, **options), tmp_path / "x.h5", codec="pairs-float32")
    assert_rows_are(path, truth(model, data, MLP_LAYERS))


@pytest.mark.parametrize(
    "sampler",
    [
        SubsetRandomSampler([3, 7, 11, 12, 21]),
        SequentialSampler([3, 7, 11, 12, 21]),  # as long as the sequence
        WeightedRandomSampler([float(index in (3, 7, 11, 12, 21)) for index in range(22)], 50),
    ],
)
def test_an_example_that_the_sampler_never_draws_has_no_row(tmp_path: Path, sampler: Any) -> None:
    model, data = Task(seeded(Mlp)), vector_data()
    path = capture(model, DataLoader(data, 4, sampler=sampler), tmp_path / "x.h5", codec="pairs-float32")
    drawn = range(5) if isinstance(sampler, SequentialSampler) else [3, 7, 11, 12, 21]
    assert StoreReader(path).column("written").nonzero()[0].tolist() == list(drawn)


def test_the_generators_of_a_loader_are_left_as_they_were(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(5)
    sampler = SubsetRandomSampler(range(22), generator=generator)
    before = generator.get_state()
    capture(Task(seeded(Mlp)), DataLoader(vector_data(), 4, sampler=sampler), tmp_path / "x.h5")
    assert torch.equal(generator.get_state(), before)


class Preparing(Task):
    """Prepares its batches in the hooks around their transfer, and augments them in training."""

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return [2 * batch[0], batch[1]]

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        trains = self.training or (self._trainer is not None and self.trainer.training)
        return [batch[0] + trains, batch[1]]


def test_batches_pass_the_models_hooks_without_what_these_do_in_training_only(tmp_path: Path) -> None:
    model, data = Preparing(seeded(Mlp)).train(), vector_data()
    path = capture(model, DataLoader(data, 4), tmp_path / "x.h5", codec="pairs-float32")
    prepared = TensorDataset(2 * data.tensors[0], data.tensors[1])
    assert_rows_are(path, truth(model, prepared, MLP_LAYERS))


# Models


def test_a_plain_module_is_captured_by_the_losses_of_its_examples(tmp_path: Path) -> None:
    model, data = seeded(Mlp), vector_data()
    path = capture(model, DataLoader(data, 4), tmp_path / "x.h5", codec="pairs-float32", training_loss=losses)
    expected = truth(
        model, data, ["first", "middle", "last"], lambda m, e: losses(m, (e[0][None], e[1][None])).sum()
    )
    assert_rows_are(path, expected)
    with torch.no_grad():
        np.testing.assert_allclose(
            StoreReader(path).column("loss"), losses(model, data.tensors).numpy(), rtol=1e-5
        )
    scores = InfluenceModule.attach(model, path).scores(data[:3], measurement=lambda m, b: -losses(m, b))
    assert (scores.diagonal() > 0).all()  # more of an example lowers its own loss


def test_training_loss_may_refer_to_the_model_itself(tmp_path: Path) -> None:
    model, data = seeded(Mlp), vector_data()
    path = capture(
        model,
        DataLoader(data, 4),
        tmp_path / "x.h5",
        codec="pairs-float32",
        training_loss=lambda _, b: losses(model, b),
    )
    assert StoreReader(path).attributes["rows_written"] == 22


def test_manual_optimization_is_captured_by_training_loss(tmp_path: Path) -> None:
    model, data = ManualTask(seeded(Mlp)), vector_data()
    path = capture(
        model,
        DataLoader(data, 4),
        tmp_path / "x.h5",
        codec="pairs-float32",
        training_loss=lambda m, batch: losses(m.net, batch),
    )
    assert_rows_are(path, truth(model, data, MLP_LAYERS))


@pytest.mark.parametrize("training_loss", [None, lambda model, batch: losses(model.net, batch)])
def test_examples_are_found_where_positions_come_first_and_are_as_many(tmp_path: Path, training_loss: Any) -> None:
    model, data = Task(seeded(PositionsFirst)), position_data()
    path = capture(
        model, DataLoader(data, 6), tmp_path / "x.h5", codec="pairs-float32", training_loss=training_loss
    )
    assert_rows_are(path, truth(model, data, ["net.body.first", "net.body.middle", "net.body.last"]))


def test_a_layer_that_runs_on_no_example_is_left_out(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=r"net.shared .*with the batch first, got shape \(5,\)"):
        path = capture(Task(seeded(Unbatched)), DataLoader(vector_data(), 4), tmp_path / "x.h5")
    assert set(StoreReader(path).layers) == {"net.first", "net.last"}


def test_a_checkpoint_of_a_run_without_the_callback_is_asked_with_a_file_made_later(tmp_path: Path) -> None:
    data = dataset(22)
    trainer = train(Classifier(), data)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    model = Classifier.load_from_checkpoint(tmp_path / "last.ckpt", weights_only=True)
    path = capture(model, DataLoader(data, 4, shuffle=True), tmp_path / "x.h5")
    influence = InfluenceModule.from_checkpoint(tmp_path / "last.ckpt", Classifier, store=path)
    assert not influence.scores(data[:2]).isnan().any()


def test_a_compiled_model_is_captured(tmp_path: Path) -> None:
    model, data = Task(seeded(Mlp)), vector_data()
    compiled = torch.compile(model, backend="eager")
    path = capture(compiled, DataLoader(data, 4), tmp_path / "x.h5", codec="pairs-float32")
    assert_rows_are(path, truth(model, data, MLP_LAYERS))
    InfluenceModule.attach(model, path)


def test_a_declared_loss_is_scaled_by_the_size_of_the_batch(tmp_path: Path) -> None:
    def own(outputs: Tensor, targets: Tensor) -> Tensor:
        return -outputs.softmax(-1).gather(-1, targets[:, None]).log().mean()

    model, data = Task(seeded(Mlp), own), vector_data()
    path = capture(model, DataLoader(data, 4), tmp_path / "x.h5", codec="pairs-float32", loss="mean")
    assert_rows_are(path, truth(model, data, MLP_LAYERS))
    assert StoreReader(path).attributes["loss"] == "mean"


def test_a_layer_whose_weight_works_elsewhere_is_left_out_with_a_reason(tmp_path: Path) -> None:
    model, data = Task(seeded(Multiplied)), vector_data()
    with pytest.warns(UserWarning, match=r"net.first .*its weight is also used outside of its forward"):
        path = capture(model, DataLoader(data, 4), tmp_path / "x.h5", codec="pairs-float32")
    assert_rows_are(path, truth(model, data, ["net.last"]))


class Multiplied(nn.Module):
    """Uses a weight where no hook sees it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(5, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.first(x)) + x @ self.first.weight.T)


def test_a_layer_that_the_loss_does_not_use_is_left_out(tmp_path: Path) -> None:
    model = Task(seeded(Mlp))
    model.net.unused = nn.Linear(2, 2)
    with pytest.warns(UserWarning, match=r"net.unused .*no call of it took part"):
        path = capture(model, DataLoader(vector_data(), 4), tmp_path / "x.h5")
    assert set(StoreReader(path).layers) == set(MLP_LAYERS)


def test_examples_with_non_finite_gradients_are_flagged_even_in_the_first_batch(tmp_path: Path) -> None:
    x, y = (tensor.clone() for tensor in vector_data().tensors)
    x[[3, 9]] = torch.nan
    model, data = Task(seeded(Mlp)), TensorDataset(x, y)
    for batch_size in (4, 22):
        with pytest.warns(UserWarning, match="2 rows have non-finite gradients"):
            path = capture(model, DataLoader(data, batch_size), tmp_path / "x.h5", codec="pairs-float32")
        assert (StoreReader(path).column("valid") == 0).nonzero()[0].tolist() == [3, 9]
        valid = [row for row in range(22) if row not in (3, 9)]
        assert_rows_are(path, truth(model, data, MLP_LAYERS), valid)


class Skipping(Task):
    """Skips batches that hold example 0."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor | None:
        is_skipped = (batch[0] == vector_data().tensors[0][0]).all(1).any()
        return None if is_skipped else super().training_step(batch, batch_idx)


@pytest.mark.parametrize("codec", ["pairs-float32", "eigen"])
def test_examples_of_a_batch_that_training_step_skips_have_no_row(tmp_path: Path, codec: Any) -> None:
    path = capture(Skipping(seeded(Mlp)), DataLoader(vector_data(), 4), tmp_path / "x.h5", codec=codec)
    assert StoreReader(path).attributes["rows_missing"] == 4
    assert StoreReader(path).column("written")[0] == 0


def test_how_coarse_rows_are_is_not_measured_where_the_later_batches_are_skipped(tmp_path: Path) -> None:
    loader = DataLoader(vector_data(), 11)  # example 0 is in the second batch
    path = capture(Skipping(seeded(Mlp)), loader, tmp_path / "x.h5")
    assert StoreReader(path).attributes["rows_written"] == 11
    assert StoreReader(path).attributes["staleness_note"] == "no example was kept"


# What is left behind


class Busy(Task):
    """Counts, draws random numbers and logs in its step."""

    def __init__(self) -> None:
        super().__init__(seeded(SmallConvNet))
        self.register_buffer("steps", torch.zeros(()))
        self.seen: list[int] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.steps += 1 + 0 * torch.rand(())
        self.seen.append(len(batch[0]))
        self.log("loss", 0.0)
        return super().training_step(batch, batch_idx)


@pytest.mark.parametrize("training_loss", [None, lambda model, batch: losses(model.net, batch)])
def test_nothing_of_the_model_or_the_random_states_is_changed(tmp_path: Path, training_loss: Any) -> None:
    model = Busy().train()
    model.net.norm.eval()
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    state = copy.deepcopy(model.state_dict())
    modes = [module.training for module in model.modules()]
    grads = [parameter.grad for parameter in model.parameters()]
    torch.manual_seed(1)
    np.random.seed(1)
    random.seed(1)
    states = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    loader = DataLoader(vector_data(), 4, shuffle=True)
    capture(model, loader, tmp_path / "x.h5", codec="eigen", training_loss=training_loss)
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())
    assert [module.training for module in model.modules()] == modes
    assert all(
        p.grad is grad and bool((grad == 1).all()) for p, grad in zip(model.parameters(), grads, strict=True)
    )
    assert model.seen == []
    assert torch.equal(torch.get_rng_state(), states[0])
    assert np.random.get_state()[1].tolist() == states[1]
    assert random.getstate() == states[2]
    assert not any(module._forward_hooks for module in model.modules())


def test_the_file_says_that_its_rows_are_of_the_final_weights(tmp_path: Path) -> None:
    model = Task(seeded(Mlp))
    path = capture(model, DataLoader(vector_data(), 4), tmp_path / "folder" / "x.h5")
    facts = StoreReader(path).attributes
    assert facts["rows"] == "final"
    assert "epoch" not in facts
    assert facts["weights_hash_start"] == facts["weights_hash_end"]
    assert facts["staleness_spearman"] == pytest.approx(1, abs=1e-3)
    assert facts["codec_spearman"] > 0.99
    assert (StoreReader(path).column("step") == -1).all()
    assert np.isnan(StoreReader(path).column("learning_rate")).all()
    influence = InfluenceModule.attach(model, path)
    assert "captured in eval mode, at the weights" in influence.summary()
    assert influence.scores(vector_data()[:2]).shape == (2, 22)


def test_the_same_sweep_gives_the_same_bytes(tmp_path: Path) -> None:
    model, loader = Task(seeded(Mlp)), DataLoader(vector_data(), 4, shuffle=True)
    first, second = (StoreReader(capture(model, loader, tmp_path / f"{name}.h5", codec="eigen")) for name in "ab")
    for layer in first.layers:
        for name, rows in first.rows(layer).items():
            assert np.array_equal(rows, second.rows(layer)[name])


def test_a_sweep_that_fails_leaves_the_old_file_and_no_other(tmp_path: Path) -> None:
    model, data = Task(seeded(Mlp)), vector_data()
    path = capture(model, DataLoader(data, 4), tmp_path / "x.h5")
    before = path.read_bytes()

    class Failing(Dataset):
        def __len__(self) -> int:
            return 22

        def __getitem__(self, index: int) -> Any:
            if index == int(np.random.default_rng(0).permutation(22)[-1]):
                raise OSError("unreadable")
            return data[index]

    with pytest.raises(OSError, match="unreadable"):
        capture(model, DataLoader(Failing(), 4), path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


# Refusals


class Locked(Task):
    """Holds what cannot be copied."""

    def __init__(self) -> None:
        super().__init__(seeded(Mlp))
        self.lock = threading.Lock()


class NeedsItsTrainer(Task):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        assert self.trainer.training
        return super().training_step(batch, batch_idx)


class Transforming(DataLoader):
    """Changes batches on their way out."""

    def __iter__(self) -> Any:
        return (batch for batch in super().__iter__())


FINE = DataLoader(vector_data(), 4)


@pytest.mark.parametrize(
    ("model", "loader", "options", "error", "message"),
    [
        (Mlp(), FINE, {}, UnsupportedTrainingError, "Mlp is a plain module, .* pass `training_loss=`"),
        (ManualTask(Mlp()), FINE, {}, UnsupportedTrainingError, "ManualTask optimizes in its `training_step`"),
        (nn.Linear(5, 3), FINE, {"training_loss": losses}, LayerError, r"wrap it, as in `nn.Sequential\(model\)`"),
        (Locked(), FINE, {}, CaptureError, "Locked cannot be copied .*pass `training_loss=`"),
        (
            NeedsItsTrainer(Mlp()),
            FINE,
            {},
            CaptureError,
            "`training_step` of NeedsItsTrainer failed .*`training_loss=",
        ),
        (
            Mlp(),
            FINE,
            {"training_loss": lambda m, b: losses(m, b).mean()},
            CaptureError,
            r"shape \[n\].*got shape \(\)",
        ),
        (
            Mlp(),
            FINE,
            {"training_loss": lambda m, b: losses(m, b)[:-1]},
            RowIndexError,
            r"\[4\] for this .*got \[3\]",
        ),
        (Task(Mlp()), DataLoader(Stream(), 4), {}, RowIndexError, "Stream is an IterableDataset.*`index_fn=`"),
        (
            Task(Mlp()),
            DataLoader(Stream(), 4),
            {"index_fn": last_part},
            RowIndexError,
            "no length.*`num_examples=`",
        ),
        (Task(Mlp()), [vector_data()[:4]], {}, RowIndexError, "need a torch `DataLoader`, got list"),
        (Task(Mlp()), iter(FINE), {}, TypeError, "must be iterable more than once"),
        (Task(Mlp()), Transforming(vector_data(), 4), {}, RowIndexError, "Transforming makes batches by its own"),
        (Task(Mlp()), FINE, {"num_examples": 21}, ValueError, "at least the dataset's length 22, got 21"),
        (Task(Mlp()), FINE, {"index_fn": lambda b: [0.5] * 4}, RowIndexError, "one integer index per row"),
        (
            Task(Mlp()),
            FINE,
            {"index_fn": lambda b: [22] * 4},
            RowIndexError,
            "below the dataset's length 22, got 22",
        ),
        (Task(Mlp()), FINE, {"index_fn": lambda b: [1, 2, 3]}, RowIndexError, "rows in a batch of 3 examples"),
        (Skipping(Mlp()), DataLoader(vector_data(), 22), {}, CaptureError, "None of 1 batches has a loss"),
        (Task(Mlp()), DataLoader(vector_data(), 4, sampler=[]), {}, RowIndexError, "draws no index"),
        (Task(Mlp()), FINE, {"layers": ["nothing"]}, LayerError, "matches no module"),
        (Task(Mlp()), FINE, {"codec": "zip"}, ValueError, "`codec` must be one of"),
        (Task(Mlp()), FINE, {"loss": "max"}, ValueError, "`loss` must be one of"),
        (
            Task(Mlp()),
            FINE,
            {"bytes_per_example": 0},
            ValueError,
            "`bytes_per_example` must be positive or None, got 0",
        ),
        (Task(Mlp()), FINE, {"covariance_positions": 0}, ValueError, "must be positive or None, got 0"),
    ],
)
def test_what_cannot_be_captured_is_an_error_that_says_what_to_do(
    tmp_path: Path, model: Any, loader: Any, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        capture(model, loader, tmp_path / "x.h5", **options)
    assert not list(tmp_path.iterdir())


def test_a_stream_that_ends_earlier_the_second_time_is_refused(tmp_path: Path) -> None:
    loader = DataLoader(Stream(passes=1), 4)
    options = {"codec": "eigen", "index_fn": last_part, "num_examples": 22}
    with pytest.raises(CaptureError, match="22 examples at first and 8 the second time"):
        capture(WithIndices(seeded(Mlp)), loader, tmp_path / "x.h5", **options)
    assert not list(tmp_path.iterdir())


# At the end of training


class SweepAtEnd(Callback):
    """What a callback does that captures rows at the final weights."""

    def __init__(self, path: Path, wanted: Sequence[int] | None = None, **options: Any) -> None:
        self.path, self.options = path, options
        self.wanted = None if wanted is None else np.asarray(wanted)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        index_fn = self.options.pop("index_fn", None)
        batches = ExampleBatches(
            trainer.train_dataloader, pl_module, index_fn=index_fn, num_examples=22, wanted=self.wanted
        )
        with kept_random_states():
            sweep = Sweep(pl_module, trainer=trainer, **self.options)
            visited, bases = sweep.begin(batches), {}
            if any(plan.needs_basis for plan in sweep.plans.values()):
                metrics = sweep.covariances(visited, positions=None)
                bases, visited = {name: metric.eigenbasis() for name, metric in metrics.items()}, iter(batches)
            recorder = Recorder(
                StoreWriter(self.path, num_examples=22, store_id="sweep-at-end"), sweep.plans, bases=bases
            )
            sweep.rows(visited, recorder, step_index=trainer.global_step, learning_rate=0.5)
            recorder.finish(recorder.factors(), attributes={}, documents={})


@pytest.mark.parametrize("codec", ["pairs-float32", "eigen"])
def test_rows_at_the_end_of_training_are_of_the_final_weights_and_training_is_the_same(
    tmp_path: Path, codec: Any
) -> None:
    swept, alone = (Preparing(seeded(Dropping), optimizer=partial(torch.optim.SGD, lr=0.1)) for _ in range(2))
    after = []
    for model, callbacks in ((swept, [SweepAtEnd(tmp_path / "x.h5", codec=codec)]), (alone, [])):
        torch.manual_seed(0)
        train(model, vector_data(), *callbacks, max_epochs=2)
        train(model, vector_data())  # goes on as if nothing had been
        after.append(torch.get_rng_state())
    assert all(map(torch.equal, swept.parameters(), alone.parameters()))
    assert torch.equal(*after)


def test_rows_at_the_end_of_training_decode_to_the_gradients_of_the_final_weights(tmp_path: Path) -> None:
    model, data = Preparing(seeded(Dropping), optimizer=partial(torch.optim.SGD, lr=0.1)), vector_data()
    wanted = [2, 3, 5, 7, 11, 13]
    train(model, data, SweepAtEnd(tmp_path / "x.h5", wanted, codec="pairs-float32"))
    reader = StoreReader(tmp_path / "x.h5")
    assert reader.column("written").nonzero()[0].tolist() == wanted
    assert set(reader.column("step")[wanted]) == {6}
    prepared = TensorDataset(2 * data.tensors[0], data.tensors[1])
    assert_rows_are(tmp_path / "x.h5", truth(model, prepared, ["net.first", "net.last"]), wanted)


@pytest.mark.parametrize("codec", ["pairs-float32", "eigen"])
def test_of_a_stream_only_the_wanted_examples_enter_rows_and_factors(tmp_path: Path, codec: Any) -> None:
    wanted = [2, 3, 5, 7, 11, 13]
    model = WithIndices(seeded(Mlp))
    options = {"index_fn": last_part, "codec": codec}
    trainer = Trainer(max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False)
    trainer.callbacks.append(SweepAtEnd(tmp_path / "a.h5", wanted, **options))
    trainer.fit(model, DataLoader(Stream(), 4))
    subset = DataLoader(vector_data(), 4, sampler=SubsetRandomSampler(wanted))
    capture(Task(model.net), subset, tmp_path / "b.h5", codec=codec, covariance_positions=None)
    swept, reader = StoreReader(tmp_path / "a.h5"), StoreReader(tmp_path / "b.h5")
    assert swept.column("written").nonzero()[0].tolist() == wanted
    assert np.array_equal(swept.column("label"), reader.column("label"))
    for (_, Lambda), (_, other) in zip(
        stored_factors(tmp_path / "a.h5").values(), stored_factors(tmp_path / "b.h5").values(), strict=True
    ):
        torch.testing.assert_close(Lambda, other, **CLOSE)


@pytest.mark.parametrize(
    ("options", "tolerance"),
    [
        ({"precision": "bf16-mixed"}, 0.05),
        ({"precision": "bf16-true"}, 0.05),
        ({"precision": "64-true"}, 1e-6),
        (float16(2.0**20), 0.01),
    ],
)
def test_a_sweep_runs_in_the_trainers_precision(tmp_path: Path, options: dict[str, Any], tolerance: float) -> None:
    def tiny(outputs: Tensor, targets: Tensor) -> Tensor:
        return 1e-5 * F.cross_entropy(outputs, targets)  # gradients below what float16 can hold

    model, data = Task(seeded(Mlp), tiny), vector_data()
    train(model, data, SweepAtEnd(tmp_path / "x.h5", codec="pairs-float32"), **options)
    stored = stored_gradients(tmp_path / "x.h5")
    model.loss = F.cross_entropy
    for name, gradient in truth(model, data, MLP_LAYERS).items():
        assert (stored[name].double() - gradient).norm() / gradient.norm() < tolerance


def test_manual_optimization_is_refused_at_the_end_of_training(tmp_path: Path) -> None:
    model = ManualTask(seeded(Mlp))
    with pytest.raises(UnsupportedTrainingError, match=re.escape('leave out `rows="final"`')):
        train(model, vector_data(), SweepAtEnd(tmp_path / "x.h5"))


class Doubling(LightningDataModule):
    """Its hooks, and not the model's, prepare the batches."""

    def train_dataloader(self) -> DataLoader:
        return DataLoader(vector_data(), 4, shuffle=True)

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return [2 * batch[0], batch[1]]


def test_batches_at_the_end_of_training_pass_the_data_modules_hooks(tmp_path: Path) -> None:
    model, data = Task(seeded(Mlp)), vector_data()
    sweep = SweepAtEnd(tmp_path / "x.h5", codec="pairs-float32")
    trainer = Trainer(max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False, callbacks=[sweep])
    trainer.fit(model, datamodule=Doubling())
    doubled = TensorDataset(2 * data.tensors[0], data.tensors[1])
    assert_rows_are(tmp_path / "x.h5", truth(model, doubled, MLP_LAYERS))
    capture(model, DataLoader(data, 4), tmp_path / "y.h5", codec="pairs-float32")  # the trainer is still attached
    assert_rows_are(tmp_path / "y.h5", truth(model, doubled, MLP_LAYERS))
