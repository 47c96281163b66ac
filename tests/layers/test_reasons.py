"""What is not attributed says why, and what to do."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

from lightning_influence.layers import find_adapters, track_layers
from lightning_influence.layers.reasons import why_unsupported
from tests.layer_table import reports
from tests.layers.case import Uncovered
from tests.layers.case_models import Lora
from tests.layers.uncovered import UNCOVERED

WAYS_OUT = ("register_adapter", "build it without", "leave the layer out", "nn.Linear", "prune after", "use nn.")


@pytest.mark.parametrize("case", UNCOVERED, ids=str)
def test_the_reason_names_the_cause_and_a_way_out(case: Uncovered) -> None:
    uncovered = [report for report in reports(case) if report.reason]
    assert uncovered
    assert sum(report.covered for report in uncovered) == 0
    assert any(case.reason in report.reason for report in uncovered)
    assert all(any(way in report.reason for way in WAYS_OUT) for report in uncovered)


@pytest.mark.parametrize("make", [nn.LazyLinear, lambda o: nn.LazyConv2d(o, 2), lambda _: nn.LazyBatchNorm1d()])
def test_a_lazy_layer_without_a_size_is_named(make: type[nn.Module]) -> None:
    layer = make(3)
    assert not find_adapters(layer)
    assert "run a batch through the model before `fit`" in why_unsupported(layer)


def test_a_lazy_layer_that_has_seen_a_batch_is_covered() -> None:
    layer = nn.LazyLinear(3)
    layer(torch.zeros(2, 5))
    assert track_layers(layer)[1].share == 1


def test_a_layer_whose_pruning_was_made_permanent_is_covered() -> None:
    layer = prune.l1_unstructured(nn.Linear(3, 2), "weight", 0.5)
    prune.remove(layer, "weight")
    assert track_layers(layer)[1].share == 1


def test_a_layer_whose_parametrization_was_removed_is_covered() -> None:
    layer = parametrizations.weight_norm(nn.Linear(3, 2))
    parametrize.remove_parametrizations(layer, "weight")
    assert track_layers(layer)[1].share == 1


def test_a_layer_without_parameters_is_not_reported() -> None:
    _, coverage = track_layers(nn.Sequential(nn.Linear(3, 2), nn.ReLU(), nn.Dropout(0.1), nn.Softmax(1)))
    assert [layer.name for layer in coverage.layers] == ["0"]


def test_lora_is_covered_by_its_inner_layers_and_its_frozen_base_is_not_missed() -> None:
    layers, coverage = track_layers(Lora())
    assert list(layers) == ["lora_A.default", "lora_B.default"]
    assert [layer.name for layer in coverage.layers] == list(layers)
    assert coverage.share == 1
