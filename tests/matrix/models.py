"""Modules that optimize in other ways, and data that comes in other ways."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.nn import functional as F

from tests.integration.models import ManualTask, Task
from tests.matrix.situation import Net, cross_entropy_sum


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


class AdversarialTask(ManualTask):
    """A generator and a discriminator, each with its own loss, backward and optimizer in every batch."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.judge = nn.Linear(3, 1)

    def training_step(self, batch: Sequence[Tensor], batch_idx: int) -> None:
        inputs, targets = batch
        generator, discriminator = self.optimizers()
        self._step(generator, self._judged(self.net(inputs), 1.0))
        real = self._judged(F.one_hot(targets, 3).to(inputs), 1.0)
        self._step(discriminator, real + self._judged(self.net(inputs).detach(), 0.0))

    def _judged(self, outputs: Tensor, wanted: float) -> Tensor:
        opinion = self.judge(outputs)
        return F.binary_cross_entropy_with_logits(opinion, torch.full_like(opinion, wanted))

    def _step(self, optimizer: Any, loss: Tensor) -> None:
        self.toggle_optimizer(optimizer)
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()
        self.untoggle_optimizer(optimizer)

    def configure_optimizers(self) -> Any:
        return [self.optimizer(self.net.parameters()), self.optimizer(self.judge.parameters())]


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
