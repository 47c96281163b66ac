"""What only whole runs show of layers: last batches of one example, loops of one's own, layers of one number."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from lightning_influence import InfluenceCallback, InfluenceModule
from lightning_influence.store import StoreReader
from tests.integration.models import ManualTask, Task, seeded, stored_gradients, token_data, train
from tests.reference.gradients import parameter_gradients

TOKENS = token_data(13)


def own_loss(net: nn.Module, example: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(net(example[0][None]), example[1][None])


def labelled(inputs: Tensor) -> TensorDataset:
    return TensorDataset(inputs, torch.arange(len(inputs)) % 3)


class Looped(nn.Module):
    """Adds the same positions twice, each time expanded to the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.positions, self.head = nn.Embedding(7, 8), nn.Embedding(6, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        t, p = self.tokens(x), self.positions(torch.arange(6))
        for _ in range(2):
            t = torch.tanh(t + p.expand(len(x), -1, -1))
        return self.head(t.mean(1))


@pytest.mark.parametrize("batch_size", [4, 1])
def test_an_output_that_is_expanded_twice_counts_twice_in_a_batch_of_one_too(
    tmp_path: Path, batch_size: int
) -> None:
    path, data = tmp_path / "influence.h5", labelled(TOKENS.tensors[0])
    model = Task(seeded(Looped))
    influence = InfluenceCallback(path, codec="pairs-float32", on_error="raise")
    train(model, data, influence, batch_size=batch_size)
    true = parameter_gradients(model.net, [data[row] for row in range(13)], own_loss)
    found = stored_gradients(path)
    torch.testing.assert_close(found["net.positions"].double(), true["positions.weight"], rtol=1e-4, atol=1e-6)
    queries = tuple(tensor[:1] for tensor in data.tensors)
    scores = InfluenceModule.attach(model, path).scores(queries, curvature="identity")[0]
    rows = torch.cat([gradient.flatten(1) for gradient in true.values()], dim=1)
    torch.testing.assert_close(scores.double(), rows @ rows[0], rtol=1e-4, atol=1e-5)


class OneNumber(nn.Module):
    """A layer with a single weight, which is also used outside of it."""

    def __init__(self, *, bias: bool) -> None:
        super().__init__()
        self.one, self.head = nn.Linear(1, 1, bias=bias), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.one(x.float()[..., None])[..., 0] * self.one.weight[0, 0]))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.filterwarnings("ignore:.*InfluenceCallback")
def test_a_mismatch_of_a_single_number_is_no_penalty(tmp_path: Path, bias: bool) -> None:
    path = tmp_path / "influence.h5"
    train(
        Task(seeded(OneNumber, bias=bias)), labelled(TOKENS.tensors[0]), InfluenceCallback(path, on_error="raise")
    )
    reasons = {entry["name"]: entry["reason"] for entry in StoreReader(path).document("coverage")}
    assert "also used outside of its forward" in reasons["net.one"]


class Bag(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bag, self.head = nn.EmbeddingBag(7, 4, mode="max"), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.bag(x))


class Normed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.head = nn.Linear(6, 4), nn.BatchNorm1d(4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.norm(self.first(x.float()))))


class SteppingTask(ManualTask):
    """Keeps the truth of its batch, takes a large step, and looks at its accuracy in eval mode."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args, lambda parameters: torch.optim.SGD(parameters, lr=1.0))
        self.norms: list[Tensor] = []

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        before = copy.deepcopy(self.net.train())
        name = "bag.weight" if isinstance(self.net, Bag) else "norm.weight"
        (-before(batch[0]).log_softmax(-1)[range(len(batch[1])), batch[1]]).sum().backward()
        self.norms.append(before.get_parameter(name).grad.clone())
        super().training_step(batch, batch_idx)
        self.net.eval()
        with torch.no_grad():
            self.net(batch[0])


@pytest.mark.parametrize("make", [Bag, Normed], ids=["largest-of-a-bag", "batch-norm"])
def test_what_a_manual_step_does_after_its_backward_changes_no_row(
    tmp_path: Path, make: Callable[[], nn.Module]
) -> None:
    path, model = tmp_path / "influence.h5", SteppingTask(seeded(make), F.cross_entropy)
    train(
        model, labelled(TOKENS.tensors[0][:12]), InfluenceCallback(path, codec="pairs-float32", on_error="raise")
    )
    found = stored_gradients(path)["net.bag" if make is Bag else "net.norm"]
    total = sum(norm.flatten() for norm in model.norms)  # over the epoch, by weight
    torch.testing.assert_close(found.sum(0)[..., : 4 if make is Bag else 1].flatten(), total, rtol=1e-4, atol=1e-5)


class First(nn.Module):
    """Positions come first, and there is one example at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(7, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.table(x.T))).mean(0)


def test_positions_first_are_seen_with_one_example_at_a_time(tmp_path: Path) -> None:
    path, data, model = tmp_path / "influence.h5", labelled(TOKENS.tensors[0]), Task(seeded(First))
    influence = InfluenceCallback(path, codec="pairs-float32", on_error="raise")
    train(model, data, influence, batch_size=1)
    true = parameter_gradients(model.net, [data[row] for row in range(13)], own_loss)
    found = stored_gradients(path)
    torch.testing.assert_close(found["net.table"].double(), true["table.weight"], rtol=1e-4, atol=1e-6)
