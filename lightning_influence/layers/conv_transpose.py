"""`nn.ConvTranspose1d`, `nn.ConvTranspose2d` and `nn.ConvTranspose3d`.

A transposed convolution is the backward of a convolution of its output, with the same weight. Its weight's
gradient is that convolution's: the gradient at the layer's output takes the place of the input, and the
layer's input that of the output gradient. The weight [c_in, c_out / g, *k] is a matrix [c_in, i], to which the
bias [c_out] is no column: it is a matrix of its own.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.functional import pad
from torch.nn.modules.conv import _ConvNd

from lightning_influence.functional.structure import DIAGONAL, KroneckerStructure
from lightning_influence.gradients import DenseGradient, TransposedConvGradient
from lightning_influence.layers.base import LayerAdapter, register_adapter
from lightning_influence.layers.conv import check_batched, geometry_of, shape_of_kernel
from lightning_influence.layers.reasons import is_plain

KINDS = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


class ConvTransposeAdapter(LayerAdapter):
    """The weight: exact for transposed convolutions and subclasses that keep their forward."""

    bias_name = ""

    def matches(self, module: nn.Module) -> bool:
        """Whether the module is a transposed convolution with a weight of its own."""
        return any(is_plain(module, kind) for kind in KINDS)

    def shape(self, module: nn.Module) -> tuple[int, int]:
        """(in_channels, out_channels / groups * places in the kernel)."""
        return shape_of_kernel(module)

    def gradient(self, module: nn.Module, layer_input: Tensor, output_grad: Tensor) -> TransposedConvGradient:
        """The output's gradient, with zeros for what padding cut off and without what no input reaches."""
        assert isinstance(module, _ConvNd)
        check_batched(module, layer_input)
        geometry = geometry_of(module)
        widths: list[int] = []
        reached = geometry.spans(layer_input.shape[2:])
        for span, found, cut in zip(reached, output_grad.shape[2:], module.padding, strict=True):
            assert isinstance(cut, int)
            widths = [cut, span - cut - found, *widths]  # `pad` wants the last dimension first
        padded = pad(output_grad, widths) if any(widths) else output_grad
        return TransposedConvGradient(padded, layer_input, geometry)

    def structure(self, module: nn.Module) -> KroneckerStructure:
        """Factors for each group; A is that of patches of gradients and S that of inputs."""
        assert isinstance(module, _ConvNd)
        return KroneckerStructure(groups=module.groups)


class ConvTransposeBiasAdapter(LayerAdapter):
    """The bias, added to every output position."""

    part = "bias"
    weight_name = "bias"
    bias_name = ""

    def matches(self, module: nn.Module) -> bool:
        """Whether there is a bias."""
        return any(is_plain(module, kind) for kind in KINDS) and module._parameters.get("bias") is not None

    def shape(self, module: nn.Module) -> tuple[int, int]:
        """(out_channels, 1)."""
        assert isinstance(module, _ConvNd)
        return module.out_channels, 1

    def gradient(self, module: nn.Module, layer_input: Tensor, output_grad: Tensor) -> DenseGradient:
        """The output's gradient, summed over positions."""
        assert isinstance(module, _ConvNd)
        check_batched(module, layer_input)
        return DenseGradient(output_grad.flatten(2).sum(-1, keepdim=True))

    def structure(self, module: nn.Module) -> KroneckerStructure:
        """One column: its Fisher block is taken to be diagonal."""
        return DIAGONAL


register_adapter(ConvTransposeAdapter(), ConvTransposeBiasAdapter())
