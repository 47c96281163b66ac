"""Stored gradient / true gradient = 1.000, through a real Trainer, the callback and the file.

The truth is autograd on one example at a time in float64. Weights stand still (learning rate 0)
unless a test says otherwise, so that every row belongs to the same ones.

Tolerances. Rows are float32, and so are the runs: a chain of about ten float32 operations of width at
most 8 rounds by some tens of 2^-24, hence 1e-5; its terms may cancel, so the error of a very small row
counts against a tenth of a typical one. Half precisions round each operation by 2^-11
(float16) or 2^-8 (bfloat16): ten of them stay below 1e-2 and 1e-1. A forgotten scale is off by a factor.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset

from lightning_influence import InfluenceCallback, InfluenceModule
from lightning_influence.curvature import AbsoluteDamping, HeuristicDamping
from lightning_influence.errors import LossNotRecognizedError
from lightning_influence.layers import Coverage
from lightning_influence.query import InfluenceQuery
from lightning_influence.store import StoreReader
from tests.integration.models import (
    Checkpointed,
    Dropping,
    Loss,
    ManualTask,
    Mlp,
    Pooled,
    PositionsFirst,
    RaggedTokens,
    Reused,
    Task,
    Tied,
    Unbatched,
    UsedOutside,
    float16,
    padded,
    position_data,
    seeded,
    stored_arrays,
    stored_factors,
    stored_gradients,
    token_data,
    train,
    vector_data,
)
from tests.reference.activations import collect_activations
from tests.reference.curvature import (
    Curvature,
    absolute_damping,
    ekfac_curvature,
    heuristic_damping,
    identity_curvature,
    kfac_curvature,
)
from tests.reference.factors import covariances, eigenvalue_correction
from tests.reference.gradients import LossFn, linear_layer_names, per_example_gradients
from tests.reference.models import Classifier, TokenModel
from tests.reference.scores import reference_scores

FLOAT32, FLOAT16, BFLOAT16 = 1e-5, 1e-2, 1e-1
CLASS_WEIGHTS = torch.tensor([0.2, 1.0, 3.0])


def own_loss(loss: Loss) -> LossFn:
    """The loss of one example: the same function on a batch of one."""
    return lambda net, example: loss(net(example[0][None]), example[1][None])


def true_gradients(net: nn.Module, data: Dataset, loss: Loss) -> dict[str, Tensor]:
    """Each example's gradient, by the layer's name in the file, [N, o, i]."""
    if isinstance(net, Checkpointed):  # reentrant checkpointing refuses `autograd.grad`
        net = copy.deepcopy(net)
        net.use_reentrant = False
    layers = [name for name in linear_layer_names(net) if net.get_submodule(name).weight.requires_grad]
    gradients = per_example_gradients(net, examples_of(data), own_loss(loss), layers)
    return {f"net.{name}": gradient for name, gradient in gradients.items()}


def examples_of(data: Dataset) -> list[Any]:
    return [data[index] for index in range(len(data))]


def assert_ratio_is_one(stored: Mapping[str, Tensor], true: Mapping[str, Tensor], tolerance: float) -> None:
    """Every row of every layer."""
    assert stored.keys() == true.keys()
    for name in true:
        found, expected = stored[name].double().flatten(1), true[name].flatten(1)
        norms = expected.norm(dim=1)
        size = norms.clamp(min=0.1 * norms.mean())
        ratios = 1 + ((found - expected) * expected).sum(1) / size**2  # <stored, true> / <true, true>
        errors = (found - expected).norm(dim=1) / size
        report = f"{name}: stored/true {ratios.min():.6f}..{ratios.max():.6f}, error {errors.max():.1e}"
        assert norms.mean() > 0, f"{name} has no gradient to compare"
        assert bool((errors <= tolerance).all()), report
        assert bool(((ratios - 1).abs() <= tolerance).all()), report


# The loss and what it is for one example ------------------------------------------------------------


def cross_entropy(**options: Any) -> Loss:
    return lambda outputs, targets: F.cross_entropy(outputs, targets, **moved(options, outputs))


def moved(options: dict[str, Any], like: Tensor) -> dict[str, Any]:
    """Class weights in the dtype of the outputs."""
    return {key: value.to(like) if isinstance(value, Tensor) else value for key, value in options.items()}


def scaled(loss: Loss, constant: float) -> Loss:
    return lambda outputs, targets: loss(outputs, targets) * constant


def unreduced_mean(outputs: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(outputs, targets, reduction="none").mean()


def log_softmax_nll(outputs: Tensor, targets: Tensor) -> Tensor:
    return F.nll_loss(F.log_softmax(outputs, dim=-1), targets)


def hand_written_sum(outputs: Tensor, targets: Tensor) -> Tensor:
    return -outputs.log_softmax(dim=-1).gather(1, targets[:, None]).sum()


def hand_written_mean(outputs: Tensor, targets: Tensor) -> Tensor:
    return hand_written_sum(outputs, targets) / len(outputs)


def one_hot(targets: Tensor, like: Tensor) -> Tensor:
    return F.one_hot(targets, 3).to(like)


def elementwise(function: Callable[..., Tensor], **options: Any) -> Loss:
    return lambda outputs, targets: function(outputs, one_hot(targets, outputs), **options)


def two_terms(outputs: Tensor, targets: Tensor) -> Tensor:
    """Both average over the examples."""
    return F.cross_entropy(outputs, targets) + 0.5 * F.mse_loss(outputs, one_hot(targets, outputs))


def two_terms_of_one_example(outputs: Tensor, targets: Tensor) -> Tensor:
    return SUM(outputs, targets) + 0.5 * F.mse_loss(outputs, one_hot(targets, outputs))


def per_token(outputs: Tensor, targets: Tensor) -> Tensor:
    """The mean over all tokens of the batch that are not ignored."""
    return F.cross_entropy(outputs.transpose(1, 2), targets)


def per_flat_token(outputs: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(outputs.view(-1, outputs.shape[-1]), targets.view(-1))


def token_sum(outputs: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(outputs.transpose(1, 2), targets, reduction="sum")


MEAN, SUM = cross_entropy(), cross_entropy(reduction="sum")


@dataclass(frozen=True)
class Case:
    """One row of the table: how a run computes its loss, and each example's own loss."""

    loss: Loss = MEAN
    own: Loss = SUM
    net: Callable[[], nn.Module] = Classifier
    data: Callable[..., Dataset] = vector_data
    task: type[Task] = Task
    trainer: Callable[[], dict[str, Any]] = dict
    callback: dict[str, Any] = field(default_factory=dict)
    callbacks: Callable[[], list[Callback]] = list
    tolerance: float = FLOAT32


def on_tokens(loss: Loss, **more: Any) -> Case:
    return Case(loss, token_sum, TokenModel, token_data, **more)


TABLE = {
    "mean": Case(data=lambda: vector_data(24)),
    "mean-short-last-batch": Case(),
    "sum": Case(SUM),
    "none-then-mean": Case(unreduced_mean),
    "accumulate-3-short-last-window": Case(
        data=lambda: vector_data(26), trainer=lambda: {"accumulate_grad_batches": 3}
    ),
    "accumulation-scheduler": Case(
        callbacks=lambda: [GradientAccumulationScheduler({0: 3, 1: 2})], trainer=lambda: {"max_epochs": 2}
    ),
    "token-mean-ignore-index": on_tokens(per_token),
    "token-mean-flattened": on_tokens(per_flat_token),
    "token-mean-accumulate-2": on_tokens(per_token, trainer=lambda: {"accumulate_grad_batches": 2}),
    "class-weights": Case(
        cross_entropy(weight=CLASS_WEIGHTS), cross_entropy(weight=CLASS_WEIGHTS, reduction="sum")
    ),
    "label-smoothing": Case(
        cross_entropy(label_smoothing=0.2), cross_entropy(label_smoothing=0.2, reduction="sum")
    ),
    "times-0.3": Case(scaled(cross_entropy(), 0.3)),
    "times-0.3-accumulate-3": Case(scaled(cross_entropy(), 0.3), trainer=lambda: {"accumulate_grad_batches": 3}),
    "nn.CrossEntropyLoss": Case(nn.CrossEntropyLoss()),
    "nll-of-log-softmax": Case(log_softmax_nll),
    "mse": Case(elementwise(F.mse_loss), elementwise(F.mse_loss)),
    "mse-sum": Case(elementwise(F.mse_loss, reduction="sum"), elementwise(F.mse_loss, reduction="sum")),
    "l1": Case(elementwise(F.l1_loss), elementwise(F.l1_loss)),
    "bce-with-logits": Case(
        elementwise(F.binary_cross_entropy_with_logits), elementwise(F.binary_cross_entropy_with_logits)
    ),
    "two-losses-keep-their-weights": Case(two_terms, two_terms_of_one_example),
    "hand-written-declared-mean": Case(hand_written_mean, callback={"loss": "mean"}),
    "hand-written-declared-sum": Case(hand_written_sum, callback={"loss": "sum"}),
    "hand-written-declared-mean-accumulate-3": Case(
        hand_written_mean, callback={"loss": "mean"}, trainer=lambda: {"accumulate_grad_batches": 3}
    ),
    "manual-optimization": Case(task=ManualTask),
    "clipping": Case(trainer=lambda: {"gradient_clip_val": 1e-3}),
    "float16-with-loss-scale": Case(trainer=float16, tolerance=FLOAT16),
    "float16-with-loss-scale-accumulate-3": Case(
        trainer=lambda: float16() | {"accumulate_grad_batches": 3}, tolerance=FLOAT16
    ),
    "float16-with-loss-scale-declared-mean": Case(
        hand_written_mean, callback={"loss": "mean"}, trainer=float16, tolerance=FLOAT16
    ),
    "bf16-mixed": Case(trainer=lambda: {"precision": "bf16-mixed"}, tolerance=BFLOAT16),
    "bf16-true": Case(trainer=lambda: {"precision": "bf16-true"}, tolerance=BFLOAT16),
    "64-true": Case(trainer=lambda: {"precision": "64-true"}),
    "layers-without-bias": Case(net=lambda: Mlp(has_bias=False)),
    "positions-without-bias": Case(net=lambda: Pooled(has_bias=False), data=position_data),
    "positions-with-bias-then-in-place-relu": Case(net=Pooled, data=position_data),
    "module-used-twice": Case(net=Reused),
    "checkpointing-non-reentrant": Case(net=lambda: Checkpointed(use_reentrant=False)),
    "checkpointing-reentrant": Case(net=lambda: Checkpointed(use_reentrant=True)),
}


def run(case: Case, path: Path, **callback: Any) -> Task:
    """Train as the case says; the module, whose weights are those of every row.

    Of the `nn.Linear` layers, whose factors the references know; other layers are in `tests/layers`.
    """
    model = case.task(seeded(case.net), case.loss)
    layers = [f"net.{name}" for name in linear_layer_names(model.net)]
    options = {"codec": "pairs-float32", "on_error": "raise", "layers": layers, **case.callback, **callback}
    influence = InfluenceCallback(path, **options)
    train(model, case.data(), influence, *case.callbacks(), **case.trainer())
    return model


@pytest.mark.parametrize("case", TABLE.values(), ids=TABLE.keys())
def test_stored_gradient_is_the_true_gradient(case: Case, tmp_path: Path) -> None:
    model = run(case, tmp_path / "influence.h5")

    true = true_gradients(model.net, case.data(), case.own)
    assert_ratio_is_one(stored_gradients(tmp_path / "influence.h5"), true, case.tolerance)


class WeightsOfSteps(Callback):
    """Copies of the net as each batch finds it, by the number of optimizer steps before it."""

    def __init__(self) -> None:
        self.nets: dict[int, nn.Module] = {}

    def on_train_batch_start(self, trainer: Trainer, model: LightningModule, *batch: Any) -> None:
        self.nets[trainer.global_step] = copy.deepcopy(model.net)


@pytest.mark.parametrize("accumulation", [1, 3])
def test_a_row_is_the_gradient_at_the_weights_of_its_own_step(accumulation: int, tmp_path: Path) -> None:
    path, data, weights = tmp_path / "influence.h5", vector_data(26), WeightsOfSteps()
    model = Task(seeded(Classifier), optimizer=lambda p: torch.optim.SGD(p, lr=0.5))
    layers = ["net.first", "net.last"]
    influence = InfluenceCallback(path, codec="pairs-float32", on_error="raise", layers=layers)
    train(model, data, influence, weights, max_epochs=2, accumulate_grad_batches=accumulation)

    at_step = {step: true_gradients(net, data, SUM) for step, net in weights.nets.items()}
    steps = StoreReader(path).column("step").tolist()
    assert len(set(steps)) == len(weights.nets) // 2  # the second epoch's
    true = {
        name: torch.stack([at_step[step][name][row] for row, step in enumerate(steps)])
        for name in at_step[steps[0]]
    }
    assert_ratio_is_one(stored_gradients(path), true, FLOAT32)


class GradsOfBatches(Callback):
    """`.grad` of the layers after each backward, and the batch's inputs."""

    def __init__(self) -> None:
        self.seen: list[tuple[Tensor, dict[str, Tensor]]] = []
        self._inputs = torch.empty(0)

    def on_train_batch_start(self, trainer: Trainer, model: LightningModule, batch: Any, index: int) -> None:
        self._inputs = batch[0].clone()

    def on_after_backward(self, trainer: Trainer, model: LightningModule) -> None:
        grads = {
            f"net.{name}": torch.cat([layer.weight.grad, layer.bias.grad[:, None]], dim=1).clone()
            for name, layer in model.net.named_modules()
            if isinstance(layer, nn.Linear)
        }
        self.seen.append((self._inputs, grads))


@pytest.mark.parametrize("batch_size", [1, 4])
@pytest.mark.parametrize(
    "make",
    [
        Dropping,
        lambda: Checkpointed(use_reentrant=False, dropout=0.5),
        lambda: Checkpointed(use_reentrant=True, dropout=0.5),
    ],
    ids=["dropout", "dropout-checkpointed", "dropout-checkpointed-reentrant"],
)
def test_with_dropout_rows_are_what_the_training_step_saw(
    make: Callable[[], nn.Module], batch_size: int, tmp_path: Path
) -> None:
    path, data, grads = tmp_path / "influence.h5", vector_data(10), GradsOfBatches()
    model = Task(seeded(make))
    influence = InfluenceCallback(path, codec="pairs-float32", on_error="raise")
    train(model, data, influence, grads, batch_size=batch_size)

    stored, inputs = stored_gradients(path), data.tensors[0]
    for batch, expected in grads.seen:
        rows = [int((inputs == x).all(dim=1).nonzero()) for x in batch]
        for name in stored:
            found = stored[name][rows].mean(0)  # .grad is that of the batch's mean
            torch.testing.assert_close(found, expected[name], rtol=FLOAT32, atol=1e-7)


def test_a_model_with_reentrant_checkpointing_can_be_asked(tmp_path: Path) -> None:
    path, case = tmp_path / "influence.h5", TABLE["checkpointing-reentrant"]
    model = run(case, path)
    assert InfluenceModule.attach(model, path).scores(case.data().tensors).isfinite().all()


def test_rows_do_not_age_where_weights_stand_still(tmp_path: Path) -> None:
    """Also if some examples have no gradient, and so no order of scores, behind dead units."""
    path, case = tmp_path / "influence.h5", TABLE["layers-without-bias"]
    model = run(case, path)
    assert (true_gradients(model.net, case.data(), SUM)["net.last"] == 0).all(dim=(1, 2)).any()
    assert StoreReader(path).attributes["staleness_spearman"] == pytest.approx(1, abs=1e-6)


# What is refused --------------------------------------------------------------------------------------


def different_counts(outputs: Tensor, targets: Tensor) -> Tensor:
    """A mean over the tokens that count and one over all, whose numbers vary independently."""
    return per_token(outputs, targets) + 0.1 * F.mse_loss(outputs, torch.ones_like(outputs))


REFUSED = {
    "losses-with-different-counts": (on_tokens(different_counts), r"different counts.*loss=\"mean\""),
    "hand-written-loss-undeclared": (Case(hand_written_mean), r"No recognised loss.*pass `loss=\"mean\"`"),
}


@pytest.mark.parametrize(("case", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_what_cannot_be_captured_is_refused_with_one_warning_and_training_goes_on(
    case: Case, message: str, tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    model = run(case, tmp_path / "influence.h5", on_error="warn")

    (warning,) = [str(w.message) for w in recwarn if "InfluenceCallback has stopped" in str(w.message)]
    assert not [w for w in recwarn if "ended without a complete" in str(w.message)]
    assert re.search(message, warning)
    assert list(tmp_path.iterdir()) == []
    assert model.trainer.global_step == 6
    assert model.trainer.state.finished


def test_on_error_raise_ends_training(tmp_path: Path) -> None:
    with pytest.raises(LossNotRecognizedError, match='pass `loss="mean"`'):
        run(Case(hand_written_mean), tmp_path / "influence.h5", on_error="raise")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("batch_size", [4, 6])
def test_positions_first_are_seen_even_when_as_many_as_examples(batch_size: int, tmp_path: Path) -> None:
    """With 6 examples of 6 positions the number of rows would fit, and their sum is the batch's gradient."""
    path, data, net = tmp_path / "influence.h5", position_data(24), seeded(PositionsFirst)
    influence = InfluenceCallback(path, codec="pairs-float32", on_error="raise")
    model = Task(net)
    train(model, data, influence, batch_size=batch_size)
    assert_ratio_is_one(stored_gradients(path), true_gradients(model.net, data, SUM), FLOAT32)
    assert {entry["batch_dim"] for entry in StoreReader(path).document("layers")} == {1}


class TokensPositionsFirst(nn.Module):
    """Tokens [n, s] to logits [s, n, 7], as people write it with `batch_first=False`."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(7, 4), nn.Linear(4, 7)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(torch.tanh(self.table(tokens.T)))


def flattened_positions_first(outputs: Tensor, targets: Tensor, **options: Any) -> Tensor:
    return F.cross_entropy(outputs.flatten(0, 1), targets.T.flatten(), ignore_index=-100, **options)


def test_losses_flattened_with_positions_first_are_not_given_to_examples(tmp_path: Path) -> None:
    """Gradients are right all the same: they have one factor."""
    path, data, net = tmp_path / "influence.h5", token_data(), seeded(TokensPositionsFirst)
    influence = InfluenceCallback(path, codec="pairs-float32", layers=["net.head"], on_error="raise")
    model = Task(net, flattened_positions_first)
    train(model, data, influence)
    one = partial(flattened_positions_first, reduction="sum")
    assert_ratio_is_one(stored_gradients(path), true_gradients(model.net, data, one), FLOAT32)
    assert torch.from_numpy(StoreReader(path).column("loss")).isnan().all()


def test_unreduced_losses_flattened_with_positions_first_are_refused(tmp_path: Path) -> None:
    """Each would need the factor of its own example."""

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        return flattened_positions_first(outputs, targets, reduction="none").sum() / 7

    influence = InfluenceCallback(tmp_path / "influence.h5", on_error="raise")
    with pytest.raises(LossNotRecognizedError, match="put the batch first before the loss"):
        train(Task(seeded(TokensPositionsFirst), loss), token_data(), influence)


# Layers that are left out, and say so -----------------------------------------------------------------


def frozen_middle() -> nn.Module:
    net = Mlp()
    net.middle.requires_grad_(False)
    return net


LEFT_OUT = {
    "frozen": (frozen_middle, {}),
    "biases-on-a-shared-weight": (Tied, dict.fromkeys(("net.left", "net.right"), "its bias is not that of all")),
    "layer-input-without-batch": (
        Unbatched,
        {"net.shared": "add a batch dimension", "net": "these parameters are the module's own"},
    ),
    "used-outside-its-forward": (UsedOutside, {"net.middle": "also used outside of its forward"}),
}


@pytest.mark.parametrize(("make", "reasons"), LEFT_OUT.values(), ids=LEFT_OUT.keys())
def test_a_layer_without_exact_gradients_is_left_out_and_the_others_stay_exact(
    make: Callable[[], nn.Module], reasons: dict[str, str], tmp_path: Path
) -> None:
    path, case = tmp_path / "influence.h5", Case(net=make)
    model = run(case, path, layers=None)

    report = StoreReader(path).document("coverage")
    uncovered = {layer.name: layer.reason for layer in Coverage.from_builtins(report).uncovered}
    assert uncovered.keys() == reasons.keys()
    for name, reason in reasons.items():
        assert reason in uncovered[name]
    true = true_gradients(model.net, case.data(), SUM)
    kept = {"net.first": true["net.first"], "net.last": true["net.last"]}
    if make is Tied:
        kept["net.left"] = true["net.left"][
            ..., :-1
        ]  # without the bias; a shared weight's truth is of all its uses
    assert_ratio_is_one(stored_gradients(path), kept, FLOAT32)


# Loss scales that overflow ----------------------------------------------------------------------------


def overflowing() -> dict[str, Any]:
    """The first step's scaled gradients are infinite in float16; the next scale, 2^10, fits."""
    return float16(init_scale=2.0**40, backoff_factor=2.0**-30)


@pytest.fixture
def overflowed(tmp_path: Path) -> tuple[Task, Path]:
    return run(Case(trainer=overflowing), tmp_path / "influence.h5"), tmp_path / "influence.h5"


def test_rows_of_an_overflowed_step_are_marked_and_all_others_are_right(
    overflowed: tuple[Task, Path],
) -> None:
    model, path = overflowed
    store = StoreReader(path)
    valid = torch.from_numpy(store.column("valid")).bool()
    assert store.column("written").all()
    assert (~valid).sum() == 4  # the first batch
    assert store.attributes["rows_invalid"] == 4

    true = true_gradients(model.net, vector_data(), SUM)
    stored = stored_gradients(path)
    assert_ratio_is_one(
        {name: rows[valid] for name, rows in stored.items()},
        {name: rows[valid] for name, rows in true.items()},
        FLOAT16,
    )


def test_rows_of_an_overflowed_step_are_in_no_factor(overflowed: tuple[Task, Path]) -> None:
    _, path = overflowed
    valid = torch.from_numpy(StoreReader(path).column("valid")).bool()
    for name, (basis, Lambda) in stored_factors(path).items():
        assert all(bool(factor.isfinite().all()) for factor in (*vars(basis).values(), Lambda))
        expected = eigenvalue_correction(stored_gradients(path)[name][valid], basis.Q_A, basis.Q_S)
        torch.testing.assert_close(Lambda, expected, rtol=1e-5, atol=1e-6 * float(expected.max()))


def test_an_overflowed_step_does_not_harm_training(tmp_path: Path) -> None:
    def weights(*callbacks: Callback) -> dict[str, Tensor]:
        model = Task(seeded(Classifier), optimizer=lambda p: torch.optim.SGD(p, lr=0.1))
        train(model, vector_data(), *callbacks, **overflowing())
        return model.state_dict()

    plain, captured = weights(), weights(InfluenceCallback(tmp_path / "influence.h5", on_error="raise"))
    assert all(torch.equal(plain[name], captured[name]) for name in plain)


# Sequences in eigen-coordinates -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("epochs", "slack"),
    # With one epoch the pairs wait in float16 for their basis: 2^-11 of each a and d.
    [pytest.param(2, 1e-4, id="basis-of-the-epoch-before"), pytest.param(1, 2e-3, id="spooled")],
)
@pytest.mark.parametrize("data", [token_data, RaggedTokens], ids=["same-length", "padded-per-batch"])
def test_eigen_coordinates_are_within_their_own_bound(
    data: Callable[[], Dataset], epochs: int, slack: float, tmp_path: Path
) -> None:
    path, options = tmp_path / "influence.h5", {"max_epochs": epochs}
    model = Task(seeded(TokenModel), per_token)
    layers = ["net.down", "net.mix", "net.head"]
    influence = InfluenceCallback(path, codec="eigen", on_error="raise", layers=layers)
    train(model, data(), influence, loader_options={"collate_fn": padded}, **options)

    store = StoreReader(path)
    true, layers = true_gradients(model.net, data(), token_sum), InfluenceQuery(store).layers
    assert layers.keys() == true.keys()
    for name, layer in layers.items():
        codec, arrays = layer.codec, stored_arrays(store, name)
        assert len(codec.coordinates) == layer.Lambda.numel()  # the budget holds them all
        Q_A, Q_S = codec.basis.Q_A.double(), codec.basis.Q_S.double()
        coordinates = (Q_S.T @ true[name] @ Q_A).flatten(1)[:, codec.coordinates] / codec.whitening
        scales = arrays["scales_8"].repeat_interleave(64, dim=1)[:, : coordinates.shape[1]]
        error = (arrays["codes_8"] * scales - coordinates).abs()
        assert bool((error <= scales / 2 + slack * coordinates.abs().amax(1, keepdim=True)).all())


# Factors and scores -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class FactorCase:
    """A codec on vectors or sequences, and how exact Lambda is in it."""

    codec: str
    Lambda_tolerance: float
    epochs: int = 1
    is_sequence: bool = False

    @property
    def case(self) -> Case:
        make = on_tokens if self.is_sequence else Case
        return make(per_token if self.is_sequence else MEAN, trainer=lambda: {"max_epochs": self.epochs})


FACTORS = {
    # float32 sums of a few hundred terms
    "pairs-float32": FactorCase("pairs-float32", 1e-5),
    "pairs-float32-sequences": FactorCase("pairs-float32", 1e-5, is_sequence=True),
    # Lambda is made from rows whose entries are off by up to 1/254 of the largest
    "pairs-int8": FactorCase("pairs", 2e-2),
    # A, S and Lambda are summed before rounding; the spool rounds to float16 before Lambda
    "eigen-2-epochs": FactorCase("eigen", 1e-5, epochs=2, is_sequence=True),
    "eigen-1-epoch-spooled": FactorCase("eigen", 2e-3, is_sequence=True),
}


@pytest.mark.parametrize("factors", FACTORS.values(), ids=FACTORS.keys())
def test_factors_in_the_file_are_those_of_the_reference(factors: FactorCase, tmp_path: Path) -> None:
    path, case = tmp_path / "influence.h5", factors.case
    net = run(case, path, codec=factors.codec).net

    names = linear_layer_names(net)
    activations = collect_activations(net, examples_of(case.data()), own_loss(case.own), names)
    stored = stored_factors(path)
    assert stored.keys() == {f"net.{name}" for name in names}
    for name, layer in activations.items():
        basis, Lambda = stored[f"net.{name}"]
        A, S = covariances(layer.inputs, layer.output_grads)
        for factor, Q, values in ((A, basis.Q_A, basis.eigenvalues_A), (S, basis.Q_S, basis.eigenvalues_S)):
            assert_close_to(Q.T @ Q, torch.eye(len(Q), dtype=torch.float64), 1e-5)
            assert_close_to(Q @ values.diag() @ Q.T, factor, 1e-5)
            assert_close_to(values, torch.linalg.eigvalsh(factor).flip(0), 1e-5)
        # In the file's own basis: eigenvectors have no unique sign.
        expected = eigenvalue_correction(layer.gradients(), basis.Q_A, basis.Q_S)
        assert_close_to(Lambda, expected, factors.Lambda_tolerance)


def assert_close_to(found: Tensor, expected: Tensor, tolerance: float) -> None:
    """No entry is off by more than `tolerance` times the largest one."""
    assert float((found - expected).abs().max()) <= tolerance * float(expected.abs().max())


SCORES = {
    "ekfac-heuristic": ("ekfac", HeuristicDamping(0.1), ekfac_curvature(heuristic_damping(0.1))),
    "ekfac-absolute": ("ekfac", AbsoluteDamping(0.01), ekfac_curvature(absolute_damping(0.01))),
    "kfac-heuristic": ("kfac", HeuristicDamping(0.1), kfac_curvature(heuristic_damping(0.1))),
    "kfac-absolute": ("kfac", AbsoluteDamping(0.01), kfac_curvature(absolute_damping(0.01))),
    "identity": ("identity", HeuristicDamping(0.1), identity_curvature),
}


@pytest.fixture(scope="module", params=["vectors", "sequences"])
def finished_run(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Case, Task, Path]:
    """A file of exact rows, whose scores several tests ask for."""
    case = Case() if request.param == "vectors" else on_tokens(per_token)
    path = tmp_path_factory.mktemp("scores") / "influence.h5"
    return case, run(case, path), path


@pytest.mark.parametrize(("curvature", "damping", "reference"), SCORES.values(), ids=SCORES.keys())
def test_scores_are_those_of_the_reference(
    finished_run: tuple[Case, Task, Path], curvature: str, damping: Any, reference: Curvature
) -> None:
    """To 1e-4: float32 factors at 1e-5 (above), divided by eigenvalues down to a tenth of their mean."""
    case, model, path = finished_run
    asked = case.data(5, seed=7)
    scores = InfluenceModule.attach(model, path).scores(asked.tensors, damping=damping, curvature=curvature)

    expected = reference_scores(
        model.net,
        examples_of(case.data()),
        examples_of(asked),
        own_loss(case.own),
        linear_layer_names(model.net),
        curvature=reference,
    )
    assert scores.shape == (5, 22)
    assert_close_to(scores.double(), expected, 1e-4)
