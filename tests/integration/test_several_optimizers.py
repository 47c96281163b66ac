"""Several optimizers: each layer's rows are gradients of the one loss that its optimizer applies."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_influence import InfluenceCallback, InfluenceModule
from lightning_influence.errors import LayerError, UnsupportedTrainingError
from lightning_influence.store import StoreReader
from tests.integration.lifecycle_models import CLASSES, FEATURES, Classifier, N, dataset, fit, loader
from tests.integration.models import stored_factors, stored_gradients
from tests.reference.factors import eigenvalue_correction
from tests.reference.gradients import per_example_gradients

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*the stored rows are coarse"),
    pytest.mark.filterwarnings("ignore:.*rows aged within the epoch"),
]
HIDDEN = 4
G_LAYERS, D_LAYERS = ["generator.0", "generator.2"], ["discriminator.0", "discriminator.2"]


class Gan(Classifier):
    """The generator turns features into what the discriminator takes for a label's."""

    def __init__(self, rate: float = 0.0, order: str = "gd") -> None:
        super().__init__(rate)
        self.automatic_optimization = False
        del self.layers
        self.generator = nn.Sequential(nn.Linear(FEATURES, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, CLASSES))
        self.discriminator = nn.Sequential(nn.Linear(CLASSES, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, 1))
        self.order = order

    def generator_loss(self, x: Tensor, y: Tensor) -> Tensor:
        return self._judged(self.generator(x), 1.0)

    def discriminator_loss(self, x: Tensor, y: Tensor) -> Tensor:
        real = self._judged(F.one_hot(y, CLASSES).to(x), 1.0)
        return real + self._judged(self.generator(x).detach(), 0.0)

    def training_step(self, batch: Any, batch_idx: int) -> None:
        generator, discriminator = self.optimizers()
        for turn in self.order:
            if turn == "g":
                self.apply_loss(generator, self.generator_loss, batch)
            else:
                self.apply_loss(discriminator, self.discriminator_loss, batch)

    def apply_loss(self, optimizer: Any, loss: Any, batch: Any) -> None:
        self.toggle_optimizer(optimizer)
        optimizer.zero_grad()
        self.manual_backward(loss(*batch))
        optimizer.step()
        self.untoggle_optimizer(optimizer)

    def configure_optimizers(self) -> Any:
        parts = self.generator, self.discriminator
        return [torch.optim.SGD(part.parameters(), lr=self.learning_rate) for part in parts]

    def _judged(self, outputs: Tensor, wanted: float) -> Tensor:
        opinion = self.discriminator(outputs)
        return F.binary_cross_entropy_with_logits(opinion, torch.full_like(opinion, wanted))


class Untoggled(Gan):
    """The generator's backward also reaches the discriminator, whose gradients are then dropped."""

    def apply_loss(self, optimizer: Any, loss: Any, batch: Any) -> None:
        optimizer.zero_grad()
        self.manual_backward(loss(*batch))
        optimizer.step()


class TwoOptimizers(Classifier):
    """One backward; each optimizer applies its layer's gradients."""

    def __init__(self, rate: float = 0.0) -> None:
        super().__init__(rate)
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        for optimizer in self.optimizers():
            optimizer.zero_grad()
        self.manual_backward(super().training_step(batch, batch_idx))
        for optimizer in self.optimizers():
            optimizer.step()

    def configure_optimizers(self) -> Any:
        layers = self.layers[0], self.layers[2]
        return [torch.optim.SGD(layer.parameters(), lr=self.learning_rate) for layer in layers]


def train(folder: Path, model: Classifier, codec: Any = "pairs-float32", **options: Any) -> Path:
    path = folder / "influence.h5"
    capture = InfluenceCallback(path, codec=codec, on_error="raise")
    fit(folder, model, loader(), capture, **options)
    return path


def truth(model: Gan) -> dict[str, Tensor]:
    """By layer, each example's gradient of its own optimizer's loss, in float64."""
    examples = [dataset()[n] for n in range(N)]

    def gradients(loss: str, layers: list[str]) -> dict[str, Tensor]:
        def of_one(module: nn.Module, example: tuple[Tensor, Tensor]) -> Tensor:
            return getattr(module, loss)(example[0][None], example[1][None])

        return per_example_gradients(model, examples, of_one, layers)

    return gradients("generator_loss", G_LAYERS) | gradients("discriminator_loss", D_LAYERS)


def assert_rows_are(path: Path, true: dict[str, Tensor], codec: str = "pairs-float32") -> None:
    stored = stored_gradients(path)
    assert stored.keys() == true.keys()
    for name, gradient in true.items():
        error = (stored[name].double() - gradient).norm() / gradient.norm()
        assert error < (1e-5 if codec != "eigen" else 0.02), name  # int8


@pytest.mark.parametrize("order", ["gd", "dg"])
@pytest.mark.parametrize("codec", ["pairs-float32", "eigen"])
def test_each_part_of_a_gan_has_the_gradients_of_its_own_loss(tmp_path: Path, codec: str, order: str) -> None:
    model = Gan(order=order)
    path, true = train(tmp_path, model, codec), truth(model)
    assert StoreReader(path).column("written").all()
    assert_rows_are(path, true, codec)
    for name, gradients in true.items():
        basis, Lambda = stored_factors(path)[name]
        expected = eigenvalue_correction(gradients, basis.Q_A, basis.Q_S)
        torch.testing.assert_close(Lambda, expected, rtol=1e-3, atol=1e-4 * float(expected.max()))


@pytest.mark.parametrize("model", [partial(Gan, 0.1), partial(Untoggled, 0.1), partial(TwoOptimizers, 0.1)])
@pytest.mark.parametrize("codec", ["pairs-float32", "eigen"])
def test_training_with_several_optimizers_is_bit_identical(tmp_path: Path, model: Any, codec: Any) -> None:
    captured, alone = model(), model()
    train(tmp_path, captured, codec)
    fit(tmp_path, alone, loader())
    assert all(map(torch.equal, captured.state_dict().values(), alone.state_dict().values()))


def test_a_gan_is_asked_by_a_measurement(tmp_path: Path) -> None:
    model = Gan()
    module = InfluenceModule.attach(model, train(tmp_path, model))
    batch = next(iter(loader()))

    def measurement(module: Gan, batch: Any) -> Tensor:
        opinion = module.discriminator(module.generator(batch[0]))
        return F.binary_cross_entropy_with_logits(opinion, torch.ones_like(opinion), reduction="none")[:, 0]

    module = InfluenceModule.attach(model, module.store)
    scores = module.scores(batch, measurement=measurement)
    assert scores.shape == (len(batch[0]), N)
    assert scores.isfinite().all()


def test_layers_that_two_backwards_reach_are_left_out_with_what_to_do(tmp_path: Path) -> None:
    model = Untoggled()
    said = r"(?s)discriminator\.0 .*set to zero before an optimizer applies.*toggle_optimizer"
    with pytest.warns(UserWarning, match=said):
        path = train(tmp_path, model)
    assert_rows_are(path, {name: gradients for name, gradients in truth(model).items() if name in G_LAYERS})
    coverage = StoreReader(path).document("coverage")
    assert [each["name"] for each in coverage if not each["covered"]] == D_LAYERS


def test_a_second_backward_in_the_captured_epoch_alone_is_refused(tmp_path: Path) -> None:
    class Later(Gan):
        def apply_loss(self, optimizer: Any, loss: Any, batch: Any) -> None:
            own = Gan.apply_loss if self.current_epoch == 0 else Untoggled.apply_loss
            own(self, optimizer, loss, batch)

    with pytest.raises(
        LayerError,
        match=r"'discriminator\.\d'.*set to zero before an optimizer applies.*not so in the first batch",
    ):
        train(tmp_path, Later())
    assert not (tmp_path / "influence.h5").exists()


def test_two_optimizers_after_one_backward_have_all_layers(tmp_path: Path) -> None:
    model = TwoOptimizers()
    path, examples = train(tmp_path, model), [dataset()[n] for n in range(N)]

    def loss(module: nn.Module, example: tuple[Tensor, Tensor]) -> Tensor:
        return F.cross_entropy(module(example[0][None]), example[1][None])

    assert_rows_are(path, per_example_gradients(model, examples, loss, ["layers.0", "layers.2"]))


class Halved(Gan):
    """The discriminator's loss is a mean of two, unlike the generator's."""

    def discriminator_loss(self, x: Tensor, y: Tensor) -> Tensor:
        return super().discriminator_loss(x, y) / 2


@pytest.mark.parametrize("order", ["gd", "dg"])
def test_the_loss_of_layers_that_are_not_asked_for_is_no_part_of_the_others_scale(
    tmp_path: Path, order: str
) -> None:
    """Rows hold the summed loss of real and made inputs: the constant 1/2 is divided out."""
    path, model = tmp_path / "influence.h5", Halved(order=order)
    capture = InfluenceCallback(path, codec="pairs-float32", layers=["discriminator.*"], on_error="raise")
    fit(tmp_path, model, loader(), capture)
    stored, true = stored_gradients(path), truth(Gan(order=order))
    assert list(stored) == D_LAYERS
    for name in D_LAYERS:
        torch.testing.assert_close(stored[name].double(), true[name], rtol=1e-5, atol=1e-7)


class Joined(Gan):
    """The discriminator sees real and made inputs in one call, so it has two rows an example."""

    def discriminator_loss(self, x: Tensor, y: Tensor) -> Tensor:
        inputs = torch.cat([F.one_hot(y, CLASSES).to(x), self.generator(x).detach()])
        wanted = torch.cat([torch.ones(len(x), 1), torch.zeros(len(x), 1)])
        return F.binary_cross_entropy_with_logits(self.discriminator(inputs), wanted)


def test_a_layer_with_two_rows_an_example_is_left_out_and_the_others_are_kept(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=r"(?s)discriminator\.0 .*it saw 8 rows in a batch of 4 examples"):
        path = train(tmp_path, Joined())
    assert StoreReader(path).layers == tuple(G_LAYERS)


class Alternating(Untoggled):
    """The generator learns in even batches, the discriminator in odd ones."""

    def training_step(self, batch: Any, batch_idx: int) -> None:
        self.order = "gd"[batch_idx % 2]
        super().training_step(batch, batch_idx)


def test_gradients_that_no_optimizer_applies_are_refused(tmp_path: Path) -> None:
    """In the generator's batches the discriminator gets gradients that its own `zero_grad` throws away."""
    with pytest.raises(LayerError, match=r"'discriminator\.\d'.* set to zero before an optimizer applies them"):
        train(tmp_path, Alternating(0.1))


class ByHand(Classifier):
    """One optimizer."""

    def __init__(self, rate: float = 0.1) -> None:
        super().__init__(rate)
        self.automatic_optimization = False

    def loss(self, batch: Any) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])


class Sharpness(ByHand):
    """As sharpness-aware minimization: the first gradient only says where the second is taken."""

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer = self.optimizers()
        self.manual_backward(self.loss(batch))
        optimizer.zero_grad()
        self.manual_backward(self.loss(batch))
        optimizer.step()
        optimizer.zero_grad()


def test_a_gradient_that_is_thrown_away_between_two_backwards_is_refused(tmp_path: Path) -> None:
    with pytest.raises(LayerError, match="set to zero before an optimizer applies them"):
        train(tmp_path, Sharpness())


class Untold(ByHand):
    """Lightning is not told of its backward."""

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.loss(batch).backward()
        optimizer.step()


def test_a_backward_that_lightning_is_not_told_of_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedTrainingError, match=r"call `self\.manual_backward\(loss\)`"):
        train(tmp_path, Untold())


class Accumulating(ByHand):
    """Two backwards of one batch are summed by hand."""

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer = self.optimizers()
        optimizer.zero_grad()
        for _ in range(2):
            self.manual_backward(self.loss(batch) / 2)
        optimizer.step()


def test_backwards_that_one_optimizer_sums_are_captured_without_a_warning(
    tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    path = train(tmp_path, Accumulating(0.0))
    assert bool(StoreReader(path).column("valid").all())
    assert not [str(warning.message) for warning in recwarn if "of the loss" in str(warning.message)]


class Overwriting(ByHand):
    """What a layer has seen is overwritten after the step, before its gradients are made."""

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(self.loss(batch))
        optimizer.step()
        batch[0].zero_()


def test_an_input_that_is_overwritten_after_the_step_is_refused(tmp_path: Path) -> None:
    with pytest.raises(LayerError, match="input was changed in place"):
        train(tmp_path, Overwriting())
