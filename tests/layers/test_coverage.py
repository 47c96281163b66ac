"""The coverage report names every parameter, and why it is not attributed."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from lightning_influence.errors import LayerError
from lightning_influence.gradients import LayerGradient
from lightning_influence.layers import (
    Coverage,
    LayerAdapter,
    LayerReport,
    find_adapter,
    register_adapter,
    track_layers,
)
from lightning_influence.layers import base as registry


def report(coverage: Coverage, name: str) -> LayerReport:
    (found,) = [layer for layer in coverage.layers if layer.name == name]
    return found


class Own(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class SubclassKeepingForward(nn.Linear):
    pass


class WithRootParameter(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.temperature = nn.Parameter(torch.ones(3))
        self.head = nn.Linear(2, 2)


def encoder() -> nn.Module:
    return nn.ModuleDict(
        {
            "embedding": nn.Embedding(10, 4),
            "block": nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 4, bias=False)),
            "head": nn.Linear(4, 3),
        }
    )


def test_every_trainable_parameter_is_in_the_report_once() -> None:
    model = encoder()
    _, coverage = track_layers(model)
    assert [layer.name for layer in coverage.layers] == ["embedding", "block.0", "block.1", "block.2", "head"]
    assert [layer.type for layer in coverage.layers] == [
        "Embedding",
        "Linear",
        "LayerNorm",
        "Linear",
        "Linear",
    ]
    assert [layer.parameters for layer in coverage.layers] == [40, 30, 12, 24, 15]
    assert sum(layer.parameters for layer in coverage.layers) == sum(p.numel() for p in model.parameters())


def test_shares_add_up() -> None:
    _, coverage = track_layers(encoder())
    assert sum(layer.share for layer in coverage.layers) == pytest.approx(1, abs=1e-15)
    assert coverage.share == pytest.approx((30 + 24 + 15) / 121)
    assert {layer.name for layer in coverage.uncovered} == {"embedding", "block.1"}


def test_unsupported_types_are_named_in_the_text() -> None:
    _, coverage = track_layers(encoder())
    text = str(coverage)
    assert text.startswith("57.0% of the trainable parameters are attributed")
    assert "not attributed: embedding (Embedding, 40 parameters, 33.1%): this type of layer" in text
    assert "not attributed: block.1 (LayerNorm, 12 parameters" in text


@pytest.mark.parametrize(
    ("patterns", "expected"),
    [
        (None, ["block.0", "block.2", "head"]),
        (["block.*"], ["block.0", "block.2"]),
        (["head"], ["head"]),
        (["block.[02]", "head"], ["block.0", "block.2", "head"]),
        (("*",), ["block.0", "block.2", "head"]),
    ],
)
def test_patterns_choose_layers(patterns: list[str] | None, expected: list[str]) -> None:
    tracked, _ = track_layers(encoder(), patterns)
    assert list(tracked) == expected


def test_layers_that_were_not_chosen_say_so() -> None:
    _, coverage = track_layers(encoder(), ["head"])
    assert report(coverage, "block.0").reason == "not named in `layers`"
    assert report(coverage, "block.0").covered == 0


def test_a_pattern_without_match_lists_what_there_is() -> None:
    with pytest.raises(LayerError, match=r"'decoder\.\*', which matches no module .* embedding, block\.0"):
        track_layers(encoder(), ["head", "decoder.*"])


def test_a_string_instead_of_a_list_is_refused() -> None:
    with pytest.raises(LayerError, match=r"must be a list of names or glob patterns, got the string 'head'"):
        track_layers(encoder(), "head")


def test_a_model_without_any_supported_layer_is_refused_with_its_report() -> None:
    with pytest.raises(LayerError, match=r"(?s)No layer can be attributed:.*0 \(LayerNorm"):
        track_layers(nn.Sequential(nn.LayerNorm(3)))


def test_a_chosen_layer_of_unsupported_type_alone_is_refused() -> None:
    with pytest.raises(LayerError, match=r"No layer can be attributed"):
        track_layers(encoder(), ["embedding"])


def test_a_shared_parameter_is_not_attributed() -> None:
    model = nn.ModuleDict({"embedding": nn.Embedding(7, 4), "other": nn.Linear(4, 4), "head": nn.Linear(4, 7)})
    model["head"].weight = model["embedding"].weight
    tracked, coverage = track_layers(model)
    assert list(tracked) == ["other"]
    assert report(coverage, "head").reason == "a parameter is shared with another module"


def test_a_module_registered_under_two_names_is_one_layer() -> None:
    shared = nn.Linear(3, 3)
    tracked, coverage = track_layers(nn.ModuleDict({"a": shared, "b": shared}))
    assert list(tracked) == ["a"]
    assert coverage.share == 1


def test_a_frozen_weight_is_not_attributed() -> None:
    model = encoder()
    model["head"].weight.requires_grad_(False)
    tracked, coverage = track_layers(model)
    assert "head" not in tracked
    assert report(coverage, "head").reason == "its weight is frozen"
    assert report(coverage, "head").parameters == 3  # its bias trains


def test_a_wholly_frozen_layer_is_not_in_the_report() -> None:
    model = encoder()
    model["head"].requires_grad_(False)
    tracked, coverage = track_layers(model)
    assert "head" not in tracked
    assert "head" not in [layer.name for layer in coverage.layers]


def test_a_frozen_bias_leaves_the_weight_attributed() -> None:
    model = encoder()
    model["head"].bias.requires_grad_(False)
    tracked, coverage = track_layers(model)
    assert tracked["head"].shape == (3, 4)
    assert set(tracked["head"].parameters) == {"weight"}
    assert (report(coverage, "head").covered, report(coverage, "head").reason) == (12, "")


def test_a_bias_is_the_last_column() -> None:
    tracked, _ = track_layers(encoder())
    assert tracked["head"].shape == (3, 5)
    assert tracked["block.2"].shape == (4, 6)


def test_a_parametrized_linear_is_not_attributed() -> None:
    model = nn.Sequential(weight_norm(nn.Linear(3, 3)), nn.Linear(3, 2))
    tracked, coverage = track_layers(model)
    assert list(tracked) == ["1"]
    assert coverage.share == pytest.approx(8 / sum(p.numel() for p in model.parameters()))
    assert sum(layer.share for layer in coverage.layers) == pytest.approx(1)


def test_the_projections_of_multihead_attention_are_not_attributed() -> None:
    model = nn.ModuleDict({"attention": nn.MultiheadAttention(4, 2), "head": nn.Linear(4, 2)})
    tracked, coverage = track_layers(model)
    assert list(tracked) == ["head"]
    assert report(coverage, "attention.out_proj").reason == (
        "nn.MultiheadAttention uses its weight without calling it"
        if find_adapter(model["attention"].out_proj)
        else "this type of layer is not supported"
    )


def test_a_subclass_with_its_own_forward_is_not_attributed() -> None:
    tracked, coverage = track_layers(nn.Sequential(Own(3, 3), nn.Linear(3, 2)))
    assert list(tracked) == ["1"]
    assert report(coverage, "0").reason == "this type of layer is not supported"


def test_a_subclass_that_keeps_the_forward_is_attributed() -> None:
    tracked, _ = track_layers(nn.Sequential(SubclassKeepingForward(3, 3)))
    assert list(tracked) == ["0"]


def test_a_parameter_of_the_model_itself_is_named() -> None:
    _, coverage = track_layers(WithRootParameter())
    assert report(coverage, "").parameters == 3
    assert "not attributed: (the model itself) (WithRootParameter, 3 parameters, 33.3%)" in str(coverage)


def test_an_extra_parameter_of_a_supported_layer_is_named() -> None:
    layer = SubclassKeepingForward(3, 2)
    layer.scale = nn.Parameter(torch.ones(4))
    _, coverage = track_layers(nn.Sequential(layer))
    assert report(coverage, "0").covered == 8
    assert report(coverage, "0").reason == "scale: not part of the layer's formula"
    assert coverage.share == pytest.approx(8 / 12)


def test_the_report_survives_json() -> None:
    _, coverage = track_layers(encoder())
    assert Coverage.from_builtins(json.loads(json.dumps(coverage.to_builtins()))) == coverage


def test_layers_taken_out_later_count_as_uncovered() -> None:
    _, coverage = track_layers(encoder())
    without = coverage.without({"head": "no call of it took part"})
    assert report(without, "head").reason == "no call of it took part"
    assert without.share == pytest.approx((30 + 24) / 121)


class Anything(LayerAdapter):
    """Claims every LayerNorm."""

    def matches(self, module: nn.Module) -> bool:
        return isinstance(module, nn.LayerNorm)

    def shape(self, module: nn.Module) -> tuple[int, int]:
        return module.weight.numel(), 1

    def gradient(self, module: nn.Module, layer_input: Tensor, output_grad: Tensor) -> LayerGradient:
        raise NotImplementedError


@pytest.fixture
def restored_registry() -> Iterator[None]:
    before = list(registry._ADAPTERS)
    yield
    registry._ADAPTERS[:] = before


@pytest.mark.usefixtures("restored_registry")
def test_a_registered_adapter_makes_its_type_known() -> None:
    assert find_adapter(nn.LayerNorm(2)) is None
    register_adapter(Anything())
    assert isinstance(find_adapter(nn.LayerNorm(2)), Anything)


@pytest.mark.usefixtures("restored_registry")
def test_the_last_registered_adapter_goes_first() -> None:
    first, second = Anything(), Anything()
    register_adapter(first)
    register_adapter(second)
    assert find_adapter(nn.LayerNorm(2)) is second
