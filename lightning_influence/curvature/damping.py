"""Rules for the number that is added to a layer's eigenvalues before they are inverted.

A rule is any function of one layer's eigenvalues. One that has to know more, such as the other layers' eigenvalues
or what the file says of training, has the method `for_layers` instead: it is asked once for all layers, and gives
each of them a function of its own eigenvalues.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Protocol, TypeAlias, runtime_checkable

from torch import Tensor


class Damping(Protocol):
    """Anything that gives a layer's damping from its eigenvalues."""

    def __call__(self, eigenvalues: Tensor) -> Tensor | float:
        """The non-negative damping for a layer with these eigenvalues, shape [o, i]."""


@dataclass(frozen=True)
class DampedLayer:
    """What a rule may know of a layer.

    Args:
        eigenvalues: of the curvature that is asked for, shape [o, i].
        decay: the factor l of the penalty l/2 |weights|^2 that acts as the layer's weight decay did, in units of
            the eigenvalues; NaN if it is not known.
        stopping: likewise, of the penalty on the way from the first weights that acts as training's end did:
            one over the sum of the learning rates.
        note: why one is not known, and what to do.
    """

    eigenvalues: Tensor
    decay: float = math.nan
    stopping: float = math.nan
    note: str = ""


@runtime_checkable
class DampingOfLayers(Protocol):
    """A rule that needs to know more than a layer's own eigenvalues."""

    def for_layers(self, layers: Mapping[str, DampedLayer]) -> Mapping[str, Damping]:
        """The rule of each of these layers, by name."""


AnyDamping: TypeAlias = "Damping | DampingOfLayers | Mapping[str, AnyDamping] | float"
"""A rule, a number (`AbsoluteDamping`) or a mapping from names or glob patterns to these (`LayerwiseDamping`)."""


@dataclass(frozen=True)
class HeuristicDamping:
    """`factor` times the layer's mean eigenvalue (Grosse et al. 2023, arXiv:2308.03296).

    Args:
        factor: positive. It is the first thing to vary when scores are to predict retraining; 0.1 is usual in
            the literature, 1 was better on most tasks of `examples/benchmarks/damping.py`.

    Example:
        >>> import torch
        >>> HeuristicDamping(0.5)(torch.tensor([1.0, 3.0])).item()
        1.0
    """

    factor: float = 1.0

    def __post_init__(self) -> None:
        _check_factor(self.factor)

    def __call__(self, eigenvalues: Tensor) -> Tensor:
        """The layer's damping, a 0-dimensional tensor."""
        return self.factor * eigenvalues.mean()


@dataclass(frozen=True)
class GlobalDamping:
    """The same for all layers: `factor` times the mean of all their eigenvalues, each parameter's counting once.

    Layers with small gradients are damped more, and those with large ones less, than by `HeuristicDamping`.

    Args:
        factor: positive.

    Example:
        >>> import torch
        >>> layers = {"a": DampedLayer(torch.ones(1, 3)), "b": DampedLayer(torch.full((1, 1), 5.0))}
        >>> GlobalDamping(0.1).for_layers(layers)["a"](torch.ones(1, 3))
        0.2
    """

    factor: float = 0.3

    def __post_init__(self) -> None:
        _check_factor(self.factor)

    def for_layers(self, layers: Mapping[str, DampedLayer]) -> Mapping[str, Damping]:
        """One number for all."""
        total = math.fsum(float(layer.eigenvalues.double().sum()) for layer in layers.values())
        value = self.factor * total / max(1, sum(layer.eigenvalues.numel() for layer in layers.values()))
        return dict.fromkeys(layers, _constant(value))


@dataclass(frozen=True)
class WeightDecayDamping:
    """`factor` times the penalty that the layer was trained with, its weight decay.

    With weight decay l, training seeks a minimum of L + l/2 |weights|^2, whose curvature is that of L plus l: so
    where the eigenvalues are those of the Hessian, this is no approximation but the objective's own. AdamW's
    decay is that of a penalty whose factor is l times the root of its second moments (Loshchilov & Hutter 2019,
    arXiv:1711.05101), of which the layer's mean is taken.

    Args:
        factor: positive.
        without: a rule or a number for layers that were trained without weight decay, as normalizations
            often are; None refuses them.

    Raises:
        ValueError: of `for_layers`, if the file does not say what the weight decay was, or there was none.

    Example:
        >>> import torch
        >>> layers = {"head": DampedLayer(torch.ones(2, 2), decay=0.01)}
        >>> WeightDecayDamping(2.0).for_layers(layers)["head"](torch.ones(2, 2))
        0.02
    """

    factor: float = 1.0
    without: AnyDamping | None = None

    def __post_init__(self) -> None:
        _check_factor(self.factor)
        if self.without is not None:
            as_damping(self.without)

    def for_layers(self, layers: Mapping[str, DampedLayer]) -> Mapping[str, Damping]:
        """Each layer's own number."""
        for name, layer in layers.items():
            _check_known(self, name, "weight decay", layer.decay, layer.note)
        rest = {name: layer for name, layer in layers.items() if layer.decay == 0}
        if rest and self.without is None:
            raise ValueError(
                f"`damping` is {type(self).__name__}, but {', '.join(rest)} had no weight decay; pass `without=`, "
                "a rule or a number for such layers, or HeuristicDamping() for all."
            )
        found = {name: _constant(self.factor * layer.decay) for name, layer in layers.items()}
        if rest and self.without is not None:
            found.update(damping_by_layer(as_damping(self.without), rest))
        return found


@dataclass(frozen=True)
class TrainingDamping:
    """What kept the layer's weights back in training: weight decay, and that training stopped.

    `decay` times the weight decay (see `WeightDecayDamping`) plus `stopping` over the training time, the sum of
    the learning rates: gradient descent that stops after a time t is about as far as with a penalty 1/t on the way
    from its first weights (Ali, Kolter & Tibshirani 2019, arXiv:1810.10082, for least squares). Momentum makes
    the time longer; Adam makes it shorter by the root of its second moments.

    Args:
        decay: not negative. The defaults were chosen by `examples/benchmarks/damping.py`, on seven tasks; theory
            would have 1 for both if the eigenvalues were the Hessian's.
        stopping: positive.

    Raises:
        ValueError: of `for_layers`, if the file does not say how the layer was trained.

    Example:
        >>> import torch
        >>> layers = {"head": DampedLayer(torch.ones(2, 2), decay=0.01, stopping=0.5)}
        >>> round(TrainingDamping(decay=1, stopping=0.1).for_layers(layers)["head"](torch.ones(2, 2)), 6)
        0.06
    """

    decay: float = 2.0
    stopping: float = 0.05

    def __post_init__(self) -> None:
        if not (
            math.isfinite(self.decay) and self.decay >= 0 and math.isfinite(self.stopping) and self.stopping > 0
        ):
            raise ValueError(
                f"`decay` must not be negative, `stopping` must be positive, got {self.decay} and {self.stopping}."
            )

    def for_layers(self, layers: Mapping[str, DampedLayer]) -> Mapping[str, Damping]:
        """Each layer's own number."""
        for name, layer in layers.items():
            _check_known(self, name, "weight decay", layer.decay, layer.note)
            _check_known(self, name, "training time", layer.stopping, layer.note)
        return {n: _constant(self.decay * own.decay + self.stopping * own.stopping) for n, own in layers.items()}


@dataclass(frozen=True)
class AbsoluteDamping:
    """The same number for every layer, in units of the eigenvalues."""

    value: float

    def __post_init__(self) -> None:
        if not (math.isfinite(self.value) and self.value > 0):
            raise ValueError(
                f"`damping` must be positive and finite, got {self.value}; "
                "pass HeuristicDamping() to derive it from the layer's eigenvalues."
            )

    def __call__(self, eigenvalues: Tensor) -> float:
        """The number itself."""
        return self.value


@dataclass(frozen=True)
class LayerwiseDamping:
    """Other dampings for other layers; a plain mapping means the same.

    Args:
        rules: a number or a rule for the layers of each name or glob pattern; a layer takes the first that fits.
            A rule over all layers, such as `GlobalDamping`, sees those that take it.

    Raises:
        ValueError: of `for_layers`, if no pattern fits a layer, or a pattern no layer.

    Example:
        >>> import torch
        >>> rule = LayerwiseDamping({"head": 0.01, "*": HeuristicDamping(0.5)})
        >>> layers = {name: DampedLayer(torch.ones(2, 2)) for name in ("body.0", "head")}
        >>> {name: float(own(torch.ones(2, 2))) for name, own in rule.for_layers(layers).items()}
        {'body.0': 0.5, 'head': 0.01}
    """

    rules: Mapping[str, AnyDamping]

    def __post_init__(self) -> None:
        if not self.rules:
            raise ValueError(
                "`damping` is an empty mapping; give each layer's name or pattern a number or a rule."
            )
        for pattern, rule in self.rules.items():
            if not isinstance(pattern, str):
                raise TypeError(f"`damping` maps names or patterns of layers to rules, got the key {pattern!r}.")
            as_damping(rule)

    def for_layers(self, layers: Mapping[str, DampedLayer]) -> Mapping[str, Damping]:
        """Of each layer the first that fits."""
        fitting = {name: [p for p in self.rules if fnmatchcase(name, p)] for name in layers}
        without = [name for name, patterns in fitting.items() if not patterns]
        listed = f"The layers are {', '.join(layers)}."
        if without:
            raise ValueError(
                f"`damping` gives {', '.join(without)} none; add the pattern '*' for all others. {listed}"
            )
        unused = [p for p in self.rules if not any(patterns[0] == p for patterns in fitting.values())]
        if unused:
            raise ValueError(
                f"`damping` names {', '.join(unused)}, which no layer fits, or none that fits no earlier one; "
                f"correct it, or put it first. {listed}"
            )
        found: dict[str, Damping] = {}
        for pattern, rule in self.rules.items():
            own = {name: layers[name] for name, patterns in fitting.items() if patterns[0] == pattern}
            found |= damping_by_layer(as_damping(rule), own)
        return {name: found[name] for name in layers}


def as_damping(damping: AnyDamping) -> Damping | DampingOfLayers:
    """A rule as it is; a number as `AbsoluteDamping`, a mapping as `LayerwiseDamping`.

    Raises:
        ValueError: if a number is not positive and finite.
        TypeError: if it is none of these.
    """
    if isinstance(damping, Mapping):
        return LayerwiseDamping(damping)
    if isinstance(damping, type):
        raise TypeError(
            f"`damping` is the class {damping.__name__}; pass what it makes, `{damping.__name__}(...)`."
        )
    if callable(damping) or isinstance(damping, DampingOfLayers):
        return damping
    if isinstance(damping, Tensor) and damping.ndim == 0:
        damping = damping.item()
    if isinstance(damping, bool) or not isinstance(damping, numbers.Real):
        raise TypeError(
            "`damping` must be a positive number, a rule such as HeuristicDamping(), or a mapping from layers to "
            f"these, got {damping!r}."
        )
    return AbsoluteDamping(float(damping))


def damping_by_layer(
    damping: Damping | DampingOfLayers, layers: Mapping[str, DampedLayer]
) -> Mapping[str, Damping]:
    """Each layer's own rule, by name.

    Raises:
        ValueError: if a rule over all layers leaves one out.
    """
    if not isinstance(damping, DampingOfLayers):
        return dict.fromkeys(layers, damping)
    found = damping.for_layers(layers)
    missing = [name for name in layers if name not in found]
    if missing:
        raise ValueError(f"`damping` is {damping!r}, whose `for_layers` gives {', '.join(missing)} none.")
    return {name: own if callable(own) else AbsoluteDamping(float(own)) for name, own in found.items()}


def _check_factor(factor: float) -> None:
    if not (math.isfinite(factor) and factor > 0):
        raise ValueError(f"`factor` must be positive and finite, got {factor}.")


def _check_known(rule: object, name: str, what: str, value: float, note: str) -> None:
    if math.isnan(value):
        raise ValueError(
            f"`damping` is {type(rule).__name__}, but the {what} of layer {name!r} is not known: "
            f"{note or 'nothing says what it was; pass HeuristicDamping() or a number.'}"
        )


def _constant(value: float) -> Damping:
    def damping(eigenvalues: Tensor) -> float:
        return value

    return damping
