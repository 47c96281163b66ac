"""What the file says of training, and rules and curvatures, in the less usual cases."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import SGD, Optimizer
from torch.optim.lr_scheduler import OneCycleLR
from torch.utils.data import DataLoader, TensorDataset

from lightning_influence import InfluenceCallback, InfluenceModule
from lightning_influence.curvature import GlobalDamping, TrainingDamping, WeightDecayDamping
from lightning_influence.errors import QueryError
from lightning_influence.solvers.preconditioner import EKFACPreconditioner
from tests.plain_loop import query_gradients, record


def data(n: int = 24, weights: Tensor | None = None) -> TensorDataset:
    generator = torch.Generator().manual_seed(1)
    inputs, labels = torch.randn(n, 4, generator=generator), torch.randint(3, (n,), generator=generator)
    return TensorDataset(inputs, labels, torch.ones(n) if weights is None else weights)


class Net(LightningModule):
    """Two layers and an optimizer."""

    def __init__(self, make: Callable[[nn.Module], Any] | None = None, loss: Any = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(4, 5), nn.Linear(5, 3)
        self.make = make or (lambda model: SGD(model.parameters(), lr=0.1, weight_decay=0.01))
        self.loss = loss or (lambda logits, batch: cross_entropy(logits, batch[1]))

    def forward(self, inputs: Tensor) -> Tensor:
        return self.last(torch.tanh(self.first(inputs)))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.loss(self(batch[0]), batch)

    def configure_optimizers(self) -> Any:
        return self.make(self)


class Time(Callback):
    """Counts the first layer's training time."""

    time = 0.0

    def on_before_optimizer_step(self, trainer: Trainer, model: LightningModule, optimizer: Optimizer) -> None:
        group = optimizer.param_groups[0]
        if model.first.weight.grad is not None:
            self.time += group["lr"] / (1 - group.get("momentum", 0))


def fit(
    path: Path,
    model: LightningModule,
    *callbacks: Callback,
    dataset: TensorDataset | None = None,
    batch_size: int = 4,
    epochs: int = 3,
) -> InfluenceModule:
    Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        max_epochs=epochs,
        callbacks=[*callbacks, InfluenceCallback(path, on_error="raise")],
    ).fit(model, DataLoader(dataset or data(), batch_size=batch_size))
    return InfluenceModule.attach(model, path)


def penalties(influence: InfluenceModule, layer: str = "first") -> dict[str, float | None]:
    return influence.store.document("penalties")["layers"][layer]


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_short_last_batch_of_summed_losses(tmp_path: Path) -> None:
    """In an epoch of 3 steps the weights decay thrice for 129 examples."""
    model = Net(loss=lambda logits, batch: cross_entropy(logits, batch[1], reduction="sum"))
    influence = fit(tmp_path / "a.h5", model, dataset=data(129), batch_size=64)
    assert penalties(influence)["decay"] == pytest.approx(0.01 * 3 / 129, rel=1e-3)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_losses_with_weights(tmp_path: Path) -> None:
    weights = torch.where(torch.arange(24) % 8 == 0, 1e-3, 1.0)
    model = Net(loss=lambda logits, batch: (batch[2] * cross_entropy(logits, batch[1], reduction="none")).mean())
    influence = fit(tmp_path / "a.h5", model, dataset=data(24, weights))
    assert penalties(influence)["decay"] == pytest.approx(0.01 / float(weights.mean()), rel=0.05)


class TwoLosses(Net):
    """Each layer's optimizer has a loss of its own scale."""

    def __init__(self) -> None:
        super().__init__(lambda m: [SGD(each.parameters(), 0.1, weight_decay=0.01) for each in (m.first, m.last)])
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        for optimizer, reduction in zip(self.optimizers(), ("mean", "sum"), strict=True):
            self.toggle_optimizer(optimizer)
            optimizer.zero_grad()
            self.manual_backward(cross_entropy(self(batch[0]), batch[1], reduction=reduction))
            optimizer.step()
            self.untoggle_optimizer(optimizer)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_losses_of_several_scales_are_not_guessed(tmp_path: Path) -> None:
    influence = fit(tmp_path / "a.h5", TwoLosses())
    assert penalties(influence)["decay"] is penalties(influence, "last")["decay"] is None
    with pytest.raises(ValueError, match="share a loss"):
        influence.self_influence(damping=WeightDecayDamping())


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_momentum_that_changes(tmp_path: Path) -> None:
    def make(model: nn.Module) -> dict[str, Any]:
        optimizer = SGD(model.parameters(), lr=0.1, momentum=0.9)
        schedule = OneCycleLR(optimizer, max_lr=0.5, total_steps=18)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    time = Time()
    influence = fit(tmp_path / "a.h5", Net(make), time)
    assert penalties(influence)["stopping"] == pytest.approx(1 / time.time, rel=1e-3)


class Unfrozen(Net):
    """Its first layer is trained in the last epoch only."""

    def on_train_epoch_start(self) -> None:
        self.first.requires_grad_(self.current_epoch >= 5)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_layer_that_was_frozen_at_first(tmp_path: Path) -> None:
    time = Time()
    influence = fit(tmp_path / "a.h5", Unfrozen(), time, epochs=6)
    assert penalties(influence)["stopping"] == pytest.approx(1 / time.time, rel=1e-3)
    assert penalties(influence, "last")["stopping"] == pytest.approx(1 / (36 * 0.1), rel=1e-3)


class Reload(Callback):
    """Replaces the optimizer's groups."""

    def on_train_epoch_start(self, trainer: Trainer, model: LightningModule) -> None:
        trainer.optimizers[0].load_state_dict(trainer.optimizers[0].state_dict())


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_an_optimizer_whose_state_is_loaded_in_between(tmp_path: Path) -> None:
    influence = fit(tmp_path / "a.h5", Net(), Reload())
    assert penalties(influence)["stopping"] == pytest.approx(1 / 1.8, rel=1e-3)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_decays_of_other_optimizers_are_not_guessed(tmp_path: Path) -> None:
    """That of Adafactor is decoupled."""
    model = Net(lambda m: torch.optim.Adafactor(m.parameters(), lr=0.01, weight_decay=0.1))
    assert penalties(fit(tmp_path / "a.h5", model))["decay"] is None


@pytest.fixture(scope="module")
def influence(tmp_path_factory: pytest.TempPathFactory) -> InfluenceModule:
    return fit(tmp_path_factory.mktemp("rules") / "a.h5", Net())


def test_no_layer_may_be_left_for_the_others_rules(influence: InfluenceModule) -> None:
    found = influence.self_influence(damping=WeightDecayDamping(without={"*": 2.0}))
    assert torch.equal(found, influence.self_influence(damping=WeightDecayDamping()))


def test_a_pattern_behind_one_that_fits_all_is_refused(influence: InfluenceModule) -> None:
    with pytest.raises(ValueError, match=r"names last, .* put it first"):
        influence.self_influence(damping={"*": 1.0, "last": 1e-3})


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1.0])
def test_rules_that_give_no_damping_are_refused(influence: InfluenceModule, value: float) -> None:
    with pytest.raises(ValueError, match="finite numbers"):
        influence.self_influence(damping=lambda eigenvalues: value)


def test_a_class_of_rules_is_no_rule(influence: InfluenceModule) -> None:
    with pytest.raises(TypeError, match=r"GlobalDamping\(\.\.\.\)"):
        influence.self_influence(damping=GlobalDamping)


@pytest.mark.parametrize("damping", [{"*": 0.1}, GlobalDamping(), TrainingDamping()], ids=str)
def test_a_preconditioner_takes_any_damping(influence: InfluenceModule, damping: Any) -> None:
    found = EKFACPreconditioner.from_store(influence.model, influence.store.path, damping=damping)
    assert found.solve(torch.ones(1, found.size)).isfinite().all()


@pytest.mark.parametrize("curvature", ["diagonal", "empirical_fisher", "identity"])
def test_a_preconditioner_refuses_other_curvatures(influence: InfluenceModule, curvature: str) -> None:
    with pytest.raises(ValueError, match="'ekfac' or 'kfac'"):
        EKFACPreconditioner.from_store(influence.model, influence.store.path, curvature=curvature)


def test_the_rows_fisher_refuses_a_damping_that_rounding_spoils(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
    inputs, labels = torch.randn(400, 8, generator=generator) + 3, torch.randint(3, (400,), generator=generator)
    examples = list(zip(inputs, labels, strict=True))
    query = record(tmp_path / "a.h5", model, examples, codec="pairs-float32", batch_size=100)
    with pytest.raises(QueryError, match="too small for the largest eigenvalue"):
        query.scores(query_gradients(model, examples[:2]), damping=1e-8, curvature="empirical_fisher")
