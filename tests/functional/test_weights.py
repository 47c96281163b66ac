"""The fingerprint of the weights notices what matters and nothing else."""

from __future__ import annotations

import copy

import torch
from torch import nn

from lightning_influence.functional.weights import parameters_hash, weights_hash


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 2))


def test_equal_weights_have_equal_hashes() -> None:
    assert weights_hash(model()) == weights_hash(copy.deepcopy(model()))


def test_one_changed_bit_changes_the_hash() -> None:
    changed = model()
    with torch.no_grad():
        weight = changed[2].weight
        weight[0, 0] = torch.nextafter(weight[0, 0], torch.tensor(10.0))
    assert weights_hash(changed) != weights_hash(model())


def test_swapped_values_change_the_hash() -> None:
    changed = model()
    with torch.no_grad():
        changed[0].weight.copy_(changed[0].weight.flip(0))
    assert weights_hash(changed) != weights_hash(model())


def test_another_name_changes_the_hash() -> None:
    layer = nn.Linear(2, 2)
    assert weights_hash(nn.ModuleDict({"a": layer})) != weights_hash(nn.ModuleDict({"b": layer}))


def test_another_shape_of_the_same_bytes_changes_the_hash() -> None:
    flat, square = nn.ParameterList([torch.zeros(4)]), nn.ParameterList([torch.zeros(2, 2)])
    assert weights_hash(flat) != weights_hash(square)


def test_buffers_do_not_count() -> None:
    forwarded = model()
    forwarded(torch.randn(8, 4))  # moves the running statistics
    assert weights_hash(forwarded) == weights_hash(model())


def test_frozen_parameters_count() -> None:
    frozen = model().requires_grad_(False)
    assert weights_hash(frozen) == weights_hash(model())
    with torch.no_grad():
        frozen[0].weight += 1
    assert weights_hash(frozen) != weights_hash(model())


def test_bfloat16_model_equals_its_checkpoint_loaded_in_float32() -> None:
    half = model().bfloat16()
    loaded = model()
    loaded.load_state_dict(half.state_dict())
    assert weights_hash(loaded) == weights_hash(half)


def test_order_of_registration_does_not_count() -> None:
    a, b = nn.Linear(2, 2), nn.Linear(2, 1)
    assert weights_hash(nn.ModuleDict({"a": a, "b": b})) == weights_hash(nn.ModuleDict({"b": b, "a": a}))


def test_memory_layout_does_not_count() -> None:
    strided = nn.ParameterList([torch.arange(6.0).reshape(2, 3).T])
    contiguous = nn.ParameterList([torch.arange(6.0).reshape(2, 3).T.contiguous()])
    assert weights_hash(strided) == weights_hash(contiguous)


def test_the_parameters_of_a_checkpoint_have_the_hash_of_the_model() -> None:
    tied = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Linear(3, 3))
    tied[2].weight = tied[0].weight  # twice in the state, with buffers beside it
    state = tied.state_dict()
    named = {name: state[name] for name, _ in tied.named_parameters()}
    assert len(named) < len(state)
    assert parameters_hash(named) == weights_hash(tied)
