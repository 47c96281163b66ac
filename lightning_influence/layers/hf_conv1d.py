"""Hugging Face's `transformers.pytorch_utils.Conv1D`, as in GPT-2: y = a W + b with a weight [i, o]."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.utils import parametrize

from lightning_influence.gradients import FactoredGradient
from lightning_influence.layers.base import LayerAdapter, register_adapter
from lightning_influence.layers.linear import outer_products


class HuggingFaceConv1DAdapter(LayerAdapter):
    """A linear layer whose weight is stored transposed; known by its name and module, without an import."""

    def matches(self, module: nn.Module) -> bool:
        """Whether it is that class, with a weight of its own."""
        kind = type(module)
        return (
            kind.__name__ == "Conv1D"
            and kind.__module__.partition(".")[0] == "transformers"
            and hasattr(module, "nf")
            and not parametrize.is_parametrized(module)
            and module._parameters.get("weight") is not None
        )

    def shape(self, module: nn.Module) -> tuple[int, int]:
        """(nf, nx)."""
        i, o = module.get_parameter("weight").shape
        return o, i

    def gradient(self, module: nn.Module, layer_input: Tensor, output_grad: Tensor) -> FactoredGradient:
        """Inputs [n, ..., i] become [n, s, i]."""
        return outer_products(layer_input, output_grad)

    def matrix(self, module: nn.Module, weight: Tensor) -> Tensor:
        """The weight's transpose."""
        return weight.T


register_adapter(HuggingFaceConv1DAdapter())
