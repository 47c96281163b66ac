"""Uses of weights that no module's call shows, and modules that are called in another way in each step."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_influence.layers import GradientCapture, track_layers
from lightning_influence.step import StepCapture
from lightning_influence.training.verification import GradientCheck
from tests.reference.gradients import parameter_gradients

N, S, E = 4, 5, 6


def tokens(n: int = N, s: int = S, seed: int = 0) -> Tensor:
    return torch.randint(0, 7, (n, s), generator=torch.Generator().manual_seed(seed))


def signal(n: int = N, s: int = S, e: int = E, seed: int = 0) -> Tensor:
    return torch.randn(n, s, e, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def seeded(make: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(4)
    return make().double()


def captured(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Dense gradients of each example's summed squares."""
    tracked, _ = track_layers(model)
    with GradientCapture(tracked) as capture:
        model(x).square().sum().backward()
    return {name: gradient.dense() for name, gradient in capture.gradients().items()}


def true(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    return parameter_gradients(model, list(x), lambda net, example: net(example[None]).square().sum())


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10 * float(expected.abs().max()))


class TableAsOutput(nn.Module):
    """Looks up rows of a table, and multiplies with it by `F.linear`, all of it or some rows."""

    def __init__(self, rows: slice = slice(None)) -> None:
        super().__init__()
        self.table, self.mix, self.rows = nn.Embedding(7, E), nn.Linear(E, E), rows

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(torch.tanh(self.mix(self.table(x))), self.table.weight[self.rows])


@pytest.mark.parametrize("rows", [slice(None), slice(2, 5)], ids=["whole", "some-rows"])
def test_a_table_is_also_an_output_layer_without_a_module(rows: slice) -> None:
    model = seeded(lambda: TableAsOutput(rows))
    found = captured(model, tokens())
    close(found["table"], true(model, tokens())["table.weight"])


class TransposedTable(TableAsOutput):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.mix(self.table(x)), self.mix.weight.T) @ self.table.weight.T


def test_a_use_that_is_not_seen_is_not_made_up() -> None:
    """What the capture misses here, the comparison with `.grad` finds in every run."""
    model = seeded(TransposedTable)
    found, expected = captured(model, tokens()), true(model, tokens())
    assert (found["table"] - expected["table.weight"]).norm() > 0.1 * expected["table.weight"].norm()


class Positions(nn.Module):
    """Adds looked-up positions to every example, in one of the ways in which people write it."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.table, self.positions, self.way = nn.Embedding(7, E), nn.Embedding(9, E), way
        self.mix, self.line, self.one = nn.Linear(E, E), nn.Linear(2, E), nn.Linear(E, 1)
        self.start = nn.Linear(E, E)

    def forward(self, x: Tensor) -> Tensor:
        looked_up = self.table(x)
        places = torch.arange(x.shape[1])
        if self.way == "first":
            added = self.positions(places) + looked_up
        elif self.way == "second":
            added = looked_up + self.positions(places)
        elif self.way == "one-row":
            added = looked_up + self.positions(places[None])
        elif self.way == "in-place":
            added = looked_up * 1.0
            added += self.positions(places)
        elif self.way == "torch.add":
            added = torch.add(looked_up, self.positions(places))
        elif self.way == "unsqueezed":
            added = looked_up + self.positions(places).unsqueeze(0)
        elif self.way == "indexed":
            added = looked_up + self.positions(places)[None]
        elif self.way == "output-expanded":
            added = looked_up + self.positions(places).expand(len(x), -1, -1)
        elif self.way == "output-repeated":
            added = looked_up + self.positions(places)[None].repeat(len(x), 1, 1)
        elif self.way == "one-for-all-places":
            added = looked_up + self.positions(torch.tensor(3))
        elif self.way == "sum-of-two":
            added = looked_up + (self.positions(places) + self.positions(places.flip(0)))
        elif self.way == "linear":
            added = looked_up + self.line(torch.linspace(-1, 1, x.shape[1] * 2, dtype=torch.float64).view(-1, 2))
        elif self.way == "linear-of-one-vector":
            added = looked_up + self.line(torch.tensor([0.5, -2.0], dtype=torch.float64))
        elif self.way == "one-vector-an-example":
            added = (
                looked_up + self.one(looked_up).mean(1, keepdim=True) + self.start(looked_up[:, 0]).unsqueeze(1)
            )
        elif self.way == "one-row-an-example":
            added = looked_up + self.positions(x[:, 0]).unsqueeze(1)
        elif self.way == "one-row-an-example-indexed":
            added = self.positions(x[:, 0])[:, None] + looked_up
        elif self.way == "one-feature":
            added = looked_up + self.one(looked_up)
        elif self.way == "twice":
            found = self.positions(places)
            added = torch.tanh(looked_up + found) + found
        else:
            added = looked_up + self.positions(places.expand(len(x), -1))
        return self.mix(torch.tanh(added))


WAYS = [
    *("first", "second", "one-row", "in-place", "torch.add", "twice", "expanded", "unsqueezed", "indexed"),
    *("output-expanded", "output-repeated", "one-for-all-places", "sum-of-two"),
    *("linear", "linear-of-one-vector", "one-feature", "one-vector-an-example"),
    *("one-row-an-example", "one-row-an-example-indexed"),
]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("n", "s"), [(N, S), (S, S), (1, S), (N, 1)], ids=["4x5", "5x5", "1x5", "4x1"])
def test_what_all_examples_share_has_a_gradient_for_each(way: str, n: int, s: int) -> None:
    model, x = seeded(lambda: Positions(way)), tokens(n, s)
    found, expected = captured(model, x), true(model, x)
    used = {
        "linear": "line",
        "linear-of-one-vector": "line",
        "one-feature": "one",
        "one-vector-an-example": "start",
    }.get(way, "positions")
    if used == "positions":
        close(found[used], expected["positions.weight"])
    else:
        bias = expected[f"{used}.bias"].unsqueeze(-1)
        close(found[used], torch.cat([expected[f"{used}.weight"], bias], dim=-1))


@pytest.mark.parametrize("way", ["scaled", "multiplied", "added-and-multiplied"])
def test_other_ways_to_share_are_not_taken_for_additions(way: str) -> None:
    """Their rows are not right, and the comparison with `.grad` or with one example fewer leaves them out."""

    class Other(Positions):
        def forward(self, x: Tensor) -> Tensor:
            found, looked_up = self.positions(torch.arange(x.shape[1])), self.table(x)
            if way == "scaled":
                return torch.add(looked_up, found, alpha=2)
            return looked_up * found if way == "multiplied" else (looked_up + found) * found

    model, x = seeded(lambda: Other(way)), tokens()
    tracked, _ = track_layers(model, ["positions"])
    check = GradientCheck(tracked)
    with GradientCapture(tracked) as capture:
        check.start()
        model(x).square().sum().backward()
    calls, _ = capture.calls()
    first = capture.shapes()["positions"][0].shape
    check.look(calls)
    assert first == (S, E) or set(check.mismatches() or {}) == {"positions"}


class Attention(nn.Module):
    def __init__(self, dropout: float = 0.0, **options: object) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(E, 2, dropout=dropout, batch_first=True, **options)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x, need_weights=False)[0]


@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("options", [{}, {"bias": False}, {"kdim": E, "vdim": E}, {"dropout": 0.5}])
def test_attention_computes_the_same_bits_while_it_is_watched(options: dict, need_weights: bool) -> None:
    model = seeded(lambda: Attention(**options)).attention
    outputs, gradients = [], []
    for is_watched in (False, True):
        net = copy.deepcopy(model)
        x = signal().requires_grad_()
        torch.manual_seed(7)
        tracked, _ = track_layers(net)
        capture = GradientCapture(tracked)
        if is_watched:
            capture.__enter__()
        attended, weights = net(x, x, x, need_weights=need_weights)
        attended.square().sum().backward()
        capture.__exit__()
        outputs.append((attended, *(() if weights is None else (weights,))))
        gradients.append([x.grad, *(p.grad for p in net.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*outputs, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_the_fast_path_of_attention_is_off_while_gradients_are_needed() -> None:
    """In eval mode torch would otherwise run a kernel that shows none of the projections."""
    model = seeded(lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(E, 2, 8, batch_first=True), 2)).eval()
    found, expected = captured(model, signal()), true(model, signal())
    for number in range(2):
        name = f"layers.{number}.self_attn"
        assert found[f"{name}.in_proj"].abs().sum() > 0
        close(found[f"{name}.in_proj"][..., :-1], expected[f"{name}.in_proj_weight"])
        close(found[f"{name}.out_proj"][..., :-1], expected[f"{name}.out_proj.weight"])


class Ordered(nn.Module):
    """Two layers in an order that changes from step to step, and one that only some steps use."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right, self.extra = nn.Linear(E, E), nn.Linear(E, E), nn.Linear(E, E)
        self.step = 0

    def forward(self, x: Tensor) -> Tensor:
        first, second = (self.left, self.right) if self.step % 2 else (self.right, self.left)
        x = torch.tanh(second(torch.tanh(first(x))))
        return self.extra(x) if self.step > 1 else x


def test_modules_may_be_called_in_another_order_in_each_step_or_not_at_all() -> None:
    model = seeded(Ordered).float()
    tracked, _ = track_layers(model)
    for model.step in range(4):
        with StepCapture(tracked) as capture:
            F.mse_loss(model(signal().float()), torch.zeros(N, S, E)).backward()
        step = capture.gradients(N)

        def loss(net: nn.Module, example: Tensor) -> Tensor:
            return net(example[None]).square().sum() / (S * E)

        expected = parameter_gradients(model, list(signal()), loss)
        for name, gradient in step.gradients.items():
            found = gradient.dense()[..., :-1].double() / gradient.dense().norm().clamp(min=1e-9)
            truth = expected[f"{name}.weight"]
            both = torch.cat([truth, expected[f"{name}.bias"].unsqueeze(-1)], dim=-1)
            torch.testing.assert_close(found, truth / both.norm().clamp(min=1e-9), rtol=1e-4, atol=1e-5)
        assert bool(step.gradients["extra"].dense().any()) == (model.step > 1)
