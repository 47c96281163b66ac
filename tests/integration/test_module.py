"""`InfluenceModule`: finds its file, refuses what does not belong, answers, and leaves the model alone."""

import itertools
import pickle
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import h5py
import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_influence import Attribution, InfluenceCallback, InfluenceModule
from lightning_influence.errors import (
    CorruptStoreError,
    IncompleteStoreError,
    NotAStoreError,
    QueryError,
    RowIndexError,
    SchemaVersionError,
    StoreError,
    StoreNotFoundError,
    WeightsMismatchError,
)
from lightning_influence.store import StoreReader
from tests.integration.lifecycle_models import Classifier, Manual, dataset, fit, make_trainer

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*rows aged within the epoch"),
    pytest.mark.filterwarnings("ignore:.*predict returned None"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
]
EXAMPLES = 22  # drop_last leaves two of them without rows in the captured epoch
SEEN = 20


class Run(NamedTuple):
    """What a training leaves."""

    folder: Path
    checkpoint: Path
    file: Path
    model: Classifier


class Noisy(Classifier):
    """Dropout, logging and a shape that the measurement can get wrong."""

    def __init__(self, learning_rate: float = 0.1) -> None:
        super().__init__(learning_rate)
        self.dropout = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.dropout(x))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        self.log("loss", loss)
        self.log_dict({"again": loss})
        return loss


def data(n: int = EXAMPLES) -> DataLoader:
    return DataLoader(dataset(n), batch_size=4, drop_last=True)


def train(folder: Path, model: Classifier, *callbacks: pl.Callback, **options: Any) -> Run:
    """With a checkpoint at the end of every epoch, by default where Lightning puts it."""
    file = folder / "influence.h5"
    callbacks = callbacks or (InfluenceCallback(file, codec="pairs-float32"),)
    trainer = fit(folder, model, data(), *callbacks, enable_checkpointing=True, **options)
    saving = trainer.checkpoint_callback
    assert isinstance(saving, ModelCheckpoint)
    return Run(folder, Path(saving.best_model_path), file, model)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """One training, for tests that only read."""
    return train(tmp_path_factory.mktemp("run"), Noisy(), max_epochs=3)


@pytest.fixture
def moved(run: Run, tmp_path: Path) -> Iterator[Run]:
    """A copy of its folder elsewhere, for tests that change files; the original is out of reach."""
    folder = tmp_path / "copy"
    shutil.copytree(run.folder, folder)
    hidden = run.file.with_suffix(".hidden")
    run.file.rename(hidden)
    yield Run(folder, folder / run.checkpoint.relative_to(run.folder), folder / run.file.name, run.model)
    hidden.rename(run.file)


@pytest.fixture
def influence(run: Run) -> InfluenceModule:
    return InfluenceModule.from_checkpoint(run.checkpoint, Noisy)


@pytest.fixture
def batch() -> list[Tensor]:
    """Three of the training examples, as queries."""
    return [column[[0, 7, 13]] for column in dataset(EXAMPLES).tensors]


def margin(model: nn.Module, batch: Any) -> Tensor:
    x, y = batch
    logits = model(x)
    return logits.gather(1, y[:, None]).squeeze(1) - logits.gather(1, 1 - y[:, None]).squeeze(1)


# --- a checkpoint and its file --------------------------------------------------------------------


def test_a_checkpoint_finds_its_file(run: Run) -> None:
    influence = InfluenceModule.from_checkpoint(run.checkpoint, Noisy)
    assert influence.store.path.samefile(run.file)


def test_a_checkpoint_and_its_file_are_found_after_moving_together(moved: Run) -> None:
    influence = InfluenceModule.from_checkpoint(moved.checkpoint, Noisy)
    assert influence.store.path.samefile(moved.file)


def test_a_file_is_found_beside_its_checkpoint(moved: Run, tmp_path: Path) -> None:
    beside = tmp_path / "beside"
    beside.mkdir()
    checkpoint = shutil.move(moved.checkpoint, beside / "last.ckpt")
    shutil.move(moved.file, beside / "influence.h5")
    influence = InfluenceModule.from_checkpoint(checkpoint, Noisy)
    assert influence.store.path.samefile(beside / "influence.h5")


def test_a_file_elsewhere_is_given_as_store(moved: Run, tmp_path: Path) -> None:
    elsewhere = shutil.move(moved.file, tmp_path / "other name.h5")
    influence = InfluenceModule.from_checkpoint(moved.checkpoint, Noisy, store=elsewhere)
    assert influence.store.path == Path(elsewhere)


def test_a_checkpoint_path_may_be_a_string(run: Run) -> None:
    assert InfluenceModule.from_checkpoint(str(run.checkpoint), Noisy).store.num_examples == EXAMPLES


def test_weights_are_loaded_into_an_instance(run: Run) -> None:
    model = Noisy()
    assert InfluenceModule.from_checkpoint(run.checkpoint, model).model is model
    assert torch.equal(model.layers[0].weight, run.model.layers[0].weight)


def test_a_missing_file_is_an_error_that_names_the_places(moved: Run) -> None:
    moved.file.unlink()
    with pytest.raises(StoreNotFoundError, match="Pass `store=` with the file's path") as raised:
        InfluenceModule.from_checkpoint(moved.checkpoint, Noisy)
    assert str(moved.file) in str(raised.value)
    assert str(moved.checkpoint.parent / moved.file.name) in str(raised.value)


def test_a_file_of_another_run_is_refused_by_its_id(moved: Run, tmp_path: Path) -> None:
    other = train(tmp_path / "other", Noisy(), max_epochs=1)
    other_id = StoreReader(other.file).store_id
    shutil.copy(other.file, moved.file)
    with pytest.raises(StoreNotFoundError, match=rf"of another run, id {other_id}"):
        InfluenceModule.from_checkpoint(moved.checkpoint, Noisy)


def test_a_checkpoint_from_before_the_end_of_capture_says_so(tmp_path: Path) -> None:
    early = ModelCheckpoint(dirpath=tmp_path / "early", every_n_train_steps=1, save_top_k=-1)
    callback = InfluenceCallback(tmp_path / "influence.h5")
    run = train(tmp_path, Noisy(), callback, early, max_epochs=1)
    run.file.unlink()
    first = min((tmp_path / "early").iterdir(), key=lambda path: path.stat().st_mtime_ns)
    with pytest.raises(StoreNotFoundError, match="saved before capture was complete"):
        InfluenceModule.from_checkpoint(first, Noisy)


def test_the_checkpoint_loads_with_weights_only(run: Run) -> None:
    loaded = torch.load(run.checkpoint, weights_only=True)
    (state,) = [state for key, state in loaded["callbacks"].items() if "InfluenceCallback" in key]
    assert state["status"] == "complete"
    assert all(type(value) is str for value in state.values())


def test_a_checkpoint_of_another_epoch_is_refused(tmp_path: Path) -> None:
    each = ModelCheckpoint(dirpath=tmp_path / "each", filename="{epoch}", save_top_k=-1)
    train(tmp_path, Noisy(), InfluenceCallback(tmp_path / "influence.h5"), each, max_epochs=2)
    with pytest.raises(WeightsMismatchError, match=r"weights at the end of epoch 1 \(step 10\)"):
        InfluenceModule.from_checkpoint(tmp_path / "each" / "epoch=0.ckpt", Noisy)
    InfluenceModule.from_checkpoint(tmp_path / "each" / "epoch=1.ckpt", Noisy)


def test_a_checkpoint_saved_after_training_belongs_to_the_file(tmp_path: Path) -> None:
    callback = InfluenceCallback(tmp_path / "influence.h5")
    trainer = fit(tmp_path, Noisy(), data(), callback)
    trainer.save_checkpoint(tmp_path / "late.ckpt")
    InfluenceModule.from_checkpoint(tmp_path / "late.ckpt", Noisy)


def test_a_modified_model_is_refused(run: Run) -> None:
    model = Noisy.load_from_checkpoint(run.checkpoint, weights_only=True)
    InfluenceModule.attach(model, run.file)
    with torch.no_grad():
        model.layers[0].bias[0] += 1e-6
    with pytest.raises(WeightsMismatchError, match=r"expected SHA-256.*found"):
        InfluenceModule.attach(model, run.file)


def test_the_trained_model_itself_can_be_attached(run: Run) -> None:
    assert InfluenceModule.attach(run.model, str(run.file)).store.num_examples == EXAMPLES


# --- broken files ---------------------------------------------------------------------------------


def unfinished(file: Path) -> None:
    with h5py.File(file, "r+") as opened:
        opened.attrs.modify("complete", False)


def of_the_future(file: Path) -> None:
    with h5py.File(file, "r+") as opened:
        opened.attrs["schema_version"] = 999


def truncated(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def no_hdf5(file: Path) -> None:
    file.write_text("the gradients")


def not_ours(file: Path) -> None:
    with h5py.File(file, "w") as opened:
        opened["gradients"] = [1.0]


def wrong_document(file: Path) -> None:
    with h5py.File(file, "r+") as opened:
        opened["documents/layers"][:4] = 0


BROKEN = [
    (unfinished, IncompleteStoreError, "was never finished"),
    (of_the_future, SchemaVersionError, "schema version 999"),
    (truncated, CorruptStoreError, "truncated or damaged|inside the file's"),
    (no_hdf5, NotAStoreError, "is not HDF5"),
    (not_ours, NotAStoreError, "its attribute `format` must be"),
    (wrong_document, CorruptStoreError, "checksum"),
]


@pytest.mark.parametrize(("breaking", "error", "match"), BROKEN)
def test_a_broken_file_gives_its_own_error(moved: Run, breaking: Any, error: type, match: str) -> None:
    breaking(moved.file)
    with pytest.raises(error, match=match):
        InfluenceModule.from_checkpoint(moved.checkpoint, Noisy)
    with pytest.raises(error, match=match):
        InfluenceModule.from_checkpoint(moved.checkpoint, Noisy, store=moved.file)
    with pytest.raises(error, match=match):
        InfluenceModule.attach(moved.model, moved.file)


def test_a_file_that_is_not_there_is_its_own_error(run: Run, tmp_path: Path) -> None:
    with pytest.raises(StoreNotFoundError, match="there is no file"):
        InfluenceModule.attach(run.model, tmp_path / "nowhere.h5")


def test_a_partial_file_that_hdf5_cannot_open_is_incomplete(moved: Run) -> None:
    partial = moved.file.rename(moved.file.with_name("influence.h5.0123.partial"))
    truncated(partial)
    with pytest.raises(IncompleteStoreError, match="was never finished"):
        InfluenceModule.attach(moved.model, partial)


def test_a_file_without_the_weights_hash_is_refused(moved: Run) -> None:
    with h5py.File(moved.file, "r+") as opened:
        del opened.attrs["weights_hash_end"]
    with pytest.raises(StoreError, match="has no attribute 'weights_hash_end'"):
        InfluenceModule.attach(moved.model, moved.file)


def test_a_model_without_the_layer_is_refused(run: Run) -> None:
    other = Noisy.load_from_checkpoint(run.checkpoint, weights_only=True)
    other.net = other.layers
    del other.layers
    with pytest.raises(WeightsMismatchError, match="which Noisy does not have"):
        InfluenceModule(other, StoreReader(run.file))


def test_a_model_whose_layer_is_of_another_type_is_refused(run: Run) -> None:
    other = Noisy.load_from_checkpoint(run.checkpoint, weights_only=True)
    other.layers[0] = nn.Bilinear(2, 2, 2)
    with pytest.raises(WeightsMismatchError, match="register an adapter"):
        InfluenceModule(other, StoreReader(run.file))


# --- answers --------------------------------------------------------------------------------------


def test_scores_have_a_number_for_each_query_and_example_with_a_row(
    influence: InfluenceModule, batch: list[Tensor]
) -> None:
    scores = influence.scores(batch)
    assert scores.shape == (3, EXAMPLES)
    assert scores[:, :SEEN].isfinite().all()


def test_examples_without_a_row_score_nan(influence: InfluenceModule, batch: list[Tensor]) -> None:
    assert influence.scores(batch)[:, SEEN:].isnan().all()
    assert influence.self_influence()[SEEN:].isnan().all()


def test_top_k_are_the_largest_scores_in_order(influence: InfluenceModule, batch: list[Tensor]) -> None:
    scores = influence.scores(batch)[:, :SEEN]
    top = influence.top_k(batch, 5)
    assert torch.equal(top.scores, scores.topk(5).values)
    assert torch.equal(scores.gather(1, top.indices), top.scores)  # equal scores may come in any order


def test_top_k_of_the_smallest_are_the_opponents(influence: InfluenceModule, batch: list[Tensor]) -> None:
    scores = influence.scores(batch)[:, :SEEN]
    top = influence.top_k(batch, 5, largest=False)
    assert torch.equal(top.scores, scores.topk(5, largest=False).values)
    assert torch.equal(scores.gather(1, top.indices), top.scores)  # equal scores may come in any order


def test_top_k_never_names_an_example_without_a_row(influence: InfluenceModule, batch: list[Tensor]) -> None:
    for largest in (True, False):
        assert influence.top_k(batch, SEEN, largest=largest).indices.max() < SEEN


class OneLayer(Classifier):
    """All its answers are alike."""

    def __init__(self) -> None:
        super().__init__(learning_rate=0.0)
        self.layers = nn.Linear(2, 2)
        nn.init.zeros_(self.layers.weight)
        nn.init.zeros_(self.layers.bias)


def test_a_copy_of_a_training_example_is_its_own_top_proponent_among_equals(tmp_path: Path) -> None:
    # Inputs on a circle: no direction is special, so all examples have the same self-influence.
    angles = torch.arange(12) * torch.pi / 6
    examples = TensorDataset(torch.stack([angles.cos(), angles.sin()], 1), (angles < 3).long())
    model = OneLayer()
    callback = InfluenceCallback(tmp_path / "influence.h5", codec="pairs-float32")
    fit(tmp_path, model, DataLoader(examples, 4), callback)
    influence = InfluenceModule.attach(model, tmp_path / "influence.h5")
    top = influence.top_k(list(examples.tensors), 1)
    assert top.indices.flatten().tolist() == list(range(12))
    assert (top.scores > 0).all()


@pytest.fixture
def unchanged(tmp_path: Path) -> InfluenceModule:
    """Captured at learning rate zero, so that rows and queries are at equal weights."""
    model = Classifier(learning_rate=0.0)
    fit(tmp_path, model, data(), InfluenceCallback(tmp_path / "influence.h5", codec="pairs-float32"))
    return InfluenceModule.attach(model, tmp_path / "influence.h5")


def test_only_an_example_of_larger_self_influence_is_above_the_copy_of_the_query(
    unchanged: InfluenceModule,
) -> None:
    # Cauchy-Schwarz: score[q, m]^2 is at most self[q] self[m].
    queries = [column[:SEEN] for column in dataset(EXAMPLES).tensors]
    top = unchanged.top_k(queries, 1).indices.flatten()
    own = unchanged.self_influence()
    first = top == torch.arange(SEEN)
    assert ((own[top] > own[:SEEN]) | first).all()
    assert first[own[:SEEN].argmax()]


def test_a_copy_of_a_training_example_scores_its_self_influence(unchanged: InfluenceModule) -> None:
    queries = [column[:SEEN] for column in dataset(EXAMPLES).tensors]
    own = unchanged.scores(queries)[:, :SEEN].diagonal()
    # float32, and another batch size rounds the forward otherwise
    torch.testing.assert_close(own, unchanged.self_influence()[:SEEN], rtol=1e-4, atol=1e-6)


def test_self_influence_is_positive(influence: InfluenceModule) -> None:
    assert (influence.self_influence()[:SEEN] > 0).all()


def test_the_effect_of_a_removal_is_minus_the_mean_score(influence: InfluenceModule, batch: list[Tensor]) -> None:
    expected = -influence.scores(batch)[:, [3, 5]].sum(1) / SEEN
    torch.testing.assert_close(influence.removal_effect(batch, [3, 5]), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("indices", "match"),
    [
        ([1, 1], "names an example twice"),
        ([EXAMPLES], rf"must lie in 0\.\.{EXAMPLES - 1}"),
        ([-1], rf"must lie in 0\.\.{EXAMPLES - 1}"),
        ([SEEN], "1 of `indices` have no valid row"),
    ],
)
def test_a_removal_that_cannot_be_predicted_is_refused(
    influence: InfluenceModule, batch: list[Tensor], indices: list[int], match: str
) -> None:
    with pytest.raises(QueryError, match=match):
        influence.removal_effect(batch, indices)


def test_the_coverage_names_every_layer(influence: InfluenceModule) -> None:
    assert influence.coverage.share == 1
    assert [layer.name for layer in influence.coverage.layers] == ["layers.0", "layers.2"]


def test_the_summary_says_what_the_file_holds(influence: InfluenceModule) -> None:
    summary = influence.summary()
    for fact in [
        "22 examples, 20 ",
        "2 missing, 0 invalid",
        "epoch 2, optimizer steps 10 to 15",
        "staleness: Spearman",
        "layers.0 (pairs), layers.2 (pairs)",
        "100.0% of the trainable parameters",
    ]:
        assert fact in summary


class Vanishing(torch.utils.data.Dataset):
    """Examples that can be deleted, and then raise."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        self.paths = [folder / str(row) for row in range(8)]
        for path, example in zip(self.paths, dataset(8), strict=True):
            torch.save(list(example), path)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> list[Tensor]:
        return torch.load(self.paths[index])


def test_queries_need_no_training_data(tmp_path: Path, batch: list[Tensor]) -> None:
    examples = Vanishing(tmp_path / "data")
    model = Classifier()
    fit(tmp_path, model, DataLoader(examples, 4), InfluenceCallback(tmp_path / "influence.h5"))
    shutil.rmtree(tmp_path / "data")
    influence = InfluenceModule.attach(model, tmp_path / "influence.h5")
    assert influence.scores(batch).isfinite().all()
    assert influence.self_influence().isfinite().all()


# --- measurements ---------------------------------------------------------------------------------


def test_the_log_likelihood_is_the_default_measurement(influence: InfluenceModule, batch: list[Tensor]) -> None:
    def log_likelihood(model: nn.Module, batch: Any) -> Tensor:
        x, y = batch
        return -F.cross_entropy(model(x), y, reduction="none")

    scores = influence.scores(batch, measurement=log_likelihood)
    torch.testing.assert_close(scores, influence.scores(batch), rtol=1e-4, atol=1e-6, equal_nan=True)


def test_scores_are_linear_in_the_measurement(influence: InfluenceModule, batch: list[Tensor]) -> None:
    scores = influence.scores(batch, measurement=margin)
    opposite = influence.scores(batch, measurement=lambda model, batch: -2 * margin(model, batch))
    torch.testing.assert_close(opposite, -2 * scores, rtol=1e-5, atol=1e-7, equal_nan=True)


@pytest.mark.parametrize(
    ("measurement", "match"),
    [
        (lambda model, batch: margin(model, batch).mean(), r"one value a query, got shape \(\)"),
        (lambda model, batch: model(batch[0]), r"got shape \(3, 2\)"),
        (lambda model, batch: margin(model, batch).tolist(), "got list"),
        (lambda model, batch: margin(model, batch).detach(), r"differentiable.*got shape \(3,\)"),
    ],
)
def test_a_measurement_of_another_shape_is_refused(
    influence: InfluenceModule, batch: list[Tensor], measurement: Any, match: str
) -> None:
    with pytest.raises(QueryError, match=match):
        influence.scores(batch, measurement=measurement)


def test_a_measurement_with_another_number_of_values_is_refused(
    influence: InfluenceModule, batch: list[Tensor]
) -> None:
    with pytest.raises(RowIndexError, match="saw 3 rows in a batch of 2"):
        influence.scores(batch, measurement=lambda model, batch: margin(model, batch)[:2])


@pytest.fixture
def manual(tmp_path: Path) -> InfluenceModule:
    model = Manual()
    fit(tmp_path, model, data(), InfluenceCallback(tmp_path / "influence.h5"))
    return InfluenceModule.attach(model, tmp_path / "influence.h5")


def test_a_module_that_optimizes_manually_needs_a_measurement(
    manual: InfluenceModule, batch: list[Tensor]
) -> None:
    with pytest.raises(QueryError, match=r"optimizes manually.*pass `measurement=`"):
        manual.scores(batch)
    assert manual.scores(batch, measurement=margin)[:, :SEEN].isfinite().all()


class Plain(nn.Module):
    """The classifier's layers under the same names, and no `training_step`."""

    def __init__(self, model: Classifier) -> None:
        super().__init__()
        self.layers = model.layers

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


def test_a_plain_module_needs_a_measurement(run: Run, batch: list[Tensor]) -> None:
    influence = InfluenceModule.attach(Plain(run.model), run.file)
    with pytest.raises(QueryError, match=r"it is a plain module.*pass `measurement=`"):
        influence.scores(batch)
    joined = InfluenceModule.attach(run.model, run.file)
    expected = joined.scores(batch, measurement=margin)
    torch.testing.assert_close(
        influence.scores(batch, measurement=margin), expected, rtol=0, atol=0, equal_nan=True
    )


class WithoutLoss(Noisy):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return None


def test_a_training_step_without_loss_is_refused(run: Run, batch: list[Tensor]) -> None:
    influence = InfluenceModule.from_checkpoint(run.checkpoint, WithoutLoss)
    with pytest.raises(QueryError, match="returned no differentiable loss, got NoneType"):
        influence.scores(batch)


# --- the model is left as it was ------------------------------------------------------------------


def test_a_query_leaves_weights_modes_and_gradients_as_they_were(run: Run, batch: list[Tensor]) -> None:
    model = Noisy.load_from_checkpoint(run.checkpoint, weights_only=True)
    model.train()
    model.dropout.eval()
    model.layers[0].bias.requires_grad_(False)
    model.layers[2].weight.grad = torch.ones_like(model.layers[2].weight)
    influence = InfluenceModule.attach(model, run.file)

    def state() -> list[Any]:
        return [
            [p.detach().clone().tolist() for p in model.parameters()],
            [None if p.grad is None else p.grad.tolist() for p in model.parameters()],
            [p.requires_grad for p in model.parameters()],
            [module.training for module in model.modules()],
            [sorted(vars(module)) for module in model.modules()],
            [len(module._forward_hooks) for module in model.modules()],
            torch.overrides._get_current_function_mode_stack(),
            torch.get_rng_state().tolist(),
        ]

    before = state()
    influence.scores(batch)
    influence.scores(batch, measurement=margin)
    assert state() == before


def test_a_query_that_fails_leaves_the_model_as_it_was(run: Run, batch: list[Tensor]) -> None:
    model = Noisy.load_from_checkpoint(run.checkpoint, weights_only=True).train()
    influence = InfluenceModule.attach(model, run.file)

    def failing(model: nn.Module, batch: Any) -> Tensor:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        influence.scores(batch, measurement=failing)
    assert model.training
    assert "log" not in vars(model)
    assert not any(module._forward_hooks for module in model.modules())
    assert torch.overrides._get_current_function_mode_stack() == []


def test_a_frozen_model_answers_the_same(run: Run, influence: InfluenceModule, batch: list[Tensor]) -> None:
    expected = influence.scores(batch)
    influence.model.freeze()
    assert torch.equal(influence.scores(batch)[:, :SEEN], expected[:, :SEEN])
    assert not any(parameter.requires_grad for parameter in influence.model.parameters())


def test_the_same_query_twice_gives_the_same_bits(influence: InfluenceModule, batch: list[Tensor]) -> None:
    first = influence.scores(batch)[:, :SEEN]
    influence.scores(batch, damping=3.0, curvature="kfac")
    influence.self_influence(damping=3.0)
    assert torch.equal(influence.scores(batch)[:, :SEEN], first)


def test_dropout_is_off_in_queries(influence: InfluenceModule, batch: list[Tensor]) -> None:
    influence.train()
    first = influence.scores(batch)[:, :SEEN]
    assert torch.equal(influence.scores(batch)[:, :SEEN], first)


def test_queries_do_not_depend_on_their_neighbours(influence: InfluenceModule, batch: list[Tensor]) -> None:
    together = influence.scores(batch)[:, :SEEN]
    alone = torch.cat([influence.scores([column[[q]] for column in batch]) for q in range(3)])[:, :SEEN]
    torch.testing.assert_close(alone, together, rtol=1e-4, atol=1e-6)  # other shapes, other rounding


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_queries_work_where_gradients_are_off(influence: InfluenceModule, mode: Any) -> None:
    expected = influence.scores([column[:3] for column in dataset(EXAMPLES).tensors])[:, :SEEN]
    with mode():
        made_inside = [column[:3].clone() for column in dataset(EXAMPLES).tensors]
        assert torch.equal(influence.scores(made_inside)[:, :SEEN], expected)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_file_first_read_where_gradients_are_off_is_of_use_outside(
    run: Run, batch: list[Tensor], mode: Any
) -> None:
    influence = InfluenceModule.from_checkpoint(run.checkpoint, Noisy)
    with mode():
        inside = influence.scores(batch), influence.self_influence(curvature="empirical_fisher")
    assert torch.equal(influence.scores(batch)[:, :SEEN], inside[0][:, :SEEN])
    outside = influence.self_influence(curvature="empirical_fisher")
    assert torch.equal(outside[:SEEN], inside[1][:SEEN])


def test_parameters_that_cannot_have_gradients_are_refused_by_name(run: Run, batch: list[Tensor]) -> None:
    with torch.inference_mode():
        influence = InfluenceModule.from_checkpoint(run.checkpoint, Noisy)
        with pytest.raises(
            QueryError, match=r"layers\.0\.weight, .* of Noisy were made in `torch\.inference_mode"
        ):
            influence.scores(batch)
        assert influence.self_influence()[:SEEN].isfinite().all()  # needs no gradient of the model


# --- who and where --------------------------------------------------------------------------------


def test_a_subset_of_the_scores(influence: InfluenceModule, batch: list[Tensor]) -> None:
    scores, own = influence.scores(batch), influence.self_influence()
    torch.testing.assert_close(influence.scores(batch, subset=[9, 4]), scores[:, [9, 4]])
    torch.testing.assert_close(influence.self_influence(subset=[9, 4]), own[[9, 4]])
    top = influence.top_k(batch, 2, subset=[9, 4])
    torch.testing.assert_close(top.scores, scores[:, [9, 4]].sort(descending=True).values)
    assert top.indices.sort().values.tolist() == [[4, 9]] * 3


def test_some_layers_of_the_scores(influence: InfluenceModule, batch: list[Tensor]) -> None:
    by_layer = influence.scores(batch, per_layer=True)
    for name, expected in by_layer.items():
        found = influence.scores(batch, layers=name)
        torch.testing.assert_close(found, expected, equal_nan=True)
    assert list(influence.scores(batch, per_layer=True, layers="*.0")) == ["layers.0"]


def test_positions_of_the_scores(influence: InfluenceModule, batch: list[Tensor]) -> None:
    found = influence.scores(batch, per_token=True)
    torch.testing.assert_close(found, influence.scores(batch)[..., None], equal_nan=True)
    by_layer = influence.scores(batch, per_token=True, per_layer=True)
    torch.testing.assert_close(sum(by_layer.values()), found, equal_nan=True)


def test_groups_of_training_examples(influence: InfluenceModule, batch: list[Tensor]) -> None:
    labels, scores = dataset(EXAMPLES).tensors[1], influence.scores(batch, measurement=margin)
    found = influence.group_scores(batch, labels, measurement=margin)
    assert found.groups == labels.unique().tolist()
    for column, label in enumerate(found.groups):
        members = (labels[:SEEN] == label).nonzero().flatten()
        torch.testing.assert_close(found.scores[:, column], scores[:, members].sum(1))
        effect = influence.removal_effect(batch, members, measurement=margin)
        torch.testing.assert_close(found.removal_effects[:, column], effect)


def test_scores_between_training_examples(influence: InfluenceModule) -> None:
    found = influence.scores_between(range(SEEN), curvature="kfac")
    own = influence.self_influence(curvature="kfac", subset=range(SEEN))
    torch.testing.assert_close(found.diagonal(), own, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(found, found.T, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(influence.scores_between([3, 1], [5], curvature="kfac"), found[[3, 1]][:, [5]])


def test_a_memory_budget_changes_no_answer(influence: InfluenceModule, batch: list[Tensor]) -> None:
    expected = influence.scores(batch), influence.top_k(batch, 4)
    influence.memory_budget = 1  # a row at a time, a query at a time
    torch.testing.assert_close(influence.scores(batch), expected[0], equal_nan=True, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(influence.top_k(batch, 4).scores, expected[1].scores, rtol=1e-4, atol=1e-6)
    influence.memory_budget = "a little"
    with pytest.raises(ValueError, match=r"`memory_budget` must be a positive number of bytes.*'a little'"):
        influence.scores(batch)


def test_unknown_options_are_refused(influence: InfluenceModule, batch: list[Tensor]) -> None:
    with pytest.raises(TypeError, match="'dampening'"):
        influence.top_k(batch, dampening=1.0)  # type: ignore[call-arg]


# --- damping, curvature, k ------------------------------------------------------------------------


def test_large_damping_gives_the_order_of_dot_products(influence: InfluenceModule, batch: list[Tensor]) -> None:
    damped = influence.scores(batch, damping=1e6)[:, :SEEN] * 1e6
    plain = influence.scores(batch, curvature="identity")[:, :SEEN]
    torch.testing.assert_close(damped, plain, rtol=1e-4, atol=1e-6)


def test_damping_takes_a_number_or_a_rule(influence: InfluenceModule, batch: list[Tensor]) -> None:
    by_number = influence.scores(batch, damping=0.25)[:, :SEEN]
    by_rule = influence.scores(batch, damping=lambda eigenvalues: 0.25)[:, :SEEN]
    assert torch.equal(by_number, by_rule)
    assert not torch.equal(by_number, influence.scores(batch)[:, :SEEN])


def test_curvatures_give_different_scores(influence: InfluenceModule, batch: list[Tensor]) -> None:
    names = ("ekfac", "kfac", "diagonal", "empirical_fisher", "identity")
    each = [influence.scores(batch, curvature=name)[:, :SEEN] for name in names]
    for one, other in itertools.combinations(each, 2):
        assert bool(one.isfinite().all())
        assert not torch.equal(one, other)


@pytest.mark.parametrize("damping", [0.0, -0.1, float("nan"), float("inf")])
def test_damping_that_is_not_positive_is_refused(
    influence: InfluenceModule, batch: list[Tensor], damping: float
) -> None:
    with pytest.raises(ValueError, match=f"`damping` must be positive and finite, got {damping}"):
        influence.scores(batch, damping=damping)


def test_damping_of_another_type_is_refused(influence: InfluenceModule, batch: list[Tensor]) -> None:
    with pytest.raises(TypeError, match="must be a positive number, a rule"):
        influence.scores(batch, damping="0.1")


def test_an_unknown_curvature_is_refused(influence: InfluenceModule, batch: list[Tensor]) -> None:
    with pytest.raises(ValueError, match=r"ekfac.*got 'hessian'"):
        influence.scores(batch, curvature="hessian")


@pytest.mark.parametrize("k", [0, -1, SEEN + 1, 2.0, True])
def test_a_k_that_the_file_cannot_give_is_refused(influence: InfluenceModule, batch: list[Tensor], k: Any) -> None:
    with pytest.raises(ValueError, match=f"`k` must be an integer from 1 to {SEEN}.*got {k}"):
        influence.top_k(batch, k)


# --- trainer.predict ------------------------------------------------------------------------------


def predict(folder: Path, influence: InfluenceModule, **options: Any) -> list[Attribution]:
    queries = DataLoader(dataset(EXAMPLES), batch_size=8)
    found = make_trainer(folder, **options).predict(influence, queries)
    assert found is not None
    return found


@pytest.mark.parametrize("inference_mode", [True, False])
def test_predict_returns_the_attributions_of_top_k(
    influence: InfluenceModule, tmp_path: Path, inference_mode: bool
) -> None:
    influence.query_options = {"k": 4}
    found = predict(tmp_path, influence, inference_mode=inference_mode)
    assert [len(each.indices) for each in found] == [8, 8, 6]
    for each, start in zip(found, (0, 8, 16), strict=True):
        batch = [column[start : start + 8] for column in dataset(EXAMPLES).tensors]
        assert isinstance(each, Attribution)
        assert all(torch.equal(*pair) for pair in zip(each, influence.top_k(batch, 4), strict=True))


def test_predict_takes_all_arguments_of_top_k_from_the_options(influence: InfluenceModule, tmp_path: Path) -> None:
    options = {"k": 2, "largest": False, "damping": 1.0, "curvature": "kfac", "measurement": margin}
    influence.query_options = dict(options)
    found = predict(tmp_path, influence)
    expected = influence.top_k([column[:8] for column in dataset(EXAMPLES).tensors], **options)
    assert torch.equal(found[0].indices, expected.indices)
    assert torch.equal(found[0].scores, expected.scores)
    assert influence.query_options == options


def test_predict_takes_a_subset_and_layers(influence: InfluenceModule, tmp_path: Path) -> None:
    influence.query_options = {"k": 2, "subset": [2, 5, 11], "layers": ["layers.0"]}
    found = predict(tmp_path, influence)[0]
    first = [column[:8] for column in dataset(EXAMPLES).tensors]
    assert torch.equal(found.indices, influence.top_k(first, 2, subset=[2, 5, 11], layers="layers.0").indices)
    influence.query_options["k"] = 4
    with pytest.raises(ValueError, match="from 1 to 3, the number of valid rows, got 4"):
        predict(tmp_path, influence)


def test_predict_in_mixed_precision_is_close(influence: InfluenceModule, tmp_path: Path) -> None:
    expected = predict(tmp_path, influence)[0].scores
    found = predict(tmp_path, influence, precision="bf16-mixed")[0].scores
    torch.testing.assert_close(found, expected, rtol=0.1, atol=0.1 * float(expected.abs().max()))


def test_predict_leaves_the_weights_as_they_were(influence: InfluenceModule, tmp_path: Path) -> None:
    before = [parameter.detach().clone() for parameter in influence.model.parameters()]
    predict(tmp_path, influence)
    assert all(map(torch.equal, before, influence.model.parameters()))


class Preparing(Noisy):
    """Takes batches of another form, as its transfer hooks leave them."""

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return batch["x"], batch["y"]

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        x, y = batch
        return x / 10, y


@pytest.mark.parametrize("by_predict", [True, False])
def test_the_models_own_transfer_hooks_prepare_the_queries(
    run: Run, influence: InfluenceModule, tmp_path: Path, by_predict: bool
) -> None:
    preparing = InfluenceModule.from_checkpoint(run.checkpoint, Preparing)
    x, y = (column[:8] for column in dataset(EXAMPLES).tensors)
    rows = [{"x": 10 * each, "y": label} for each, label in zip(x, y, strict=True)]
    batches = DataLoader(rows, batch_size=8)
    if by_predict:
        (found,) = make_trainer(tmp_path).predict(preparing, batches)
    else:
        found = preparing.top_k(next(iter(batches)))
    torch.testing.assert_close(found.scores, influence.top_k([x, y]).scores, rtol=1e-4, atol=1e-6)


def test_a_module_can_be_sent_to_another_process(influence: InfluenceModule, batch: list[Tensor]) -> None:
    copy = pickle.loads(pickle.dumps(influence))
    assert torch.equal(copy.scores(batch)[:, :SEEN], influence.scores(batch)[:, :SEEN])


def test_a_module_of_double_precision_answers_nearly_the_same(
    influence: InfluenceModule, batch: list[Tensor]
) -> None:
    expected = influence.scores(batch)[:, :SEEN]
    influence.double()
    found = influence.scores([batch[0].double(), batch[1]])[:, :SEEN]
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)


def test_a_module_of_half_precision_answers_about_the_same(
    influence: InfluenceModule, batch: list[Tensor]
) -> None:
    expected = influence.scores(batch)[:, :SEEN]
    influence.bfloat16()
    found = influence.scores([batch[0].bfloat16(), batch[1]])[:, :SEEN]
    assert found.dtype == torch.float32
    torch.testing.assert_close(
        found, expected, rtol=0, atol=0.05 * float(expected.abs().max())
    )  # 8 bits of mantissa


def test_predict_refuses_options_that_top_k_does_not_have(influence: InfluenceModule, tmp_path: Path) -> None:
    influence.query_options = {"k": 2, "dampening": 1.0}
    with pytest.raises(ValueError, match=r"arguments of `top_k`, which are curvature, .* got 'dampening'"):
        predict(tmp_path, influence)
