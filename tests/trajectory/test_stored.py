"""Segments that a file keeps, merged afterwards: sums of rows, in the basis of the rows' own covariances."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_influence import HeuristicDamping, InfluenceCallback, InfluenceModule
from lightning_influence.errors import QueryError
from lightning_influence.functional.kronecker import eigenbasis
from lightning_influence.query import InfluenceQuery
from lightning_influence.segments import mean_learning_rate
from lightning_influence.store import StoreReader
from lightning_influence.trajectory import merge_segments
from lightning_influence.trajectory.stored import StoredEpoch
from tests.integration.lifecycle_models import BATCH, Classifier, dataset, fit
from tests.plain_loop import decoded_rows
from tests.reference.factors import vec

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*rows aged within the epoch"),
    pytest.mark.filterwarnings("ignore:.*the stored rows are coarse"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
]
EXAMPLES, EVERYTHING = 22, 10**6
INT8 = 1 / 127  # of the largest entry of a group


class Decaying(Classifier):
    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.4)
        return [optimizer], [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)]


class Convolutional(LightningModule):
    """A convolution in two groups, a normalization and a linear layer on positions."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.norm, self.head = nn.Conv1d(2, 4, 2, groups=2), nn.LayerNorm(2), nn.Linear(2, 2)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        hidden = self.head(self.norm(self.conv(torch.stack([x, x.square()], 1)).tanh()))
        return F.cross_entropy(hidden.mean(1), y)

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), lr=0.1)


def train(folder: Path, model: LightningModule, *, drop_last: bool = False, **options: Any) -> Path:
    path, order = folder / f"{options.get('trajectory', 'segments')}.h5", torch.Generator().manual_seed(0)
    capture = InfluenceCallback(
        path, **{"epochs": "every", "trajectory": "segments", "on_error": "raise", **options}
    )
    data = DataLoader(dataset(EXAMPLES), BATCH, shuffle=True, drop_last=drop_last, generator=order)
    fit(folder, model, data, capture, max_epochs=3)
    return path


def merged(path: Path, target: Path, **options: Any) -> StoreReader:
    assert merge_segments(StoreReader(path), target, **{"bytes_per_example": EVERYTHING, **options}) == 3
    return StoreReader(target)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every epoch left out two examples, not the same ones."""
    return train(tmp_path_factory.mktemp("runs"), Decaying(), drop_last=True, codec="pairs-float32")


def queries(path: Path) -> list[InfluenceQuery]:
    reader = StoreReader(path)
    return [InfluenceQuery(reader.segment(number)) for number in reader.segments]


@pytest.mark.parametrize("weighting", ["learning_rate", "mean"])
def test_a_row_is_the_weighted_sum_of_the_segments_rows(path, tmp_path, weighting):
    segments = queries(path)
    rates = [mean_learning_rate(each.store) for each in segments]
    assert rates == pytest.approx([0.4, 0.2, 0.1])
    weights = np.array(rates if weighting == "learning_rate" else [1, 1, 1])
    found = InfluenceQuery(merged(path, tmp_path / "merged.h5", weighting=weighting))
    for name in found.layers:
        expected = torch.zeros_like(decoded_rows(found, name))
        for each, weight in zip(segments, weights / weights.sum(), strict=True):
            seen = each.store.column("valid") * each.store.column("occurrences")
            expected += torch.from_numpy(weight * seen).float()[:, None, None] * decoded_rows(each, name)
        error = (decoded_rows(found, name) - expected).norm(dim=(1, 2))
        assert (error <= 2 * INT8 * expected.norm(dim=(1, 2)) + 1e-7).all()


def test_basis_and_eigenvalues_are_those_of_the_mean_fisher(path, tmp_path):
    segments, found = queries(path), InfluenceQuery(merged(path, tmp_path / "merged.h5"))
    for name, layer in found.layers.items():
        Q_A, Q_S = layer.basis.Q_A.double(), layer.basis.Q_S.double()
        epochs = []
        for each in segments:
            valid = torch.from_numpy(each.store.column("valid")).bool()
            epochs.append(decoded_rows(each, name)[valid].double())
        A, S = (torch.stack(parts).mean(0) for parts in zip(*(_moments(G) for G in epochs), strict=True))
        Lambda = torch.stack([(Q_S.T @ G @ Q_A).square().mean(0) for G in epochs]).mean(0)
        torch.testing.assert_close((Q_A * layer.basis.eigenvalues_A) @ Q_A.T, A, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close((Q_S * layer.basis.eigenvalues_S) @ Q_S.T, S / S.trace(), rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(layer.Lambda.double(), Lambda, rtol=1e-4, atol=1e-8)


def _moments(G: Tensor) -> tuple[Tensor, Tensor]:
    return (G.mT @ G).mean(0), (G @ G.mT).mean(0)


@pytest.mark.parametrize("kind", [Decaying, Convolutional])
def test_scores_are_those_of_a_run_that_merged_while_training(tmp_path, kind):
    """With rows that are nearly exact; the online ones are of the same weights and sums."""
    model = kind()
    later = merged(train(tmp_path, kind(), codec="pairs-float32"), tmp_path / "later.h5")
    online = train(tmp_path, model, trajectory="merge", bytes_per_example=EVERYTHING)
    batch = [column[:5] + (0.1 if n == 0 else 0) for n, column in enumerate(dataset(EXAMPLES).tensors)]
    scores = [InfluenceModule.attach(model, each).scores(batch) for each in (later, online)]
    assert (scores[0] - scores[1]).norm() < 0.03 * scores[1].norm()


def test_columns_and_facts_are_those_of_all_segments(path, tmp_path):
    segments, found = queries(path), merged(path, tmp_path / "merged.h5")
    seen = np.stack([each.store.column("written") * each.store.column("occurrences") for each in segments])
    assert found.column("occurrences").tolist() == seen.sum(0).tolist()
    assert found.column("written").all()
    assert found.column("label").tolist() == dataset(EXAMPLES).tensors[1].tolist()
    last = [max(np.flatnonzero(seen[:, n])) for n in range(EXAMPLES)]
    losses = [segments[e].store.column("loss")[n] for n, e in enumerate(last)]
    assert found.column("loss").tolist() == losses
    first, root = segments[0].store.attributes, segments[-1].store.attributes
    for name, expected in {
        "trajectory": "merge",
        "epochs_merged": 3,
        "rows_written": EXAMPLES,
        "rows_missing": 0,
        "step_start": first["step_start"],
        "step_end": root["step_end"],
        "weights_hash_start": first["weights_hash_start"],
        "weights_hash_end": root["weights_hash_end"],
        "is_whole": True,
    }.items():
        assert found.attributes[name] == expected, name
    document = found.document("trajectory")
    assert [each["epoch"] for each in document["epochs"]] == [0, 1, 2]
    assert [each["weights"]["layers.0"] for each in document["epochs"]] == pytest.approx([0.4, 0.2, 0.1])
    assert found.document("coverage") == StoreReader(path).document("coverage")
    assert found.store_id == StoreReader(path).store_id
    found.verify_rows()


def test_an_earlier_segment_merges_those_before_it(path, tmp_path):
    assert merge_segments(StoreReader(path).segment(1), tmp_path / "merged.h5") == 2
    found = StoreReader(tmp_path / "merged.h5")
    assert found.number == 1
    assert found.attributes["weights_hash_end"] == StoreReader(path).segment(1).attributes["weights_hash_end"]


class Stopping(Decaying):
    """Its last epoch has a learning rate of zero."""

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.4)
        return [optimizer], [torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: 0.0 if epoch > 1 else 1.0)]


def test_a_last_epoch_that_learnt_nothing_still_has_the_weights(tmp_path):
    model = Stopping()
    path = train(tmp_path, model, codec="pairs-float32")
    assert merge_segments(StoreReader(path), tmp_path / "merged.h5") == 2
    found = StoreReader(tmp_path / "merged.h5")
    assert found.number == 2
    assert [each["epoch"] for each in found.document("trajectory")["epochs"]] == [0, 1]
    for name in ("step_end", "weights_hash_end", "epoch"):
        assert found.attributes[name] == StoreReader(path).attributes[name], name
    InfluenceModule.attach(model, found)


def test_a_budget_is_kept(path, tmp_path):
    found = merged(path, tmp_path / "merged.h5", bytes_per_example=20)
    assert 0 < found.attributes["bytes_per_row"] <= 20


# --- what was cut off -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cut(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows of few coordinates."""
    return train(tmp_path_factory.mktemp("cut"), Convolutional(), codec="eigen", bytes_per_example=24)


def test_variances_of_lost_coordinates_are_the_diagonal_of_their_covariance(cut):
    """The whole matrix, densely: diag of R C R^T, with C diagonal in the segment's own basis."""
    query, torch_seed = queries(cut)[-1], torch.Generator().manual_seed(0)
    layer = query.layers["head"]
    A, S = (torch.randn(n, n, generator=torch_seed).double() for n in reversed(layer.basis.shape))
    basis = eigenbasis((A @ A.T).float(), (S @ S.T).float())
    lost = layer.Lambda.flatten().double()
    lost[layer.codec.coordinates] = 0
    assert 0 < int((lost > 0).sum()) < lost.numel()
    own = torch.kron(layer.basis.Q_A, layer.basis.Q_S).double()
    C = own @ torch.diag(vec(lost.view(layer.Lambda.shape))) @ own.T
    rotation = torch.kron(basis.Q_A, basis.Q_S).double()
    epoch = StoredEpoch(query.store, query.layers, 1.0)
    found = epoch.cut_off_in("head", basis)
    torch.testing.assert_close(vec(found.double()), (rotation.T @ C @ rotation).diagonal(), rtol=1e-4, atol=1e-9)
    o, i = layer.basis.shape
    blocks = C.view(i, o, i, o)  # E[G_oi G_o'i'] at [i, o, i', o']
    for part, expected in zip(
        epoch.cut_off_moments("head"),
        (blocks.diagonal(0, 1, 3).sum(-1), blocks.diagonal(0, 0, 2).sum(-1)),
        strict=True,
    ):
        torch.testing.assert_close(part.double(), expected, rtol=1e-4, atol=1e-9)


def test_eigenvalues_add_up_to_the_mean_squares_whatever_was_cut_off(cut, tmp_path):
    """A rotation keeps the sum: what rows have kept, and Lambda of what they have not."""
    segments, found = queries(cut), InfluenceQuery(merged(cut, tmp_path / "merged.h5"))
    for name, layer in found.layers.items():
        expected = 0.0
        for each in segments:
            own = each.layers[name]
            lost = own.Lambda.flatten().index_fill(0, own.codec.coordinates, 0.0).sum()
            kept = decoded_rows(each, name).square().sum((1, 2)).mean()
            expected += float(lost + kept) / len(segments)
        assert float(layer.Lambda.sum()) == pytest.approx(expected, rel=1e-4)


# --- what is refused ------------------------------------------------------------------------------


def test_a_single_segment_is_refused(path, tmp_path):
    with pytest.raises(QueryError, match="has one segment up to number 0, so there is nothing to merge"):
        merge_segments(StoreReader(path).segment(0), tmp_path / "merged.h5")
    assert not list(tmp_path.iterdir())


def test_the_file_itself_is_refused(path):
    with pytest.raises(ValueError, match="is the file that is merged"):
        merge_segments(StoreReader(path), path)
    assert len(StoreReader(path).segments) == 3


def test_an_unknown_weighting_is_refused(path, tmp_path):
    with pytest.raises(ValueError, match="`weighting` must be one of"):
        merge_segments(StoreReader(path), tmp_path / "merged.h5", weighting="last")


def test_a_budget_of_nothing_is_refused(path, tmp_path):
    with pytest.raises(ValueError, match="`bytes_per_example` must be at least 1, got 0"):
        merge_segments(StoreReader(path), tmp_path / "merged.h5", bytes_per_example=0)


def test_factors_of_drawn_labels_are_refused(path, tmp_path):
    other = shutil.copy(path, tmp_path / "drawn.h5")
    with h5py.File(other, "r+") as file:
        file.attrs["fisher"] = np.bytes_("sampled")
    with pytest.raises(QueryError, match=r"segments \[2\] of .* drawn labels"):
        merge_segments(StoreReader(other), tmp_path / "merged.h5")


def test_an_interrupted_merge_leaves_nothing(path, tmp_path):
    def watch(chunks: Any) -> Any:
        yield next(iter(chunks))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        merge_segments(StoreReader(path), tmp_path / "merged.h5", watch=watch)
    assert not list(tmp_path.iterdir())


def test_damping_and_curvature_stay_free(path, tmp_path):
    """As in every file: dot products of the merged rows, and scores that shrink with the damping."""
    model = Decaying()
    fit_again = train(tmp_path, model, drop_last=True, codec="pairs-float32")
    influence = InfluenceModule.attach(model, merged(fit_again, tmp_path / "merged.h5"))
    batch = [column[:5] for column in dataset(EXAMPLES).tensors]
    products = influence.scores(batch, curvature="identity")
    far = influence.scores(batch, damping=1e6)
    torch.testing.assert_close(1e6 * far, products, rtol=1e-3, atol=1e-4 * float(products.abs().max()))
    assert influence.scores(batch, damping=HeuristicDamping(0.1)).norm() > far.norm()
