"""The factor undoes every reduction, option and constant: stored / true is 1, always.

Truth: autograd of each example's loss, run through the model alone and written out by hand below.
"""

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_influence.errors import LossNotRecognizedError
from lightning_influence.losses import LossTap, declared_scale

N, T, C = 4, 3, 5  # examples, positions, classes or elements
TOLERANCE = 1e-10  # float64: rounding only
GENERATOR = torch.Generator().manual_seed(0)


def _random(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=GENERATOR, dtype=torch.float64)


X = _random(N, T, 3)
CLASSES = torch.randint(C, (N, T), generator=GENERATOR)
CLASSES_PADDED = CLASSES.clone()
CLASSES_PADDED[0, 1:] = CLASSES_PADDED[2, 0] = -100
PROBABILITIES = _random(N, T, C).softmax(-1)
CLASS_WEIGHTS = _random(C).abs() + 0.1
REAL = _random(N, T, C)
UNIT = REAL.sigmoid()
POSITIVE = REAL.abs() + 0.1
ELEMENT_WEIGHTS = _random(N, T, C).abs() + 0.1
ONES = torch.ones(C, dtype=torch.float64)


@dataclass(frozen=True)
class Case:
    """`loss(y)` of the whole batch's outputs [n, s, o]; `example(y[n], n)` by hand."""

    name: str
    loss: Callable[[Tensor], Tensor]
    example: Callable[[Tensor, int], Tensor]


def class_loss(y: Tensor, target: Tensor, weight: Tensor = ONES, smoothing: float = 0.0) -> Tensor:
    """Sum over positions, y [s, o], class indices [s]."""
    total = y.sum() * 0
    for position, label in zip(y, target.tolist(), strict=True):
        if label != -100:
            surprise = -(position - position.exp().sum().log())
            total = total + (1 - smoothing) * weight[label] * surprise[label]
            total = total + smoothing / C * (weight * surprise).sum()
    return total


def reduced(values: Callable[[str], Tensor], reduction: str) -> Tensor:
    """The loss as the user writes it: 'none' is averaged by hand."""
    return values("none").mean() if reduction == "none" else values(reduction)


def class_cases() -> list[Case]:
    cases = []
    options: dict[str, tuple[Tensor, dict]] = {
        "plain": (CLASSES, {}),
        "ignore_index": (CLASSES_PADDED, {}),
        "class_weights": (CLASSES, {"weight": CLASS_WEIGHTS}),
        "smoothing": (CLASSES, {"label_smoothing": 0.1}),
        "all_options": (CLASSES_PADDED, {"weight": CLASS_WEIGHTS, "label_smoothing": 0.1}),
    }
    shapes: dict[str, Callable] = {
        "one_label": lambda y, t: (y[:, 0], t[:, 0]),
        "tokens_BCT": lambda y, t: (y.transpose(1, 2), t),
        "tokens_flattened": lambda y, t: (y.flatten(0, 1), t.flatten()),
    }
    for option, (t, keywords) in options.items():
        for shape, shaped in shapes.items():
            for reduction in ("mean", "sum", "none"):
                positions = 1 if shape == "one_label" else T
                weight = keywords.get("weight", ONES)
                smoothing = keywords.get("label_smoothing", 0.0)

                def example(y, n, t=t, positions=positions, weight=weight, smoothing=smoothing):
                    return class_loss(y[:positions], t[n, :positions], weight, smoothing)

                def ce(y, t=t, k=keywords, shaped=shaped, r=reduction):
                    return reduced(lambda red: F.cross_entropy(*shaped(y, t), reduction=red, **k), r)

                cases.append(Case(f"cross_entropy-{shape}-{option}-{reduction}", ce, example))
                if smoothing:
                    continue

                def nll(y, t=t, k=keywords, shaped=shaped, r=reduction):
                    inputs, target = shaped(y.log_softmax(-1), t)
                    return reduced(lambda red: F.nll_loss(inputs, target, reduction=red, **k), r)

                cases.append(Case(f"nll_loss-{shape}-{option}-{reduction}", nll, example))
    for reduction in ("mean", "sum", "none"):
        for weight in (ONES, CLASS_WEIGHTS):

            def probabilities(y, r=reduction, w=weight):
                y, t = y.transpose(1, 2), PROBABILITIES.transpose(1, 2)
                return reduced(lambda red: F.cross_entropy(y, t, w, reduction=red), r)

            def example(y, n, w=weight):
                return -(PROBABILITIES[n] * w * (y - y.exp().sum(-1, keepdim=True).log())).sum()

            name = "probabilities" + ("" if weight is ONES else "_weighted")
            cases.append(Case(f"cross_entropy-{name}-{reduction}", probabilities, example))
    return cases


# name: (the call, its elements for one example by hand)
ELEMENTWISE: dict[str, tuple[Callable, Callable]] = {
    "mse_loss": (lambda y, r: F.mse_loss(y, REAL, reduction=r), lambda y, n: (y - REAL[n]) ** 2),
    "mse_loss_flattened": (
        lambda y, r: F.mse_loss(y.flatten(), REAL.flatten(), reduction=r),
        lambda y, n: (y - REAL[n]) ** 2,
    ),
    "mse_loss_weighted": (
        lambda y, r: F.mse_loss(y, REAL, reduction=r, weight=ELEMENT_WEIGHTS),
        lambda y, n: ELEMENT_WEIGHTS[n] * (y - REAL[n]) ** 2,
    ),
    "l1_loss": (lambda y, r: F.l1_loss(y, REAL, reduction=r), lambda y, n: (y - REAL[n]).abs()),
    "smooth_l1_loss": (
        lambda y, r: F.smooth_l1_loss(y, REAL, reduction=r, beta=0.5),
        lambda y, n: huber(y - REAL[n], 0.5) / 0.5,
    ),
    "huber_loss": (
        lambda y, r: F.huber_loss(y, REAL, reduction=r, delta=0.7),
        lambda y, n: huber(y - REAL[n], 0.7),
    ),
    "huber_loss_weighted": (
        lambda y, r: F.huber_loss(y, REAL, reduction=r, weight=ELEMENT_WEIGHTS),
        lambda y, n: ELEMENT_WEIGHTS[n] * huber(y - REAL[n], 1.0),
    ),
    "binary_cross_entropy": (
        lambda y, r: F.binary_cross_entropy(y.sigmoid(), UNIT, CLASS_WEIGHTS, reduction=r),
        lambda y, n: CLASS_WEIGHTS * binary_cross_entropy(y, UNIT[n]),
    ),
    "binary_cross_entropy_with_logits": (
        lambda y, r: F.binary_cross_entropy_with_logits(y, UNIT, reduction=r),
        lambda y, n: binary_cross_entropy(y, UNIT[n]),
    ),
    "binary_cross_entropy_with_logits_weighted": (
        lambda y, r: F.binary_cross_entropy_with_logits(
            y, UNIT, ELEMENT_WEIGHTS, reduction=r, pos_weight=CLASS_WEIGHTS
        ),
        lambda y, n: ELEMENT_WEIGHTS[n] * binary_cross_entropy(y, UNIT[n], CLASS_WEIGHTS),
    ),
    "kl_div": (
        lambda y, r: F.kl_div(y.log_softmax(-1), PROBABILITIES, reduction=r),
        lambda y, n: PROBABILITIES[n] * (PROBABILITIES[n].log() - y.log_softmax(-1)),
    ),
    "kl_div_log_target": (
        lambda y, r: F.kl_div(y, PROBABILITIES.log(), reduction=r, log_target=True),
        lambda y, n: PROBABILITIES[n] * (PROBABILITIES[n].log() - y),
    ),
    "gaussian_nll_loss": (
        lambda y, r: F.gaussian_nll_loss(y, REAL, POSITIVE, full=True, reduction=r),
        lambda y, n: gaussian(y - REAL[n], POSITIVE[n]),
    ),
    "gaussian_nll_loss_homoscedastic": (
        lambda y, r: F.gaussian_nll_loss(y, REAL, POSITIVE[..., 0], full=True, reduction=r),
        lambda y, n: gaussian(y - REAL[n], POSITIVE[n, :, :1]),
    ),
    "poisson_nll_loss": (
        lambda y, r: F.poisson_nll_loss(y, POSITIVE, reduction=r),
        lambda y, n: y.exp() - POSITIVE[n] * y,
    ),
    "poisson_nll_loss_rate": (
        lambda y, r: F.poisson_nll_loss(y.exp(), POSITIVE, log_input=False, reduction=r),
        lambda y, n: y.exp() - POSITIVE[n] * (y.exp() + 1e-8).log(),
    ),
}
if "weight" in inspect.signature(F.l1_loss).parameters:
    ELEMENTWISE["l1_loss_weighted"] = (
        lambda y, r: F.l1_loss(y, REAL, reduction=r, weight=ELEMENT_WEIGHTS),
        lambda y, n: ELEMENT_WEIGHTS[n] * (y - REAL[n]).abs(),
    )


def huber(error: Tensor, delta: float) -> Tensor:
    return torch.where(error.abs() < delta, error**2 / 2, delta * (error.abs() - delta / 2))


def binary_cross_entropy(y: Tensor, target: Tensor, weight: Tensor | float = 1.0) -> Tensor:
    p = 1 / (1 + (-y).exp())
    return -(weight * target * p.log() + (1 - target) * (1 - p).log())


def gaussian(error: Tensor, variance: Tensor) -> Tensor:
    return 0.5 * (variance.log() + error**2 / variance + math.log(2 * math.pi))


def element_cases() -> list[Case]:
    cases = []
    for name, (call, elements) in ELEMENTWISE.items():
        for r in ("mean", "sum", "none") + ("batchmean",) * name.startswith("kl_div"):

            def loss(y, call=call, r=r):
                return reduced(lambda reduction: call(y, reduction), r)

            def example(y, n, elements=elements, r=r):
                values = elements(y, n).expand(T, C)
                return values.mean() if r == "mean" else values.sum()

            cases.append(Case(f"{name}-{r}", loss, example))
    return cases


CASES = class_cases() + element_cases()
CONSTANTS = {"plain": 1.0, "times_0.3": 0.3, "accumulation_3": 1 / 3, "amp": 1024.0, "maximised": -2.0}


class Model(nn.Module):
    """A tracked layer, and enough after it to make its output gradients interesting."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nn.Linear(3, 6), nn.Linear(6, C)
        generator = torch.Generator().manual_seed(1)
        for parameter in self.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator).double()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        hidden = self.layer(x)
        return hidden, self.head(hidden.tanh())


def captured_and_scale(backpropagate: Callable[[Tensor], None]):
    """Gradient at the layer's output, [n, s, o], and the scale of the step."""
    hidden, y = Model()(X)
    hidden.retain_grad()
    with LossTap() as tap:
        backpropagate(y)
    return hidden.grad, tap.scale(N)


def true_gradients(example: Callable[[Tensor, int], Tensor]) -> tuple[Tensor, Tensor]:
    """One example at a time: the same gradient, and the losses."""
    gradients, losses = [], []
    for n in range(N):
        hidden, y = Model()(X[n])
        loss = example(y, n)
        gradients.append(torch.autograd.grad(loss, hidden)[0])
        losses.append(loss.detach())
    return torch.stack(gradients), torch.stack(losses)


def assert_equal(gradient, scale, truth: tuple[Tensor, Tensor], sign: float = 1.0) -> None:
    true, losses = truth
    stored = gradient * scale.factor.reshape(-1, 1, 1)
    assert (stored - sign * true).norm() <= TOLERANCE * true.norm()
    assert (scale.losses - sign * losses).norm() <= TOLERANCE * losses.norm()
    assert scale.factor.dtype == torch.float64


def assert_exact(gradient, scale, example: Callable[[Tensor, int], Tensor]) -> None:
    assert_equal(gradient, scale, true_gradients(example))


@pytest.mark.filterwarnings("ignore:reduction. 'mean' divides")
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_gradient_times_factor_equals_autograd_one_example_at_a_time(case):
    truth = true_gradients(case.example)
    for constant in CONSTANTS.values():
        gradient, scale = captured_and_scale(lambda y, k=constant: (k * case.loss(y)).backward())
        assert_equal(gradient, scale, truth, sign=math.copysign(1, constant))


def test_constant_found_is_recorded_in_builtins():
    _, scale = captured_and_scale(lambda y: (-F.cross_entropy(y[:, 0], CLASSES[:, 0])).backward())
    assert scale.description == {
        "function": "cross_entropy",
        "reduction": "mean",
        "count": 4.0,
        "constant": 1.0,
        "terms": [{"function": "cross_entropy", "reduction": "mean", "weight": -1.0}],
    }


def classes(y, n):
    return class_loss(y[:1], CLASSES[n, :1])


def squares(y, n):
    return ((y - REAL[n]) ** 2).mean()


def two_losses(y):
    return F.cross_entropy(y[:, 0], CLASSES[:, 0]), F.mse_loss(y, REAL)


def test_several_losses_in_one_backward_keep_their_relative_weights():
    def backpropagate(y):
        first, second = two_losses(y)
        (3 * first - 0.5 * second).backward()

    gradient, scale = captured_and_scale(backpropagate)
    assert_exact(gradient, scale, lambda y, n: classes(y, n) - squares(y, n) / 6)
    weights = [term["weight"] for term in scale.description["terms"]]
    assert weights == pytest.approx([1, -1 / 6])


def test_several_losses_in_two_backwards_keep_their_relative_weights():
    def backpropagate(y):
        first, second = two_losses(y)
        (3 * first).backward(retain_graph=True)
        (0.5 * second).backward()

    gradient, scale = captured_and_scale(backpropagate)
    assert_exact(gradient, scale, lambda y, n: classes(y, n) + squares(y, n) / 6)


def test_first_call_with_negative_sign_keeps_the_objective():
    def backpropagate(y):
        first, second = two_losses(y)
        (-2 * first + second).backward()

    gradient, scale = captured_and_scale(backpropagate)
    assert_exact(gradient, scale, lambda y, n: -classes(y, n) + squares(y, n) / 2)


def test_one_loss_back_propagated_twice_counts_twice():
    def backpropagate(y):
        loss = two_losses(y)[0]
        loss.backward(retain_graph=True)
        loss.backward()

    gradient, scale = captured_and_scale(backpropagate)
    assert_exact(gradient, scale, classes)


@pytest.mark.parametrize(
    "second",
    [
        lambda y: F.mse_loss(y, REAL, reduction="sum"),
        lambda y: F.cross_entropy(y.flatten(0, 1), CLASSES.flatten()),
        lambda y: F.mse_loss(y, REAL, reduction="none").mean(),
    ],
    ids=["mean_and_sum", "examples_and_tokens", "mean_and_none"],
)
def test_losses_over_different_counts_are_refused(second):
    message = r"cross_entropy \(reduction 'mean', count 4\) and .* different counts or masks"
    with pytest.raises(LossNotRecognizedError, match=message):
        captured_and_scale(lambda y: (two_losses(y)[0] + second(y)).backward())


def test_unreduced_losses_combine_when_they_share_weights():
    weights = torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64)

    def backpropagate(y):
        first = F.cross_entropy(y[:, 0], CLASSES[:, 0], reduction="none")
        second = F.cross_entropy(y[:, 1], CLASSES[:, 1], reduction="none")
        ((first - 0.5 * second) * weights).mean().backward()

    gradient, scale = captured_and_scale(backpropagate)
    assert_exact(gradient, scale, lambda y, n: classes(y, n) - 0.5 * class_loss(y[1:2], CLASSES[n, 1:2]))


def test_unreduced_losses_with_different_weights_are_refused():
    def backpropagate(y):
        first = F.cross_entropy(y[:, 0], CLASSES[:, 0], reduction="none")
        second = F.cross_entropy(y[:, 1], CLASSES[:, 1], reduction="none")
        (first.mean() + (second * torch.arange(1.0, 5.0)).mean()).backward()

    with pytest.raises(LossNotRecognizedError, match="different counts or masks"):
        captured_and_scale(backpropagate)


def test_masked_positions_of_unreduced_losses_belong_to_no_example():
    mask = torch.tensor([[1, 1, 1], [1, 0, 0], [0, 1, 1], [1, 1, 0]]).double()

    def backpropagate(y):
        values = F.cross_entropy(y.transpose(1, 2), CLASSES, reduction="none")
        ((values * mask).sum() / mask.sum()).backward()

    gradient, scale = captured_and_scale(backpropagate)
    kept = CLASSES.where(mask != 0, -100)
    assert_exact(gradient, scale, lambda y, n: class_loss(y, kept[n]))


def test_weights_between_examples_are_divided_out():
    weights = torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64)

    def backpropagate(y):
        (F.cross_entropy(y[:, 0], CLASSES[:, 0], reduction="none") * weights).sum().backward()

    gradient, scale = captured_and_scale(backpropagate)
    assert_exact(gradient, scale, classes)
    assert torch.allclose(scale.factor, 1 / weights)


def test_token_weights_within_an_example_are_refused():
    def backpropagate(y):
        values = F.cross_entropy(y.transpose(1, 2), CLASSES, reduction="none")
        (values * torch.tensor([1.0, 2.0, 3.0])).mean().backward()

    with pytest.raises(LossNotRecognizedError, match="different weights within one example"):
        captured_and_scale(backpropagate)


def test_example_of_weight_zero_has_no_finite_factor():
    weights = torch.tensor([1.0, 0.0, 3.0, 4.0], dtype=torch.float64)

    def backpropagate(y):
        (F.cross_entropy(y[:, 0], CLASSES[:, 0], reduction="none") * weights).mean().backward()

    _, scale = captured_and_scale(backpropagate)
    assert scale.factor.isfinite().tolist() == [True, False, True, True]
    assert scale.losses.isfinite().tolist() == [True, False, True, True]


def test_batch_of_unreduced_losses_masked_as_a_whole_has_no_finite_factor():
    _, scale = captured_and_scale(lambda y: (F.mse_loss(y, REAL, reduction="none") * 0).mean().backward())
    assert not scale.factor.isfinite().any()


def test_example_whose_positions_are_all_ignored_has_a_true_gradient_of_zero():
    target = CLASSES.clone()
    target[1] = -100

    def backpropagate(y):
        values = F.cross_entropy(y.transpose(1, 2), target, reduction="none")
        (values * (target != -100)).mean().backward()

    gradient, scale = captured_and_scale(backpropagate)
    assert scale.factor[1] == 0
    assert_exact(gradient, scale, lambda y, n: class_loss(y, target[n]))


def test_all_targets_ignored_gives_no_finite_factor():
    target = torch.full((N,), -100)
    _, scale = captured_and_scale(lambda y: F.cross_entropy(y[:, 0], target).backward())
    assert not scale.factor.isfinite()


@pytest.mark.parametrize("constant", [math.inf, math.nan])
def test_overflow_gives_no_finite_factor_and_no_error(constant):
    for reduction in ("mean", "none"):
        _, scale = captured_and_scale(
            lambda y, r=reduction: (F.mse_loss(y, REAL, reduction=r) * constant).sum().backward()
        )
        assert not scale.factor.isfinite().any()


def test_losses_that_do_not_split_into_the_examples_are_refused():
    with pytest.raises(LossNotRecognizedError, match="do not split into the 4 examples"):
        captured_and_scale(lambda y: F.mse_loss(y[:3], REAL[:3]).backward())


@pytest.mark.filterwarnings("ignore:Using a target size")
def test_broadcasting_that_puts_the_target_first_is_refused():
    with pytest.raises(LossNotRecognizedError, match=r"shape \(4,\) and gave losses of shape"):
        captured_and_scale(lambda y: F.mse_loss(y[:, 0, 0], REAL[:, 0, :1]).backward())


def test_unbatched_input_is_one_example():
    logits = torch.zeros(C, requires_grad=True)
    with LossTap() as tap:
        F.cross_entropy(logits, torch.tensor(2)).backward()
    scale = tap.scale(1)
    assert (scale.factor.item(), scale.labels.tolist()) == (1.0, [2])
    assert scale.losses.tolist() == pytest.approx([math.log(C)])
    with pytest.raises(LossNotRecognizedError, match="do not split into the 4 examples"):
        tap.scale(4)


@pytest.mark.filterwarnings("ignore:size_average and reduce")
@pytest.mark.parametrize(
    ("legacy", "count"),
    [({"size_average": False}, 1), ({"size_average": True}, N), ({"reduce": False}, 1)],
)
def test_legacy_arguments_are_honoured(legacy, count):
    _, scale = captured_and_scale(lambda y: F.mse_loss(y, REAL, **legacy).sum().backward())
    assert scale.description["count"] == count


def test_half_precision_losses_give_float32():
    y = _random(N, C).bfloat16().requires_grad_()
    with LossTap() as tap:
        (F.mse_loss(y, REAL[:, 0].bfloat16()) * 0.25).backward()
    scale = tap.scale(N)
    assert (scale.factor.dtype, scale.losses.dtype) == (torch.float32, torch.float32)
    assert scale.factor == 16


def test_labels_are_given_when_each_example_has_one_class():
    _, one = captured_and_scale(lambda y: F.cross_entropy(y[:, 0], CLASSES[:, 0]).backward())
    _, many = captured_and_scale(lambda y: F.cross_entropy(y.mT, CLASSES).backward())
    _, none = captured_and_scale(lambda y: F.mse_loss(y, REAL).backward())
    assert one.labels.tolist() == CLASSES[:, 0].tolist()
    assert (many.labels, none.labels) == (None, None)


def test_declared_scale_takes_out_the_mean_and_the_factor():
    mean, total = declared_scale("mean", 4, 1024 / 3), declared_scale("sum", 4, -0.5)
    assert (mean.factor.item(), total.factor.item()) == pytest.approx((12 / 1024, 2.0))
    assert mean.losses.isnan().all()
    assert mean.labels is None
    assert not declared_scale("mean", 4, math.inf).factor.isfinite()
    assert not declared_scale("mean", 4, 0.0).factor.isfinite()


def test_declared_scale_refuses_other_kinds_and_empty_batches():
    with pytest.raises(ValueError, match='must be "mean" or "sum"'):
        declared_scale("median", 4, 1.0)
    with pytest.raises(ValueError, match="`n`, the number of examples in the step, must be pos"):
        declared_scale("mean", 0, 1.0)
