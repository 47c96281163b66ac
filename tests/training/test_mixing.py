"""Training that mixes examples is refused, and training that does not is left in peace."""

import random
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset
from torch.utils.data import default_collate as collate

from lightning_influence.errors import UnsupportedTrainingError
from lightning_influence.layers import track_layers
from lightning_influence.step import StepCapture
from lightning_influence.training.asking import copied
from lightning_influence.training.layout import ask_copy, find_batch_dims
from lightning_influence.training.mixed_targets import Mixing, find_mixed_targets
from lightning_influence.training.mixing import check_mixing, find_mixing
from tests.integration.models import Mlp, PositionsFirst, Task, position_data, token_data, train, vector_data

BATCH = 8
Augment = Callable[[Tensor], Tensor]


class Asks(Callback):
    """Asks about an epoch's first batch, as capture does."""

    def __init__(self, *, at_epoch: int = 0, checks: bool = False) -> None:
        self.at_epoch, self.checks = at_epoch, checks
        self.found: Mixing | None = None
        self.targets: Mixing | None = None
        self.error: UnsupportedTrainingError | None = None

    def on_train_batch_start(self, trainer: Any, model: Any, batch: Any, batch_idx: int) -> None:
        self._is_first = batch_idx == 0 and trainer.current_epoch == self.at_epoch
        if self._is_first:
            self._batch, self._layers = copied(batch), track_layers(model, None)[0]
            self._capture = StepCapture(self._layers, loss="sum").__enter__()

    def on_after_backward(self, trainer: Any, model: Any) -> None:
        if self._is_first:
            self._capture.__exit__()

    def on_train_batch_end(self, trainer: Any, model: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if not self._is_first:
            return
        batch, n = self._batch, len(self._batch[0])
        ask = partial(ask_copy, trainer, model, self._layers)
        layers, _ = find_batch_dims(self._layers, self._capture.shapes(), batch, (n,), ask)
        self.found = find_mixing(trainer, model, layers, batch, n)
        self.targets = find_mixed_targets(batch, n)
        if self.checks:
            try:
                check_mixing(trainer, model, layers, batch, n)
            except UnsupportedTrainingError as error:
                self.error = error


class Mixed(Task):
    """A step with an augmentation of the batch before the net."""

    def __init__(self, net: nn.Module, augment: Augment, **options: Any) -> None:
        super().__init__(net, **options)
        self.augment = augment

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        inputs, targets = batch
        return super().training_step((self.augment(inputs) if self.training else inputs, targets), batch_idx)


def asked(
    model: LightningModule, data: Dataset, batch_size: int = BATCH, *, seed: int = 0, **options: Any
) -> Mixing | None:
    """What is found in a run's first batch."""
    asks = Asks()
    torch.manual_seed(seed)
    train(model, data, asks, batch_size=batch_size, max_steps=1, **options)
    return asks.found


def image_data(n: int = 16) -> TensorDataset:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(n, 2, 6, 6, generator=generator)
    return TensorDataset(images, torch.randint(0, 3, (n,), generator=generator))


def conv_net(norm: Callable[[int], nn.Module] = nn.Identity) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(2, 4, 3), norm(4), nn.ReLU(), nn.Conv2d(4, 4, 3), norm(4), nn.Flatten(), nn.Linear(16, 3)
    )


def with_permutation(x: Tensor) -> Tensor:
    share = float(np.random.beta(1.0, 1.0))
    return share * x + (1 - share) * x[torch.randperm(len(x))]


def with_flip(x: Tensor) -> Tensor:
    """As timm does, in place."""
    flipped = x.flip(0).mul_(0.3)
    return x.mul_(0.7).add_(flipped)


def with_one_for_each(x: Tensor) -> Tensor:
    share = torch.rand(len(x), *[1] * (x.ndim - 1))
    return share * x + (1 - share) * x.roll(1, 0)


def with_independent_partners(x: Tensor) -> Tensor:
    return 0.5 * x + 0.5 * x[torch.randint(len(x), (len(x),))]


def half_of_the_time(x: Tensor) -> Tensor:
    return with_permutation(x) if random.random() < 0.5 else x


def cutmix(x: Tensor) -> Tensor:
    top, left = random.randrange(3), random.randrange(3)
    mixed = x.clone()
    mixed[..., top : top + 3, left : left + 3] = x[torch.randperm(len(x)), ..., top : top + 3, left : left + 3]
    return mixed


def assert_refused(found: Mixing | None) -> None:
    assert found is not None
    assert found.is_certain, found.text
    assert "makes rows of several examples" in found.text


@pytest.mark.parametrize(
    "augment",
    [with_permutation, with_flip, with_one_for_each, with_independent_partners, half_of_the_time],
)
@pytest.mark.parametrize("batch_size", [4, 15])
def test_mixup_in_the_step_is_found(augment: Augment, batch_size: int) -> None:
    assert_refused(asked(Mixed(Mlp(), augment), vector_data(48), batch_size))


def test_mixup_is_found_whatever_the_first_batch_is() -> None:
    for seed in range(3):
        assert_refused(asked(Mixed(Mlp(), half_of_the_time), vector_data(24), seed=seed))


@pytest.mark.parametrize("augment", [cutmix, with_permutation])
@pytest.mark.parametrize("norm", [nn.Identity, nn.BatchNorm2d])
def test_mixed_images_are_found(augment: Augment, norm: Callable[[int], nn.Module]) -> None:
    assert_refused(asked(Mixed(conv_net(norm), augment), image_data()))


class ManifoldMixup(Task):
    """Mixes what the first layer makes."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        inputs, targets = batch
        hidden = with_permutation(torch.tanh(self.net.first(inputs)))
        return self.loss(self.net.last(torch.tanh(self.net.middle(hidden))), targets)


def test_mixing_at_a_hidden_layer_names_the_layer_after_it() -> None:
    found = asked(ManifoldMixup(Mlp()), vector_data())
    assert_refused(found)
    assert found is not None
    assert "layer 'net.middle'" in found.text


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "64-true"])
def test_mixup_is_found_in_other_precisions(precision: str) -> None:
    def mix(x: Tensor) -> Tensor:
        return 0.6 * x + 0.4 * x.flip(0)

    assert_refused(asked(Mixed(Mlp(), mix), vector_data(), precision=precision))
    assert asked(Mixed(Mlp(), nn.Dropout()), vector_data(), precision=precision) is None


@pytest.mark.parametrize("part", ["whole", "net", "in place"])
def test_mixup_is_found_in_compiled_models(part: str) -> None:
    model = Mixed(Mlp(), with_flip)
    if part == "net":
        model.net = torch.compile(model.net, backend="eager")
    elif part == "in place":
        model.net.compile(backend="eager")
    assert_refused(asked(torch.compile(model, backend="eager") if part == "whole" else model, vector_data()))


def test_mixing_in_batches_of_two_is_a_suspicion() -> None:
    found = asked(Mixed(Mlp(), with_flip), vector_data(), 2)
    assert found is not None
    assert not found.is_certain


def test_a_batch_of_one_is_no_question() -> None:
    assert asked(Mixed(Mlp(), with_flip), vector_data(), 1) is None


class MixesUntil(Mixed):
    """Turns the augmentation off in the last epoch."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        if self.current_epoch < self.trainer.max_epochs - 1:
            return super().training_step(batch, batch_idx)
        return Task.training_step(self, batch, batch_idx)


def test_mixing_that_is_off_in_the_captured_epoch_is_no_reason() -> None:
    first, last = Asks(), Asks(at_epoch=1)
    train(MixesUntil(Mlp(), with_flip), vector_data(), first, last, batch_size=BATCH, max_epochs=2)
    assert_refused(first.found)
    assert last.found is None


# No false alarms.


class Attending(nn.Module):
    """A transformer's layer with dropout, over positions."""

    def __init__(self, *, batch_first: bool) -> None:
        super().__init__()
        self.batch_first = batch_first
        self.first = nn.Linear(5, 8)
        self.block = nn.TransformerEncoderLayer(8, 2, 16, batch_first=batch_first)
        self.attention = nn.MultiheadAttention(8, 2, dropout=0.1, batch_first=batch_first)
        self.last = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        mask = x[..., 0] > 1  # [n, s]
        mask[:, 0] = False
        hidden = self.block(self.first(x if self.batch_first else x.transpose(0, 1)), src_key_padding_mask=mask)
        hidden, _ = self.attention(hidden, hidden, value=hidden, key_padding_mask=mask)
        return self.last(hidden).mean(int(self.batch_first))


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.body, self.last = (
            nn.Linear(5, 4),
            nn.LSTM(4, 4, num_layers=2, dropout=0.2),
            nn.Linear(4, 3),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.body(self.first(x.transpose(0, 1)))[0][-1])


class Masked(nn.Module):
    """Tokens with padding, each in its position, as in a language model."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(7, 6, padding_idx=0), nn.Embedding(6, 6)
        self.norm, self.dropout, self.last = nn.LayerNorm(6), nn.Dropout(0.1), nn.Linear(6, 7)

    def forward(self, tokens: Tensor) -> Tensor:
        embedded = self.tokens(tokens) + self.positions(torch.arange(tokens.shape[1]))
        scores = (embedded @ embedded.transpose(1, 2)).masked_fill(tokens[:, None] == 0, -1e9)
        hidden = scores.softmax(-1) @ embedded
        return self.last(self.dropout(self.norm(hidden))).transpose(1, 2)  # [n, classes, s]


def with_noise(x: Tensor) -> Tensor:
    return x + 0.1 * torch.randn_like(x)


def dropped(x: Tensor) -> Tensor:
    return F.dropout(x, 0.5)


def cropped(x: Tensor) -> Tensor:
    top, left = np.random.randint(3), random.randrange(3)
    return F.pad(x[..., top : top + 4, left : left + 4], (1, 1, 1, 1))


def flipped_each(x: Tensor) -> Tensor:
    return torch.where((torch.rand(len(x)) < 0.5)[:, None, None, None], x.flip(-1), x)


def erased_where_large(x: Tensor) -> Tensor:
    """Draws as many numbers as the data say."""
    x = x.clone()
    x[x > 1] = torch.rand(int((x > 1).sum()))
    return x


def assert_no_alarm(model: Callable[[Augment], LightningModule], augment: Augment, *data: Any) -> None:
    """Nothing is found, and it would be, if there were something."""
    assert asked(model(augment), *data) is None
    assert_refused(asked(model(lambda x: with_flip(augment(x))), *data))


@pytest.mark.parametrize("augment", [nn.Identity(), with_noise, dropped])
@pytest.mark.parametrize("batch_size", [4, 5])  # there are 5 features and 4 units
def test_augmenting_each_vector_by_itself_is_no_mixing(augment: Augment, batch_size: int) -> None:
    assert_no_alarm(partial(Mixed, Mlp()), augment, vector_data(), batch_size)


@pytest.mark.parametrize("augment", [cropped, flipped_each])
@pytest.mark.parametrize("norm", [nn.BatchNorm2d, partial(nn.GroupNorm, 2), nn.InstanceNorm2d])
def test_augmenting_each_image_by_itself_is_no_mixing(augment: Augment, norm: Callable[[int], nn.Module]) -> None:
    assert_no_alarm(partial(Mixed, conv_net(norm)), augment, image_data(), 4)


@pytest.mark.parametrize("batch_size", [4, 6])  # there are 6 positions
@pytest.mark.parametrize(
    "net", [partial(Attending, batch_first=True), partial(Attending, batch_first=False), Recurrent, PositionsFirst]
)
def test_nets_over_positions_are_no_mixing(net: Callable[[], nn.Module], batch_size: int) -> None:
    assert_no_alarm(partial(Mixed, net()), nn.Identity(), position_data(), batch_size)


def test_draws_that_depend_on_the_data_are_not_judged() -> None:
    for augment in (erased_where_large, lambda x: with_flip(erased_where_large(x))):
        assert asked(Mixed(Mlp(), augment), vector_data()) is None


@pytest.mark.parametrize("batch_size", [4, 6, 7])  # there are 6 positions and 7 tokens
def test_masked_tokens_are_no_mixing(batch_size: int) -> None:
    def swapped(tokens: Tensor) -> Tensor:
        return torch.where(torch.arange(6) < 3, tokens, tokens.flip(0))

    assert asked(Task(Masked()), token_data(), batch_size) is None
    assert_refused(asked(Mixed(Masked(), swapped), token_data(), batch_size))


def noise_of_its_own(scale: float) -> Augment:
    """Draws numbers that no global state knows."""
    generator = np.random.default_rng(0)
    return lambda x: x + scale * torch.tensor(generator.normal(size=x.shape)).float()


class OwnNoise(Mixed):
    """Noise of its own, from a generator that is not copied with it."""

    augmentations: ClassVar[dict[float, Augment]] = {scale: noise_of_its_own(scale) for scale in (1e-6, 1.0)}

    def __init__(self, scale: float, augment: Augment) -> None:
        super().__init__(Mlp(), lambda x: OwnNoise.augmentations[scale](augment(x)))


@pytest.mark.parametrize("augment", [nn.Identity(), with_flip])
def test_noise_of_an_unknown_generator_is_not_judged(augment: Augment) -> None:
    assert asked(OwnNoise(1.0, augment), vector_data()) is None


def test_results_that_are_not_reproduced_to_the_last_bit_are_no_mixing() -> None:
    # as with some kernels on a GPU
    assert_no_alarm(partial(OwnNoise, 1e-6), nn.Identity(), vector_data())


# Batches that are coupled, and not mixed.


def centred(x: Tensor) -> Tensor:
    return x - x.mean(0)


def standardized(x: Tensor) -> Tensor:
    return F.batch_norm(x, None, None, training=True)


def over_its_maximum(x: Tensor) -> Tensor:
    return x / x.abs().max()


@pytest.mark.parametrize("augment", [centred, standardized])
@pytest.mark.parametrize("batch_size", [4, 20])
def test_statistics_of_the_batch_are_a_warning(augment: Augment, batch_size: int) -> None:
    asks = Asks(checks=True)
    with pytest.warns(UserWarning, match=r"InfluenceCallback: what layer 'net.first' sees of an example depends"):
        train(Mixed(Mlp(), augment), vector_data(40), asks, batch_size=batch_size)
    assert asks.found is not None
    assert not asks.found.is_certain
    assert asks.error is None


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_statistics_of_the_batch_are_no_mixing_though_they_are_rounded(precision: str) -> None:
    found = asked(Mixed(Mlp(), centred), vector_data(128), 64, precision=precision)
    assert found is None or not found.is_certain


def test_a_maximum_that_one_example_has_is_no_mixing() -> None:
    for seed in range(3):
        found = asked(Mixed(Mlp(), over_its_maximum), vector_data(), 20, seed=seed)
        assert found is None or not found.is_certain


def test_statistics_of_hidden_features_are_no_mixing_though_many_units_are_dead() -> None:
    class Hidden(Task):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            inputs, targets = batch
            hidden = F.relu(centred(self.net.first(inputs)) - 0.3)
            return self.loss(self.net.last(self.net.middle(hidden)), targets)

    found = asked(Hidden(Mlp()), vector_data(64), 32)
    assert found is not None
    assert not found.is_certain


class MixedOutputs(Task):
    """Mixes after all layers."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        inputs, targets = batch
        return self.loss(with_flip(self.net(inputs)), targets)


class Contrastive(Task):
    """Two noisy views of each example must find one another among the batch's."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        inputs, _ = batch
        first, second = (F.normalize(self.net(with_noise(inputs))) for _ in range(2))
        return F.cross_entropy(first @ second.T / 0.1, torch.arange(len(inputs)))


@pytest.mark.parametrize("model", [MixedOutputs, Contrastive])
def test_examples_that_only_the_loss_puts_together_are_a_warning(model: type[Task]) -> None:
    found = asked(model(Mlp()), vector_data())
    assert found is not None
    assert not found.is_certain
    assert "what `cross_entropy` sees of an example depends on the other examples" in found.text


# What asking leaves behind.


class Counting(Mixed):
    """Keeps state that a further forward would change, and logs."""

    def __init__(self, augment: Augment) -> None:
        torch.manual_seed(5)
        super().__init__(nn.Sequential(nn.BatchNorm1d(5), nn.Dropout(0.2), Mlp()), augment)
        self.register_buffer("calls", torch.zeros(()))
        self.logged: list[float] = []
        self.optimizer = lambda parameters: torch.optim.Adam(parameters, 0.1)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.calls += 1
        self.logged.append(float(self.calls))
        loss = super().training_step(batch, batch_idx)
        self.log("loss", loss)
        return loss


@pytest.mark.filterwarnings("ignore:.*InfluenceCallback")
@pytest.mark.parametrize("augment", [with_noise, half_of_the_time, centred])
def test_asking_leaves_training_bit_identical(augment: Augment) -> None:
    states, models, logged = [], [], []
    for callbacks in ([Asks()], []):
        model = Counting(augment)
        for seed in (torch.manual_seed, np.random.seed, random.seed):
            seed(11)
        trainer = train(model, vector_data(), *callbacks, max_epochs=2)
        states.append((torch.get_rng_state().tolist(), np.random.get_state()[1].tolist(), random.getstate()))
        models.append(model.state_dict())
        logged.append((model.logged, trainer.logged_metrics))
        assert not model.net[2].first._forward_pre_hooks
    assert all(map(torch.equal, models[0].values(), models[1].values()))
    assert states[0] == states[1]
    assert logged[0] == logged[1]


class Talking(Mixed):
    """Talks to other processes in its step."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        if torch.distributed.is_initialized():
            torch.distributed.all_reduce(torch.zeros(1))
        return loss


class NeedsMoreOfItsTrainer(Mixed):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        assert self.trainer.optimizers
        return super().training_step(batch, batch_idx)


def test_a_step_that_cannot_be_asked_is_not_judged() -> None:
    assert asked(NeedsMoreOfItsTrainer(Mlp(), with_flip), vector_data()) is None


def test_a_step_that_talks_to_other_processes_is_not_judged(tmp_path: Path) -> None:
    assert_refused(asked(Talking(Mlp(), with_flip), vector_data()))
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    try:
        assert asked(Talking(Mlp(), with_flip), vector_data()) is None
    finally:
        torch.distributed.destroy_process_group()


# Mixing before the step.


def mixed_by(share: float | None, *, smoothing: float = 0.0, classes: int = 5) -> Callable[[Any], Any]:
    """A collate function as torchvision's `v2.MixUp` makes it, or (None) with a share for each example."""

    def mix(examples: Any) -> tuple[Tensor, Tensor]:
        x, y = collate(examples)
        targets = F.one_hot(y, classes).float()
        targets = targets * (1 - smoothing) + smoothing / classes
        shares = torch.rand(len(x), 1) if share is None else torch.tensor(share)
        return shares * x + (1 - shares) * x.roll(1, 0), shares * targets + (1 - shares) * targets.roll(1, 0)

    return mix


class Soft(Task):
    def __init__(self) -> None:
        super().__init__(nn.Linear(5, 5))


def collated(collate_fn: Callable[[Any], Any], n: int = 24) -> Asks:
    x = vector_data(n).tensors[0]
    asks, data = Asks(checks=True), TensorDataset(x, torch.arange(n) % 5)
    train(Soft(), data, asks, batch_size=12, max_steps=1, loader_options={"collate_fn": collate_fn})
    return asks


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("share", [0.1, 0.3, 0.8])
def test_mixup_in_a_collate_function_is_refused(share: float, smoothing: float) -> None:
    asks = collated(mixed_by(share, smoothing=smoothing))
    assert asks.found is None  # its targets alone give it away
    assert asks.targets is not None
    assert asks.targets.is_certain
    with pytest.raises(UnsupportedTrainingError, match=r"Targets of shape \(12, 5\) .* Turn the mixing off"):
        raise asks.error  # type: ignore[misc]


def test_shares_that_differ_between_examples_are_a_warning() -> None:
    with pytest.warns(UserWarning, match="InfluenceCallback: Targets of shape .* If so, rows are wrong"):
        asks = collated(mixed_by(None))
    assert asks.targets is not None
    assert not asks.targets.is_certain


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_unmixed_targets_are_no_mixing(smoothing: float) -> None:
    assert collated(mixed_by(1.0, smoothing=smoothing)).targets is None


@pytest.mark.parametrize(
    "targets",
    [
        torch.softmax(torch.randn(8, 5, generator=torch.Generator().manual_seed(0)), 1),
        torch.softmax(torch.randn(8, 3, generator=torch.Generator().manual_seed(0)), 1),
        torch.tensor([[0.3, 0.7]] * 8),
        torch.tensor([[1.0, 1.0, 0.0]] * 8),
        torch.tensor([[0.5, 1.0, -0.5]] * 8),
        torch.full((8, 4), 0.25),
        torch.tensor([[0.5, 0.25, 0.25, 0.0]] * 8),
        torch.full((8, 4), torch.nan),
        torch.tensor([[0.3, 0.7, 0.0]] * 4),
        torch.zeros(8, 0),
        torch.zeros(8, 3, 4),
        torch.eye(8, dtype=torch.long),
    ],
)
def test_other_numbers_in_a_batch_are_no_mixed_targets(targets: Tensor) -> None:
    assert find_mixed_targets({"x": torch.randn(8, 5), "targets": [targets]}, 8) is None


def test_labels_of_two_annotators_are_a_suspicion_and_no_more() -> None:
    targets = torch.tensor([[0.5, 0.5, 0, 0], [0.5, 0, 0.5, 0], [0, 0, 0.5, 0.5], [0, 0.5, 0, 0.5]])
    found = find_mixed_targets((torch.zeros(4, 2), targets), 4)
    assert found is not None
    assert not found.is_certain


def test_a_main_and_a_second_label_are_a_suspicion_and_no_more() -> None:
    targets = 0.75 * F.one_hot(torch.tensor([0, 0, 0, 1]), 4) + 0.25 * F.one_hot(torch.tensor([1, 2, 3, 2]), 4)
    found = find_mixed_targets((torch.zeros(4, 2), targets), 4)
    assert found is not None
    assert not found.is_certain
