"""Which layers are attributed, and a report that names every parameter that is not."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from fnmatch import fnmatchcase

from torch import nn
from torch.nn.parameter import is_lazy

from lightning_influence.errors import LayerError
from lightning_influence.layers.base import find_adapters
from lightning_influence.layers.discovery import find_layers
from lightning_influence.layers.reasons import NOT_CHOSEN, why_unsupported
from lightning_influence.layers.tracked import TrackedLayer


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

    def without(self, layers: Mapping[str, TrackedLayer], reasons: Mapping[str, str]) -> Coverage:
        """The report after some of the layers turned out not to be attributable.

        Args:
            layers: by name, those that are counted as covered.
            reasons: by name, why some of them are not.
        """
        lost, why = Counter[str](), defaultdict[str, list[str]](list)
        for name, reason in reasons.items():
            for module, elements in _elements(layers[name]):
                lost[module] += elements
                why[module].append(reason)
        return Coverage(
            tuple(
                replace(
                    layer,
                    covered=layer.covered - lost[layer.name],
                    reason="; ".join(dict.fromkeys([*filter(None, [layer.reason]), *why[layer.name]])),
                )
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
        model: any module; names are those of `model.named_modules()`. A module with several matrices has a
            layer for each, as "attention.in_proj".
        patterns: names or glob patterns ("encoder.*"); None takes every supported layer.

    Raises:
        LayerError: if a pattern matches no module with trainable parameters, or nothing is left.
    """
    owners = {name: module for name, module in model.named_modules() if _own_parameters(module)}
    _check_initialized(owners)
    _check_patterns(patterns, owners)
    chosen = {n: m for n, m in owners.items() if patterns is None or any(fnmatchcase(n, p) for p in patterns)}
    tracked, reasons = find_layers(chosen, model)
    reasons |= dict.fromkeys(owners.keys() - chosen.keys(), NOT_CHOSEN)
    coverage = Coverage(tuple(_reports(owners, tracked, reasons)))
    if not tracked:
        raise LayerError(f"No layer can be attributed:\n{coverage}")
    return tracked, coverage


def _reports(
    owners: Mapping[str, nn.Module], tracked: Mapping[str, TrackedLayer], reasons: Mapping[str, str]
) -> Iterator[LayerReport]:
    """One report a module; a shared parameter is its first owner's."""
    total = sum({id(p): p.numel() for module in owners.values() for _, p in _own_parameters(module)}.values())
    covered = Counter[str]()
    for layer in tracked.values():
        for name, elements in _elements(layer):
            covered[name] += elements
    seen: set[int] = set()
    for name, module in owners.items():
        own = [(key, p) for key, p in _own_parameters(module) if id(p) not in seen]
        seen |= {id(p) for _, p in own}
        count = sum(p.numel() for _, p in own)
        if not count:
            continue
        reason = "" if covered[name] == count else reasons.get(name) or _left_over(module, own)
        yield LayerReport(name, type(module).__name__, count, count / total, covered[name], reason)


def _elements(layer: TrackedLayer) -> Iterator[tuple[str, int]]:
    """How many parameters the layer covers in which modules."""
    yield layer.sources[0].name, layer.weight_elements
    if layer.has_bias:
        yield layer.bias_owner.name, layer.shape[0]


def _left_over(module: nn.Module, own: list[tuple[str, nn.Parameter]]) -> str:
    known = {n for adapter in find_adapters(module) for n in (adapter.weight_name, adapter.bias_name)}
    left = [key for key, _ in own if key not in known] or [key for key, _ in own]
    return f"{', '.join(left)}: not part of the layer's formula"


def _own_parameters(module: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return [(k, p) for k, p in module.named_parameters(recurse=False) if p.requires_grad]


def _check_initialized(owners: Mapping[str, nn.Module]) -> None:
    for name, module in owners.items():
        if any(is_lazy(parameter) for _, parameter in _own_parameters(module)):
            raise LayerError(f"Layer {name!r}: {why_unsupported(module)}.")


def _check_patterns(patterns: Sequence[str] | None, owners: Mapping[str, nn.Module]) -> None:
    if isinstance(patterns, str):
        raise LayerError(f"`layers` must be a list of names or glob patterns, got the string {patterns!r}.")
    for pattern in patterns or ():
        if not any(fnmatchcase(name, pattern) for name in owners):
            raise LayerError(
                f"`layers` has {pattern!r}, which matches no module with trainable parameters; "
                f"there are: {', '.join(owners)}."
            )
