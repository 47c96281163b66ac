"""What a layer type must say about itself to be attributed, and the registry of those that do."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from lightning_influence.functional.structure import FULL, KroneckerStructure
from lightning_influence.gradients import LayerGradient


@dataclass(frozen=True)
class LayerCall:
    """One call of a module, as the hooks saw it.

    Args:
        args: positional arguments; tensors are detached.
        kwargs: keyword arguments, likewise.
        output_grad: d loss / d output, in the shape of the output.
        memory: what the adapter wanted to remember of the module.
    """

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    output_grad: Tensor
    memory: Any = None

    @property
    def arguments(self) -> tuple[Any, ...]:
        """All arguments."""
        return *self.args, *self.kwargs.values()

    @property
    def layer_input(self) -> Tensor:
        """The first argument."""
        return self.arguments[0]

    def argument(self, place: int, name: str) -> Any:
        """An argument by its place or name; None if it was not passed."""
        return self.args[place] if place < len(self.args) else self.kwargs.get(name)


class LayerAdapter(ABC):
    """Turns what the hooks saw of one layer type into per-example gradients.

    An adapter has no state; one instance serves every layer of its type. It covers one matrix of
    parameters: a weight and, as the matrix's last column, a bias. Three methods are enough for a layer
    that multiplies its input [n, i] with a weight [o, i]::

        class CosineLinearAdapter(LayerAdapter):
            def matches(self, module):
                return type(module) is CosineLinear

            def shape(self, module):
                return module.weight.shape

            def gradient(self, module, layer_input, output_grad):
                return FactoredGradient(normalize(layer_input)[:, None], output_grad[:, None])

        register_adapter(CosineLinearAdapter())

    (`examples/own_layer.py` is the whole of it.) In every run the captured gradients are compared with what
    `.grad` gained, so a formula that is wrong leaves the layer out and says so.

    Attributes:
        part: what is appended to the module's name, for a module with several matrices.
        weight_name: the parameter that is the matrix.
        bias_name: the parameter that is its last column; "" if none is.
        is_called: whether the module's own call is seen. If not, its weight is used by `F.linear` within
            another function, as in `nn.MultiheadAttention`.
        is_table: whether rows of it are looked up, so that its outputs may be the same for all examples, and
            its weight may serve as an output layer.
        keeps_positions: whether the output has the input's leading dimensions, so that the input can be
            expanded along with an output that all examples share.
    """

    part: ClassVar[str] = ""
    weight_name: ClassVar[str] = "weight"
    bias_name: ClassVar[str] = "bias"
    is_called: ClassVar[bool] = True
    is_table: ClassVar[bool] = False
    keeps_positions: ClassVar[bool] = False

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
            output_grad: d loss / d output, in the shape of the output, first dimension n.

        Raises:
            LayerError: if the input does not have examples in its first dimension.
        """

    def remember(self, module: nn.Module, layer_input: Tensor) -> Any:
        """Just after the module's forward: what of its state the gradient depends on, as it is now."""
        return None

    def gradient_of_call(self, module: nn.Module, call: LayerCall) -> LayerGradient:
        """The same, for layers with more than one argument."""
        return self.gradient(module, call.layer_input, call.output_grad)

    def append_bias(self, module: nn.Module, gradient: LayerGradient, call: LayerCall) -> LayerGradient:
        """The gradient with the bias's column; by default a bias is added to every output position."""
        return gradient.with_ones()

    def matrix(self, module: nn.Module, weight: Tensor) -> Tensor:
        """The weight, or anything of its shape, as the matrix [o, i]."""
        return weight.reshape(self.shape(module))

    def bias_column(self, module: nn.Module, bias: Tensor) -> Tensor:
        """The entries of the bias, or of anything of its shape, that are this matrix's column, shape [o]."""
        return bias

    def structure(self, module: nn.Module) -> KroneckerStructure:
        """Which Kronecker factors the Fisher block has."""
        return FULL


_ADAPTERS: list[tuple[LayerAdapter, ...]] = []


def register_adapter(*adapters: LayerAdapter) -> None:
    """Make a layer type known; a later registration goes before an earlier one.

    Args:
        adapters: one, or for a module with several matrices one for each, with different `part`s; those that
            match a module serve it, if the first does.
    """
    _ADAPTERS.insert(0, adapters)


def find_adapters(module: nn.Module) -> Sequence[LayerAdapter]:
    """The adapters for a module's matrices; none if its type is not supported."""
    for adapters in _ADAPTERS:
        if adapters[0].matches(module):
            return [adapter for adapter in adapters if adapter.matches(module)]
    return ()
