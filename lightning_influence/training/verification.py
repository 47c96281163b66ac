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

PROJECTIONS = 8
# Of the sum of all absolute contributions, so that examples that cancel are no false alarm.
TOLERANCES = {torch.float64: 1e-6, torch.float32: 1e-3}
HALF_TOLERANCE = 5e-2


class GradientCheck:
    """Compares a backward's captured gradients with the change of the layers' `.grad`.

    Args:
        layers: the tracked layers.
    """

    def __init__(self, layers: Mapping[str, TrackedLayer]) -> None:
        generator = torch.Generator().manual_seed(0)  # an own one
        self._layers = layers
        self._projections = {
            name: tuple(
                torch.randn(width, PROJECTIONS, generator=generator).to(layer.parameters["weight"].device)
                for width in layer.shape
            )
            for name, layer in layers.items()
        }
        self._before: dict[str, Tensor] | None = None

    def start(self) -> None:
        """Just before the backward."""
        self._before = {name: self._of_grad(name) for name in self._layers}

    @property
    def is_started(self) -> bool:
        """Whether `.grad` was looked at before the backward."""
        return self._before is not None

    def mismatches(self, calls: Mapping[str, Sequence[LayerGradient]]) -> dict[str, float] | None:
        """Layers that do not add up, with the error relative to `.grad`; None if nothing could be compared.

        Args:
            calls: gradients of each use of the layers, as back-propagated, just after the backward.
        """
        before, self._before = self._before, None
        if before is None:
            return None
        found = {}
        for name, gradients in calls.items():
            products = torch.cat([g.projections(*self._projections[name]) for g in gradients])  # [parts, p]
            gained = self._of_grad(name) - before[name]
            difference = gained - products.sum(0)
            tolerance = TOLERANCES.get(gradients[0].dtype, HALF_TOLERANCE)
            allowed = tolerance * float(products.abs().sum(0).norm())
            if not math.isfinite(allowed + float(difference.norm())):
                return None
            if difference.norm() > allowed and self._without_penalty(name, difference).norm() > allowed:
                found[name] = float(difference.norm() / gained.norm().clamp(min=1e-30))
        return found

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
