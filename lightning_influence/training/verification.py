"""A check against autograd itself: the captured gradients must add up to what `.grad` gained."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from lightning_influence.gradients import LayerGradient
from lightning_influence.layers import TrackedLayer

# Rounding alone stays far below; a weight that is also used elsewhere is off by order 1.
TOLERANCES = {torch.float64: 1e-5, torch.float32: 1e-2}
HALF_TOLERANCE = 1e-1


class GradientCheck:
    """Compares one backward's captured gradients with the change of the layers' `.grad`.

    Args:
        layers: the tracked layers; make the object just before the backward.
    """

    def __init__(self, layers: Mapping[str, TrackedLayer]) -> None:
        self._layers = layers
        self._before = {name: _grads(layer) for name, layer in layers.items()}

    def errors(self, gradients: Mapping[str, LayerGradient]) -> dict[str, float] | None:
        """Relative errors of the layers beyond tolerance, by name; None if the step overflowed.

        Args:
            gradients: as back-propagated, just after the backward.
        """
        found = {}
        for name, gradient in gradients.items():
            gained = _grads(self._layers[name]) - self._before[name]
            captured = torch.einsum(
                "nso,nsi->oi", gradient.output_grads.to(gained), gradient.inputs.to(gained)
            )
            if not (gained.isfinite().all() and captured.isfinite().all()):
                return None
            error = (captured - gained).norm() / gained.norm().clamp(min=torch.finfo(gained.dtype).tiny)
            if error > TOLERANCES.get(gradient.output_grads.dtype, HALF_TOLERANCE):
                found[name] = float(error)
        return found


def _grads(layer: TrackedLayer) -> Tensor:
    """A copy of the layer's `.grad` in the gradient's shape [o, i]."""
    parts = []
    for parameter in layer.parameters.values():
        grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.detach().clone()
        parts.append(grad if grad.ndim > 1 else grad[:, None])
    return torch.cat(parts, dim=1)
