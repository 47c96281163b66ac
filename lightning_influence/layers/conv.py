"""`nn.Conv1d`, `nn.Conv2d` and `nn.Conv3d`, with every stride, dilation, grouping and way of padding."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.functional import pad
from torch.nn.modules.conv import _ConvNd

from lightning_influence.errors import LayerError
from lightning_influence.functional.structure import KroneckerStructure
from lightning_influence.gradients import ConvGeometry, ConvGradient
from lightning_influence.layers.base import LayerAdapter, register_adapter
from lightning_influence.layers.reasons import is_plain

KINDS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


class ConvAdapter(LayerAdapter):
    """Exact for convolutions and subclasses that keep their forward, unless parametrized."""

    def matches(self, module: nn.Module) -> bool:
        """Whether the module convolves with a weight of its own."""
        convolves = getattr(type(module), "_conv_forward", None)
        return any(is_plain(module, kind) and convolves is kind._conv_forward for kind in KINDS)

    def shape(self, module: nn.Module) -> tuple[int, int]:
        """(out_channels, in_channels / groups * places in the kernel)."""
        return shape_of_kernel(module)

    def gradient(self, module: nn.Module, layer_input: Tensor, output_grad: Tensor) -> ConvGradient:
        """The input, padded as the forward pads it."""
        assert isinstance(module, _ConvNd)
        check_batched(module, layer_input)
        mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
        # what 'same' comes to as well, where an even kernel has one more on the right
        padding = module._reversed_padding_repeated_twice
        padded = pad(layer_input, padding, mode=mode) if any(padding) else layer_input
        return ConvGradient(padded, output_grad, geometry_of(module))

    def structure(self, module: nn.Module) -> KroneckerStructure:
        """Factors for each group."""
        assert isinstance(module, _ConvNd)
        return KroneckerStructure(groups=module.groups)


def shape_of_kernel(module: nn.Module) -> tuple[int, int]:
    """(o, i) of a weight [o, channels, *kernel_size]."""
    assert isinstance(module, _ConvNd)
    return len(module.weight), module.weight[0].numel()


def geometry_of(module: _ConvNd) -> ConvGeometry:
    """Where a convolution's patches lie."""
    return ConvGeometry(module.kernel_size, module.stride, module.dilation, module.groups)


def check_batched(module: _ConvNd, layer_input: Tensor) -> None:
    """A convolution takes a single example without a batch dimension, too.

    Raises:
        LayerError: if this is one.
    """
    if layer_input.ndim != len(module.kernel_size) + 2:
        raise LayerError(
            f"expected inputs [n, channels, *spatial] of {len(module.kernel_size) + 2} dimensions with the batch "
            f"first, got shape {tuple(layer_input.shape)}; add a batch dimension."
        )


register_adapter(ConvAdapter())
