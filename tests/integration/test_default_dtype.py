"""Torch's default dtype may be float64: what is captured and answered stays float32, and the same."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_influence import InfluenceCallback, InfluenceModule
from tests.integration.lifecycle_models import fit

OPTIONS: dict[str, dict[str, Any]] = {
    "final epoch": {},
    "merged": {"epochs": "every"},
    "segments": {"epochs": "every", "trajectory": "segments"},
    "after training": {"rows": "final"},
    "exact labels": {"fisher": "exact"},
    "error budget": {"codec": "eigen", "error_budget": 0.02},
}
CURVATURES = ("ekfac", "kfac", "diagonal", "empirical_fisher")


class Model(pl.LightningModule):
    """A convolution and a linear layer of float32, on float32 data."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Conv1d(1, 3, 2), nn.Tanh(), nn.Flatten(), nn.Linear(9, 2)).float()
        with torch.no_grad():
            for n, parameter in enumerate(self.parameters()):  # drawn alike whatever the default is
                parameter.copy_(numbers(*parameter.shape, seed=n) / 3)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self.net(batch[0][:, None]), batch[1])

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def numbers(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float32)


def answers(folder: Path, options: dict[str, Any]) -> dict[str, Tensor]:
    x, y = numbers(20, 4, seed=8), torch.arange(20) % 2
    model, path = Model(), folder / "influence.h5"
    fit(
        folder,
        model,
        DataLoader(TensorDataset(x, y), 8, shuffle=False),
        InfluenceCallback(path, on_error="raise", **options),
        max_epochs=3,
    )
    influence = InfluenceModule.attach(model, path)
    scores = {name: influence.scores((x[:3], y[:3]), curvature=name) for name in CURVATURES}
    return {
        **scores,
        "self-influence": influence.self_influence(),
        "top": influence.top_k((x[:3], y[:3]), 4).scores,
        "effect": influence.removal_effect((x[:3], y[:3]), [1, 2]),
        "handed in": influence.scores_of((x[:2], y[:2]), (x[:4], y[:4])),
    }


@pytest.fixture
def float64_is_default() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_answers_do_not_depend_on_the_default_dtype(tmp_path: Path, request, options: dict[str, Any]) -> None:
    expected = answers(tmp_path / "usual", options)
    request.getfixturevalue("float64_is_default")
    for name, found in answers(tmp_path / "float64", options).items():
        assert found.dtype == torch.float32, name
        scale = float(expected[name].abs().max())
        torch.testing.assert_close(
            found, expected[name], rtol=0, atol=1e-3 * scale, msg=lambda m, n=name: f"{n}: {m}"
        )
