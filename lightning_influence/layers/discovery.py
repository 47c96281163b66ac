"""Which matrices of parameters a model has, and which modules use each of them."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import replace

from torch import nn

from lightning_influence.layers.attention import AttentionOutput, is_plain_attention
from lightning_influence.layers.base import LayerAdapter, find_adapters
from lightning_influence.layers.linear import LinearAdapter
from lightning_influence.layers.reasons import why_unsupported
from lightning_influence.layers.tracked import Source, TrackedLayer


def find_layers(
    modules: Mapping[str, nn.Module], model: nn.Module, *, trainable_only: bool = True
) -> tuple[dict[str, TrackedLayer], dict[str, str]]:
    """The layers of some of a model's modules.

    Args:
        modules: by name; those to look at.
        model: that they are part of.
        trainable_only: whether frozen weights and biases are left out.

    Returns:
        The layers by name, in the model's order, and by module the reason why it has parameters that are
        in no layer.
    """
    reasons: dict[str, str] = {}
    sources: dict[str, Source] = {}  # by the layer's name
    for name, module in modules.items():
        adapters = _adapters(name, module, model)
        if not adapters:
            reasons[name] = why_unsupported(module)
        for adapter in adapters:
            if trainable_only and not module.get_parameter(adapter.weight_name).requires_grad:
                reasons[name] = f"its {adapter.weight_name} is frozen"
                continue
            bias = _parameter(module, adapter.bias_name)
            has_bias = bias is not None and (bias.requires_grad or not trainable_only)
            layer_name = f"{name}.{adapter.part}" if adapter.part and name else name or adapter.part
            sources[layer_name] = Source(name, module, adapter, has_bias)
    return _grouped(sources, model, reasons), reasons


def _adapters(name: str, module: nn.Module, model: nn.Module) -> list[LayerAdapter]:
    adapters = list(find_adapters(module))
    parent = model.get_submodule(name.rpartition(".")[0]) if name else None
    if adapters and isinstance(adapters[0], LinearAdapter) and parent is not None and is_plain_attention(parent):
        return [AttentionOutput()]
    return adapters


def _grouped(sources: Mapping[str, Source], model: nn.Module, reasons: dict[str, str]) -> dict[str, TrackedLayer]:
    """One layer for each weight; its name is that of the first module that has it."""
    users: dict[int, list[str]] = defaultdict(list)
    for layer_name, source in sources.items():
        users[id(_weight(source))].append(layer_name)
    owners = Counter(id(p) for module in model.modules() for p in module._parameters.values() if p is not None)
    layers = {}
    for weight, names in users.items():
        group = [sources[layer_name] for layer_name in names]
        reason = _why_not_together(group, owners[weight])
        if reason:
            reasons |= {source.name: reason for source in group}
            continue
        biases = {id(_bias(source)) for source in group if source.has_bias}
        if len(biases) > 1 or any(owners[bias] > sum(s.has_bias for s in group) for bias in biases):
            reasons |= {s.name: "its bias is not that of all layers with its weight" for s in group if s.has_bias}
            group = [replace(source, has_bias=False) for source in group]
        layers[names[0]] = TrackedLayer(tuple(group), any(source.has_bias for source in group))
    return layers


def _why_not_together(group: list[Source], owners: int) -> str:
    if owners > len(group):
        return "its weight is shared with a module that is not covered"
    views = {
        (tuple(view.shape), view.stride())
        for source in group
        for view in [source.adapter.matrix(source.module, _weight(source).detach())]
    }
    structures = {source.adapter.structure(source.module).groups for source in group}
    if len(views) > 1 or len(structures) > 1:
        return "its weight is shared with a layer that uses it in another way"
    return ""


def _weight(source: Source) -> nn.Parameter:
    return source.module.get_parameter(source.adapter.weight_name)


def _bias(source: Source) -> nn.Parameter:
    return source.module.get_parameter(source.adapter.bias_name)


def _parameter(module: nn.Module, name: str) -> nn.Parameter | None:
    found = getattr(module, name, None) if name else None
    return found if isinstance(found, nn.Parameter) else None
