"""Questions to several captured epochs of a file: the weighted sum of what each of them answers alone."""

from __future__ import annotations

import re
import shutil
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from lightning.pytorch import Trainer
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_influence import InfluenceCallback, InfluenceModule
from lightning_influence.errors import QueryError
from lightning_influence.query import InfluenceQuery
from lightning_influence.segments import mean_learning_rate, weighted_segments
from lightning_influence.store import StoreReader
from tests.integration.lifecycle_models import BATCH, Classifier, N, fit, loader
from tests.plain_loop import decoded_rows

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*rows aged within the epoch"),
    pytest.mark.filterwarnings("ignore:.*the stored rows are coarse"),
]
RATES = {0: 0.4, 1: 0.2, 2: 0.1}  # of the three epochs
DAMPING = 0.01
OWN = {0: 0.3, 2: 2.5}
WEIGHTS: dict[str, tuple[Any, dict[int, float]]] = {
    "none": (None, {2: 1.0}),
    "last": ("last", {2: 1.0}),
    "mean": ("mean", dict.fromkeys(RATES, 1 / 3)),
    "learning-rate": ("learning_rate", {number: rate / 0.7 for number, rate in RATES.items()}),
    "own": (OWN, OWN),
}


class Decaying(Classifier):
    """Its learning rate halves with each epoch."""

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=RATES[0])
        return [optimizer], [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)]


def train(folder: Path, model: Classifier, data: DataLoader) -> Path:
    path = folder / "influence.h5"
    options = {"epochs": "every", "trajectory": "segments", "codec": "pairs-float32"}
    callback = InfluenceCallback(path, **options, on_error="raise")
    fit(folder, model, data, callback, max_epochs=3)
    return path


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> InfluenceModule:
    """Every epoch saw every example."""
    model = Decaying()
    return InfluenceModule.attach(model, train(tmp_path_factory.mktemp("whole"), model, loader()))


@pytest.fixture(scope="module")
def dropping(tmp_path_factory: pytest.TempPathFactory) -> InfluenceModule:
    """Every epoch leaves out the two examples that its order has last."""
    model = Decaying()
    shuffled = torch.Generator().manual_seed(3)
    data = DataLoader(loader().dataset, BATCH, shuffle=True, generator=shuffled, drop_last=True)
    return InfluenceModule.attach(model, train(tmp_path_factory.mktemp("dropping"), model, data))


@pytest.fixture(scope="module")
def batch() -> Any:
    x, y = next(iter(loader()))
    return x[:3] + 0.1, 1 - y[:3]


def changed(influence: InfluenceModule, folder: Path, change: Callable[[h5py.File], None]) -> InfluenceModule:
    """The same model with a copy of its file, changed by hand."""
    path = Path(shutil.copy(influence.store.path, folder / "changed.h5"))
    with h5py.File(path, "r+") as file:
        change(file)
        for name in ("rows", *(f"segments/{number}/rows" for number in file["segments"])):
            for column in file[name].values():
                column.attrs["crc32"] = np.uint32(zlib.crc32(column[()].tobytes()))
    return InfluenceModule(influence.model, StoreReader(path))


def set_rates(group: h5py.Group, value: float) -> None:
    group["rows/learning_rate"][...] = value


def by_hand(
    influence: InfluenceModule, number: int, queries: dict[str, Tensor], curvature: str = "ekfac"
) -> Tensor:
    """-grad f^T (G + damping)^-1 grad L of one segment, dense and in float64, [q, N]; 0 without a row."""
    query = InfluenceQuery(influence.store.segment(number))
    total = torch.zeros(len(next(iter(queries.values()))), query.num_examples, dtype=torch.float64)
    for name in query.layers:
        factors = {key: torch.from_numpy(array).double() for key, array in query.store.factors(name).items()}
        basis = torch.kron(factors["Q_S"], factors["Q_A"])
        inverse = basis @ torch.diag(1 / (factors["Lambda"].flatten() + DAMPING)) @ basis.T
        rows = decoded_rows(query, name).double().flatten(1)
        if curvature == "empirical_fisher":
            own = rows[query.valid]
            inverse = torch.linalg.inv(own.T @ own / len(own) + DAMPING * torch.eye(rows.shape[1]))
        rows[~query.valid] = 0
        total += queries[name].double().flatten(1) @ inverse @ rows.T
    return total


def dense_queries(influence: InfluenceModule, batch: Any) -> dict[str, Tensor]:
    """Gradients of each query's own loss at the model's weights, by autograd: its bias is the last column."""
    layers = {name: influence.model.get_submodule(name) for name in influence.store.layers}
    found: dict[str, list[Tensor]] = {name: [] for name in layers}
    for x, y in zip(*batch, strict=True):
        loss = influence.model.training_step((x[None], y[None]), 0)
        for name, layer in layers.items():
            weight, bias = torch.autograd.grad(loss, [layer.weight, layer.bias], retain_graph=True)
            found[name].append(torch.cat([weight, bias[:, None]], 1))
    return {name: torch.stack(gradients) for name, gradients in found.items()}


def close(found: Tensor, expected: Tensor) -> None:
    """Float32 rows and factors: a few steps of rounding of the largest."""
    largest = float(expected.nan_to_num().abs().max())
    torch.testing.assert_close(found.double(), expected.double(), rtol=0, atol=1e-5 * largest, equal_nan=True)


# --- what is summed -------------------------------------------------------------------------------


@pytest.mark.parametrize("case", WEIGHTS)
def test_scores_are_the_weighted_sum_of_each_segments_own(whole: InfluenceModule, batch: Any, case: str) -> None:
    segments, weights = WEIGHTS[case]
    queries = dense_queries(whole, batch)
    expected = sum(weight * by_hand(whole, number, queries) for number, weight in weights.items())
    close(whole.scores(batch, damping=DAMPING, segments=segments), expected)


def test_each_segment_has_the_empirical_fisher_of_its_own_rows(
    whole: InfluenceModule, dropping: InfluenceModule, batch: Any
) -> None:
    for influence in (whole, dropping):
        queries = dense_queries(influence, batch)
        expected = sum(w * by_hand(influence, n, queries, "empirical_fisher") for n, w in OWN.items())
        found = influence.scores(batch, damping=DAMPING, segments=OWN, curvature="empirical_fisher")
        close(found[:, ~found.isnan().any(0)], expected[:, ~found.isnan().any(0)])
        assert int(found.isnan().all(0).sum()) <= 2


def test_the_learning_rate_of_a_segment_is_that_of_its_epoch(whole: InfluenceModule) -> None:
    found = {number: mean_learning_rate(whole.store.segment(number)) for number in whole.store.segments}
    assert found == pytest.approx(RATES)


def test_only_the_segments_up_to_the_models_count(whole: InfluenceModule) -> None:
    found = weighted_segments(whole.store.segment(1), "learning_rate")
    assert [each.store.number for each in found] == [0, 1]
    assert [each.weight for each in found] == pytest.approx([2 / 3, 1 / 3])


def test_layers_add_up_to_the_scores(whole: InfluenceModule, batch: Any) -> None:
    by_layer = whole.scores(batch, segments="mean", per_layer=True)
    close(sum(by_layer.values()), whole.scores(batch, segments="mean"))


def test_scores_by_segment_are_those_of_each_alone(whole: InfluenceModule, batch: Any) -> None:
    found = whole.scores_by_segment(batch)
    assert list(found) == [0, 1, 2]
    for number, scores in found.items():
        assert torch.equal(scores, whole.scores(batch, segments={number: 1}))
    assert torch.equal(found[2], whole.scores(batch))


def test_self_influence_is_the_weighted_sum_of_each_segments_own(whole: InfluenceModule) -> None:
    each = {n: InfluenceQuery(whole.store.segment(n)).self_influence() for n in OWN}
    close(whole.self_influence(segments=OWN), sum(weight * each[n] for n, weight in OWN.items()))


def test_top_k_is_of_the_sum(whole: InfluenceModule, batch: Any) -> None:
    scores = whole.scores(batch, segments="learning_rate")
    top = whole.top_k(batch, 4, segments="learning_rate")
    assert torch.equal(top.scores, scores.sort(dim=1, descending=True).values[:, :4])
    assert torch.equal(scores.gather(1, top.indices), top.scores)


def test_removal_effect_is_the_weighted_mean_of_the_segments_predictions(
    whole: InfluenceModule, batch: Any
) -> None:
    weights = {0: 0.25, 2: 0.75}
    alone = {n: whole.removal_effect(batch, [1, 4], segments={n: 1}) for n in weights}
    found = whole.removal_effect(batch, [1, 4], segments=weights)
    close(found, sum(weight * alone[n] for n, weight in weights.items()))
    close(found, -whole.scores(batch, segments=weights)[:, [1, 4]].sum(1) / N)


def test_an_example_drawn_twice_in_one_epoch_is_removed_twice_from_that(
    whole: InfluenceModule, batch: Any, tmp_path: Path
) -> None:
    def draw_twice(file: h5py.File) -> None:
        file["segments/0/rows/occurrences"][4] = 2

    twice = changed(whole, tmp_path, draw_twice)
    first, last = (twice.scores_by_segment(batch)[n][:, 4] for n in (0, 2))
    close(
        twice.removal_effect(batch, [4], segments={0: 0.5, 2: 0.5}),
        -(0.5 * 2 * first / (N + 1) + 0.5 * last / N),
    )


def test_groups_are_sums_over_segments(whole: InfluenceModule, batch: Any) -> None:
    scores, labels = whole.scores(batch, segments="mean"), np.arange(N) % 3
    found = whole.group_scores(batch, labels, segments="mean")
    close(found.scores, torch.stack([scores[:, labels == n].sum(1) for n in range(3)], 1))
    effects = [whole.removal_effect(batch, labels == n, segments="mean") for n in range(3)]
    close(found.removal_effects, torch.stack(effects, 1))
    assert whole.group_scores(batch, labels, segments=OWN).removal_effects is None


@pytest.mark.parametrize("curvature", ["ekfac", "empirical_fisher"])
def test_scores_between_examples_take_both_gradients_from_each_segment(
    dropping: InfluenceModule, curvature: str
) -> None:
    found = dropping.scores_between(range(N), segments=OWN, curvature=curvature)
    own = dropping.self_influence(segments=OWN, curvature=curvature)
    close(found.diagonal(), own.double())
    each = {n: dropping.scores_between(range(N), segments={n: 1}, curvature=curvature) for n in OWN}
    expected = sum(weight * each[n].nan_to_num() for n, weight in OWN.items())
    unknown = own.isnan()[:, None] | own.isnan()
    close(found, expected.masked_fill(unknown, torch.nan))


def test_subsets_and_layers_of_segments(dropping: InfluenceModule, batch: Any) -> None:
    options = {"segments": OWN, "layers": "layers.0"}
    expected = dropping.scores(batch, segments=OWN, per_layer=True)["layers.0"]
    close(dropping.scores(batch, subset=[6, 1], **options), expected[:, [6, 1]])
    top = dropping.top_k(batch, 2, subset=[6, 1, 9], **options)
    close(top.scores, expected.gather(1, top.indices))
    for number, scores in dropping.scores_by_segment(batch, subset=[6, 1]).items():
        close(scores, dropping.scores_by_segment(batch)[number][:, [6, 1]])


def test_trainer_predict_takes_segments(whole: InfluenceModule, batch: Any) -> None:
    whole.query_options = {"k": 2, "segments": "mean"}
    trainer = Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False)
    try:
        (found,) = trainer.predict(whole, DataLoader(list(zip(*batch, strict=True)), 3))
    finally:
        whole.query_options = {}
    expected = whole.top_k(batch, 2, segments="mean")
    assert torch.equal(found.indices, expected.indices)
    close(found.scores, expected.scores)


@pytest.mark.parametrize("case", WEIGHTS)
def test_the_same_question_twice_gives_the_same_bits(whole: InfluenceModule, batch: Any, case: str) -> None:
    segments, _ = WEIGHTS[case]
    first = whole.scores(batch, segments=segments), whole.self_influence(segments=segments)
    whole.scores(batch, segments={1: 3.0}, damping=1.0, curvature="kfac")
    again = InfluenceModule(whole.model, StoreReader(whole.store.path))
    for other in (whole, again):
        assert torch.equal(other.scores(batch, segments=segments), first[0])
        assert torch.equal(other.self_influence(segments=segments), first[1])


def test_the_order_of_a_mapping_does_not_matter(whole: InfluenceModule, batch: Any) -> None:
    there, back = {0: 0.3, 1: 0.7, 2: 1.1}, {2: 1.1, 1: 0.7, 0: 0.3}
    assert torch.equal(whole.scores(batch, segments=there), whole.scores(batch, segments=back))


# --- examples without a row -----------------------------------------------------------------------


def test_an_epoch_that_did_not_see_an_example_adds_nothing(dropping: InfluenceModule, batch: Any) -> None:
    each = dropping.scores_by_segment(batch)
    missing = torch.stack([scores[0].isnan() for scores in each.values()])
    assert missing.sum(1).tolist() == [2, 2, 2]
    assert len(missing.unique(dim=0)) > 1  # not the same ones in each
    expected = sum(scores.nan_to_num() for scores in each.values()) / 3
    close(dropping.scores(batch, segments="mean"), expected.masked_fill(missing.all(0), torch.nan))


def test_an_example_that_no_epoch_saw_has_nan(dropping: InfluenceModule, batch: Any, tmp_path: Path) -> None:
    def lose(file: h5py.File) -> None:
        for group in (file, *file["segments"].values()):
            for column in ("written", "valid", "occurrences"):
                group[f"rows/{column}"][5] = 0

    found = changed(dropping, tmp_path, lose)
    scores = found.scores(batch, segments="mean")
    assert scores.isnan().all(0).nonzero().flatten().tolist() == [5]
    assert found.self_influence(segments="mean").isnan().nonzero().flatten().tolist() == [5]
    with pytest.raises(ValueError, match=f"`k` must be an integer from 1 to {N - 1}"):
        found.top_k(batch, N, segments="mean")
    with pytest.raises(QueryError, match=r"1 of `indices` have no valid row .* \(the first is 5\)"):
        found.removal_effect(batch, [4, 5], segments="mean")


def test_an_epoch_that_is_a_part_of_one_does_not_know_of_the_others(
    dropping: InfluenceModule, batch: Any, tmp_path: Path
) -> None:
    def cut(file: h5py.File) -> None:
        file["segments/0"].attrs["is_whole"] = False

    found = changed(dropping, tmp_path, cut)
    lacking = np.flatnonzero(found.store.segment(0).column("written") == 0).tolist()
    assert len(lacking) == 2
    scores = found.scores(batch, segments="mean")
    assert scores.isnan().all(0).nonzero().flatten().tolist() == lacking
    without = found.scores(batch, segments={0: 0, 1: 0.5, 2: 0.5})
    assert not without[:, lacking].isnan().all()


def test_an_example_whose_gradient_was_not_finite_in_one_epoch_keeps_the_others(
    whole: InfluenceModule, batch: Any, tmp_path: Path
) -> None:
    def spoil(file: h5py.File) -> None:
        file["segments/1/rows/valid"][7] = 0

    found = changed(whole, tmp_path, spoil)
    each = whole.scores_by_segment(batch)
    close(found.scores(batch, segments="mean")[:, 7], (each[0] + each[2])[:, 7] / 3)
    assert found.scores_by_segment(batch)[1][:, 7].isnan().all()


# --- what cannot be asked -------------------------------------------------------------------------


@pytest.mark.parametrize("segments", ["all", "", 2, 1.0, [0, 2], [(0, 1.0)], True])
def test_other_values_are_refused_with_those_that_there_are(whole: InfluenceModule, segments: Any) -> None:
    said = '`segments` must be None, "last", "mean", "learning_rate" or a mapping {segment number: weight}, got '
    with pytest.raises(ValueError, match=re.escape(said + repr(segments))):
        whole.self_influence(segments=segments)


@pytest.mark.parametrize("weight", [-0.1, float("nan"), float("inf"), "1", None, True, 1j])
def test_impossible_weights_are_refused(whole: InfluenceModule, weight: Any) -> None:
    with pytest.raises(ValueError, match=re.escape(f"finite numbers >= 0, got {{1: {weight!r}}}")):
        whole.self_influence(segments={1: weight})


@pytest.mark.parametrize("number", [3, -1, "0", True, None])
def test_segments_that_are_not_there_are_refused(whole: InfluenceModule, number: Any) -> None:
    said = re.escape(f"`segments` names {number!r}, but {whole.store.path} has the segments [0, 1, 2]")
    with pytest.raises(QueryError, match=said):
        whole.self_influence(segments={number: 1.0})


@pytest.mark.parametrize("segments", [{}, {0: 0.0}])
def test_weights_of_nothing_are_refused(whole: InfluenceModule, segments: Any) -> None:
    with pytest.raises(QueryError, match=r"must give a segment of .* a positive weight"):
        whole.self_influence(segments=segments)


def test_epochs_after_the_models_weights_are_refused(whole: InfluenceModule) -> None:
    earlier = InfluenceQuery(whole.store.segment(1))
    with pytest.raises(QueryError, match=r"names 2, but the model has the weights of segment 1 .* later epochs"):
        earlier.self_influence(segments={2: 1.0})


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({0: np.nan}, "{0: nan}"),
        ({0: np.nan, 1: np.nan, 2: np.nan}, "{0: nan, 1: nan, 2: nan}"),
        ({0: 0.0, 1: 0.0, 2: 0.0}, "{0: 0.0, 1: 0.0, 2: 0.0}"),
    ],
)
def test_learning_rates_that_weigh_nothing_are_refused(
    whole: InfluenceModule, tmp_path: Path, changes: dict[int, float], said: str
) -> None:
    def change(file: h5py.File) -> None:
        for number, rate in changes.items():
            set_rates(file if number == 2 else file[f"segments/{number}"], rate)

    found = changed(whole, tmp_path, change)
    with pytest.raises(QueryError, match=rf"needs the learning rate of each epoch.*{re.escape(said)}"):
        found.self_influence(segments="learning_rate")
    assert found.self_influence(segments="mean").isfinite().all()


def test_an_epoch_at_a_learning_rate_of_zero_does_not_count(whole: InfluenceModule, tmp_path: Path) -> None:
    found = changed(whole, tmp_path, lambda file: set_rates(file["segments/0"], 0.0))
    assert [each.store.number for each in weighted_segments(found.store, "learning_rate")] == [1, 2]


def test_segments_of_other_layers_are_refused_by_name(whole: InfluenceModule, batch: Any, tmp_path: Path) -> None:
    found = changed(
        whole, tmp_path, lambda file: file.move("segments/1/layers/layers.2", "segments/1/layers/head")
    )
    said = r"segment 2, .* differ in \(segment 1: layers\.2, head\)"
    for ask in (lambda: found.scores(batch, segments="mean"), lambda: found.scores_by_segment(batch)):
        with pytest.raises(QueryError, match=said):
            ask()
    assert found.scores(batch, segments={0: 1, 2: 1}).isfinite().all()


def test_a_removal_whose_weights_do_not_sum_to_1_has_no_scale(whole: InfluenceModule, batch: Any) -> None:
    with pytest.raises(QueryError, match=r"must sum to 1 for `removal_effect`, got 2\.8"):
        whole.removal_effect(batch, [1], segments=OWN)
    for segments in ("mean", "learning_rate", "last", {0: 1 / 3, 1: 2 / 3}):
        assert whole.removal_effect(batch, [1], segments=segments).isfinite().all()
