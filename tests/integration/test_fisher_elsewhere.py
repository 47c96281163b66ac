"""Labels that the model predicts where training is not one plain process: ranks, compiled models, resumed runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader

from lightning_influence import InfluenceCallback
from lightning_influence.errors import UnsupportedTrainingError
from lightning_influence.store import StoreReader
from tests.integration.models import ManualTask, Task, seeded, stored_factors, train, vector_data
from tests.integration.test_compiled import WAYS
from tests.matrix.processes import ODD, processes
from tests.matrix.running import train as train_situation
from tests.matrix.situation import Net, Situation

MOVING = partial(torch.optim.SGD, lr=0.05)


def factors_of(path: Path) -> dict[str, list[Tensor]]:
    """A and S put together again, and the sum of Lambda: what eigenvectors' signs do not matter to."""
    found = {}
    for name, (basis, Lambda) in stored_factors(path).items():
        A = basis.Q_A @ basis.eigenvalues_A.diag() @ basis.Q_A.T
        S = basis.Q_S @ basis.eigenvalues_S.diag() @ basis.Q_S.T
        found[name] = [A, S, Lambda.sum()]
    return found


def assert_same_factors(path: Path, other: Path, *, rtol: float) -> None:
    found, expected = factors_of(path), factors_of(other)
    assert len(found) == len(expected) > 0
    for factors, others in zip(found.values(), expected.values(), strict=True):
        for one, two in zip(factors, others, strict=True):
            assert (one - two).norm() <= rtol * two.norm()


# %%
# Two ranks


def forked(fisher: str, codec: str) -> Situation:
    options = {"codec": codec, "fisher": fisher, "covariance_positions": None}
    return processes("forked", "ddp_fork", influence=options)


@pytest.mark.ddp
@pytest.mark.parametrize("codec", ["pairs-float32", "eigen"])
def test_two_ranks_have_the_exact_factors_of_one_process(tmp_path: Path, codec: str) -> None:
    """Of 23 examples one rank gets one twice, which counts once."""
    situation = forked("exact", codec)
    alone = replace(situation, trainer=dict, process="this")
    train_situation(alone, tmp_path / "one", is_captured=True, is_still=True)
    train_situation(situation, tmp_path / "two", is_captured=True, is_still=True)
    one, two = tmp_path / "one" / "influence.h5", tmp_path / "two" / "influence.h5"
    attributes = StoreReader(two).attributes
    assert (attributes["fisher"], attributes["processes"], attributes["rows_written"]) == ("exact", 2, ODD)
    assert_same_factors(two, one, rtol=1e-3)  # gradients wait in float16
    expected = StoreReader(one).attributes["effective_samples_S"]
    assert attributes["effective_samples_S"] == pytest.approx(expected, rel=1e-3)


@pytest.mark.ddp
def test_drawing_labels_leaves_training_in_two_ranks_bit_identical(tmp_path: Path) -> None:
    situation = forked("sampled", "pairs-float32")
    runs = [
        train_situation(situation, tmp_path / str(is_captured), is_captured=is_captured, is_still=False)
        for is_captured in (False, True)
    ]
    assert runs[0].digest == runs[1].digest
    assert StoreReader(tmp_path / "True" / "influence.h5").attributes["fisher"] == "sampled"


# %%
# Compiled models


@pytest.mark.parametrize("way", WAYS)
def test_compiled_models_have_the_exact_factors_of_eager_ones(tmp_path: Path, way: str) -> None:
    torch._dynamo.reset()
    for name, wrap in (("eager", None), ("compiled", WAYS[way])):
        task = Task(seeded(Net))
        callback = InfluenceCallback(tmp_path / f"{name}.h5", fisher="exact", codec="eigen", on_error="raise")
        train(task if wrap is None else wrap(task, "aot_eager"), vector_data(), callback, max_epochs=2)
    assert_same_factors(tmp_path / "compiled.h5", tmp_path / "eager.h5", rtol=1e-5)


# %%
# Several epochs, and runs that are resumed


def test_segments_have_factors_each(tmp_path: Path) -> None:
    """At weights that stand still, all the same."""
    callback = InfluenceCallback(
        tmp_path / "x.h5", fisher="exact", epochs="every", trajectory="segments", codec="eigen", on_error="raise"
    )
    train(Task(seeded(Net)), vector_data(), callback, max_epochs=3)
    store = StoreReader(tmp_path / "x.h5")
    assert len(store.segments) == 3
    sums = [store.segment(number).factors(store.layers[0])["Lambda"].sum() for number in store.segments]
    assert sums[1] == pytest.approx(sums[0], rel=1e-3)
    assert sums[2] == pytest.approx(sums[0], rel=1e-3)


class Stop(Callback):
    """An exception in the middle of an epoch, after a checkpoint."""

    def __init__(self, epoch: int, checkpoint: Path) -> None:
        self.epoch, self.checkpoint = epoch, checkpoint

    def on_train_batch_end(self, trainer: Trainer, model: LightningModule, *rest: object) -> None:
        if (trainer.current_epoch, trainer.fit_loop.batch_idx) == (self.epoch, 2):
            trainer.save_checkpoint(self.checkpoint)
            raise KeyboardInterrupt


@pytest.mark.parametrize("stops_in", [1, 2])
def test_a_run_that_is_resumed_has_factors_of_what_it_sees(tmp_path: Path, stops_in: int) -> None:
    """Stopped in the epoch of the bases, no row is lost; in the captured one, sums and rows begin anew."""

    def run(*others: Callback, **fit_options: object) -> None:
        torch.manual_seed(0)
        callback = InfluenceCallback(tmp_path / "x.h5", fisher="exact", codec="eigen", on_error="raise")
        quiet = dict.fromkeys(
            ("logger", "enable_progress_bar", "enable_checkpointing", "enable_model_summary"), False
        )
        trainer = Trainer(max_epochs=3, accelerator="cpu", callbacks=[callback, *others], **quiet)
        trainer.fit(Task(seeded(Net)), DataLoader(vector_data(), batch_size=4), **fit_options)

    checkpoint = tmp_path / "middle.ckpt"
    with pytest.raises(SystemExit):  # as Lightning leaves when it is interrupted
        run(Stop(stops_in, checkpoint))
    run(ckpt_path=checkpoint)
    attributes = StoreReader(tmp_path / "x.h5").attributes
    assert attributes["fisher"] == "exact"
    assert attributes["is_resumed"] == (stops_in == 2)
    assert attributes["rows_missing"] == (10 if stops_in == 2 else 0)  # the loader begins anew, for three batches
    for _, Lambda in stored_factors(tmp_path / "x.h5").values():
        assert (Lambda >= 0).all()
        assert 0 < Lambda.sum() < torch.inf


# %%
# What a model keeps of its own backward


class Skipping(nn.Module):
    """Checkpointed batch normalization that the first steps of a fit leave out, or freeze."""

    def __init__(self, *, freezes: bool) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Linear(4, 3)
        self.freezes, self.calls = freezes, 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += self.training
        is_early = self.training and self.calls <= 4
        self.norm.train(self.training and not (is_early and self.freezes))
        hidden = self.first(x)
        if self.freezes or not is_early:
            hidden = checkpoint(self.norm, hidden, use_reentrant=False)
        return self.last(torch.tanh(hidden))


class RandomLoss(Task):
    """A loss that is computed again in the backward, with noise: so when it is asked for its labels, too."""

    def training_step(self, batch: Sequence[Tensor], batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        return checkpoint(
            lambda x: x + 0 * torch.rand(()) * x, loss, use_reentrant=False, preserve_rng_state=False
        )


class Retaining(Task):
    """Gradients are scaled by that of a hidden tensor, which adds up over backwards."""

    def training_step(self, batch: Sequence[Tensor], batch_idx: int) -> Tensor:
        self.hidden = self.net.first(batch[0]) * 1
        self.hidden.retain_grad()
        return self.loss(self.net.last(self.hidden), batch[1])

    def on_after_backward(self) -> None:
        for parameter in self.parameters():
            if parameter.grad is not None:
                parameter.grad.mul_(1 + self.hidden.grad.norm())


def fitted(make: Callable[[], Task], *callbacks: Callback) -> list[Tensor]:
    """Weights, statistics and the random state after three epochs."""
    torch.manual_seed(0)
    task = make()
    train(task, vector_data(), *callbacks, max_epochs=3)
    return [*task.state_dict().values(), torch.get_rng_state()]


TRAINED = {
    "skipped at first": lambda: Task(Skipping(freezes=False), optimizer=MOVING),
    "frozen at first": lambda: Task(Skipping(freezes=True), optimizer=MOVING),
    "random loss": lambda: RandomLoss(nn.Linear(5, 3), optimizer=MOVING),
    "retained": lambda: Retaining(Skipping(freezes=True), optimizer=MOVING),
}


@pytest.mark.parametrize("fisher", ["sampled", "exact"])
@pytest.mark.parametrize("name", TRAINED)
def test_what_backwards_leave_behind_is_put_back(tmp_path: Path, name: str, fisher: str) -> None:
    options = {"fisher": fisher, "epochs": "every", "trajectory": "segments"}
    callback = InfluenceCallback(tmp_path / "x.h5", on_error="raise", **options)
    assert all(map(torch.equal, fitted(TRAINED[name]), fitted(TRAINED[name], callback)))
    assert StoreReader(tmp_path / "x.h5").attributes["fisher"] == fisher


class Counting(torch.autograd.Function):
    """The identity; its backward keeps a count."""

    runs = 0

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        Counting.runs += 1
        return grad


class WithFunction(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        first, last = self
        return last(Counting.apply(first(x)))


def with_hook() -> nn.Module:
    def count(module: nn.Module, grad_input: object, grad_output: object) -> None:
        Counting.runs += 1

    net = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))
    net[1].register_full_backward_hook(count)
    return net


@pytest.mark.filterwarnings("ignore:InfluenceCallback has stopped")
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: WithFunction(nn.Linear(5, 4), nn.Linear(4, 3)), r"`torch.autograd.Function` 'Counting'"),
        (with_hook, "a full backward hook"),
    ],
)
def test_python_in_the_backward_is_refused_before_it_is_run(
    tmp_path: Path, make: Callable[[], nn.Module], message: str
) -> None:
    Counting.runs = 0
    alone = fitted(lambda: Task(make(), optimizer=MOVING))
    expected, Counting.runs = Counting.runs, 0
    beside = fitted(lambda: Task(make(), optimizer=MOVING), InfluenceCallback(tmp_path / "x.h5", fisher="exact"))
    assert Counting.runs == expected + 1 == 19  # once in a copy of the model, which is asked before training
    assert all(map(torch.equal, alone, beside))
    with pytest.raises(UnsupportedTrainingError, match=message):
        fitted(lambda: Task(make()), InfluenceCallback(tmp_path / "x.h5", fisher="exact", on_error="raise"))
    fitted(lambda: Task(make()), InfluenceCallback(tmp_path / "x.h5", on_error="raise"))
    assert StoreReader(tmp_path / "x.h5").attributes["fisher"] == "empirical"


# %%
# Two callbacks, whose hooks sit on the same layers


@pytest.mark.parametrize("task", [Task, ManualTask])
@pytest.mark.parametrize("kinds", [("empirical", "exact"), ("exact", "empirical"), ("sampled", "exact")])
def test_a_callback_does_not_see_the_label_passes_of_another(
    tmp_path: Path, task: type[Task], kinds: tuple[str, str]
) -> None:
    def fit(folder: str, *fishers: str) -> list[Path]:
        paths = [tmp_path / folder / f"{fisher}.h5" for fisher in fishers]
        options = {"covariance_positions": None, "on_error": "raise"}
        callbacks = [InfluenceCallback(p, fisher=f, **options) for p, f in zip(paths, fishers, strict=True)]
        model = task(nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)), optimizer=MOVING)
        weights = torch.Generator().manual_seed(0)
        for parameter in model.parameters():
            nn.init.normal_(parameter, generator=weights)
        torch.manual_seed(1)
        train(model, vector_data(), *callbacks)
        return paths

    for beside, kind in zip(fit("both", *kinds), kinds, strict=True):
        (alone,) = fit("alone", kind)
        assert_same_factors(beside, alone, rtol=1e-6)
