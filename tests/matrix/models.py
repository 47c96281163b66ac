"""Modules that optimize in other ways, and data that comes in other ways."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_influence.store import StoreReader
from tests.integration.models import ManualTask, Task
from tests.matrix.situation import Net, Run, cross_entropy_sum


class LoggingTask(Task):
    """Logs its loss, for callbacks that watch it; counts up a number that grows with every epoch."""

    def training_step(self, batch: Sequence[Tensor], batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        self.log("loss", loss, on_epoch=True)
        self.log("age", float(self.current_epoch), on_epoch=True, on_step=False)
        return loss

    def validation_step(self, batch: Sequence[Tensor], batch_idx: int) -> None:
        self.log("val_loss", super().training_step(batch, batch_idx))


class StoppingTask(Task):
    """Asks for the end in the second epoch's third batch."""

    def training_step(self, batch: Sequence[Tensor], batch_idx: int) -> Tensor:
        if (self.current_epoch, batch_idx) == (1, 2):
            self.trainer.should_stop = True
        return super().training_step(batch, batch_idx)


class EarlyStoppingTask(Task):
    """Asks for the end in the very first batch."""

    def training_step(self, batch: Sequence[Tensor], batch_idx: int) -> Tensor:
        self.trainer.should_stop = True
        return super().training_step(batch, batch_idx)


class SkippingTask(Task):
    """Returns no loss for the second batch of every epoch."""

    def training_step(self, batch: Sequence[Tensor], batch_idx: int) -> Tensor | None:
        return None if batch_idx == 1 else super().training_step(batch, batch_idx)


class LBFGSTask(Task):
    """Its optimizer calls the closure several times a step."""

    def configure_optimizers(self) -> Any:
        return torch.optim.LBFGS(self.parameters(), lr=0.01, max_iter=3)


class TwoOptimizersTask(ManualTask):
    """One backward, whose gradients two optimizers apply to parts of the net."""

    def training_step(self, batch: Sequence[Tensor], batch_idx: int) -> None:
        inputs, targets = batch
        for optimizer in self.optimizers():
            optimizer.zero_grad()
        self.manual_backward(self.loss(self.net(inputs), targets))
        for optimizer in self.optimizers():
            optimizer.step()

    def configure_optimizers(self) -> Any:
        layers = list(self.net.children())
        return [self.optimizer(layer.parameters()) for layer in layers]


class Adversaries(nn.Module):
    """A generator, and a judge that tells what it makes from parts of the inputs, the real things."""

    def __init__(self) -> None:
        super().__init__()
        self.generator, self.judge = Net(), nn.Linear(3, 1)

    def forward(self, x: Tensor) -> Tensor:
        """What the fixed judge says of the fakes, and the judge of the real and of the fixed fakes, [n, 3]."""
        fakes = self.generator(x)
        fixed = F.linear(fakes, self.judge.weight.detach(), self.judge.bias.detach())
        return torch.cat([fixed, self.judge(x[:, :3]), self.judge(fakes.detach())], dim=1)


def both_losses(opinions: Tensor, targets: Tensor) -> Tensor:
    """Of the generator and of the judge, each a mean over the examples."""
    return sum(_deceived(opinions[:, [each]], wanted) for each, wanted in enumerate((1.0, 1.0, 0.0)))  # type: ignore


def both_losses_sum(opinions: Tensor, targets: Tensor) -> Tensor:
    """The same of one example."""
    return both_losses(opinions, targets)


def _deceived(opinion: Tensor, wanted: float) -> Tensor:
    return F.binary_cross_entropy_with_logits(opinion, torch.full_like(opinion, wanted))


class UntoggledTask(ManualTask):
    """The two train in turn, each with its own loss, backward and optimizer in every batch."""

    net: Adversaries

    def training_step(self, batch: Sequence[Tensor], batch_idx: int) -> None:
        inputs, _ = batch
        generator, judge = self.optimizers()
        with self.toggled(generator):
            self._step(generator, _deceived(self.net.judge(self.net.generator(inputs)), 1.0))
        with self.toggled(judge):
            real = _deceived(self.net.judge(inputs[:, :3]), 1.0)
            self._step(judge, real + _deceived(self.net.judge(self.net.generator(inputs).detach()), 0.0))

    def toggled(self, optimizer: Any) -> AbstractContextManager[None]:
        """Nothing is frozen."""
        return contextlib.nullcontext()

    def _step(self, optimizer: Any, loss: Tensor) -> None:
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()

    def configure_optimizers(self) -> Any:
        return [self.optimizer(each.parameters()) for each in (self.net.generator, self.net.judge)]


class AdversarialTask(UntoggledTask):
    """Only the parameters of the optimizer whose turn it is are trainable."""

    @contextlib.contextmanager
    def toggled(self, optimizer: Any) -> Iterator[None]:
        self.toggle_optimizer(optimizer)
        yield
        self.untoggle_optimizer(optimizer)


def the_judge_is_left_out(run: Run) -> str:
    """Both backwards reach it."""
    layers = StoreReader(run.path).layers
    return "" if "net.judge" not in layers and "net.generator.first" in layers else f"the layers are {layers}"


class MixupTask(Task):
    """Trains on mixtures of two examples."""

    def training_step(self, batch: Sequence[Tensor], batch_idx: int) -> Tensor:
        inputs, targets = batch
        other = torch.randperm(len(inputs))
        outputs = self.net(0.7 * inputs + 0.3 * inputs[other])
        return 0.7 * self.loss(outputs, targets) + 0.3 * self.loss(outputs, targets[other])


class Normalised(nn.Module):
    """With batch statistics, which examples share."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.relu(self.norm(self.first(x))))


def two_terms(outputs: Tensor, targets: Tensor) -> Tensor:
    """Two losses of a batch, both means over the examples."""
    return F.cross_entropy(outputs, targets) + 0.5 * F.cross_entropy(2 * outputs, targets)


def two_terms_sum(outputs: Tensor, targets: Tensor) -> Tensor:
    """The same of one example."""
    return cross_entropy_sum(outputs, targets) + 0.5 * cross_entropy_sum(2 * outputs, targets)


class CompiledNetTask(Task):
    """Its net is compiled, and its layers' names say so."""

    def __init__(self, net: nn.Module, *args: Any) -> None:
        super().__init__(torch.compile(net, backend="eager"), *args)


class CompiledLayerTask(Task):
    """One layer of its net is compiled."""

    def __init__(self, net: Net, *args: Any) -> None:
        net.middle = torch.compile(net.middle, backend="eager")
        super().__init__(net, *args)


class CompiledInPlaceTask(Task):
    """Its net is compiled by `Module.compile`."""

    def __init__(self, net: nn.Module, *args: Any) -> None:
        net.compile(backend="eager")
        super().__init__(net, *args)


def compiled(model: LightningModule) -> Any:
    """The whole `LightningModule`."""
    return torch.compile(model, backend="eager")
