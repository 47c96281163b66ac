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
    find_adapters,
    register_adapter,
    track_layers,
)
from lightning_influence.layers import base as registry
from lightning_influence.layers import tracked as tracked_module


def report(coverage: Coverage, name: str) -> LayerReport:
    (found,) = [layer for layer in coverage.layers if layer.name == name]
    return found


class Table(nn.Module):
    """A layer that nobody knows."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))


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
            "table": Table(40),
            "block": nn.Sequential(nn.Linear(4, 6), Table(12), nn.Linear(6, 4, bias=False)),
            "head": nn.Linear(4, 3),
        }
    )


def test_every_trainable_parameter_is_in_the_report_once() -> None:
    model = encoder()
    _, coverage = track_layers(model)
    assert [layer.name for layer in coverage.layers] == ["table", "block.0", "block.1", "block.2", "head"]
    assert [layer.type for layer in coverage.layers] == [
        "Table",
        "Linear",
        "Table",
        "Linear",
        "Linear",
    ]
    assert [layer.parameters for layer in coverage.layers] == [40, 30, 12, 24, 15]
    assert sum(layer.parameters for layer in coverage.layers) == sum(p.numel() for p in model.parameters())


def test_shares_add_up() -> None:
    _, coverage = track_layers(encoder())
    assert sum(layer.share for layer in coverage.layers) == pytest.approx(1, abs=1e-15)
    assert coverage.share == pytest.approx((30 + 24 + 15) / 121)
    assert {layer.name for layer in coverage.uncovered} == {"table", "block.1"}


def test_unsupported_types_are_named_in_the_text() -> None:
    _, coverage = track_layers(encoder())
    text = str(coverage)
    assert text.startswith("57.0% of the trainable parameters are attributed")
    assert "not attributed: table (Table, 40 parameters, 33.1%): this type of layer" in text
    assert "not attributed: block.1 (Table, 12 parameters" in text


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
    with pytest.raises(LayerError, match=r"'decoder\.\*', which matches no module .* table, block\.0"):
        track_layers(encoder(), ["head", "decoder.*"])


def test_a_string_instead_of_a_list_is_refused() -> None:
    with pytest.raises(LayerError, match=r"must be a list of names or glob patterns, got the string 'head'"):
        track_layers(encoder(), "head")


def test_a_model_without_any_supported_layer_is_refused_with_its_report() -> None:
    with pytest.raises(LayerError, match=r"(?s)No layer can be attributed:.*0 \(Table"):
        track_layers(nn.Sequential(Table(3)))


def test_a_chosen_layer_of_unsupported_type_alone_is_refused() -> None:
    with pytest.raises(LayerError, match=r"No layer can be attributed"):
        track_layers(encoder(), ["table"])


def test_layers_that_share_a_weight_are_one_layer() -> None:
    model = nn.ModuleDict({"first": nn.Linear(4, 7, bias=False), "second": nn.Linear(4, 7)})
    model["second"].weight = model["first"].weight
    tracked, coverage = track_layers(model)
    assert list(tracked) == ["first"]
    assert [source.name for source in tracked["first"].sources] == ["first", "second"]
    assert tracked["first"].shape == (7, 5)
    assert (report(coverage, "first").parameters, report(coverage, "second").parameters) == (28, 7)
    assert coverage.share == 1


def test_biases_of_their_own_on_a_shared_weight_are_not_attributed() -> None:
    model = nn.ModuleDict({"first": nn.Linear(4, 7), "second": nn.Linear(4, 7)})
    model["second"].weight = model["first"].weight
    tracked, coverage = track_layers(model)
    assert tracked["first"].shape == (7, 4)
    assert coverage.share == 28 / 42
    assert report(coverage, "second").reason == "its bias is not that of all layers with its weight"


def test_a_weight_shared_with_an_unknown_layer_is_not_attributed() -> None:
    model = nn.ModuleDict({"table": Table(3), "known": nn.Linear(2, 2), "other": nn.Linear(2, 2)})
    model["table"].weight = model["known"].weight
    tracked, coverage = track_layers(model)
    assert list(tracked) == ["other"]
    assert report(coverage, "known").reason == "its weight is shared with a module that is not covered"


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


@pytest.mark.parametrize(
    ("attention", "layers"),
    [
        (nn.MultiheadAttention(4, 2), {"in_proj": (12, 5), "out_proj": (4, 5)}),
        (nn.MultiheadAttention(4, 2, bias=False), {"in_proj": (12, 4), "out_proj": (4, 4)}),
        (
            nn.MultiheadAttention(4, 2, kdim=3, vdim=5),
            {"q_proj": (4, 5), "k_proj": (4, 4), "v_proj": (4, 6), "out_proj": (4, 5)},
        ),
    ],
    ids=["packed", "no-bias", "separate"],
)
def test_attention_has_a_layer_for_each_of_its_matrices(
    attention: nn.Module, layers: dict[str, tuple[int, int]]
) -> None:
    tracked, coverage = track_layers(nn.ModuleDict({"attention": attention}))
    assert {name: layer.shape for name, layer in tracked.items()} == {
        f"attention.{k}": v for k, v in layers.items()
    }
    assert coverage.share == 1


def test_biases_that_attention_appends_to_keys_and_values_are_named() -> None:
    _, coverage = track_layers(nn.ModuleDict({"attention": nn.MultiheadAttention(4, 2, add_bias_kv=True)}))
    assert report(coverage, "attention").reason == "bias_k, bias_v: not part of the layer's formula"
    assert report(coverage, "attention").covered == 60


def test_a_subclass_with_its_own_forward_is_not_attributed() -> None:
    tracked, coverage = track_layers(nn.Sequential(Own(3, 3), nn.Linear(3, 2)))
    assert list(tracked) == ["1"]
    assert "it has a `forward` of its own" in report(coverage, "0").reason


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
    tracked, coverage = track_layers(encoder())
    without = coverage.without(tracked, {"head": "no call of it took part"})
    assert report(without, "head").reason == "no call of it took part"
    assert without.share == pytest.approx((30 + 24) / 121)


class Anything(LayerAdapter):
    """Claims every Table."""

    def matches(self, module: nn.Module) -> bool:
        return isinstance(module, Table)

    def shape(self, module: nn.Module) -> tuple[int, int]:
        return module.weight.numel(), 1

    def gradient(self, module: nn.Module, layer_input: Tensor, output_grad: Tensor) -> LayerGradient:
        raise NotImplementedError  # these tests ask the registry only, never for gradients


@pytest.fixture
def restored_registry() -> Iterator[None]:
    before = list(registry._ADAPTERS)
    yield
    registry._ADAPTERS[:] = before


@pytest.mark.usefixtures("restored_registry")
def test_a_registered_adapter_makes_its_type_known() -> None:
    assert not find_adapters(Table(2))
    register_adapter(Anything())
    assert [type(adapter) for adapter in find_adapters(Table(2))] == [Anything]


@pytest.mark.usefixtures("restored_registry")
def test_the_last_registered_adapter_goes_first() -> None:
    first, second = Anything(), Anything()
    register_adapter(first)
    register_adapter(second)
    assert find_adapters(Table(2)) == [second]


def test_one_matrix_of_a_module_that_is_taken_out_leaves_the_others_covered() -> None:
    tracked, coverage = track_layers(nn.ModuleDict({"attention": nn.MultiheadAttention(4, 2, kdim=3, vdim=5)}))
    without = coverage.without(tracked, {"attention.k_proj": "it was not used"})
    assert report(without, "attention").covered == report(coverage, "attention").covered - 16
    assert report(without, "attention").reason == "it was not used"


def test_a_long_side_gets_a_diagonal_factor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracked_module, "LARGEST_FACTOR", 4)
    tracked, _ = track_layers(nn.Sequential(nn.Linear(3, 9), nn.Linear(9, 2), nn.Conv1d(6, 12, 1, groups=6)))
    structures = [(layer.structure.full_A, layer.structure.full_S) for layer in tracked.values()]
    assert structures == [(True, False), (False, True), (True, True)]
