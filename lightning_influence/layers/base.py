"""What a layer type must say about itself to be attributed, and the registry of those that do."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor, nn

from lightning_influence.gradients import LayerGradient


class LayerAdapter(ABC):
    """Turns what the hooks saw of one layer type into per-example gradients.

    An adapter has no state; one instance serves every layer of its type. It speaks of `weight`
    only: a bias that is added to every output position is handled for all layers alike, as one more
    input that is always 1.
    """

    @abstractmethod
    def matches(self, module: nn.Module) -> bool:
        """Whether this adapter's formulas are exact for the module."""

    @abstractmethod
    def shape(self, module: nn.Module) -> tuple[int, int]:
        """The weight gradient's shape (o, i), without a bias."""

    @abstractmethod
    def gradient(self, module: nn.Module, layer_input: Tensor, output_grad: Tensor) -> LayerGradient:
        """Per-example gradients of the weight for one call of the module.

        Args:
            module: the layer.
            layer_input: its first argument, first dimension n.
            output_grad: d loss / d output, in the shape of the output.

        Raises:
            LayerError: if the input does not have examples in its first dimension.
        """


_ADAPTERS: list[LayerAdapter] = []


def register_adapter(adapter: LayerAdapter) -> None:
    """Make a layer type known; a later registration goes before an earlier one."""
    _ADAPTERS.insert(0, adapter)


def find_adapter(module: nn.Module) -> LayerAdapter | None:
    """The adapter for a module, or None if its type is not supported."""
    return next((adapter for adapter in _ADAPTERS if adapter.matches(module)), None)
