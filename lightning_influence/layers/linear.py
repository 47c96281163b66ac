"""`nn.Linear`: y = W a + b on inputs [n, ..., i]."""

from __future__ import annotations

from torch import Tensor, nn

from lightning_influence.errors import LayerError
from lightning_influence.gradients import FactoredGradient
from lightning_influence.layers.base import LayerAdapter, register_adapter
from lightning_influence.layers.reasons import is_plain


class LinearAdapter(LayerAdapter):
    """Exact for `nn.Linear` and subclasses that keep its forward, unless parametrized."""

    keeps_positions = True

    def matches(self, module: nn.Module) -> bool:
        """Whether the module computes W a + b with a W of its own."""
        return is_plain(module, nn.Linear)

    def shape(self, module: nn.Module) -> tuple[int, int]:
        """(out_features, in_features)."""
        assert isinstance(module, nn.Linear)
        return module.out_features, module.in_features

    def gradient(self, module: nn.Module, layer_input: Tensor, output_grad: Tensor) -> FactoredGradient:
        """Inputs [n, ..., i] become [n, s, i]."""
        return outer_products(layer_input, output_grad)


def outer_products(layer_input: Tensor, output_grad: Tensor) -> FactoredGradient:
    """The gradient of a matrix that multiplies inputs [n, ..., i] into outputs [n, ..., o].

    Raises:
        LayerError: if there is no dimension for the examples.
    """
    if layer_input.ndim < 2:
        raise LayerError(
            "expected inputs [n, ..., in_features] with the batch first, got shape "
            f"{tuple(layer_input.shape)}; add a batch dimension."
        )
    n, i, o = len(layer_input), layer_input.shape[-1], output_grad.shape[-1]
    return FactoredGradient(layer_input.reshape(n, -1, i), output_grad.reshape(n, -1, o))


register_adapter(LinearAdapter())
