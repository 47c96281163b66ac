"""Rules that see all layers, their names or how they were trained give each layer the number that they say."""

from __future__ import annotations

import math

import pytest
import torch

from lightning_influence.curvature import (
    AbsoluteDamping,
    AnyDamping,
    DampedLayer,
    GlobalDamping,
    HeuristicDamping,
    LayerwiseDamping,
    TrainingDamping,
    WeightDecayDamping,
    as_damping,
    damping_by_layer,
)

LAYERS = {
    "body.0": DampedLayer(torch.tensor([[1.0, 3.0, 5.0]]), decay=0.01, stopping=0.5),
    "body.1": DampedLayer(torch.tensor([[0.5], [0.5]]), decay=0.02, stopping=2.0),
    "head": DampedLayer(torch.tensor([[2.0]]), decay=0.0, stopping=4.0),
}


def values(damping: AnyDamping, layers: dict[str, DampedLayer] | None = None) -> dict[str, float]:
    layers = LAYERS if layers is None else layers
    rules = damping_by_layer(as_damping(damping), layers)
    return {name: float(rules[name](layer.eigenvalues)) for name, layer in layers.items()}


def test_global_damping_counts_each_parameter_once() -> None:
    assert values(GlobalDamping(0.5)) == dict.fromkeys(LAYERS, 0.5 * 12 / 6)


def test_weight_decay_damping_is_the_layers_own_penalty() -> None:
    found = values(WeightDecayDamping(3.0, without=0.7))
    assert found == pytest.approx({"body.0": 0.03, "body.1": 0.06, "head": 0.7})


def test_weight_decay_damping_takes_a_rule_for_layers_without() -> None:
    assert values(WeightDecayDamping(without=HeuristicDamping(0.5)))["head"] == 1.0


def test_weight_decay_damping_refuses_layers_without() -> None:
    with pytest.raises(ValueError, match=r"but head had no weight decay; pass `without=`"):
        values(WeightDecayDamping())


def test_training_damping_adds_decay_and_stopping() -> None:
    found = values(TrainingDamping(decay=3.0, stopping=0.1))
    assert found == pytest.approx({"body.0": 0.08, "body.1": 0.26, "head": 0.4})


@pytest.mark.parametrize("damping", [WeightDecayDamping(), TrainingDamping()])
def test_what_is_not_known_is_refused_with_its_reason(damping: AnyDamping) -> None:
    layers = {"head": DampedLayer(torch.ones(1, 1), note="old.h5 does not say; capture again.")}
    with pytest.raises(
        ValueError, match=r"weight decay of layer 'head' is not known: old.h5 does not say; capture"
    ):
        values(damping, layers)


def test_an_unknown_training_time_is_refused_by_the_rule_that_needs_it_only() -> None:
    layers = {"head": DampedLayer(torch.ones(1, 1), decay=0.1)}
    assert values(WeightDecayDamping(), layers) == {"head": 0.1}
    with pytest.raises(ValueError, match="training time of layer 'head' is not known"):
        values(TrainingDamping(), layers)


def test_a_mapping_gives_a_layer_the_first_pattern_that_fits() -> None:
    found = values({"body.1": 7, "body.*": HeuristicDamping(0.5), "*": 0.25})
    assert found == {"body.0": 1.5, "body.1": 7.0, "head": 0.25}


def test_a_global_rule_in_a_mapping_sees_the_layers_that_take_it() -> None:
    assert values({"head": 1.0, "*": GlobalDamping(1.0)})["body.0"] == 10 / 5


def test_a_mapping_must_name_every_layer() -> None:
    with pytest.raises(
        ValueError, match=r"gives head none; add the pattern '\*' .* layers are body.0, body.1, head"
    ):
        values({"body.*": 0.1})


def test_a_pattern_that_fits_no_layer_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"names haed, which no layer fits, .* The layers are body.0, body.1, head"
    ):
        values({"haed": 0.1, "*": 1.0})


def test_a_mapping_must_hold_dampings() -> None:
    with pytest.raises(ValueError, match="must be positive and finite, got -1"):
        as_damping({"*": -1.0})
    with pytest.raises(TypeError, match="or a mapping from layers to these, got 'much'"):
        as_damping({"*": "much"})  # type: ignore[dict-item]
    with pytest.raises(TypeError, match="got the key 0"):
        as_damping({0: 1.0})  # type: ignore[dict-item]
    with pytest.raises(ValueError, match="empty mapping"):
        as_damping({})


def test_a_function_of_one_layers_eigenvalues_goes_on_working() -> None:
    assert values(lambda eigenvalues: eigenvalues.max()) == {"body.0": 5.0, "body.1": 0.5, "head": 2.0}
    assert values(AbsoluteDamping(0.5)) == dict.fromkeys(LAYERS, 0.5)


def test_an_own_rule_may_see_all_layers() -> None:
    class Largest:
        def for_layers(self, layers):  # type: ignore[no-untyped-def]
            largest = max(float(layer.eigenvalues.max()) for layer in layers.values())
            return dict.fromkeys(layers, lambda eigenvalues: largest)

    assert values(Largest()) == dict.fromkeys(LAYERS, 5.0)


@pytest.mark.parametrize("rule", [GlobalDamping, WeightDecayDamping])
@pytest.mark.parametrize("factor", [0.0, -0.1, math.nan, math.inf])
def test_factors_must_be_positive(rule: type, factor: float) -> None:
    with pytest.raises(ValueError, match="`factor` must be positive and finite"):
        rule(factor)


@pytest.mark.parametrize("numbers", [(-1.0, 0.1), (1.0, 0.0), (math.nan, 0.1), (1.0, math.inf)])
def test_numbers_of_training_damping_are_checked(numbers: tuple[float, float]) -> None:
    with pytest.raises(ValueError, match="`decay` must not be negative, `stopping` must be positive"):
        TrainingDamping(*numbers)


def test_a_layerwise_damping_equals_its_mapping() -> None:
    mapping = {"body.*": 0.1, "head": GlobalDamping()}
    assert as_damping(mapping) == LayerwiseDamping(mapping)
