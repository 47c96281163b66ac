"""Training is the same to the last bit with and without the callback, and nothing is left behind.

Each case trains twice from the same seed. Everything that training makes is compared for equality;
there is no tolerance.
"""

from __future__ import annotations

import copy
import csv
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import _get_current_function_mode_stack
from torch.utils.data import BatchSampler, DataLoader, Dataset, RandomSampler
from torchmetrics.classification import MulticlassAccuracy

from lightning_influence import InfluenceCallback
from lightning_influence.store import StoreReader
from tests.integration.models import (
    Checkpointed,
    Dropping,
    Loss,
    ManualTask,
    Mlp,
    Task,
    float16,
    seeded,
    token_data,
    vector_data,
)
from tests.integration.nets import SmallConvNet, SmallTransformer
from tests.reference.models import TokenModel

SGD = partial(torch.optim.SGD, lr=0.1, momentum=0.9)
ADAMW = partial(torch.optim.AdamW, lr=0.01)
EPOCHS = 3


def token_mean(outputs: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(outputs.transpose(1, 2), targets)


class LoggingTask(Task):
    """Logs its loss each step and each epoch, a metric object, and a validation loss."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.accuracy = MulticlassAccuracy(3)

    def training_step(self, batch: Sequence[Tensor], batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        self.log("loss", loss, on_step=True, on_epoch=True, prog_bar=True)
        if batch[1].ndim == 1:
            self.accuracy(self.net(batch[0]).detach(), batch[1])
            self.log("accuracy", self.accuracy, on_step=False, on_epoch=True)
        return loss

    def validation_step(self, batch: Sequence[Tensor], batch_idx: int) -> None:
        self.log("val_loss", super().training_step(batch, batch_idx))


class ScheduledTask(LoggingTask):
    """A learning rate that changes every step."""

    def configure_optimizers(self) -> Any:
        optimizer = super().configure_optimizers()
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=6 * EPOCHS)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


class LoggingManualTask(ManualTask):
    """The hand-written loop, with a logged step."""

    def training_step(self, batch: Sequence[Tensor], batch_idx: int) -> None:
        super().training_step(batch, batch_idx)
        self.log("rows", float(len(batch[0])))


class Normalised(nn.Module):
    """Batch normalisation, whose running statistics move in every forward."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.relu(self.norm(self.first(x))))


class Augmented(Dataset):
    """Noise from all three global generators on every access."""

    def __init__(self, n: int = 22) -> None:
        self.examples = vector_data(n)

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        x, y = self.examples[index]
        return x + torch.randn(5) + random.random() + float(np.random.rand()), y


class OwnGenerator(Dataset):
    """Noise from a generator that the dataset keeps."""

    def __init__(self, n: int = 22) -> None:
        self.examples, self.generator = vector_data(n), torch.Generator().manual_seed(5)

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        x, y = self.examples[index]
        return x + torch.randn(5, generator=self.generator), y


@dataclass(frozen=True)
class Case:
    """One way of training."""

    net: Callable[[], nn.Module] = Mlp
    loss: Loss = F.cross_entropy
    task: type[LightningModule] = LoggingTask
    optimizer: Callable[..., torch.optim.Optimizer] = SGD
    data: Callable[[], Dataset] = vector_data
    has_validation: bool = False
    loader: dict[str, Any] = field(default_factory=dict)
    trainer: Callable[[], dict[str, Any]] = dict
    callbacks: Callable[[], list[Callback]] = list
    influence: dict[str, Any] = field(default_factory=dict)


def stops_after_two() -> list[Callback]:
    """The loss cannot fall by 100, so training stops after the second epoch."""
    return [EarlyStopping("loss_epoch", min_delta=100.0, patience=1)]


CASES = {
    "plain": Case(),
    "one-epoch": Case(trainer=lambda: {"max_epochs": 1}),
    "adamw": Case(optimizer=ADAMW),
    "dropout-and-in-place-relu": Case(Dropping),
    "batch-norm": Case(Normalised),
    "learning-rate-schedule": Case(task=ScheduledTask),
    "accumulate-and-clip": Case(trainer=lambda: {"accumulate_grad_batches": 4, "gradient_clip_val": 0.1}),
    "bf16-mixed": Case(Dropping, trainer=lambda: {"precision": "bf16-mixed"}),
    "bf16-true": Case(trainer=lambda: {"precision": "bf16-true"}),
    "float16-with-loss-scale": Case(trainer=float16),
    "validation": Case(Dropping, has_validation=True),
    "early-stopping-rolling": Case(Dropping, has_validation=True, callbacks=stops_after_two),
    "sequences-eigen": Case(TokenModel, token_mean, data=token_data, influence={"codec": "eigen"}),
    "sequences-eigen-spooled": Case(
        TokenModel,
        token_mean,
        data=token_data,
        influence={"codec": "eigen"},
        trainer=lambda: {"max_epochs": 1},
    ),
    "sequences-eigen-rolling": Case(
        TokenModel, token_mean, data=token_data, influence={"codec": "eigen"}, callbacks=stops_after_two
    ),
    "augmentation-from-global-generators": Case(data=Augmented),
    "augmentation-rolling": Case(data=Augmented, callbacks=stops_after_two),
    "augmentation-in-2-workers": Case(data=Augmented, loader={"num_workers": 2}),
    "checkpointing": Case(lambda: Checkpointed(use_reentrant=False, dropout=0.5)),
    "checkpointing-reentrant": Case(lambda: Checkpointed(use_reentrant=True, dropout=0.5)),
    "convolutions": Case(SmallConvNet),
    "convolutions-one-epoch": Case(SmallConvNet, trainer=lambda: {"max_epochs": 1}),
    "convolutions-bf16": Case(SmallConvNet, trainer=lambda: {"precision": "bf16-mixed"}),
    "transformer": Case(lambda: SmallTransformer(dropout=0.3), token_mean, data=token_data, optimizer=ADAMW),
    "transformer-rolling": Case(SmallTransformer, token_mean, data=token_data, callbacks=stops_after_two),
    "transformer-bf16": Case(
        SmallTransformer, token_mean, data=token_data, trainer=lambda: {"precision": "bf16-mixed"}
    ),
    "manual-optimization": Case(Dropping, task=LoggingManualTask),
}


@dataclass(frozen=True)
class Run:
    """What one fit made and left."""

    trainer: Trainer
    model: LightningModule
    loader: DataLoader
    logged: list[tuple[str, str, str]]
    checkpoint: dict[str, Any]
    initial: dict[str, Tensor]
    random_states: list[Any]


def fit(case: Case, folder: Path, *callbacks: Callback) -> Run:
    seed_everything(11, verbose=False)
    model = case.task(seeded(case.net), case.loss, case.optimizer)
    initial = copy.deepcopy(model.state_dict())
    loader = DataLoader(case.data(), batch_size=4, shuffle=True, **case.loader)
    options = {"max_epochs": EPOCHS, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = Trainer(
        **{**options, **case.trainer()},
        accelerator="cpu",
        log_every_n_steps=1,
        logger=CSVLogger(folder),
        default_root_dir=folder,
        callbacks=[*case.callbacks(), ModelCheckpoint(folder, filename="last"), *callbacks],
    )
    validation = DataLoader(vector_data(6, seed=9), batch_size=4) if case.has_validation else None
    trainer.fit(model, loader, validation)
    checkpoint = torch.load(folder / "last.ckpt", weights_only=False)
    return Run(trainer, model, loader, logged_values(trainer), checkpoint, initial, random_states())


def logged_values(trainer: Trainer) -> list[tuple[str, str, str]]:
    """(step, key, value) in the order of logging."""
    with (Path(trainer.logger.log_dir) / "metrics.csv").open() as file:
        return [
            (row["step"], key, value)
            for row in csv.DictReader(file)
            for key, value in row.items()
            if key != "step" and value
        ]


def random_states() -> list[Any]:
    return [torch.get_rng_state(), np.random.get_state(legacy=False), random.getstate()]


def differences(first: Any, second: Any, where: str = "") -> Iterator[str]:
    """Places at which two nested values are not equal to the last bit."""
    if isinstance(first, dict) and isinstance(second, dict) and first.keys() == second.keys():
        for key in first:
            yield from differences(first[key], second[key], f"{where}/{key}")
    elif isinstance(first, list | tuple) and isinstance(second, list | tuple) and len(first) == len(second):
        for number, pair in enumerate(zip(first, second, strict=True)):
            yield from differences(*pair, f"{where}/{number}")
    elif isinstance(first, Tensor) and isinstance(second, Tensor):
        if not torch.equal(first, second):
            yield f"{where}: {first} != {second}"
    elif isinstance(first, np.ndarray) and isinstance(second, np.ndarray):
        if not np.array_equal(first, second):
            yield where
    elif type(first) is not type(second) or first != second:
        yield f"{where}: {first!r} != {second!r}"


@pytest.fixture(scope="module", params=CASES.values(), ids=CASES.keys())
def runs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, Run]:
    """The same training, plain and with the callback."""
    folder = tmp_path_factory.mktemp("identity")
    plain = fit(request.param, folder / "plain")
    influence = InfluenceCallback(folder / "influence.h5", on_error="raise", **request.param.influence)
    captured = fit(request.param, folder / "captured", influence)
    store = StoreReader(folder / "influence.h5")  # so there was something to change training with
    assert store.attributes["rows_written"] == 22
    assert store.attributes["epoch"] == captured.trainer.current_epoch - 1
    return plain, captured


def test_weights_and_optimizer_state_are_bit_identical(runs: tuple[Run, Run]) -> None:
    plain, captured = runs
    assert list(differences(plain.model.state_dict(), captured.model.state_dict())) == []
    states = [[optimizer.state_dict() for optimizer in run.trainer.optimizers] for run in runs]
    assert states[0][0]["state"]
    assert list(differences(*states)) == []
    assert list(differences(plain.initial, plain.model.state_dict()))  # training did something


def test_logged_values_are_the_same_at_every_step(runs: tuple[Run, Run]) -> None:
    plain, captured = runs
    ours = [entry for entry in captured.logged if entry[1].startswith("influence/")]
    assert plain.logged
    assert ours
    assert [entry for entry in captured.logged if entry not in ours] == plain.logged
    names = plain.trainer.callback_metrics.keys()
    assert captured.trainer.callback_metrics.keys() == names
    assert list(differences(dict(plain.trainer.callback_metrics), dict(captured.trainer.callback_metrics))) == []


def test_checkpoints_differ_only_in_the_callbacks_own_entry(runs: tuple[Run, Run]) -> None:
    plain, captured = (dict(run.checkpoint) for run in runs)
    callbacks, ours = ({**run.pop("callbacks")} for run in (plain, captured))
    assert len(ours) == len(callbacks) + 1
    assert [key for key in ours if key.startswith("InfluenceCallback")]
    assert list(differences(plain, captured)) == []


def test_random_states_afterwards_are_the_same(runs: tuple[Run, Run]) -> None:
    plain, captured = runs
    assert list(differences(plain.random_states, captured.random_states)) == []


def left_on(owner: Any) -> dict[str, Any]:
    """Attribute names, and how many hooks there are of each kind."""
    hooks = {key: len(value) for key, value in vars(owner).items() if key.endswith("_hooks") and value}
    return {"attributes": sorted(vars(owner)), "hooks": hooks}


def test_nothing_is_left_on_modules_and_parameters(runs: tuple[Run, Run]) -> None:
    plain, captured = ({name: left_on(m) for name, m in run.model.named_modules()} for run in runs)
    assert captured == plain
    for parameter in runs[1].model.parameters():
        assert not parameter._backward_hooks
        assert not parameter._post_accumulate_grad_hooks
        assert parameter.requires_grad
    assert [m.training for m in runs[0].model.modules()] == [m.training for m in runs[1].model.modules()]


def test_only_what_ties_later_checkpoints_to_the_file_is_left(runs: tuple[Run, Run]) -> None:
    plain, captured = runs
    assert vars(captured.trainer.strategy).keys() - vars(plain.trainer.strategy).keys() == {"save_checkpoint"}
    assert vars(plain.trainer.strategy).keys() <= vars(captured.trainer.strategy).keys()
    assert sorted(vars(captured.trainer)) == sorted(vars(plain.trainer))
    for loader in (captured.loader, captured.trainer.train_dataloader):
        assert vars(loader).keys() == vars(plain.loader).keys()
        assert type(loader.batch_sampler) is BatchSampler
        assert type(loader.sampler) is RandomSampler
        assert type(loader.batch_sampler.sampler) is RandomSampler
        assert vars(loader.batch_sampler).keys() == vars(plain.loader.batch_sampler).keys()


def test_no_function_mode_and_no_compiler_stance_is_left(runs: tuple[Run, Run]) -> None:
    assert _get_current_function_mode_stack() == []
    assert torch._dynamo.eval_frame._stance.stance == "default"


def test_a_dataset_with_its_own_generator_is_not_disturbed(tmp_path: Path) -> None:
    case = Case(data=OwnGenerator, callbacks=stops_after_two)
    plain = fit(case, tmp_path / "plain")
    captured = fit(case, tmp_path / "captured", InfluenceCallback(tmp_path / "influence.h5", on_error="raise"))
    assert list(differences(plain.model.state_dict(), captured.model.state_dict())) == []
