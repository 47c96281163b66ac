"""Transposed convolutions' gradients equal autograd's, one example at a time, with every flag."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lightning_influence.errors import LayerError
from lightning_influence.functional.covariance import add_covariance_sums
from lightning_influence.functional.structure import DIAGONAL, KroneckerStructure
from lightning_influence.gradients import DenseGradient, LayerGradient, TransposedConvGradient
from lightning_influence.layers import GradientCapture, track_layers
from tests.reference.gradients import parameter_gradients

TOLERANCES = {torch.float64: 1e-10, torch.float32: 1e-5}  # relative; sums of some dozen products
KINDS = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
SIZES = {1: (6,), 2: (5, 4), 3: (3, 2, 4)}
N = 3

FLAGS = {
    "plain": (2, {}),
    "1d": (1, {}),
    "3d": (3, {"stride": (1, 2, 1)}),
    "stride": (2, {"stride": 2}),
    "stride as wide as the kernel": (2, {"kernel_size": 2, "stride": 2}),
    "stride wider than the kernel": (2, {"kernel_size": 2, "stride": 3}),
    "padding": (2, {"padding": (1, 2)}),
    "output_padding": (2, {"stride": (3, 2), "padding": (0, 1), "output_padding": (2, 1)}),
    "output_padding as wide as the stride": (2, {"stride": 1, "dilation": 3, "output_padding": (1, 2)}),
    "dilation": (2, {"dilation": (2, 3)}),
    "grouped": (2, {"groups": 2}),
    "depthwise": (2, {"groups": 4, "out_channels": 4}),
    "depthwise with several outputs a channel": (2, {"groups": 4, "out_channels": 8}),
    "1x1": (2, {"kernel_size": 1}),
    "one position": (2, {"kernel_size": (5, 4), "padding": (4, 3), "in_channels": 1}),
    "blocks of 8 channels": (2, {"in_channels": 8, "out_channels": 8}),
    "everything": (2, {"groups": 2, "stride": (3, 2), "padding": 1, "output_padding": (1, 0), "dilation": (1, 2)}),
    "everything 1d": (1, {"groups": 2, "stride": 3, "padding": 2, "output_padding": 2, "dilation": 2}),
}
every_flag = pytest.mark.parametrize("name", FLAGS)
every_dtype = pytest.mark.parametrize("dtype", TOLERANCES)
with_and_without_bias = pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])


def make(dims: int, options: dict, *, bias: bool = True, dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(4)
    defaults = {"in_channels": 4, "out_channels": 6, "kernel_size": 3, "bias": bias}
    return KINDS[dims](**(defaults | options)).to(dtype)


def draw(*shape: int, seed: int = 3) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def inputs_for(conv: nn.Module, spatial: tuple[int, ...] | None = None, n: int = N) -> Tensor:
    spatial = spatial or SIZES[len(conv.kernel_size)]
    return draw(n, conv.in_channels, *spatial).to(conv.weight.dtype)


def loss_of(model: nn.Module, x: Tensor) -> Tensor:
    """The summed loss of a batch."""
    return model(x).square().sum()


def captured(model: nn.Module, *calls: Tensor, loss: Callable = loss_of) -> dict[str, LayerGradient]:
    tracked, _ = track_layers(model)
    with GradientCapture(tracked) as capture:
        torch.stack([loss(model, x) for x in calls]).sum().backward()
    return capture.gradients()


def one_at_a_time(conv: nn.Module, x: Tensor, loss: Callable = loss_of) -> dict[str, Tensor]:
    """Of the weight [n, c_in, i] and the bias [n, c_out, 1], by the name of the layer."""
    found = parameter_gradients(nn.Sequential(conv), x, lambda m, row: loss(m[0], row[None]))
    names = {"0.weight": "0", "0.bias": "0.bias"}
    return {names[key]: value.reshape(*value.shape[:2], -1) for key, value in found.items()}


def error(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm().clamp(min=1e-30))


@every_dtype
@with_and_without_bias
@every_flag
def test_gradients_equal_autograd_one_example_at_a_time(name: str, bias: bool, dtype: torch.dtype) -> None:
    conv = make(*FLAGS[name], bias=bias, dtype=dtype)
    x = inputs_for(conv)
    found, expected = captured(nn.Sequential(conv), x), one_at_a_time(conv, x)
    assert list(found) == (["0", "0.bias"] if bias else ["0"])
    for layer, gradient in found.items():
        assert gradient.dense().dtype == dtype
        assert error(gradient.dense(), expected[layer]) <= TOLERANCES[dtype]


@every_flag
def test_the_products_of_a_check_are_those_of_grad(name: str) -> None:
    conv = make(*FLAGS[name])
    gradient = captured(nn.Sequential(conv), inputs_for(conv))["0"]
    U, V = draw(gradient.shape[0], 3).float(), draw(gradient.shape[1], 3, seed=5).float()
    found = gradient.projections(U, V).sum(0).double()
    expected = torch.einsum("op,oi,ip->p", U.double(), conv.weight.grad.flatten(1), V.double())
    assert error(found, expected) < 1e-5  # float32


@st.composite
def drawn_convolutions(draw_one: st.DrawFn) -> tuple[int, dict, tuple[int, ...]]:
    dims = draw_one(st.integers(1, 3))
    few = st.integers(1, 3)

    def each(numbers: st.SearchStrategy[int]) -> tuple[int, ...]:
        return tuple(draw_one(numbers) for _ in range(dims))

    groups = draw_one(few)
    kernel, dilation, stride = each(few), each(few), each(few)
    options = {
        "in_channels": groups * draw_one(few),
        "out_channels": groups * draw_one(few),
        "kernel_size": kernel,
        "stride": stride,
        "padding": tuple(
            draw_one(st.integers(0, (d * (k - 1)) // 2)) for k, d in zip(kernel, dilation, strict=True)
        ),
        "output_padding": tuple(
            draw_one(st.integers(0, max(s, d) - 1)) for s, d in zip(stride, dilation, strict=True)
        ),
        "dilation": dilation,
        "groups": groups,
        "bias": draw_one(st.booleans()),
    }
    return dims, options, each(st.integers(1, 4))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(drawn_convolutions())
def test_gradients_of_any_combination_of_flags_equal_autograd(drawn: tuple[int, dict, tuple[int, ...]]) -> None:
    dims, options, spatial = drawn
    conv = make(dims, options)
    x = inputs_for(conv, spatial)
    found, expected = captured(nn.Sequential(conv), x), one_at_a_time(conv, x)
    assert max(error(found[layer].dense(), expected[layer]) for layer in expected) <= 1e-10


# --- Factors against their definition ----------------------------------------------------------------


def patch_of(conv: nn.Module, x: Tensor, output_grad: Tensor, group: int, place: tuple[int, ...]) -> Tensor:
    """The gradients [i] of a row of the weight if that row's input is 1 at one place and 0 elsewhere."""
    row = group * conv.in_channels // conv.groups
    one = torch.zeros_like(x[:1])
    one[(0, row, *place)] = 1
    (found,) = torch.autograd.grad((conv(one)[0] * output_grad).sum(), [conv.weight])
    return found[row].flatten()


def defined_sums(conv: nn.Module, x: Tensor, output_grads: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Sums of a a^T, with a the patches, and d d^T, with d the inputs, where neither is all zero."""
    channels = conv.in_channels // conv.groups
    A, S, counts = [], [], []
    for group in range(conv.groups):
        pairs = [
            (
                patch_of(conv, x, output_grads[n], group, place),
                x[(n, slice(group * channels, (group + 1) * channels), *place)],
            )
            for n, place in product(range(len(x)), product(*map(range, x.shape[2:])))
        ]
        pairs = [(a, d) for a, d in pairs if a.any() and d.any()]
        A.append(torch.stack([torch.outer(a, a) for a, _ in pairs]).sum(0))
        S.append(torch.stack([torch.outer(d, d) for _, d in pairs]).sum(0))
        counts.append(len(pairs))
    return torch.stack(A), torch.stack(S), torch.tensor(counts)


@pytest.mark.parametrize(
    "name", ["plain", "output_padding", "grouped", "depthwise", "everything", "everything 1d"]
)
def test_factors_equal_their_definition_in_every_group(name: str) -> None:
    conv = make(*FLAGS[name])
    x = inputs_for(conv, n=2)
    x[:, :, 0, ...] *= torch.tensor([1.0, 0.0]).reshape(-1, *[1] * (x.ndim - 2))  # dead inputs of one example
    kept = (draw(*conv(x).shape) > 0).double()  # some outputs without a loss
    kept[:, :, kept.shape[2] // 2 :] = 0  # and so many that whole patches have none

    gradient = captured(nn.Sequential(conv), x, loss=lambda m, x: (m(x) * kept).square().sum())["0"]
    layer = track_layers(nn.Sequential(conv))[0]["0"]
    assert layer.structure == KroneckerStructure(groups=conv.groups)
    A, S, counts = defined_sums(conv, x, 2 * conv(x).detach() * kept)
    assert (counts < x[:, 0].numel() - x[1, 0, 0].numel()).all()  # patches without gradient are among them
    A_sum, S_sum = torch.zeros_like(A).squeeze(0), torch.zeros_like(S).squeeze(0)
    assert torch.equal(add_covariance_sums(gradient, A_sum, S_sum), counts.squeeze(0))
    assert error(A_sum, A.squeeze(0)) < 1e-10
    assert error(S_sum, S.squeeze(0)) < 1e-10


def test_ignored_outputs_change_neither_factor() -> None:
    """An input whose outputs are all ignored counts nowhere, as padding behind the end of a signal."""
    conv = make(1, {"stride": 2})
    x, kept = inputs_for(conv), torch.ones(13, dtype=torch.float64)
    kept[7:] = 0  # what inputs 4 and 5 alone reach begins at 9

    def sums(x: Tensor) -> list[Tensor]:
        gradient = captured(nn.Sequential(conv), x, loss=lambda m, x: (m(x) * kept).square().sum())["0"]
        o, i = gradient.shape
        A, S = torch.zeros(i, i, dtype=torch.float64), torch.zeros(o, o, dtype=torch.float64)
        return [A, S, add_covariance_sums(gradient, A, S)]

    others = x.clone()
    others[:, :, 4:] = 100
    for found, expected in zip(sums(others), sums(x), strict=True):
        torch.testing.assert_close(found, expected)


def test_a_scale_of_the_loss_scales_the_gradients() -> None:
    conv = make(*FLAGS["everything"])
    x = inputs_for(conv)
    scaled = captured(nn.Sequential(conv), x, loss=lambda m, x: 8 * loss_of(m, x))
    expected = one_at_a_time(conv, x)
    for layer, gradient in scaled.items():
        assert error(gradient.rescaled(torch.tensor(1 / 8)).dense(), expected[layer]) < 1e-5  # a float32 copy
    A, A_scaled = (
        torch.stack([a for a, _ in g.position_chunks()])
        for g in (captured(nn.Sequential(conv), x)["0"], scaled["0"].rescaled(torch.tensor(1 / 8)))
    )
    torch.testing.assert_close(A_scaled.double(), A, rtol=1e-4, atol=1e-4)


# --- Uses ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("other", [(5, 4), (3, 6)], ids=["one size", "two sizes"])
def test_a_module_used_twice_in_a_step_has_both_uses(other: tuple[int, ...]) -> None:
    conv = make(*FLAGS["everything"])
    x, y = inputs_for(conv), inputs_for(conv, other) + 1
    found = captured(nn.Sequential(conv), x, y)
    first, second = one_at_a_time(conv, x), one_at_a_time(conv, y)
    for layer, gradient in found.items():
        assert error(gradient.dense(), first[layer] + second[layer]) <= 1e-10


def test_an_output_size_that_the_call_asks_for() -> None:
    conv = make(2, {"stride": 3})
    x = inputs_for(conv)
    assert conv(x).shape[2:] == (15, 12)

    def loss(model: nn.Module, x: Tensor) -> Tensor:
        conv = model[0] if isinstance(model, nn.Sequential) else model
        return conv(x, output_size=(17, 13)).square().sum()

    found, expected = captured(nn.Sequential(conv), x, loss=loss), one_at_a_time(conv, x, loss)
    for layer, gradient in found.items():
        assert error(gradient.dense(), expected[layer]) <= 1e-10


def test_a_batch_of_one() -> None:
    conv = make(*FLAGS["everything"])
    x = inputs_for(conv, n=1)
    found, expected = captured(nn.Sequential(conv), x), one_at_a_time(conv, x)
    for layer, gradient in found.items():
        assert error(gradient.dense(), expected[layer]) <= 1e-10


def test_bfloat16() -> None:
    conv = make(*FLAGS["everything"], dtype=torch.bfloat16)
    x = inputs_for(conv)
    found, expected = captured(nn.Sequential(conv), x), one_at_a_time(conv, x)
    for layer, gradient in found.items():
        assert gradient.dense().dtype == torch.bfloat16
        assert error(gradient.dense(), expected[layer]) < 3e-2  # some roundings of 2^-9


def test_an_input_without_a_batch_is_refused() -> None:
    conv = make(1, {})
    with pytest.raises(LayerError, match=r"of 3 dimensions with the batch first, got shape \(4, 6\); add a batch"):
        captured(nn.Sequential(conv), inputs_for(conv)[0])


# --- The bias -----------------------------------------------------------------------------------------


def test_weight_and_bias_are_two_layers_that_cover_the_module() -> None:
    conv = make(*FLAGS["grouped"])
    tracked, coverage = track_layers(nn.Sequential(conv))
    assert {name: layer.shape for name, layer in tracked.items()} == {"0": (4, 3 * 9), "0.bias": (6, 1)}
    assert tracked["0.bias"].structure == DIAGONAL
    assert coverage.share == 1
    found = captured(nn.Sequential(conv), inputs_for(conv))
    assert isinstance(found["0"], TransposedConvGradient)
    assert isinstance(found["0.bias"], DenseGradient)


@pytest.mark.parametrize(("frozen", "left"), [("weight", "0.bias"), ("bias", "0")])
def test_a_frozen_half_is_left_out(frozen: str, left: str) -> None:
    conv = make(*FLAGS["everything"])
    getattr(conv, frozen).requires_grad_(False)
    x = inputs_for(conv)
    found, expected = captured(nn.Sequential(conv), x), one_at_a_time(conv, x)
    assert list(found) == [left]
    assert error(found[left].dense(), expected[left]) <= 1e-10
    assert track_layers(nn.Sequential(conv))[1].share == 1


class OtherForward(nn.ConvTranspose2d):
    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        return super().forward(2 * input, output_size)


def test_a_forward_of_its_own_is_not_covered() -> None:
    tracked, coverage = track_layers(nn.Sequential(OtherForward(2, 2, 3), nn.Linear(2, 2)))
    assert list(tracked) == ["1"]
    assert coverage.uncovered
