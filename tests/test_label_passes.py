"""Passes before a step's own backward give the gradients that its own backward gives."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_influence.codecs import EigenCodec
from lightning_influence.fisher import LabelFactors, LabelPasses, LabelSource
from lightning_influence.functional.kronecker import diagonal_basis
from lightning_influence.gradients import DenseGradient
from lightning_influence.layer_plan import LayerPlan
from lightning_influence.layers import track_layers
from lightning_influence.losses import Predictive
from lightning_influence.processes import ALONE
from lightning_influence.step import StepCapture
from tests.integration.models import Checkpointed, Mlp, Pooled, Reused, Tied, position_data, seeded, vector_data
from tests.integration.nets import SmallConvNet, SmallTransformer


class TrainingLabels(LabelSource):
    """The pulls of the training labels: a pass must then give what the backward gives."""

    def __init__(self, pull: Callable[[Tensor], Tensor]) -> None:
        super().__init__("sampled", 2)
        object.__setattr__(self, "pull", pull)

    def pulls(self, predictives: list[Predictive], generator: torch.Generator) -> Iterator[list]:
        for factor in (1, 2):
            yield [(each.prediction, factor * self.pull(each.prediction.detach())) for each in predictives]


NETS = {
    "mlp": (Mlp, vector_data().tensors[0][:4]),
    "positions": (Pooled, position_data().tensors[0][:4]),
    "reused": (Reused, vector_data().tensors[0][:4]),
    "tied": (Tied, vector_data().tensors[0][:4]),
    "checkpointed": (lambda: Checkpointed(use_reentrant=False), vector_data().tensors[0][:4]),
    "convolutions": (SmallConvNet, vector_data().tensors[0][:4]),
    "transformer": (SmallTransformer, torch.arange(20).reshape(4, 5) % 7),
}


@pytest.mark.parametrize("name", NETS)
def test_a_pass_with_the_training_labels_gives_the_gradients_of_the_backward(name: str) -> None:
    make, inputs = NETS[name]
    net = seeded(make)
    layers, _ = track_layers(net, None)
    # torch's own encoder layers have positions first; training finds that out by itself
    layers = {
        n: replace(layer, batch_dim=1) if n.startswith("block.") and name == "transformer" else layer
        for n, layer in layers.items()
    }

    def loss_of(outputs: Tensor) -> Tensor:
        rows = outputs.flatten(0, -2)
        return F.cross_entropy(rows, torch.arange(len(rows)) % 3)

    def pull(prediction: Tensor) -> Tensor:
        """At the prediction that the loss got: a step's own mean times the number of examples, so unscaled."""
        prediction.requires_grad_()
        total = F.cross_entropy(prediction, torch.arange(len(prediction)) % 3, reduction="sum")
        return torch.autograd.grad(total, prediction)[0]

    capture, passes = StepCapture(layers), LabelPasses(TrainingLabels(pull), net)
    capture.keep_graph(True)
    with capture:
        loss = loss_of(net(inputs))
        state = {key: value.clone() for key, value in net.state_dict().items()}
        passes.run(capture, loss, 4, after_pass=None)
        assert all(torch.equal(value, state[key]) for key, value in net.state_dict().items())
        assert all(parameter.grad is None for parameter in net.parameters())
        capture.set_open(True)
        loss.backward()
    grads = [p.grad.clone() for p in net.parameters() if p.grad is not None]
    first, second = passes.each(capture, 4, is_copied=True)
    passes.check_reached(capture.shapes())
    own = capture.gradients(4).gradients
    assert first.keys() == second.keys() == own.keys()
    for layer, gradient in own.items():
        torch.testing.assert_close(first[layer].dense(), gradient.dense(), rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(second[layer].dense(), 2 * gradient.dense(), rtol=1e-4, atol=1e-6)

    net.zero_grad(set_to_none=True)
    loss_of(net(inputs)).backward()
    assert all(map(torch.equal, grads, [p.grad for p in net.parameters() if p.grad is not None]))


@pytest.mark.parametrize("skips", [(4, 5), (2, 4)], ids=["after it is used", "as soon as coordinates are chosen"])
def test_a_layer_that_some_steps_skip_has_the_mean_over_the_steps_that_sum_a_coordinate(
    tmp_path: Path, skips: tuple[int, int]
) -> None:
    """Two steps sum all coordinates, four those that rows keep; a skipped one counts where it would sum."""
    basis, kept = diagonal_basis((2, 3)), torch.tensor([0, 4])
    codec = EigenCodec(basis, kept, torch.ones(2))
    factors = LabelFactors(
        {"layer": LayerPlan((2, 3), False, "eigen", 1)}, {}, {"layer": basis}, tmp_path / "x.h5"
    )
    values = torch.randn(6, 5, 2, 3, generator=torch.Generator().manual_seed(0))
    values[[*skips]] = 0
    for step, gradient in enumerate(values):
        other = DenseGradient(torch.ones(5, 1, 1))  # of a layer that tells how many examples there are
        used = {} if step in skips else {"layer": DenseGradient(gradient)}
        factors.add({"other": other, **used}, {"layer": codec} if step >= 2 else {})
        factors.end_step()
    factors.finish({}, ALONE)
    expected = values[:2].square().mean((0, 1))
    expected.view(-1)[kept] = values.square().mean((0, 1)).view(-1)[kept]
    torch.testing.assert_close(factors.Lambda("layer", codec), expected)
