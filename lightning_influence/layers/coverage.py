"""Which layers are attributed, and a report that names every parameter that is not."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from lightning_influence.errors import LayerError
from lightning_influence.gradients import LayerGradient
from lightning_influence.layers.base import LayerAdapter, find_adapter

NOT_CHOSEN = "not named in `layers`"


@dataclass(frozen=True)
class TrackedLayer:
    """A module, the adapter that knows its gradients, and what of it they cover.

    Args:
        module: the layer.
        adapter: for its type.
        has_bias: whether the gradient's last column is that of a trainable bias.
    """

    module: nn.Module
    adapter: LayerAdapter
    has_bias: bool

    def of_copy(self, module: nn.Module) -> TrackedLayer:
        """The same layer in a copy of the model."""
        return replace(self, module=module)

    @property
    def shape(self) -> tuple[int, int]:
        """The gradient's shape (o, i), the bias's column included."""
        o, i = self.adapter.shape(self.module)
        return o, i + self.has_bias

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """The covered parameters, by their names in the module."""
        names = ("weight", "bias") if self.has_bias else ("weight",)
        return {name: self.module.get_parameter(name) for name in names}

    def gradient(self, layer_input: Tensor, output_grad: Tensor) -> LayerGradient:
        """Per-example gradients of one call of the module."""
        gradient = self.adapter.gradient(self.module, layer_input, output_grad)
        if not self.has_bias:
            return gradient
        ones = gradient.inputs.new_ones(*gradient.inputs.shape[:2], 1)
        return LayerGradient(torch.cat([gradient.inputs, ones], dim=-1), gradient.output_grads)


@dataclass(frozen=True)
class LayerReport:
    """What becomes of the parameters that one module owns.

    Args:
        name: the module's name in the model; "" is the model itself.
        type: the module's class.
        parameters: number of its own trainable parameters.
        share: `parameters` over all trainable parameters of the model.
        covered: how many of them are attributed.
        reason: why the others are not; empty if all are.
    """

    name: str
    type: str
    parameters: int
    share: float
    covered: int
    reason: str


@dataclass(frozen=True)
class Coverage:
    """The report over all modules that own trainable parameters."""

    layers: tuple[LayerReport, ...]

    @property
    def share(self) -> float:
        """Attributed parameters over trainable parameters, 0 to 1."""
        total = sum(layer.parameters for layer in self.layers)
        return sum(layer.covered for layer in self.layers) / max(total, 1)

    @property
    def uncovered(self) -> tuple[LayerReport, ...]:
        """The modules with parameters that are not attributed."""
        return tuple(layer for layer in self.layers if layer.reason)

    def without(self, reasons: dict[str, str]) -> Coverage:
        """The report after some of the layers turned out not to be attributable."""
        return Coverage(
            tuple(
                replace(layer, covered=0, reason=reasons[layer.name]) if layer.name in reasons else layer
                for layer in self.layers
            )
        )

    def to_builtins(self) -> list[dict[str, object]]:
        """The report as JSON can hold it."""
        return [asdict(layer) for layer in self.layers]

    @classmethod
    def from_builtins(cls, layers: Iterable[dict]) -> Coverage:
        """The inverse of `to_builtins`."""
        return cls(tuple(LayerReport(**layer) for layer in layers))

    def __str__(self) -> str:
        """One line for what is covered, one for each module that is not."""
        lines = [f"{self.share:.1%} of the trainable parameters are attributed"]
        lines += [
            f"  not attributed: {layer.name or '(the model itself)'} ({layer.type}, "
            f"{layer.parameters - layer.covered:,} parameters, "
            f"{layer.share * (1 - layer.covered / layer.parameters):.1%}): {layer.reason}"
            for layer in self.uncovered
        ]
        return "\n".join(lines)


def track_layers(
    model: nn.Module, patterns: Sequence[str] | None = None
) -> tuple[dict[str, TrackedLayer], Coverage]:
    """Find the layers to attribute.

    Args:
        model: any module; names are those of `model.named_modules()`.
        patterns: names or glob patterns ("encoder.*"); None takes every supported layer.

    Raises:
        LayerError: if a pattern matches no module with trainable parameters, or nothing is left.
    """
    owners = {name: module for name, module in model.named_modules() if _own_parameters(module)}
    _check_patterns(patterns, owners)
    shared = _shared_parameters(model)
    total = sum(_count(module) for module in owners.values())
    tracked: dict[str, TrackedLayer] = {}
    reports = []
    for name, module in owners.items():
        adapter = find_adapter(module)
        reason = _reason_against(name, module, adapter, patterns, shared, model)
        covered = 0
        if adapter is not None and not reason:
            bias = getattr(module, "bias", None)
            layer = TrackedLayer(module, adapter, bias is not None and bias.requires_grad)
            tracked[name] = layer
            covered = sum(parameter.numel() for parameter in layer.parameters.values())
            left = [key for key, _ in _own_parameters(module) if key not in layer.parameters]
            reason = f"{', '.join(left)}: not part of the layer's formula" if left else ""
        reports.append(
            LayerReport(name, type(module).__name__, _count(module), _count(module) / total, covered, reason)
        )
    coverage = Coverage(tuple(reports))
    if not tracked:
        raise LayerError(f"No layer can be attributed:\n{coverage}")
    return tracked, coverage


def _reason_against(
    name: str,
    module: nn.Module,
    adapter: LayerAdapter | None,
    patterns: Sequence[str] | None,
    shared: set[int],
    model: nn.Module,
) -> str:
    if patterns is not None and not any(fnmatchcase(name, pattern) for pattern in patterns):
        return NOT_CHOSEN
    if adapter is None:
        return "this type of layer is not supported"
    if not module.get_parameter("weight").requires_grad:
        return "its weight is frozen"
    if any(id(parameter) in shared for _, parameter in _own_parameters(module)):
        return "a parameter is shared with another module"
    if isinstance(_parent(name, model), nn.MultiheadAttention):
        return "nn.MultiheadAttention uses its weight without calling it"
    return ""


def _parent(name: str, model: nn.Module) -> nn.Module | None:
    return model.get_submodule(name.rpartition(".")[0]) if name else None


def _own_parameters(module: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return [(k, p) for k, p in module.named_parameters(recurse=False) if p.requires_grad]


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for _, parameter in _own_parameters(module))


def _shared_parameters(model: nn.Module) -> set[int]:
    owners = Counter(id(p) for module in model.modules() for _, p in _own_parameters(module))
    return {parameter for parameter, count in owners.items() if count > 1}


def _check_patterns(patterns: Sequence[str] | None, owners: dict[str, nn.Module]) -> None:
    if isinstance(patterns, str):
        raise LayerError(f"`layers` must be a list of names or glob patterns, got the string {patterns!r}.")
    for pattern in patterns or ():
        if not any(fnmatchcase(name, pattern) for name in owners):
            raise LayerError(
                f"`layers` has {pattern!r}, which matches no module with trainable parameters; "
                f"there are: {', '.join(owners)}."
            )
