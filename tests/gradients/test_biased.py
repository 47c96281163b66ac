"""A bias's 1 that is appended late: every answer is that of inputs that end in it."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import pad

from lightning_influence.codecs import DenseCodec, PairsCodec
from lightning_influence.gradients import BiasedGradient, DenseGradient, FactoredGradient, add_calls, concatenate

EXAMPLES, POSITIONS, INPUTS, OUTPUTS = 5, 3, 4, 2


@pytest.fixture
def pair() -> tuple[BiasedGradient, FactoredGradient]:
    """The same gradients in both forms."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(EXAMPLES, POSITIONS, INPUTS, generator=generator)
    grads = torch.randn(EXAMPLES, POSITIONS, OUTPUTS, generator=generator)
    grads[:, 1] = 0  # a position without gradient
    return FactoredGradient(inputs, grads).with_ones(), FactoredGradient(pad(inputs, (0, 1), value=1), grads)


def test_values_and_shapes_are_those_of_appended_ones(pair):
    biased, plain = pair
    assert biased.shape == plain.shape == (OUTPUTS, INPUTS + 1)
    assert biased.positions == plain.positions
    assert len(biased) == len(plain)
    torch.testing.assert_close(biased.inputs, plain.inputs, rtol=0, atol=0)
    torch.testing.assert_close(biased.dense(), plain.dense())
    torch.testing.assert_close(biased.bounds, plain.bounds)
    assert (biased.dense().abs().amax((1, 2)) <= biased.bounds).all()
    U, V = torch.randn(OUTPUTS, 6), torch.randn(INPUTS + 1, 6)
    torch.testing.assert_close(biased.projections(U, V), plain.projections(U, V))
    for ours, theirs in zip(biased.position_chunks(), plain.position_chunks(), strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize(
    "rows", [slice(1, 4), torch.tensor([4, 0]), torch.tensor([True, False, True, True, False])]
)
def test_some_rows(pair, rows):
    biased, plain = pair
    biased.inputs  # noqa: B018 (what was appended once must not be kept for other rows)
    torch.testing.assert_close(biased[rows].dense(), plain[rows].dense())
    torch.testing.assert_close(biased[rows].inputs, plain[rows].inputs)


def test_the_same_positions_are_drawn(pair):
    biased, plain = pair
    ours, our_weight = biased.sampled(1, torch.Generator().manual_seed(3))
    theirs, their_weight = plain.sampled(1, torch.Generator().manual_seed(3))
    assert our_weight == their_weight == 2
    torch.testing.assert_close(ours.dense(), theirs.dense())


def test_missing_positions_add_nothing(pair):
    biased, plain = pair
    torch.testing.assert_close(biased.padded(POSITIONS + 2).dense(), plain.dense())
    assert biased.padded(POSITIONS + 2).positions == POSITIONS + 2


@pytest.mark.parametrize("order", [[0, 1], [1, 0]])
def test_batches_of_both_forms_are_stacked(pair, order):
    """As where a layer was not used in some batch."""
    both = [pair[place] for place in order]
    found = concatenate(both)
    assert isinstance(found, FactoredGradient)
    torch.testing.assert_close(found.dense(), torch.cat([gradient.dense() for gradient in both]))
    alike = concatenate([pair[0], pair[0].padded(POSITIONS + 1)])
    assert isinstance(alike, BiasedGradient)
    torch.testing.assert_close(alike.dense(), torch.cat([pair[1].dense()] * 2))


def test_calls_add_up(pair):
    biased, plain = pair
    torch.testing.assert_close(add_calls([biased, biased]).dense(), 2 * plain.dense())
    torch.testing.assert_close(add_calls([biased, plain]).dense(), 2 * plain.dense())
    other = DenseGradient(plain.dense())
    torch.testing.assert_close(add_calls([biased, other]).dense(), 2 * plain.dense())


def test_rescaled_gradients_stay_in_their_form(pair):
    biased, plain = pair
    factor = torch.arange(1.0, EXAMPLES + 1)
    found = biased.rescaled(factor)
    assert isinstance(found, BiasedGradient)
    torch.testing.assert_close(found.dense(), plain.dense() * factor[:, None, None])


def test_non_finite_examples_are_found(pair):
    biased, _ = pair
    biased.bare_inputs[1, 0, 0] = float("inf")
    biased.output_grads[3, 2, 1] = float("nan")
    assert biased.is_finite().tolist() == [True, False, True, False, True]


@pytest.mark.parametrize("dtype", ["int8", "float16", "float32"])
def test_codecs_store_the_same(pair, dtype):
    biased, plain = pair
    for codec in (
        PairsCodec((OUTPUTS, INPUTS + 1), positions=POSITIONS + 1, has_bias=True, dtype=dtype),
        DenseCodec((OUTPUTS, INPUTS + 1), dtype=dtype),
    ):
        ours, theirs = codec.encode(biased), codec.encode(plain)
        assert ours.keys() == theirs.keys()
        torch.testing.assert_close(codec.decode(ours), codec.decode(theirs), rtol=2e-3, atol=2e-3)
        assert {key: a.shape for key, a in ours.items()} == {key: a.shape for key, a in theirs.items()}
