"""An ensemble answers with the mean of its models' scores, of the same examples only."""

import shutil
import zlib
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from lightning_influence import InfluenceCallback, InfluenceModule
from lightning_influence.errors import QueryError
from tests.integration.lifecycle_models import Classifier, dataset, fit, make_trainer

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*rows aged within the epoch"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
]
EXAMPLES, MODELS = 22, 3  # each model drops other two of them


class Seeded(Classifier):
    def __init__(self, seed: int = 0, width: int = 5) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.layers = torch.nn.Sequential(torch.nn.Linear(3, width), torch.nn.Tanh(), torch.nn.Linear(width, 2))


def train(folder: Path, model: LightningModule, data: Any = None, seed: int = 0) -> InfluenceModule:
    order = torch.Generator().manual_seed(seed)
    data = DataLoader(data or dataset(EXAMPLES), 4, shuffle=True, drop_last=True, generator=order)
    fit(folder, model, data, InfluenceCallback(folder / "influence.h5", codec="pairs-float32"))
    return InfluenceModule.attach(model, folder / "influence.h5")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[InfluenceModule]:
    make = tmp_path_factory.mktemp
    return [train(make("run"), Seeded(seed, width=5 + seed), seed=seed) for seed in range(MODELS)]


@pytest.fixture
def batch() -> list[Tensor]:
    return [column[[0, 7, 13]] for column in dataset(EXAMPLES).tensors]


def stacked(models: list[InfluenceModule], batch: Any, **options: Any) -> np.ndarray:
    return np.stack([model.scores(batch, **options).numpy() for model in models])


def test_scores_are_the_mean_over_the_models_that_have_the_example(models, batch):
    each = stacked(models, batch)
    assert np.isnan(each).any()
    found = InfluenceModule.ensemble(models).scores(batch)
    np.testing.assert_allclose(found, np.nanmean(each, 0), rtol=1e-5)


def test_an_example_that_no_model_has_is_nan(models, batch):
    found = InfluenceModule.ensemble(models[:1]).scores(batch)
    assert torch.equal(found.isnan(), models[0].scores(batch).isnan())
    torch.testing.assert_close(found, models[0].scores(batch), equal_nan=True)


def test_standardized_scores_weigh_models_by_their_spread(models, batch):
    each = stacked(models, batch).astype(np.float64)
    weights = 1 / np.nanstd(each, axis=2, keepdims=True)
    expected = np.nansum(weights * each, 0) / (weights * ~np.isnan(each)).sum(0)
    found = InfluenceModule.ensemble(models, average="standardized").scores(batch)
    np.testing.assert_allclose(found, expected, rtol=1e-4)
    assert not np.allclose(found, np.nanmean(each, 0), rtol=1e-2)


def test_standardized_scores_do_not_depend_on_a_models_scale(models, batch):
    """A damping of a million has the order of dot products, and scores a million times smaller."""
    ensemble = InfluenceModule.ensemble(models[:2], average="standardized")
    one, other = (stacked(models[:2], batch, damping=damping) for damping in (1e6, 1e9))
    np.testing.assert_allclose(one, 1e3 * other, rtol=1e-2)
    found = [ensemble.scores(batch, damping=damping).numpy() for damping in (1e6, 1e9)]
    np.testing.assert_allclose(found[0], 1e3 * found[1], rtol=1e-2)


@pytest.mark.parametrize("size", [1e-30, 1e25])
def test_standardized_scores_weigh_models_of_whatever_size_their_scores_are(models, batch, size):
    ensemble = InfluenceModule.ensemble(models, average="standardized")

    def measurement(model, batch):
        return size * model(batch[0])[:, 0]

    each = stacked(models, batch, measurement=measurement).astype(np.float64)
    weights = 1 / np.nanstd(each, axis=2, keepdims=True)
    expected = np.nansum(weights * each, 0) / (weights * ~np.isnan(each)).sum(0)
    found = ensemble.scores(batch, measurement=measurement)
    assert found.dtype == torch.float32
    np.testing.assert_allclose(found / size, expected / size, rtol=1e-3, atol=1e-4)


def test_models_that_tell_no_examples_apart_are_no_division_by_zero(models, batch):
    ensemble = InfluenceModule.ensemble(models, average="standardized")
    found = ensemble.scores(batch, measurement=lambda model, batch: 0 * model(batch[0]).sum(1))
    assert (found.nan_to_num() == 0).all()


@pytest.mark.parametrize("average", ["mean", "standardized"])
@pytest.mark.parametrize("largest", [True, False])
def test_the_best_are_those_of_the_mean_scores(models, batch, average, largest):
    ensemble = InfluenceModule.ensemble(models, average=average)
    scores = ensemble.scores(batch).numpy()
    found = ensemble.top_k(batch, 4, largest=largest)
    order = np.argsort(-scores if largest else scores, axis=1)[:, :4]  # NaN is last
    assert found.indices.tolist() == order.tolist()
    np.testing.assert_array_equal(found.scores, np.take_along_axis(scores, order, 1))


def test_self_influence_is_the_mean(models):
    each = np.stack([model.self_influence(damping=0.1) for model in models])
    found = InfluenceModule.ensemble(models).self_influence(damping=0.1)
    np.testing.assert_allclose(found, np.nanmean(each, 0), rtol=1e-5)


def held_by_all(models: list[InfluenceModule], batch: Any) -> list[int]:
    return np.flatnonzero(~np.isnan(stacked(models, batch)).any((0, 1))).tolist()


@pytest.mark.parametrize("average", ["mean", "standardized"])
def test_removal_effects_are_the_mean_with_the_weights_of_scores(models, batch, average):
    removed = held_by_all(models, batch)[:3]
    each = np.stack([model.removal_effect(batch, removed) for model in models])
    spreads = np.nanstd(stacked(models, batch), axis=2)
    weights = np.ones_like(spreads) if average == "mean" else 1 / spreads
    found = InfluenceModule.ensemble(models, average=average).removal_effect(batch, removed)
    np.testing.assert_allclose(found, (weights * each).sum(0) / weights.sum(0), rtol=1e-4)


def test_a_removal_that_one_model_cannot_predict_is_refused(models, batch):
    missing = sorted(set(range(EXAMPLES)) - set(held_by_all(models, batch)))[0]
    with pytest.raises(QueryError, match="have no valid row"):
        InfluenceModule.ensemble(models).removal_effect(batch, [missing])


def test_layers_add_up_to_the_scores(models, batch):
    ensemble = InfluenceModule.ensemble(models)
    layers = ensemble.scores(batch, per_layer=True)
    assert list(layers) == ["layers.0", "layers.2"]
    torch.testing.assert_close(sum(layers.values()), ensemble.scores(batch), equal_nan=True)


def test_options_reach_every_model(models, batch):
    options = {"curvature": "identity", "damping": 0.5, "measurement": lambda model, batch: model(batch[0])[:, 0]}
    found = InfluenceModule.ensemble(models).scores(batch, **options)
    np.testing.assert_allclose(found, np.nanmean(stacked(models, batch, **options), 0), rtol=1e-5)


@pytest.mark.parametrize("precision", ["32-true", "64-true"])
def test_predict_answers_as_top_k(models, tmp_path, precision):
    ensemble = InfluenceModule.ensemble(models)
    expected = ensemble.top_k(dataset(EXAMPLES)[:], 3, damping=0.1)
    ensemble.query_options = {"k": 3, "damping": 0.1}
    queries = DataLoader(dataset(EXAMPLES), batch_size=8)
    found = make_trainer(tmp_path, precision=precision).predict(ensemble, queries)
    ensemble.float()
    assert torch.cat([each.indices for each in found]).tolist() == expected.indices.tolist()
    torch.testing.assert_close(torch.cat([each.scores for each in found]).float(), expected.scores)


def test_predict_refuses_options_that_top_k_does_not_have(models, batch):
    ensemble = InfluenceModule.ensemble(models)
    ensemble.query_options = {"dampening": 1.0}
    with pytest.raises(ValueError, match=r"arguments of `top_k`, .* got 'dampening'"):
        ensemble.predict_step(batch)


def test_a_table_has_the_labels(models, batch):
    ensemble = InfluenceModule.ensemble(models)
    found = ensemble.top_k(batch, 4)
    labels = dataset(EXAMPLES).tensors[1].numpy()
    table = ensemble.to_columns([found, found])
    assert list(table) == ["query", "rank", "index", "score", "label"]
    assert table["query"].tolist() == np.repeat(range(6), 4).tolist()
    assert table["index"].tolist() == 2 * found.indices.flatten().tolist()
    assert table["label"].tolist() == labels[table["index"]].tolist()
    assert ensemble.to_columns()["label"].tolist() == labels.tolist()  # each example was seen by some model


@pytest.mark.parametrize("average", ["mean", "standardized"])
@pytest.mark.parametrize("is_mapping", [False, True])
def test_groups_are_sums_of_the_mean_scores(models, batch, average, is_mapping):
    ensemble = InfluenceModule.ensemble(models, average=average)
    scores = ensemble.scores(batch).numpy()
    members = {"odd": [n for n in range(EXAMPLES) if n % 2], "some": [3, 1, 20], "none": []}
    groups: Any = members
    if not is_mapping:
        groups = np.arange(EXAMPLES) % 3
        members = {number: np.flatnonzero(groups == number).tolist() for number in range(3)}
    found = ensemble.group_scores(batch, groups)
    assert found.groups == list(members)
    assert found.counts.tolist() == [len(own) for own in members.values()]
    for number, own in enumerate(members.values()):
        expected = scores[:, own].sum(1) if own else np.full(len(scores), np.nan)
        np.testing.assert_allclose(found.scores[:, number], expected, rtol=1e-4, atol=1e-5)


def test_effects_of_groups_that_all_models_know_are_those_of_their_removal(models, batch):
    ensemble, known = InfluenceModule.ensemble(models), held_by_all(models, batch)
    found = ensemble.group_scores(batch, {"one": known[:3], "other": known[3:5]})
    for number, own in enumerate((known[:3], known[3:5])):
        torch.testing.assert_close(found.removal_effects[:, number], ensemble.removal_effect(batch, own))


def test_groups_that_do_not_fit_are_refused(models, batch):
    with pytest.raises(QueryError, match="one label for each of the 22 examples"):
        InfluenceModule.ensemble(models).group_scores(batch, [0, 1])


def test_scores_between_examples_are_the_mean(models):
    each = np.stack([model.scores_between([1, 5, 9], [2, 3]) for model in models])
    found = InfluenceModule.ensemble(models).scores_between([1, 5, 9], [2, 3])
    np.testing.assert_allclose(found, np.nanmean(each, 0), rtol=1e-5)


@pytest.mark.parametrize("average", ["mean", "standardized"])
def test_a_subset_has_the_scores_of_all(models, batch, average):
    ensemble, subset = InfluenceModule.ensemble(models, average=average), [9, 2, 17, 4]
    expected = ensemble.scores(batch)[:, subset]
    torch.testing.assert_close(ensemble.scores(batch, subset=subset), expected, equal_nan=True)
    found = ensemble.top_k(batch, 3, subset=subset)
    order = expected.sort(1, descending=True)
    assert found.indices.tolist() == torch.tensor(subset)[order.indices[:, :3]].tolist()
    torch.testing.assert_close(found.scores, order.values[:, :3])
    with pytest.raises(ValueError, match=r"`k` must be an integer from 1 to 4"):
        ensemble.top_k(batch, 5, subset=subset)


def test_layers_can_be_chosen(models, batch):
    ensemble = InfluenceModule.ensemble(models)
    expected = ensemble.scores(batch, per_layer=True)["layers.2"]
    torch.testing.assert_close(ensemble.scores(batch, layers="layers.2"), expected, equal_nan=True)


@pytest.mark.parametrize("average", ["mean", "standardized"])
def test_positions_add_up(models, batch, average):
    ensemble = InfluenceModule.ensemble(models, average=average)
    found = ensemble.scores(batch, per_token=True)
    assert found.shape == (3, EXAMPLES, 1)
    torch.testing.assert_close(found[..., 0], ensemble.scores(batch), equal_nan=True)


# --- what is refused ------------------------------------------------------------------------------


def test_no_models_are_refused():
    with pytest.raises(ValueError, match="`models` must hold at least one InfluenceModule"):
        InfluenceModule.ensemble([])


def test_an_unknown_average_is_refused(models):
    with pytest.raises(ValueError, match=r"`average` must be one of \('mean', 'standardized'\), got 'median'"):
        InfluenceModule.ensemble(models, average="median")


def test_a_run_that_is_given_twice_is_refused(models):
    with pytest.raises(QueryError, match="in the ensemble twice"):
        InfluenceModule.ensemble([*models, models[0]])


def test_datasets_of_other_lengths_are_refused(models, tmp_path):
    other = train(tmp_path, Seeded(), dataset(EXAMPLES + 4))
    with pytest.raises(QueryError, match=r"influence.h5 has 22 examples and .* has 26"):
        InfluenceModule.ensemble([models[0], other])


def test_datasets_in_another_order_are_refused(models, tmp_path):
    x, y = dataset(EXAMPLES)[:]
    other = train(tmp_path, Seeded(), TensorDataset(x.flip(0), y.flip(0)))
    with pytest.raises(QueryError, match=r"labels of .* differ .* as that of example \d+: [01], not [01]"):
        InfluenceModule.ensemble([models[0], other])


def test_labels_that_nobody_knows_are_no_difference(models, batch, tmp_path):
    path = shutil.copy(models[1].store.path, tmp_path)

    with h5py.File(path, "r+") as file:
        file["rows/label"][:] = -1
        file["rows/label"].attrs["crc32"] = zlib.crc32(file["rows/label"][:].tobytes())
    other = InfluenceModule.attach(models[1].model, path)
    found = InfluenceModule.ensemble([models[0], other]).scores(batch)
    torch.testing.assert_close(found, InfluenceModule.ensemble(models[:2]).scores(batch), equal_nan=True)


@pytest.mark.parametrize("k", [0, 23, 2.0, True])
def test_a_k_that_there_is_not_is_refused(models, batch, k):
    with pytest.raises(ValueError, match=r"`k` must be an integer from 1 to 22"):
        InfluenceModule.ensemble(models).top_k(batch, k)


def test_queries_that_are_not_numbers_are_refused(models, batch):
    with pytest.raises(QueryError, match="is there a NaN in them"):
        InfluenceModule.ensemble(models).top_k([batch[0] * torch.nan, batch[1]])


@pytest.mark.parametrize("average", ["mean", "standardized"])
def test_a_query_that_one_model_makes_no_number_of_is_not_hidden(models, batch, average):
    def measurement(model, batch):
        values = model(batch[0])[:, 0]
        return values * torch.tensor([torch.nan, 1.0, 1.0]) if model is models[1].model else values

    ensemble = InfluenceModule.ensemble(models, average=average)
    found = ensemble.scores(batch, measurement=measurement)
    assert torch.equal(found[0].isnan(), ~models[1].scores(batch).isnan()[0])  # the others are those of two models
    assert found[1:].isfinite().all()
    removed = held_by_all(models, batch)[:2]
    effect = ensemble.removal_effect(batch, removed, measurement=measurement)
    assert effect.isnan().tolist() == [True, False, False]
    groups = ensemble.group_scores(batch, {"some": removed, "none": []}, measurement=measurement)
    for sums in (groups.scores, groups.removal_effects):
        assert sums.isnan().tolist() == [[True, True], [False, True], [False, True]]


def test_layers_of_different_networks_cannot_be_told_apart(models, batch, tmp_path):
    class Deeper(Classifier):
        def __init__(self) -> None:
            super().__init__()
            self.layers.append(torch.nn.Linear(2, 2))

    other = train(tmp_path, Deeper())
    with pytest.raises(QueryError, match="`per_layer` needs models with the same layers"):
        InfluenceModule.ensemble([models[0], other]).scores(batch, per_layer=True)
