"""Fisher matrices of labels that the model predicts: their factors in the file, and training beside them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from lightning_influence import InfluenceCallback, InfluenceModule, capture
from lightning_influence.errors import CaptureError, UnsupportedTrainingError
from lightning_influence.store import StoreReader
from tests.integration.models import (
    Checkpointed,
    Dropping,
    ManualTask,
    Mlp,
    Pooled,
    Reused,
    Task,
    float16,
    position_data,
    seeded,
    stored_factors,
    stored_gradients,
    token_data,
    train,
    vector_data,
)
from tests.reference.gauss_newton import Linearized, linearize
from tests.reference.models import TokenModel

SEED = 0


@dataclass(frozen=True)
class Head:
    """A loss and targets for it; `own` is an example's own loss, as rows have it."""

    name: str
    loss: Callable[[Tensor, Tensor], Tensor]
    own: Callable[[Tensor, Tensor], Tensor]
    targets: Tensor


def targets(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(9))


HEADS = [
    Head("cross entropy", F.cross_entropy, partial(F.cross_entropy, reduction="sum"), targets(22, 3).argmax(-1)),
    Head(
        "binary",
        F.binary_cross_entropy_with_logits,
        F.binary_cross_entropy_with_logits,
        (targets(22, 3) > 0).float(),
    ),
    Head("square", F.mse_loss, F.mse_loss, targets(22, 3)),
    Head("Poisson", F.poisson_nll_loss, F.poisson_nll_loss, targets(22, 3).exp().round()),
]
each_head = pytest.mark.parametrize("head", HEADS, ids=lambda head: head.name)


def inputs_of(net: nn.Module) -> Tensor:
    return (position_data() if isinstance(net, Pooled) else vector_data()).tensors[0]


def fit(path: Path, net: nn.Module, head: Head, *, epochs: int = 1, batch_size: int = 4, **options: Any) -> None:
    """Capture with weights that never move."""
    torch.manual_seed(SEED)
    callback = InfluenceCallback(path, covariance_positions=None, on_error="raise", **options)
    data = TensorDataset(inputs_of(net), head.targets)
    train(Task(net, head.loss), data, callback, batch_size=batch_size, max_epochs=epochs)


def reference(net: nn.Module, head: Head) -> dict[str, Linearized]:
    names = [name for name, module in net.named_modules() if isinstance(module, nn.Linear)]
    examples = zip(inputs_of(net), head.targets, strict=True)
    return {f"net.{name}": found for name, found in linearize(net, examples, head.own, names).items()}


def assert_factors(path: Path, expected: dict[str, Linearized], *, rtol: float) -> None:
    """A and S by what the basis diagonalizes, Lambda in the file's own basis; errors relative to the norm."""
    factors = stored_factors(path)
    assert factors.keys() == expected.keys()
    for name, (basis, Lambda) in factors.items():
        for Q, values, matrix in (
            (basis.Q_A, basis.eigenvalues_A, expected[name].A()),
            (basis.Q_S, basis.eigenvalues_S, expected[name].S()),
        ):
            assert_near(Q @ values.diag() @ Q.T, matrix, rtol)
        assert_near(Lambda, expected[name].Lambda(basis.Q_A, basis.Q_S), rtol)


def assert_near(found: Tensor, expected: Tensor, rtol: float) -> None:
    assert (found - expected).norm() <= rtol * expected.norm()


# %%
# Exact: the Gauss-Newton matrix


@each_head
@pytest.mark.parametrize(
    ("make", "options"),
    [
        (Mlp, {}),  # rows first: gradients wait in float16
        (partial(Mlp, has_bias=False), {"codec": "pairs-float32"}),
        (Mlp, {"codec": "eigen", "epochs": 2}),  # the basis of the epoch before
        (Pooled, {"epochs": 2}),
        (Pooled, {}),
    ],
    ids=["pairs", "pairs without bias", "eigen", "positions", "positions, one epoch"],
)
def test_exact_factors_are_those_of_the_gauss_newton_matrix(
    tmp_path: Path, head: Head, make: Callable[[], nn.Module], options: dict[str, Any]
) -> None:
    net = seeded(make)
    fit(tmp_path / "x.h5", net, head, fisher="exact", **options)
    assert_factors(tmp_path / "x.h5", reference(net, head), rtol=1e-3)  # float16 rounds to half a thousandth


@each_head
def test_rows_stay_those_of_the_training_labels(tmp_path: Path, head: Head) -> None:
    for fisher in ("empirical", "exact"):
        fit(tmp_path / f"{fisher}.h5", seeded(Mlp), head, fisher=fisher, codec="pairs-float32")
    rows = [stored_gradients(tmp_path / f"{fisher}.h5") for fisher in ("empirical", "exact")]
    assert all(torch.equal(rows[0][name], rows[1][name]) for name in rows[0])


@each_head
@pytest.mark.parametrize("codec", ["pairs-float32", "eigen"])
def test_rows_at_the_final_weights_have_exact_factors_too(tmp_path: Path, head: Head, codec: str) -> None:
    net = seeded(Mlp)
    fit(tmp_path / "x.h5", net, head, epochs=2, fisher="exact", rows="final", codec=codec)
    assert_factors(tmp_path / "x.h5", reference(net, head), rtol=1e-3)
    assert StoreReader(tmp_path / "x.h5").attributes["fisher"] == "exact"


@pytest.mark.parametrize("codec", ["pairs-float32", "eigen"])
def test_capture_after_training_has_exact_factors_too(tmp_path: Path, codec: str) -> None:
    net, head = seeded(Mlp), HEADS[0]
    data = TensorDataset(inputs_of(net), head.targets)
    loader = torch.utils.data.DataLoader(data, batch_size=4)
    model = Task(net, head.loss)
    capture(model, loader, tmp_path / "x.h5", codec=codec, fisher="exact", covariance_positions=None)
    assert_factors(tmp_path / "x.h5", reference(net, head), rtol=1e-3)


@pytest.mark.parametrize(
    ("trainer_options", "rtol"),
    [
        ({"accumulate_grad_batches": 3}, 1e-3),
        ({"precision": "bf16-mixed"}, 3e-2),  # eight bits of mantissa
        ({"precision": "64-true"}, 1e-3),
        (float16(2.0**10), 1e-2),
        ({"gradient_clip_val": 1e-3}, 1e-3),
    ],
    ids=["accumulation", "bf16", "float64", "float16", "clipping"],
)
def test_exact_factors_do_not_depend_on_how_training_scales(
    tmp_path: Path, trainer_options: dict[str, Any], rtol: float
) -> None:
    net, head = seeded(Mlp), HEADS[0]
    expected = reference(net, head)
    callback = InfluenceCallback(tmp_path / "x.h5", fisher="exact", on_error="raise")
    data = TensorDataset(inputs_of(net), head.targets)
    if trainer_options.get("precision") == "64-true":
        data = TensorDataset(inputs_of(net).double(), head.targets)
    train(Task(net, head.loss), data, callback, max_epochs=1, **trainer_options)
    assert_factors(tmp_path / "x.h5", expected, rtol=rtol)


class Unchecked(Checkpointed):
    """The same network without checkpoints, which the reference cannot pass through so often."""

    def __init__(self) -> None:
        super().__init__(use_reentrant=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.block(torch.tanh(self.first(x)))))


def test_exact_factors_of_a_network_with_checkpointed_activations(tmp_path: Path) -> None:
    net, head = seeded(partial(Checkpointed, use_reentrant=False)), HEADS[0]
    fit(tmp_path / "x.h5", net, head, fisher="exact")
    assert_factors(tmp_path / "x.h5", reference(seeded(Unchecked), head), rtol=1e-3)


def test_manual_optimization_with_one_backward(tmp_path: Path) -> None:
    net, head = seeded(Mlp), HEADS[0]
    callback = InfluenceCallback(tmp_path / "x.h5", fisher="exact", on_error="raise")
    train(ManualTask(net, head.loss), TensorDataset(inputs_of(net), head.targets), callback)
    assert_factors(tmp_path / "x.h5", reference(net, head), rtol=1e-3)


# %%
# Sampled: the same in expectation


@each_head
def test_sampled_factors_converge_to_the_exact_ones(tmp_path: Path, head: Head) -> None:
    net = seeded(Mlp)
    fit(tmp_path / "x.h5", net, head, batch_size=22, fisher="sampled", fisher_samples=400)
    # Of 22 examples one or two carry most. The square of a normal number has a variance of 2, so that 400 draws of
    # one example leave sqrt(2 / 400) = 0.07 in each entry; how fast it falls, tests/losses says entry by entry.
    assert_factors(tmp_path / "x.h5", reference(net, head), rtol=0.25)


def test_positions_draw_labels_of_their_own(tmp_path: Path) -> None:
    """In a model of sequences; exact labels would be positions times classes, in one dimension with examples."""
    net = seeded(TokenModel)

    class Tokens(Task):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return F.cross_entropy(self.net(batch[0]).flatten(0, 1), batch[1].flatten())

    data, names = token_data(), ["down", "head"]
    callback = InfluenceCallback(
        tmp_path / "x.h5", layers=["net.down", "net.head"], fisher="sampled", fisher_samples=160,
        covariance_positions=None, on_error="raise",
    )  # fmt: skip
    train(Tokens(net), data, callback, batch_size=22)

    def own(logits: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(logits.flatten(0, 1), target.flatten(), reduction="sum")

    expected = {f"net.{n}": e for n, e in linearize(net, zip(*data.tensors, strict=True), own, names).items()}
    assert_factors(tmp_path / "x.h5", expected, rtol=0.1)


def test_the_number_of_labels_is_in_the_file_and_its_summary(tmp_path: Path) -> None:
    net = seeded(Mlp)
    fit(tmp_path / "x.h5", net, HEADS[0], fisher="sampled", fisher_samples=2)
    facts = StoreReader(tmp_path / "x.h5").attributes
    assert (facts["fisher"], facts["fisher_samples"]) == ("sampled", 2)
    assert 1 <= facts["effective_samples_S"] <= 22
    assert 1 <= facts["effective_samples_Lambda"] <= 22
    assert StoreReader(tmp_path / "x.h5").document("fisher")["seconds"] > 0
    summary = InfluenceModule.attach(Task(net), tmp_path / "x.h5").summary()
    assert "sampled Fisher (2 labels an example; effective sample sizes" in summary


# %%
# Training stays as it is


class Normalized(nn.Module):
    """Batch normalization whose statistics are updated again where its block is run again."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(5, 4), nn.Linear(4, 3)
        self.block = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.2))

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.utils.checkpoint.checkpoint(self.block, self.first(x), use_reentrant=False))


@pytest.mark.parametrize(
    ("make", "options"),
    [
        (Dropping, {}),
        (partial(Checkpointed, use_reentrant=False, dropout=0.3), {}),
        (Normalized, {}),
        (Reused, {"accumulate_grad_batches": 2, "gradient_clip_val": 0.1}),
        (Dropping, {"precision": "bf16-mixed"}),
        (Dropping, "float16"),
    ],
    ids=["dropout", "checkpointed", "normalized", "accumulation", "bf16", "float16"],
)
@pytest.mark.parametrize(
    "callback_options",
    [{"fisher": "exact"}, {"fisher": "sampled", "codec": "eigen", "rows": "final"}],
    ids=["online", "final"],
)
def test_training_is_bit_identical(
    tmp_path: Path, make: Any, options: Any, callback_options: dict[str, Any]
) -> None:
    states = []
    for is_captured in (False, True):
        torch.manual_seed(SEED)
        model = Task(make(), optimizer=partial(torch.optim.AdamW, lr=1e-2))
        callback = InfluenceCallback(tmp_path / "x.h5", on_error="raise", **callback_options)
        trainer_options = float16(2.0**10) if options == "float16" else options
        train(model, vector_data(), *([callback] if is_captured else []), max_epochs=3, **trainer_options)
        states.append([*model.state_dict().values(), torch.get_rng_state()])
    assert all(map(torch.equal, *states))
    assert StoreReader(tmp_path / "x.h5").attributes["fisher"] == callback_options["fisher"]


def test_a_pass_touches_no_grad_and_leaves_no_graph(tmp_path: Path) -> None:
    seen: list[tuple[Any, int]] = []

    class Looking(InfluenceCallback):
        def on_before_backward(self, trainer: Any, pl_module: LightningModule, loss: Tensor) -> None:
            super().on_before_backward(trainer, pl_module, loss)
            capture = self._session._batches.tracking.capture
            seen.append(([p.grad for p in pl_module.parameters()], len(capture.hooks.edges)))

    callback = Looking(tmp_path / "x.h5", fisher="exact", on_error="raise")
    train(Task(seeded(Mlp)), vector_data(), callback)
    assert all(edges == 0 and all(grad is None for grad in grads) for grads, edges in seen)


# %%
# What does not go


def test_reentrant_checkpointing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedTrainingError, match="use_reentrant"):
        fit(tmp_path / "x.h5", seeded(partial(Checkpointed, use_reentrant=True)), HEADS[0], fisher="sampled")


class WithoutLayerBefore(nn.Module):
    """No tracked layer lies before the checkpoint, so that no pass would run through it."""

    def __init__(self) -> None:
        super().__init__()
        self.block, self.last = nn.Sequential(nn.Linear(5, 4)), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = x.detach().requires_grad_()
        return self.last(torch.utils.checkpoint.checkpoint(self.block, x, use_reentrant=True))


def test_layers_that_only_the_own_backward_reaches_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedTrainingError, match=r"Layer 'net.block.0'.*use_reentrant"):
        fit(tmp_path / "x.h5", seeded(WithoutLayerBefore), HEADS[0], fisher="sampled")


def test_other_losses_are_refused_and_training_goes_on(tmp_path: Path) -> None:
    states = []
    for is_captured in (False, True):
        torch.manual_seed(SEED)
        model = Task(Mlp(), F.l1_loss, partial(torch.optim.SGD, lr=0.1))
        data = TensorDataset(vector_data().tensors[0], targets(22, 3))
        callback = InfluenceCallback(tmp_path / "x.h5", fisher="sampled")
        if is_captured:
            with pytest.warns(UserWarning, match=r"l1_loss has no known distribution.*empirical"):
                train(model, data, callback)
        else:
            train(model, data)
        states.append(list(model.parameters()))
    assert all(map(torch.equal, *states))


def test_several_backwards_in_a_batch_are_refused(tmp_path: Path) -> None:
    class Twice(ManualTask):
        def training_step(self, batch: Any, batch_idx: int) -> None:
            optimizer = self.optimizers()
            for half in range(2):
                self.manual_backward(self.loss(self.net(batch[0]), batch[1]) * (half + 1))
            optimizer.step()

    with pytest.raises(UnsupportedTrainingError, match="several backwards"):
        train(
            Twice(seeded(Mlp)),
            vector_data(),
            InfluenceCallback(tmp_path / "x.h5", fisher="sampled", on_error="raise"),
        )


def test_a_number_of_labels_that_changes_is_refused(tmp_path: Path) -> None:
    class Growing(Task):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            outputs = self.net(batch[0])[:, : 1 + batch_idx % 2]
            return F.mse_loss(outputs, torch.zeros_like(outputs))

    callback = InfluenceCallback(tmp_path / "x.h5", fisher="exact", on_error="raise")
    with pytest.raises(CaptureError, match="labels an example, and had"):
        train(Growing(seeded(Mlp)), vector_data(), callback)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fisher": "true"}, "`fisher` must be one of"),
        ({"fisher": "sampled", "fisher_samples": 0}, "`fisher_samples` must be positive"),
        ({"fisher": "exact", "fisher_samples": 2}, "counts the labels of"),
        ({"fisher": "sampled", "loss": "mean"}, "`loss` must be 'auto'"),
        ({"fisher": "sampled", "epochs": "every"}, "Merged epochs have the training labels' Fisher only"),
    ],
)
def test_options_that_do_not_go_together_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        InfluenceCallback(**options)


def test_own_losses_have_no_labels_to_draw(tmp_path: Path) -> None:
    loader = torch.utils.data.DataLoader(vector_data(), batch_size=4)
    with pytest.raises(ValueError, match="`training_loss` does not tell"):
        capture(
            seeded(Mlp), loader, tmp_path / "x.h5", training_loss=lambda m, b: m(b[0]).sum(1), fisher="sampled"
        )
