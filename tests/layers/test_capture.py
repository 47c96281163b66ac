"""Captured per-example gradients equal autograd's, one example at a time, however the layer is used."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_influence.errors import LayerError
from lightning_influence.gradients import FactoredGradient, LayerGradient, concatenate
from lightning_influence.layers import GradientCapture, track_layers
from tests.reference.gradients import linear_layer_names, per_example_gradients

# Sums of some dozen products in another order; float32 has 1e-7 a term.
TOLERANCES = {torch.float64: {"rtol": 1e-10, "atol": 1e-12}, torch.float32: {"rtol": 1e-5, "atol": 1e-5}}
DTYPES = pytest.mark.parametrize("dtype", TOLERANCES)


class Plain(nn.Module):
    def __init__(self, *, has_bias: bool = True) -> None:
        super().__init__()
        self.first = nn.Linear(5, 4, bias=has_bias)
        self.last = nn.Linear(4, 3, bias=has_bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.first(x)))


class WithoutBias(Plain):
    def __init__(self) -> None:
        super().__init__(has_bias=False)


class InPlace(Plain):
    def forward(self, x: Tensor) -> Tensor:
        return self.last(F.leaky_relu(self.first(x), 0.3, inplace=True))


class InPlaceWithoutBias(WithoutBias):
    forward = InPlace.forward


class InPlaceTwice(Plain):
    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.first(x).mul_(2).add_(0.1).relu_())


class ViewedInPlace(Plain):
    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        h[..., :2].mul_(3)
        return self.last(h.transpose(-1, -2).relu_().transpose(-1, -2))


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(5, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.mix(torch.tanh(self.mix(x)))


class Keyword(Plain):
    def forward(self, x: Tensor) -> Tensor:
        return self.last(input=torch.tanh(self.first(input=x)))


class Reentrant(Plain):
    use_reentrant = True

    def forward(self, x: Tensor) -> Tensor:
        x = x + 0 * next(self.parameters()).sum()  # reentrant checkpoints need an input with a gradient
        return checkpoint(super().forward, x, use_reentrant=self.use_reentrant)


class NonReentrant(Reentrant):
    use_reentrant = False


class UsedTwiceAfterwards(Plain):
    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        return self.last(torch.tanh(h)) + self.last(h * h)


class FrozenBias(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.first.bias.requires_grad_(False)


MODELS = [
    Plain,
    WithoutBias,
    InPlace,
    InPlaceWithoutBias,
    InPlaceTwice,
    ViewedInPlace,
    Twice,
    Keyword,
    Reentrant,
    NonReentrant,
    UsedTwiceAfterwards,
    FrozenBias,
]
WITHOUT_CHECKPOINT = {Reentrant: Plain}  # `autograd.grad` refuses reentrant checkpoints
SHAPES = [(6, 5), (6, 4, 5), (6, 3, 2, 5)]


def inputs(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64).to(dtype)


def seeded(make: Callable[[], nn.Module], dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(4)
    return make().to(dtype)


def one_loss(model: nn.Module, x: Tensor) -> Tensor:
    """The summed loss of one example."""
    return model(x[None]).square().sum()


def captured(model: nn.Module, x: Tensor) -> dict[str, LayerGradient]:
    tracked, _ = track_layers(model)
    with GradientCapture(tracked) as capture:
        model(x).square().sum().backward()
    return capture.gradients()


@DTYPES
@pytest.mark.parametrize("shape", SHAPES, ids=["2d", "3d", "4d"])
@pytest.mark.parametrize("make", MODELS)
def test_gradients_equal_autograd_one_example_at_a_time(
    make: Callable[[], nn.Module], shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    model, x = seeded(make, dtype), inputs(shape, dtype)
    reference = seeded(WITHOUT_CHECKPOINT.get(make, make), dtype)
    expected = per_example_gradients(reference, x, one_loss, linear_layer_names(reference))
    found = captured(model, x)
    assert set(found) == set(expected)
    for name, gradient in found.items():
        assert gradient.output_grads.dtype == dtype
        torch.testing.assert_close(gradient.dense(), expected[name].to(dtype), **TOLERANCES[dtype])


@pytest.mark.parametrize("shape", SHAPES, ids=["2d", "3d", "4d"])
@pytest.mark.parametrize("make", MODELS)
def test_capture_never_changes_a_gradient(make: Callable[[], nn.Module], shape: tuple[int, ...]) -> None:
    x = inputs(shape, torch.float32)
    watched, plain = seeded(make, torch.float32), seeded(make, torch.float32)
    captured(watched, x)
    plain(x).square().sum().backward()
    for ours, theirs in zip(watched.parameters(), plain.parameters(), strict=True):
        if theirs.grad is None:
            assert ours.grad is None
        else:
            assert torch.equal(ours.grad, theirs.grad)


@pytest.mark.parametrize("make", MODELS)
def test_rows_do_not_depend_on_the_others_in_the_batch(make: Callable[[], nn.Module]) -> None:
    model, x = seeded(make, torch.float64), inputs((6, 4, 5), torch.float64)
    together, apart = captured(model, x), [captured(model, row[None]) for row in x]
    for name, gradient in together.items():
        rows = torch.cat([each[name].dense() for each in apart])
        torch.testing.assert_close(gradient.dense(), rows, **TOLERANCES[torch.float64])


def hook_count(model: nn.Module) -> int:
    return sum(
        len(hooks)
        for module in model.modules()
        for hooks in (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks)
    )


def test_no_hook_is_left_after_the_block() -> None:
    model = Plain()
    tracked, _ = track_layers(model)
    with GradientCapture(tracked):
        assert hook_count(model) == 2
    assert hook_count(model) == 0


def test_no_hook_is_left_after_an_exception() -> None:
    model = Plain()
    tracked, _ = track_layers(model)
    with pytest.raises(RuntimeError), GradientCapture(tracked):
        model(torch.zeros(2, 7))
    assert hook_count(model) == 0


def test_entering_twice_leaves_one_set_of_hooks() -> None:
    model = Plain()
    tracked, _ = track_layers(model)
    capture = GradientCapture(tracked)
    capture.__enter__()
    with capture:
        assert hook_count(model) == 2
    assert hook_count(model) == 0


def test_the_model_has_no_new_attribute() -> None:
    model = seeded(Plain, torch.float32)
    before = {name: set(vars(module)) for name, module in model.named_modules()}
    captured(model, inputs((6, 5), torch.float32))
    assert {name: set(vars(module)) for name, module in model.named_modules()} == before


def test_forwards_without_gradient_are_not_recorded() -> None:
    model = seeded(Plain, torch.float64)
    tracked, _ = track_layers(model)
    x = inputs((6, 5), torch.float64)
    with GradientCapture(tracked) as capture:
        with torch.no_grad():
            model(x)
        with torch.inference_mode():
            model(x)
        model(x).square().sum().backward()
    assert capture.gradients()["first"].positions == 1


def test_a_layer_without_backward_is_named_as_unseen() -> None:
    model = seeded(Plain, torch.float64)
    tracked, _ = track_layers(model)
    with GradientCapture(tracked) as capture:
        model.first(inputs((6, 5), torch.float64)).sum().backward()
    assert capture.unseen == ["last"]
    assert set(capture.gradients()) == {"first"}


def test_clear_forgets_the_step() -> None:
    model = seeded(Plain, torch.float64)
    tracked, _ = track_layers(model)
    with GradientCapture(tracked) as capture:
        model(inputs((6, 5), torch.float64)).sum().backward()
    capture.clear()
    assert capture.gradients() == {}
    assert capture.unseen == ["first", "last"]


def test_inputs_without_a_batch_are_refused_by_layer_name() -> None:
    model = seeded(Plain, torch.float64)
    tracked, _ = track_layers(model)
    with GradientCapture(tracked) as capture:
        model(inputs((5,), torch.float64)).sum().backward()
    with pytest.raises(LayerError, match=r"Layer 'first': expected inputs .* got shape \(5,\)"):
        capture.gradients()


def test_calls_with_different_numbers_of_rows_are_refused() -> None:
    model = seeded(Twice, torch.float64)
    tracked, _ = track_layers(model)
    with GradientCapture(tracked) as capture:
        loss = model.mix(inputs((6, 5), torch.float64)).sum() + model.mix(inputs((2, 5), torch.float64)).sum()
        loss.backward()
    with pytest.raises(LayerError, match=r"called 2 times .* different numbers of rows: \[2, 6\]"):
        capture.gradients()


def test_a_gradient_needs_matching_factors() -> None:
    with pytest.raises(ValueError, match=r"must be \[n, s, i\] and \[n, s, o\], got \(2, 3, 4\) and \(2, 2, 5\)"):
        FactoredGradient(torch.ones(2, 3, 4), torch.ones(2, 2, 5))


def test_concatenation_pads_shorter_examples_with_zeros() -> None:
    short, long = (
        FactoredGradient(torch.ones(1, 1, 2), torch.ones(1, 1, 3)),
        FactoredGradient(torch.ones(2, 4, 2), torch.ones(2, 4, 3)),
    )
    joined = concatenate([short, long])
    assert joined.positions == 4
    assert torch.equal(joined.dense(), torch.cat([short.dense(), long.dense()]))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("where", ["inputs", "output_grads"])
def test_an_example_with_one_bad_entry_is_not_finite(bad: float, where: str) -> None:
    gradient = FactoredGradient(torch.ones(3, 4, 2), torch.ones(3, 4, 3))
    getattr(gradient, where)[1, 2, 0] = bad
    assert gradient.is_finite().tolist() == [True, False, True]
