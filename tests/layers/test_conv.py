"""Convolutions' gradients equal autograd's, one example at a time, with every flag.

The names of some cases say which other library gets them wrong, and by how much.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from lightning_influence.errors import LayerError
from lightning_influence.functional.covariance import add_covariance_sums
from lightning_influence.functional.structure import KroneckerStructure
from lightning_influence.gradients import ConvGradient, LayerGradient
from lightning_influence.layers import Coverage, GradientCapture, TrackedLayer, track_layers
from tests.reference.gradients import per_example_gradients

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")  # PyTorch copies the input

TOLERANCES = {torch.float64: 1e-10, torch.float32: 1e-5}  # relative; sums of some dozen products
KINDS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
SIZES = {1: (11,), 2: (9, 7), 3: (4, 5, 6)}
N = 3

TRAPS = {
    "plain": (2, {}),
    "Conv1d, k=3 (bergson crashes)": (1, {}),
    "Conv1d, k=1, as many channels as positions (bergson silently wrong)": (
        1,
        {"kernel_size": 1, "in_channels": 11},
    ),
    "Conv3d": (3, {}),
    "grouped (kronfluence relative error 0.77, captum crashes)": (2, {"groups": 2}),
    "grouped Conv1d": (1, {"groups": 2}),
    "grouped Conv3d": (3, {"groups": 2}),
    "depthwise (kronfluence 0.81)": (2, {"groups": 4, "out_channels": 4}),
    "depthwise with several outputs a channel": (2, {"groups": 4, "out_channels": 8}),
    "zero padding": (2, {"padding": (1, 2)}),
    "circular padding (kronfluence, captum 0.44)": (2, {"padding": (1, 2), "padding_mode": "circular"}),
    "reflect padding (kronfluence 0.41)": (2, {"padding": (1, 2), "padding_mode": "reflect"}),
    "replicate padding": (2, {"padding": (2, 1), "padding_mode": "replicate"}),
    "circular Conv1d": (1, {"padding": 2, "padding_mode": "circular"}),
    "replicate Conv3d": (3, {"padding": 1, "padding_mode": "replicate"}),
    "padding='same' (captum crashes)": (2, {"padding": "same"}),
    "padding='same', even kernel": (2, {"padding": "same", "kernel_size": (4, 2)}),
    "padding='same', even kernel, dilation": (2, {"padding": "same", "kernel_size": (2, 4), "dilation": (3, 1)}),
    "padding='same', even kernel, circular": (
        2,
        {"padding": "same", "kernel_size": 2, "padding_mode": "circular"},
    ),
    "padding='valid'": (2, {"padding": "valid"}),
    "dilation (LogIX ignores it in the covariance)": (2, {"dilation": (2, 1)}),
    "stride": (2, {"stride": 2, "padding": 1}),
    "stride with a remainder": (2, {"stride": (3, 2), "kernel_size": (2, 3)}),
    "stride wider than the kernel": (2, {"stride": 4, "kernel_size": 2}),
    "1x1": (2, {"kernel_size": 1}),
    "1x1, strided": (2, {"kernel_size": 1, "stride": 2}),
    "1x1, padded": (2, {"kernel_size": 1, "padding": 1}),
    "one position": (2, {"kernel_size": SIZES[2]}),
    "one input channel": (2, {"in_channels": 1}),
    "blocks of 8 channels": (2, {"in_channels": 8, "out_channels": 8, "padding": 1}),
    "everything": (
        2,
        {"groups": 2, "stride": (1, 2), "dilation": (2, 1), "padding": 3, "padding_mode": "reflect"},
    ),
}
every_trap = pytest.mark.parametrize("name", TRAPS)
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


def of_root(model: nn.Module, *calls: Tensor, loss: Callable = loss_of) -> LayerGradient:
    return captured(model, *calls, loss=loss)[""]


def one_at_a_time(model: nn.Module, x: Tensor, *layers: str) -> dict[str, Tensor]:
    return per_example_gradients(model, x, lambda m, row: loss_of(m, row[None]), layers or [""])


def error(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm().clamp(min=1e-30))


@every_dtype
@with_and_without_bias
@every_trap
def test_gradients_equal_autograd_one_example_at_a_time(name: str, bias: bool, dtype: torch.dtype) -> None:
    conv = make(*TRAPS[name], bias=bias, dtype=dtype)
    x = inputs_for(conv)
    gradient = of_root(conv, x)
    assert isinstance(gradient, ConvGradient)
    assert gradient.dense().dtype == dtype
    assert error(gradient.dense(), one_at_a_time(conv, x)[""]) <= TOLERANCES[dtype]


@every_trap
def test_the_products_of_a_check_are_those_of_grad(name: str) -> None:
    conv = make(*TRAPS[name])
    gradient = of_root(conv, inputs_for(conv))
    U, V = draw(gradient.shape[0], 8).float(), draw(gradient.shape[1], 8, seed=5).float()
    grad = torch.cat([conv.weight.grad.flatten(1), conv.bias.grad.unsqueeze(1)], dim=1)
    found = gradient.projections(U, V).sum(0).double()
    assert error(found, torch.einsum("op,oi,ip->p", U.double(), grad, V.double())) < 1e-5  # float32


@st.composite
def drawn_convolutions(draw_one: st.DrawFn) -> tuple[int, dict, tuple[int, ...]]:
    dims = draw_one(st.integers(1, 3))
    few = st.integers(1, 3)

    def each(numbers: st.SearchStrategy[int]) -> tuple[int, ...]:
        return tuple(draw_one(numbers) for _ in range(dims))

    groups = draw_one(few)
    kernel, dilation, mode = each(few), each(few), draw_one(st.sampled_from(["zeros", *MODES]))
    stride = each(few)
    padding = each(st.integers(0, 2))
    if set(stride) == {1}:
        padding = draw_one(st.sampled_from([padding, "same", "valid"]))
    spans = [d * (k - 1) + 1 for k, d in zip(kernel, dilation, strict=True)]
    spatial = tuple(span + draw_one(st.integers(2, 4)) for span in spans)  # wider than what is padded
    options = {
        "in_channels": groups * draw_one(few),
        "out_channels": groups * draw_one(few),
        "kernel_size": kernel,
        "stride": stride,
        "padding": padding,
        "dilation": dilation,
        "groups": groups,
        "padding_mode": mode,
        "bias": draw_one(st.booleans()),
    }
    return dims, options, spatial


MODES = ["circular", "reflect", "replicate"]


@settings(max_examples=150, deadline=None, derandomize=True)
@given(drawn_convolutions())
def test_gradients_of_any_combination_of_flags_equal_autograd(drawn: tuple[int, dict, tuple[int, ...]]) -> None:
    dims, options, spatial = drawn
    conv = make(dims, options)
    x = inputs_for(conv, spatial)
    assert error(of_root(conv, x).dense(), one_at_a_time(conv, x)[""]) <= 1e-10


# --- Factors against their definition ----------------------------------------------------------------


def outputs_of(conv: nn.Module, x: Tensor) -> list[tuple[int, tuple[int, ...]]]:
    """Every example and place of the output."""
    sizes = conv(x).shape
    return list(product(range(sizes[0]), product(*map(range, sizes[2:]))))


def patch_of(conv: nn.Module, x: Tensor, n: int, group: int, place: tuple[int, ...]) -> Tensor:
    """What an output is made of: its gradient by the parameters, whatever the padding."""
    row = group * conv.out_channels // conv.groups
    parameters = [conv.weight] + [p for p in [conv.bias] if p is not None]
    found = torch.autograd.grad(conv(x)[(n, row, *place)], parameters)
    return torch.cat([gradient[row].flatten() for gradient in found])


def defined_sums(conv: nn.Module, x: Tensor, output_grads: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Sums of a a^T and d d^T, and counts, of each group over the positions that carry gradient."""
    o = conv.out_channels // conv.groups
    A, S, counts = [], [], []
    for group in range(conv.groups):
        carried = [
            (patch_of(conv, x, n, group, place), d)
            for n, place in outputs_of(conv, x)
            if (d := output_grads[(n, slice(group * o, (group + 1) * o), *place)]).any()
        ]
        A.append(torch.stack([torch.outer(a, a) for a, _ in carried]).sum(0))
        S.append(torch.stack([torch.outer(d, d) for _, d in carried]).sum(0))
        counts.append(len(carried))
    return torch.stack(A), torch.stack(S), torch.tensor(counts)


@pytest.mark.parametrize(
    "name",
    [
        name
        for name in TRAPS
        if any(word in name for word in ("plain", "grouped", "depth", "circ", "dilation", "every"))
    ],
)
def test_factors_equal_their_definition_in_every_group(name: str) -> None:
    conv = make(*TRAPS[name])
    x = inputs_for(conv, n=2)
    kept = (draw(*conv(x).shape) > 0).double()  # some outputs without a loss
    kept[:, :, 1] = 0  # and some positions

    gradient = of_root(conv, x, loss=lambda m, x: (m(x) * kept).square().sum())
    layer = track_layers(conv)[0][""]
    assert layer.structure == KroneckerStructure(groups=conv.groups)
    A, S, counts = defined_sums(conv, x, 2 * conv(x).detach() * kept)
    A_sum, S_sum = torch.zeros_like(A).squeeze(0), torch.zeros_like(S).squeeze(0)
    found = add_covariance_sums(gradient, A_sum, S_sum)
    assert torch.equal(found, counts.squeeze(0))
    assert error(A_sum, A.squeeze(0)) < 1e-10
    assert error(S_sum, S.squeeze(0)) < 1e-10


# --- Uses ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("other", [(9, 7), (8, 10)], ids=["one size", "two sizes"])
@pytest.mark.parametrize(
    "name", ["plain", "zero padding", "grouped (kronfluence relative error 0.77, captum crashes)"]
)
def test_a_module_used_twice_in_a_step_has_both_uses(name: str, other: tuple[int, ...]) -> None:
    """In kronfluence 0.50 off, and 0.35 with its flag."""
    conv = make(*TRAPS[name])
    x, y = inputs_for(conv), inputs_for(conv, other) + 1
    expected = one_at_a_time(conv, x)[""] + one_at_a_time(conv, y)[""]
    assert error(of_root(conv, x, y).dense(), expected) <= 1e-10


def test_a_module_applied_to_its_own_output_has_both_uses() -> None:
    conv = make(2, {"out_channels": 4, "padding": 1})
    model = nn.Sequential(conv, nn.Tanh(), conv)
    x = inputs_for(conv)
    assert error(captured(model, x)["0"].dense(), one_at_a_time(model, x, "0")["0"]) <= 1e-10


def test_convolutions_that_share_a_weight_are_one_layer_in_two_geometries() -> None:
    first, second = make(2, {}, bias=False), make(2, {"dilation": 2, "stride": 2, "padding": 1}, bias=False)
    second.weight = first.weight
    model = nn.ModuleList([first, second])
    x = inputs_for(first)

    def loss(model: nn.ModuleList, x: Tensor) -> Tensor:
        return loss_of(model[0], x) + 3 * loss_of(model[1], x)

    found = captured(model, x, loss=loss)
    assert list(found) == ["0"]
    expected = per_example_gradients(model, x, lambda m, row: loss(m, row[None]), ["0"])["0"]
    assert error(found["0"].dense(), expected) <= 1e-10


class SmallCNN(nn.Sequential):
    """With what usually follows a convolution."""

    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(1, 8, 3, padding=1),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(2),
            nn.Conv2d(8, 8, 3, groups=8, padding="same", padding_mode="circular"),
            nn.Conv2d(8, 16, 1, bias=False),
            nn.ReLU(inplace=True),
            nn.AdaptiveAvgPool2d(2),
            nn.Flatten(),
            nn.Linear(64, 3),
        )


@every_dtype
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_every_layer_of_a_network_equals_autograd(dtype: torch.dtype, memory_format: torch.memory_format) -> None:
    torch.manual_seed(4)
    model = SmallCNN().to(dtype).to(memory_format=memory_format)
    x = draw(N, 1, 12, 12).to(dtype).contiguous(memory_format=memory_format)
    expected = one_at_a_time(model, x, "0", "3", "4", "8")
    found = captured(model, x)
    assert set(found) == set(expected)
    for name, gradient in found.items():
        assert error(gradient.dense(), expected[name]) <= TOLERANCES[dtype]


def test_a_batch_of_one() -> None:
    conv = make(*TRAPS["everything"])
    x = inputs_for(conv, n=1)
    assert error(of_root(conv, x).dense(), one_at_a_time(conv, x)[""]) <= 1e-10


@pytest.mark.parametrize("name", ["everything", "depthwise (kronfluence 0.81)", "blocks of 8 channels"])
def test_bfloat16(name: str) -> None:
    conv = make(*TRAPS[name], dtype=torch.bfloat16)
    x = inputs_for(conv)
    gradient = of_root(conv, x)
    assert gradient.dense().dtype == torch.bfloat16
    assert error(gradient.dense(), one_at_a_time(conv, x)[""]) < 3e-2  # some roundings of 2^-9


def test_autocast() -> None:
    conv = make(*TRAPS["blocks of 8 channels"], dtype=torch.float32)
    x = inputs_for(conv)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        gradient = of_root(conv, x, loss=lambda m, x: m(x).float().square().sum())
    assert [tensor.dtype for tensor in gradient.tensors] == [torch.float32, torch.bfloat16]
    assert error(gradient.dense(), one_at_a_time(conv, x)[""]) < 3e-2


def test_a_frozen_bias_is_no_column() -> None:
    conv = make(2, {"padding": 1})
    conv.bias.requires_grad_(False)
    x = inputs_for(conv)
    gradient = of_root(conv, x)
    assert gradient.shape == (6, 36)
    assert error(gradient.dense(), one_at_a_time(conv, x)[""]) <= 1e-10


def test_an_input_without_a_batch_is_refused() -> None:
    conv = make(2, {})
    with pytest.raises(
        LayerError, match=r"of 4 dimensions with the batch first, got shape \(4, 9, 7\); add a batch"
    ):
        of_root(conv, inputs_for(conv)[0])


# --- Which modules ------------------------------------------------------------------------------------


def report(conv: nn.Module) -> tuple[dict[str, TrackedLayer], Coverage]:
    return track_layers(nn.Sequential(conv, nn.Linear(2, 2)))


def test_a_layer_and_its_bias_are_covered() -> None:
    tracked, coverage = report(make(*TRAPS["grouped (kronfluence relative error 0.77, captum crashes)"]))
    assert coverage.share == 1
    assert tracked["0"].shape == (6, 2 * 9 + 1)


def test_a_lazy_convolution_is_one_once_it_has_seen_data() -> None:
    conv = nn.LazyConv2d(6, 3).double()
    x = draw(N, 4, 9, 7)
    conv(x)
    assert error(of_root(conv, x).dense(), one_at_a_time(conv, x)[""]) <= 1e-10


class OtherConvolution(nn.Conv2d):
    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return super()._conv_forward(input, weight - weight.mean(), bias)


class OtherForward(nn.Conv2d):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(2 * input)


@pytest.mark.parametrize(
    "module",
    [OtherConvolution(2, 2, 3), OtherForward(2, 2, 3), weight_norm(nn.Conv2d(2, 2, 3))],
    ids=["own _conv_forward", "own forward", "weight norm"],
)
def test_what_convolves_in_another_way_is_not_covered(module: nn.Module) -> None:
    tracked, coverage = report(copy.deepcopy(module))
    assert list(tracked) == ["1"]
    assert coverage.uncovered
