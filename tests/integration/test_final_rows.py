"""`rows="final"`: after training, one pass gives each example's row at the final weights, in eval mode."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import StochasticWeightAveraging
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset

from lightning_influence import InfluenceCallback, InfluenceModule
from lightning_influence.errors import UnsupportedTrainingError
from lightning_influence.store import StoreReader
from tests.integration.lifecycle_models import BATCH, Classifier, Manual, N, Stream, dataset, fit, loader
from tests.integration.models import stored_factors, stored_gradients
from tests.reference.factors import covariances, eigenvalue_correction
from tests.reference.gradients import linear_layer_names, per_example_gradients

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*the stored rows are coarse"),
    pytest.mark.filterwarnings("ignore:.*has no length"),
]
CODECS = ["pairs-float32", "eigen"]


class Decaying(Classifier):
    """A learning rate that changes at every step, and dropout, which rows in eval mode do not know."""

    def __init__(self) -> None:
        super().__init__()
        self.layers.insert(2, nn.Dropout(0.5))

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.5)
        schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def train(
    folder: Path,
    model: LightningModule,
    *callbacks: Callback,
    codec: Any = "pairs-float32",
    data: Any = None,
    **options: Any,
) -> Path:
    """Train with capture before the other callbacks; the path of the file."""
    path = folder / "influence.h5"
    own = {name: options.pop(name) for name in ("index_key", "num_examples") if name in options}
    capture = InfluenceCallback(
        path, rows="final", codec=codec, on_error="raise", covariance_positions=None, **own
    )
    fit(folder, model, loader() if data is None else data, capture, *callbacks, **options)
    return path


def truth(model: LightningModule) -> dict[str, Tensor]:
    """Each example's gradient in float64 at the weights of now, in eval mode, [N, o, i]."""

    def loss(module: nn.Module, example: tuple[Tensor, Tensor]) -> Tensor:
        return nn.functional.cross_entropy(module(example[0][None]), example[1][None])

    model = model.eval()
    net, examples = model.layers, dataset()
    found = per_example_gradients(net, [examples[n] for n in range(N)], loss, linear_layer_names(net))
    return {f"layers.{name}": gradient for name, gradient in found.items()}


def assert_rows_are(path: Path, true: dict[str, Tensor], rows: np.ndarray, tolerance: float = 1e-5) -> None:
    """These rows are in the file and no others; each is its example's gradient."""
    reader = StoreReader(path)
    reader.verify_rows()
    assert np.flatnonzero(reader.column("written")).tolist() == sorted(rows.tolist())
    stored = stored_gradients(path)
    assert stored.keys() == true.keys()
    for name, gradient in true.items():
        error = (stored[name][rows].double() - gradient[rows]).norm() / gradient[rows].norm()
        assert error < tolerance, name


@pytest.mark.parametrize("codec", CODECS)
def test_rows_are_autograds_gradients_at_the_final_weights(tmp_path: Path, codec: str) -> None:
    model = Decaying()
    path = train(tmp_path, model, codec=codec, max_epochs=3)
    assert_rows_are(path, truth(model), np.arange(N), 1e-5 if codec != "eigen" else 0.02)  # int8
    assert InfluenceModule.attach(model, path).store.path == path


@pytest.mark.parametrize("codec", CODECS)
def test_lambda_is_of_the_final_weights_in_the_files_basis(tmp_path: Path, codec: str) -> None:
    model = Decaying()
    path = train(tmp_path, model, codec=codec, max_epochs=3)
    for name, gradients in truth(model).items():
        basis, Lambda = stored_factors(path)[name]
        expected = eigenvalue_correction(gradients, basis.Q_A, basis.Q_S)
        torch.testing.assert_close(Lambda, expected, rtol=1e-3, atol=1e-5 * float(expected.max()))


def test_the_basis_of_eigen_rows_is_of_the_last_epoch(tmp_path: Path) -> None:
    model = Classifier(0.0)
    path = train(tmp_path, model, codec="eigen", max_epochs=2)
    inputs = torch.cat([dataset().tensors[0], torch.ones(N, 1)], 1)
    A, S = covariances(inputs[:, None], truth(model)["layers.0"][:, None, :, -1])
    basis, _ = stored_factors(path)["layers.0"]
    for Q, values, expected in ((basis.Q_A, basis.eigenvalues_A, A), (basis.Q_S, basis.eigenvalues_S, S)):
        torch.testing.assert_close(Q @ values.diag() @ Q.T, expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("codec", CODECS)
def test_the_file_says_that_no_row_aged(tmp_path: Path, codec: str) -> None:
    reader = StoreReader(train(tmp_path, Decaying(), codec=codec, max_epochs=2))
    found = reader.attributes
    assert found["rows"] == "final"
    assert found["staleness_spearman"] == pytest.approx(1)
    assert (found["epoch"], found["step_start"], found["step_end"]) == (1, 6, 6)
    assert found["weights_hash_start"] == found["weights_hash_end"]
    assert (found["rows_written"], found["rows_missing"], found["rows_invalid"]) == (N, 0, 0)
    assert reader.column("occurrences").tolist() == [1] * N
    assert set(reader.column("step")) == {6}
    np.testing.assert_array_equal(reader.column("label"), dataset().tensors[1])


class SaysLosses(Callback):
    def __init__(self) -> None:
        self.losses: list[Tensor] = []

    def on_train_batch_end(self, trainer: Trainer, module: LightningModule, outputs: Any, *rest: Any) -> None:
        self.losses.append(outputs["loss"])


@pytest.mark.parametrize("codec", CODECS)
def test_training_and_what_comes_after_it_are_bit_identical(tmp_path: Path, codec: str) -> None:
    models, losses, states = (Decaying(), Decaying()), (SaysLosses(), SaysLosses()), []
    train(tmp_path, models[0], losses[0], codec=codec, max_epochs=3)
    states.append(torch.get_rng_state())
    fit(tmp_path, models[1], loader(), losses[1], max_epochs=3)
    states.append(torch.get_rng_state())
    assert all(map(torch.equal, losses[0].losses, losses[1].losses))
    assert all(map(torch.equal, models[0].state_dict().values(), models[1].state_dict().values()))
    assert torch.equal(*states)
    assert models[0].training == models[1].training


class SaysIndices(Callback):
    """Which examples the last epoch saw, by their inputs."""

    def on_train_epoch_start(self, *rest: Any) -> None:
        self.seen: list[int] = []

    def on_train_batch_start(self, trainer: Trainer, module: LightningModule, batch: Any, batch_idx: int) -> None:
        self.seen += [int((dataset().tensors[0] == x).all(1).nonzero()) for x in batch[0]]


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize(
    "options",
    [{"limit_train_batches": 2}, {"max_epochs": -1, "max_steps": 5}, {"max_epochs": 1}, {"overfit_batches": 1}],
    ids=str,
)
def test_only_examples_that_the_last_epoch_saw_have_rows(
    tmp_path: Path, options: dict[str, Any], codec: str
) -> None:
    model, seen = Decaying(), SaysIndices()
    path = train(tmp_path, model, seen, codec=codec, **options)
    assert_rows_are(path, truth(model), np.unique(seen.seen), 1e-5 if codec != "eigen" else 0.02)
    assert StoreReader(path).attributes["rows_missing"] == N - len(seen.seen)


def test_rows_of_a_subset_stand_at_its_own_indices(tmp_path: Path) -> None:
    model, chosen = Decaying(), [7, 2, 5]
    path = train(tmp_path, model, data=DataLoader(Subset(dataset(), chosen), 2, shuffle=True))
    stored = stored_gradients(path)
    for name, gradients in truth(model).items():
        torch.testing.assert_close(stored[name].double(), gradients[chosen], atol=1e-6, rtol=1e-4)


class Numbered(Stream):
    """Each example brings its number, the last first."""

    def __iter__(self) -> Any:
        return iter([(x, y, index) for index, (x, y) in enumerate(super().__iter__())][::-1])


class OfStream(Decaying):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor | None:
        return super().training_step(batch[:2], batch_idx)


@pytest.mark.parametrize("codec", CODECS)
def test_rows_of_a_stream_stand_where_index_key_says(tmp_path: Path, codec: str) -> None:
    model = OfStream()
    data = DataLoader(Numbered(), BATCH)
    path = train(tmp_path, model, codec=codec, data=data, index_key=2, num_examples=N)
    assert_rows_are(path, truth(model), np.arange(N), 1e-5 if codec != "eigen" else 0.02)


# --- what else changes weights --------------------------------------------------------------------


def averaging() -> StochasticWeightAveraging:
    return StochasticWeightAveraging(0.1, swa_epoch_start=1, annealing_epochs=1)


def test_after_weight_averaging_rows_are_of_the_averaged_weights(tmp_path: Path) -> None:
    path, model = tmp_path / "influence.h5", Decaying()
    capture = InfluenceCallback(path, rows="final", codec="pairs-float32", on_error="raise")
    fit(tmp_path, model, loader(), averaging(), capture, max_epochs=4)
    assert InfluenceModule.attach(model, path).store.path == path
    assert_rows_are(path, truth(model), np.arange(N))


def test_before_weight_averaging_the_order_of_callbacks_is_a_warning(tmp_path: Path) -> None:
    said = "StochasticWeightAveraging replaces the weights when training ends.*put InfluenceCallback after it"
    with pytest.warns(UserWarning, match=said):
        train(tmp_path, Decaying(), averaging(), max_epochs=3)


# --- what is refused ------------------------------------------------------------------------------


def test_manual_optimization_is_refused_with_a_reason(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedTrainingError, match=r"Manual optimizes in its `training_step`.*leave out"):
        train(tmp_path, Manual())


@pytest.mark.ddp
def test_several_processes_are_refused_with_a_reason(tmp_path: Path) -> None:
    said = re.escape('`rows="final"` works in one process, found 2; pass `rows="online"`')
    with pytest.raises(Exception, match=said):
        train(tmp_path, Classifier(), strategy="ddp_fork", devices=2, accelerator="cpu")


class TwoLoaders(Classifier):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = (torch.cat(parts) for parts in zip(*batch, strict=True))
        return nn.functional.cross_entropy(self(x), y)


def test_several_loaders_are_refused_with_a_reason(tmp_path: Path) -> None:
    path = tmp_path / "influence.h5"
    capture = InfluenceCallback(path, rows="final", on_error="raise")
    with pytest.raises(UnsupportedTrainingError, match='`rows="final"` needs one training dataloader, found 2'):
        fit(tmp_path, TwoLoaders(), [loader(), loader()], capture, max_epochs=1)
    assert not path.exists()


@pytest.mark.parametrize("epochs", ["every", 2, [1]])
def test_rows_at_the_end_go_with_the_last_epoch_only(epochs: Any) -> None:
    said = f'after training, and goes with `epochs="last"` only, got `epochs={epochs!r}`'
    with pytest.raises(ValueError, match=re.escape(said)):
        InfluenceCallback(rows="final", epochs=epochs)


def test_other_values_of_rows_are_refused() -> None:
    with pytest.raises(ValueError, match="`rows` must be one of 'online', 'final', got 'end'"):
        InfluenceCallback(rows="end")  # type: ignore[arg-type]


class StoppingEarly(Classifier):
    """Asks for a stop in an epoch that did not seem to be the last."""

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        if (self.trainer.current_epoch, batch_idx) == (1, 1):
            self.trainer.should_stop = True


@pytest.mark.parametrize("codec", ["pairs", "eigen"])
def test_a_stop_before_the_epoch_that_seemed_certain_leaves_rows_of_all_examples(
    tmp_path: Path, codec: Any
) -> None:
    path, model = tmp_path / "influence.h5", StoppingEarly()
    callback = InfluenceCallback(path, rows="final", codec=codec, on_error="raise")
    fit(tmp_path, model, loader(), callback, max_epochs=5)
    facts = InfluenceModule.attach(model, path).store.attributes
    assert (facts["epoch"], facts["rows_written"], facts["rows_missing"]) == (1, N, 0)
