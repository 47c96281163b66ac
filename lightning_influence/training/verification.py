"""A check against autograd itself: the captured gradients must add up to what `.grad` gained.

Comparing whole matrices again and again would cost as much as making them, so a few random
projections U^T G V are compared, of which the captured side needs no matrix: sum_ns (U^T d) (V^T a).
A penalty on the weights adds a multiple of the weights to `.grad` and belongs to no example; it is
recognised and let pass.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lightning_influence.gradients import LayerGradient
from lightning_influence.layers import TrackedLayer
from lightning_influence.processes import ALONE, Processes

PROJECTIONS = 8
# Of the sum of all absolute contributions, so that examples that cancel are no false alarm.
TOLERANCES = {torch.float64: 1e-6, torch.float32: 1e-3}
HALF_TOLERANCE = 5e-2


class _Look:
    """What was seen of one backward, by layer; `local` stacks `.grad` before, captured and absolute gradients."""

    def __init__(self, is_averaged: bool) -> None:
        self.is_averaged = is_averaged
        self.after: dict[str, Tensor] = {}
        self.local: dict[str, Tensor] = {}
        self.tolerances: dict[str, Tensor] = {}

    def average(self, processes: Processes) -> None:
        """Make what each process saw the mean of all, as `.grad` is."""
        processes.sum_([*self.local.values(), *self.tolerances.values()])
        for seen in self.local.values():
            seen /= processes.size


class GradientCheck:
    """Compares a backward's captured gradients with the change of the layers' `.grad`.

    `start` before a backward, `look` after it, and after each that adds to it; `stop` after the last, and
    `mismatches`, later, says what was found. Of several processes, whose `.grad` becomes their mean, each
    looks, and all judge together.

    Args:
        layers: the tracked layers.
    """

    def __init__(self, layers: Mapping[str, TrackedLayer]) -> None:
        generator = torch.Generator().manual_seed(0)  # an own one
        self._layers = layers
        self._projections = {
            name: tuple(
                torch.randn(width, PROJECTIONS, generator=generator, dtype=torch.float32).to(
                    layer.parameters["weight"].device
                )
                for width in layer.shape
            )
            for name, layer in layers.items()
        }
        self._before: dict[str, Tensor] | None = None
        self._looks: list[_Look] = []

    def start(self) -> None:
        """Just before the backward."""
        self._before = {name: self._of_grad(name) for name in self._layers}

    @property
    def is_started(self) -> bool:
        """Whether `.grad` was looked at before the backward."""
        return self._before is not None

    def stop(self) -> None:
        """What comes now is of another batch."""
        self._before = None

    def look(self, calls: Mapping[str, Sequence[LayerGradient]], *, is_averaged: bool = False) -> None:
        """Just after the backward.

        Args:
            calls: gradients of each use of the layers, as back-propagated since `start`.
            is_averaged: whether `.grad` is the mean over processes now.
        """
        before = self._before
        if before is None:
            return
        look = _Look(is_averaged)
        for name in self._layers:
            after, parts = self._of_grad(name), calls.get(name, ())
            products = [g.projections(*self._projections[name]) for g in parts]
            captured = torch.cat(products) if products else torch.zeros_like(after)[None]  # [parts, p]
            tolerance = TOLERANCES.get(parts[0].dtype, HALF_TOLERANCE) if parts else 0.0
            look.after[name] = after
            look.local[name] = torch.stack([before[name], captured.sum(0), captured.abs().sum(0)])
            look.tolerances[name] = torch.tensor(
                [tolerance, float(bool(parts))], device=after.device, dtype=torch.float32
            )
        self._looks.append(look)

    def mismatches(self, processes: Processes = ALONE) -> dict[str, float] | None:
        """Layers that did not add up, with the error relative to `.grad`; None if nothing could be compared."""
        looks, self._looks = self._looks, []
        found: dict[str, float] | None = None
        for look in looks:
            if look.is_averaged:
                look.average(processes)
            errors = {name: self._error(name, look) for name in self._layers}
            if all(error is not None for error in errors.values()):
                found = {**(found or {}), **{name: error for name, error in errors.items() if error}}
        return found

    def _error(self, name: str, look: _Look) -> float | None:
        """0 if a layer adds up or was not captured, None after an overflow."""
        before, captured, absolute = look.local[name]
        tolerance, present = look.tolerances[name].tolist()
        if not present:
            return 0.0
        gained = look.after[name] - before
        difference = gained - captured
        allowed = tolerance / present * float(absolute.norm())
        if not math.isfinite(allowed + float(difference.norm())):
            return None
        if difference.norm() > allowed and self._without_penalty(name, difference).norm() > allowed:
            return float(difference.norm() / gained.norm().clamp(min=1e-30))
        return 0.0

    def _of_grad(self, name: str) -> Tensor:
        grads = {key: parameter.grad for key, parameter in self._layers[name].parameters.items()}
        return self._projected(name, grads)

    def _without_penalty(self, name: str, difference: Tensor) -> Tensor:
        """What is left of the difference after the best multiples of weight's and bias's own projections.

        A matrix of one or two entries is a multiple of anything, so there all of the difference is left.
        """
        parameters = self._layers[name].parameters
        if math.prod(self._layers[name].shape) <= len(parameters):
            return difference
        own = torch.stack([self._projected(name, {key: p.detach()}) for key, p in parameters.items()], dim=1)
        return difference - own @ (torch.linalg.pinv(own) @ difference)

    def _projected(self, name: str, values: Mapping[str, Tensor | None]) -> Tensor:
        """U^T [W b] V on its diagonal, shape [p], for a matrix in the parts of the layer's parameters."""
        U, V = self._projections[name]
        if all(value is None for value in values.values()):
            return U.new_zeros(PROJECTIONS)
        return ((self._layers[name].matrix(values).float() @ V) * U).sum(0)
