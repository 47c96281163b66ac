"""Tables: rows that are looked up, shared by all examples, put into bags, and tied to output layers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lightning_influence.errors import LayerError
from lightning_influence.factors import KroneckerCovariance
from lightning_influence.functional.coordinates import CoordinateSelection
from lightning_influence.functional.eigenvalues import second_moment_sum
from lightning_influence.functional.kronecker import Eigenbasis
from lightning_influence.gradients import LayerGradient, RowGradient
from lightning_influence.layers import GradientCapture, TrackedLayer, find_adapters, track_layers
from lightning_influence.training.verification import GradientCheck

ROWS, SIZE = 7, 3


def captured(
    model: nn.Module, *inputs: Tensor, loss: Callable[[Tensor], Tensor] | None = None, batch_dim: int = 0
) -> tuple[dict[str, TrackedLayer], dict[str, LayerGradient]]:
    layers = {name: replace(layer, batch_dim=batch_dim) for name, layer in track_layers(model)[0].items()}
    with GradientCapture(layers) as capture:
        output = model(*inputs)
        (output.square().sum() if loss is None else loss(output)).backward()
    return layers, capture.gradients()


def assert_adds_up(layer: TrackedLayer, gradient: LayerGradient) -> None:
    grads = {name: parameter.grad for name, parameter in layer.parameters.items()}
    torch.testing.assert_close(gradient.dense().sum(0), layer.matrix(grads), rtol=1e-10, atol=1e-12)


def factors(layer: TrackedLayer, gradient: LayerGradient) -> tuple[Tensor, Tensor]:
    metric = KroneckerCovariance(layer.shape, layer.structure, dtype=torch.float64)
    metric.update(gradient)
    return metric.compute()


def test_a_is_of_gradients_and_s_counts_rows_with_a_gradient() -> None:
    table = nn.Embedding(ROWS, SIZE, padding_idx=0).double()
    indices = torch.tensor([[1, 1, 0, 2], [3, 0, 0, 5], [4, 1, 6, 6]])
    weights = torch.tensor([[1.0, 2.0, 3.0, 0.0], [1.0, 1.0, 1.0, 1.0], [0.0, 1.0, -1.0, 2.0]]).double()
    layers, gradients = captured(table, indices, loss=lambda y: (weights[..., None] * y.square()).sum())
    A, S = factors(layers[""], gradients[""])

    outer, counts, positions = torch.zeros(SIZE, SIZE).double(), torch.zeros(ROWS).double(), 0
    for n in range(3):
        for s in range(4):
            row = int(indices[n, s])
            if row == 0 or weights[n, s] == 0:
                continue
            a = 2 * weights[n, s] * table.weight[row].detach()
            outer += torch.outer(a, a)
            counts[row] += 1
            positions += 1
    torch.testing.assert_close(A, outer / positions)
    torch.testing.assert_close(S, counts / 3)


def test_padding_a_batch_further_changes_nothing() -> None:
    torch.manual_seed(0)
    table = nn.Embedding(ROWS, SIZE, padding_idx=0).double()
    short = torch.tensor([[1, 2, 3], [4, 4, 0]])
    layers, before = captured(table, short)
    _, after = captured(table, nn.functional.pad(short, (0, 4)))
    torch.testing.assert_close(after[""].dense(), before[""].dense())
    torch.testing.assert_close(factors(layers[""], after[""]), factors(layers[""], before[""]))


@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
def test_padding_bags_further_changes_nothing(mode: str) -> None:
    torch.manual_seed(0)
    bags = nn.EmbeddingBag(ROWS, SIZE, mode=mode, padding_idx=0).double()
    short = torch.tensor([[1, 2, 3], [4, 4, 0]])
    layers, before = captured(bags, short)
    _, after = captured(bags, nn.functional.pad(short, (0, 4)))
    torch.testing.assert_close(after[""].dense(), before[""].dense())
    torch.testing.assert_close(factors(layers[""], after[""]), factors(layers[""], before[""]))


@pytest.mark.parametrize("make", [nn.Embedding, nn.EmbeddingBag])
def test_a_sparse_grad_is_compared(make: type[nn.Module]) -> None:
    table = make(ROWS, SIZE, sparse=True)
    layers, _ = track_layers(table)
    check = GradientCheck(layers)
    check.start()
    with GradientCapture(layers) as capture:
        table(torch.randint(ROWS, (4, 5))).square().sum().backward()
    assert table.weight.grad.is_sparse
    check.look(capture.calls()[0])
    assert check.mismatches() == {}
    check.start()
    check.look(capture.calls()[0])
    assert set(check.mismatches()) == {""}  # .grad did not change


@pytest.mark.parametrize("has_basis", [True, False])
def test_a_large_table_needs_no_dense_gradients(has_basis: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    _, gradients = captured(nn.Embedding(ROWS, SIZE).double(), torch.randint(ROWS, (4, 5)))
    Q_A = torch.linalg.qr(torch.randn(SIZE, SIZE).double())[0] if has_basis else None
    basis = Eigenbasis(Q_A, None, torch.ones(SIZE).double(), torch.ones(ROWS).double())
    kept = torch.tensor([20, 3, 4, 11, 0])
    coordinates = basis.rotate_dense(gradients[""].dense())
    monkeypatch.setattr(RowGradient, "dense", None)
    torch.testing.assert_close(second_moment_sum(gradients[""], basis), coordinates.square().sum(0))
    found = CoordinateSelection(basis, kept).of(gradients[""])
    torch.testing.assert_close(found, coordinates.flatten(1)[:, kept])


def test_indices_may_be_int32() -> None:
    table = nn.Embedding(ROWS, SIZE).double()
    layers, gradients = captured(table, torch.randint(ROWS, (4, 5), dtype=torch.int32))
    assert_adds_up(layers[""], gradients[""])
    assert factors(layers[""], gradients[""])[1].sum() == 5


class PositionsFirst(nn.Module):
    """Tokens [t, n] and positions [t, 1]."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(ROWS, SIZE), nn.Embedding(5, SIZE)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.tokens(tokens) + self.positions(torch.arange(len(tokens))[:, None])


def test_shared_positions_may_come_before_the_batch() -> None:
    layers, gradients = captured(PositionsFirst().double(), torch.randint(ROWS, (5, 4)), batch_dim=1)
    for name, layer in layers.items():
        assert len(gradients[name]) == 4
        assert_adds_up(layer, gradients[name])


class Offset(nn.Module):
    """A table of single numbers, added to every element."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.offset = nn.Embedding(ROWS, SIZE), nn.Embedding(ROWS, 1)

    def forward(self, indices: Tensor) -> Tensor:
        return self.table(indices) + self.offset(indices)


def test_a_broadcast_element_has_the_sum_of_its_gradients() -> None:
    layers, gradients = captured(Offset().double(), torch.randint(ROWS, (4, 5)))
    assert gradients["offset"].shape == (ROWS, 1)
    for name, layer in layers.items():
        assert_adds_up(layer, gradients[name])


def test_one_index_without_a_batch_is_refused_by_layer_name() -> None:
    with pytest.raises(LayerError, match=r"expected indices \[n, \.\.\.\] with the batch first, got one index"):
        captured(nn.Embedding(ROWS, SIZE), torch.tensor(2))


def test_bags_that_are_not_examples_are_refused() -> None:
    bags = nn.EmbeddingBag(ROWS, SIZE)
    (adapter,) = find_adapters(bags)
    with pytest.raises(LayerError, match=r"expected gradients of 4 bags, got shape \(2, 3\)"):
        adapter.gradient(bags, torch.zeros(4, 2, dtype=torch.int64), torch.zeros(2, SIZE))


class KeywordBag(nn.EmbeddingBag):
    def __call__(self, flat: Tensor, offsets: Tensor) -> Tensor:
        return super().__call__(offsets=offsets, input=flat)


@pytest.mark.parametrize("kind", [nn.EmbeddingBag, KeywordBag], ids=["by place", "by name"])
@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
@given(data=st.data())
@settings(max_examples=12, deadline=None)
def test_bags_of_any_sizes_equal_autograd(mode: str, kind: type[nn.EmbeddingBag], data: st.DataObject) -> None:
    sizes = data.draw(st.lists(st.integers(0, 4), min_size=1, max_size=5))
    flat = torch.tensor(data.draw(st.lists(st.integers(0, ROWS - 1), min_size=sum(sizes), max_size=sum(sizes))))
    flat, ends = flat.long(), torch.tensor(sizes).cumsum(0)
    padding_idx = data.draw(st.sampled_from([None, 0]))
    bags = kind(ROWS, SIZE, mode=mode, padding_idx=padding_idx).double()
    _, gradients = captured(bags, flat, ends - torch.tensor(sizes))
    for n, size in enumerate(sizes):
        alone = flat[ends[n] - size : ends[n]]
        bags.zero_grad()
        bags(alone, torch.tensor([0])).square().sum().backward()
        torch.testing.assert_close(gradients[""].dense()[n], bags.weight.grad)


def test_only_what_looks_up_is_matched() -> None:
    for kind in (nn.Embedding, nn.EmbeddingBag):
        assert find_adapters(kind(ROWS, SIZE))
        assert not find_adapters(kind(ROWS, SIZE, max_norm=1.0))
        assert not find_adapters(kind(ROWS, SIZE, scale_grad_by_freq=True))
