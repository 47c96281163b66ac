"""Several training dataloaders: their datasets stand one after the other in the file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.utilities import CombinedLoader
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_influence import InfluenceCallback
from lightning_influence.store import StoreReader
from tests.integration.lifecycle_models import FEATURES, Classifier, fit
from tests.integration.models import stored_gradients
from tests.reference.gradients import per_example_gradients

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*rows aged within the epoch"),
    pytest.mark.filterwarnings("ignore:.*the stored rows are coarse"),
]
SIZES = 12, 7


class Joined(Classifier):
    """One forward of all loaders' examples, at fixed weights."""

    def __init__(self) -> None:
        super().__init__(0.0)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        parts = batch.values() if isinstance(batch, dict) else batch
        x, y = (torch.cat(each) for each in zip(*(part for part in parts if part is not None), strict=True))
        return F.cross_entropy(self(x), y)


def data(seed: int) -> TensorDataset:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(SIZES[seed], FEATURES, generator=generator)
    return TensorDataset(x, (x[:, 0] > 0).long())


@pytest.mark.parametrize("mode", ["min_size", "max_size", "max_size_cycle"])
@pytest.mark.parametrize("batch_sizes", [(4, 4), (2, 6), (4, 1), (1, 3), (1, 1)])
@pytest.mark.parametrize("kind", [list, dict])
def test_rows_of_joined_loaders_are_autograds_gradients(
    tmp_path: Path, kind: type, batch_sizes: tuple[int, int], mode: Any
) -> None:
    path, model = tmp_path / "influence.h5", Joined()
    loaders = [DataLoader(data(seed), size, shuffle=True) for seed, size in enumerate(batch_sizes)]
    made = CombinedLoader(loaders if kind is list else dict(zip("ab", loaders, strict=True)), mode)
    fit(tmp_path, model, made, InfluenceCallback(path, codec="pairs-float32", on_error="raise"))

    def loss(module: nn.Module, example: tuple[Tensor, Tensor]) -> Tensor:
        return F.cross_entropy(module(example[0][None]), example[1][None])

    examples = [data(seed)[index] for seed in (0, 1) for index in range(SIZES[seed])]
    written = torch.from_numpy(StoreReader(path).column("written")).bool()
    assert written.all() or mode == "min_size"
    for name, true in per_example_gradients(model, examples, loss, ["layers.0", "layers.2"]).items():
        torch.testing.assert_close(
            stored_gradients(path)[name][written].double(), true[written], atol=1e-6, rtol=1e-4
        )
