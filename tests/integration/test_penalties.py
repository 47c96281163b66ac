"""What a file says of weight decay and training time equals what autograd and a plain count of steps say."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD, Adam, AdamW, Optimizer, RMSprop
from torch.utils.data import DataLoader, TensorDataset

from lightning_influence import InfluenceCallback, InfluenceModule, capture
from lightning_influence.curvature import AbsoluteDamping, TrainingDamping, WeightDecayDamping
from lightning_influence.query import DEFAULT_DAMPING
from tests.reference.models import random

N, S, EPOCHS, BATCH = 12, 3, 2, 4
DECAY = 0.03


def mean(logits: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), y.flatten())


def total(logits: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), y.flatten(), reduction="sum")


def weighted(logits: Tensor, y: Tensor) -> Tensor:
    return 0.25 * mean(logits, y)


class Sequences(LightningModule):
    """Two layers over positions [n, s, 4], and the last one without weight decay."""

    def __init__(self, make: Callable[[list[dict[str, Any]]], Optimizer], loss: Callable = mean) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(4, 5), nn.Linear(5, 3)
        self.make, self.loss = make, loss

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.first(x)))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return self.loss(self(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        groups = [{"params": self.first.parameters(), "weight_decay": DECAY}, {"params": self.last.parameters()}]
        optimizer = self.make(groups)
        scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.5, total_iters=3)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


class Watch(Callback):
    """The slow twin: learning rates summed step by step, and Adam's moments from the gradients themselves."""

    def __init__(self) -> None:
        self.rates: dict[str, float] = {"first": 0.0, "last": 0.0}
        self.moments: dict[str, Tensor] = {name: torch.zeros((), dtype=torch.float64) for name in self.rates}
        self.steps = 0

    def on_before_optimizer_step(self, trainer: Trainer, module: LightningModule, optimizer: Optimizer) -> None:
        self.steps += 1
        for name, group in zip(self.rates, optimizer.param_groups, strict=True):
            self.rates[name] += float(group["lr"])
            gradient = getattr(module, name).weight.grad.double()
            self.moments[name] = 0.9 * self.moments[name] + 0.1 * gradient**2

    def root(self, name: str) -> float:
        return float((self.moments[name] / (1 - 0.9**self.steps)).sqrt().mean())


def data() -> TensorDataset:
    labels = torch.randint(3, (N, S), generator=torch.Generator().manual_seed(1))
    return TensorDataset(random(N, S, 4, seed=3).float(), labels)


def fit(path: Path, model: Sequences, *, loaded: str | None = None, **options: Any) -> Watch:
    own = {
        "accumulate_grad_batches": options.pop("accumulate", 1),
        "max_epochs": options.pop("epochs_run", EPOCHS),
    }
    watch = Watch()
    trainer = Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[watch, InfluenceCallback(path, on_error="raise", **options)],
        **own,
    )
    trainer.fit(model, DataLoader(data(), batch_size=BATCH), ckpt_path=loaded)
    trainer.save_checkpoint(path.with_suffix(".ckpt"))
    return watch


def own_over_trained(model: Sequences) -> float:
    """How much larger the gradient of the examples' own mean loss is than that of the trained loss."""
    x, y = data()[:BATCH]
    weight = model.first.weight
    trained = torch.autograd.grad(model.loss(model(x), y), weight)[0]
    own = torch.autograd.grad(total(model(x), y) / BATCH, weight)[0]
    return float(own.norm() / trained.norm())


def layers_of(path: Path, model: Sequences) -> dict[str, dict[str, Any]]:
    return InfluenceModule.attach(model, path).store.document("penalties")["layers"]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("epochs", ["last", "every"])
@pytest.mark.parametrize(("loss", "expected"), [(mean, S), (total, 1 / BATCH), (weighted, 4 * S)])
def test_weight_decay_is_in_the_units_of_the_rows(
    tmp_path: Path, loss: Callable, expected: float, epochs: str, accumulate: int
) -> None:
    model = Sequences(lambda groups: SGD(groups, lr=0.1, momentum=0.5), loss)
    watch = fit(tmp_path / "run.h5", model, epochs=epochs, accumulate=accumulate)
    scale = own_over_trained(model)
    assert scale == pytest.approx(expected, rel=1e-5)
    found = layers_of(tmp_path / "run.h5", model)
    assert found["first"]["decay"] == pytest.approx(DECAY * scale, rel=1e-5)
    assert found["last"]["decay"] == 0
    for name, rate in watch.rates.items():  # momentum .5 makes steps twice as long
        assert found[name]["stopping"] == pytest.approx(scale / (2 * rate), rel=1e-5)


@pytest.mark.filterwarnings("ignore")
def test_adamw_decays_like_a_penalty_times_the_root_of_its_moments(tmp_path: Path) -> None:
    model = Sequences(lambda groups: AdamW(groups, lr=0.01, betas=(0.9, 0.9), weight_decay=0.5))
    watch = fit(tmp_path / "run.h5", model)
    found = layers_of(tmp_path / "run.h5", model)
    for name, decay in (("first", DECAY), ("last", 0.5)):
        assert found[name]["weight_decay"] == decay
        assert found[name]["decay"] == pytest.approx(S * decay * watch.root(name), rel=1e-4)
        assert found[name]["stopping"] == pytest.approx(S * watch.root(name) / watch.rates[name], rel=1e-4)


@pytest.mark.filterwarnings("ignore")
def test_decay_that_adam_adds_to_the_gradient_is_a_penalty_as_it_is(tmp_path: Path) -> None:
    model = Sequences(lambda groups: Adam(groups, lr=0.01))
    fit(tmp_path / "run.h5", model)
    assert layers_of(tmp_path / "run.h5", model)["first"]["decay"] == pytest.approx(S * DECAY, rel=1e-5)


@pytest.mark.filterwarnings("ignore")
def test_scores_take_each_layers_own_penalty(tmp_path: Path) -> None:
    model = Sequences(lambda groups: SGD(groups, lr=0.1))
    watch = fit(tmp_path / "run.h5", model)
    influence, batch = InfluenceModule.attach(model, tmp_path / "run.h5"), list(data()[:3])
    found = influence.scores(batch, damping=WeightDecayDamping(2.0, without=AbsoluteDamping(0.7)))
    assert torch.allclose(found, influence.scores(batch, damping={"first": 2 * DECAY * S, "last": 0.7}))
    trained = {"first": DECAY * S + 0.1 * S / watch.rates["first"], "last": 0.1 * S / watch.rates["last"]}
    found = influence.scores(batch, damping=TrainingDamping(decay=1.0, stopping=0.1))
    assert torch.allclose(found, influence.scores(batch, damping=trained))


@pytest.mark.filterwarnings("ignore")
def test_advice_is_by_training_where_the_file_says_how_it_was(tmp_path: Path) -> None:
    model = Sequences(lambda groups: SGD(groups, lr=0.1))
    fit(tmp_path / "run.h5", model)
    advice = InfluenceModule.attach(model, tmp_path / "run.h5").recommend_damping()
    assert advice.damping == TrainingDamping()
    assert all(-1 <= value <= 1.0001 for value in advice.sensitivity.values())


@pytest.mark.filterwarnings("ignore")
def test_what_an_optimizer_does_that_is_not_known_is_not_guessed(tmp_path: Path) -> None:
    model = Sequences(lambda groups: RMSprop(groups, lr=0.01))
    fit(tmp_path / "run.h5", model)
    influence = InfluenceModule.attach(model, tmp_path / "run.h5")
    with pytest.raises(ValueError, match=r"training time of layer 'first' is not known: .*captured with RMSprop"):
        influence.scores(list(data()[:2]), damping=TrainingDamping())
    advice = influence.recommend_damping()
    assert advice.damping == DEFAULT_DAMPING
    assert "first, last were trained" in advice.reason


@pytest.mark.filterwarnings("ignore")
def test_a_resumed_run_does_not_know_how_long_it_was_trained(tmp_path: Path) -> None:
    make = lambda groups: SGD(groups, lr=0.1)  # noqa: E731
    fit(tmp_path / "run.h5", Sequences(make))
    model = Sequences(make)
    fit(tmp_path / "run.h5", model, epochs_run=EPOCHS + 1, loaded=str(tmp_path / "run.ckpt"))
    found = layers_of(tmp_path / "run.h5", model)["first"]
    assert found["stopping"] is None
    assert found["decay"] == pytest.approx(S * DECAY, rel=1e-5)


def test_a_capture_without_training_says_nothing(tmp_path: Path) -> None:
    model = Sequences(lambda groups: SGD(groups, lr=0.1))
    capture(model, DataLoader(data(), batch_size=BATCH), tmp_path / "run.h5")
    with pytest.raises(ValueError, match="does not say how its layers were trained"):
        InfluenceModule.attach(model, tmp_path / "run.h5").scores(list(data()[:2]), damping=TrainingDamping())
