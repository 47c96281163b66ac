"""Normalizations within an example: `nn.LayerNorm`, `nn.RMSNorm`, `nn.GroupNorm`, and Hugging Face's RMS norms.

y = weight * xhat + bias at every position, with xhat the normalized input, which is made again from the
input. The gradient of the weight is the sum over positions of xhat * (d loss / d y), that of the bias the
sum of d loss / d y: a matrix [c, 2] for each example, one row a weight. Its entries are few, so the Fisher
block is taken to be diagonal.
"""

from __future__ import annotations

from abc import abstractmethod

import torch
import torch.nn.functional as F  # noqa: N812 (the name that torch's documentation uses)
from torch import Tensor, nn
from torch.nn.utils import parametrize

from lightning_influence.errors import LayerError
from lightning_influence.functional.structure import DIAGONAL, KroneckerStructure
from lightning_influence.gradients import DenseGradient, LayerGradient
from lightning_influence.layers.base import LayerAdapter, LayerCall, register_adapter
from lightning_influence.layers.reasons import is_plain

# Those of them that are called LayerNorm; T5's is also that of MT5, UMT5 and LongT5.
_NAMED_LAYER_NORM = ("T5LayerNorm", "Pix2StructLayerNorm", "Pop2PianoLayerNorm", "UdopLayerNorm")
_RMS_NAMES = ("RMSNorm", *_NAMED_LAYER_NORM, "SwitchTransformersLayerNorm")


class NormAdapter(LayerAdapter):
    """What normalizations have in common: a weight, and perhaps a bias, for each element or channel."""

    @abstractmethod
    def normalized(self, module: nn.Module, layer_input: Tensor) -> Tensor:
        """xhat, in the shape of the input, which is float32 or float64."""

    @abstractmethod
    def by_position(self, module: nn.Module, values: Tensor) -> Tensor:
        """Values in the shape of the output as [n, c, s].

        Raises:
            LayerError: if there is no dimension for the examples.
        """

    def shape(self, module: nn.Module) -> tuple[int, int]:
        """(c, 1)."""
        return module.get_parameter(self.weight_name).numel(), 1

    def structure(self, module: nn.Module) -> KroneckerStructure:
        """Diagonal."""
        return DIAGONAL

    def gradient(self, module: nn.Module, layer_input: Tensor, output_grad: Tensor) -> DenseGradient:
        """Of the weight, shape [n, c, 1]."""
        self.by_position(module, output_grad)  # refuses before anything is computed
        return self._of_normalized(module, self.normalized(module, _wide(layer_input)), output_grad)

    def append_bias(self, module: nn.Module, gradient: LayerGradient, call: LayerCall) -> DenseGradient:
        """Of weight and bias, shape [n, c, 2]."""
        bias = self._summed(module, _wide(call.output_grad), call.output_grad.dtype)
        return DenseGradient(torch.cat([gradient.dense(), bias.values], dim=2))

    def bias_column(self, module: nn.Module, bias: Tensor) -> Tensor:
        """The bias, flattened."""
        return bias.flatten()

    def _of_normalized(self, module: nn.Module, normalized: Tensor, output_grad: Tensor) -> DenseGradient:
        return self._summed(module, normalized * _wide(output_grad), output_grad.dtype)

    def _summed(self, module: nn.Module, values: Tensor, dtype: torch.dtype) -> DenseGradient:
        """Sums over positions, in the output gradients' dtype; but float16 of mixed precision would overflow."""
        if dtype == torch.float16:
            dtype = module.get_parameter(self.weight_name).dtype
        return DenseGradient(self.by_position(module, values).sum(2, keepdim=True).to(dtype))


def _wide(values: Tensor) -> Tensor:
    """In float32 at least, as torch's own kernels compute."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


class ElementwiseNormAdapter(NormAdapter):
    """A weight for each element of the last dimensions: inputs [n, ..., *weight.shape]."""

    keeps_positions = True

    def by_position(self, module: nn.Module, values: Tensor) -> Tensor:
        """[n, ..., *weight.shape] as [n, c, s]."""
        weight = module.get_parameter(self.weight_name)
        if values.ndim <= weight.ndim:
            raise LayerError(
                f"expected inputs [n, ...{''.join(f', {size}' for size in weight.shape)}] with the batch first, "
                f"got shape {tuple(values.shape)}; add a batch dimension."
            )
        return values.reshape(len(values), -1, weight.numel()).mT


class LayerNormAdapter(ElementwiseNormAdapter):
    """Exact for `nn.LayerNorm` with and without a bias."""

    def matches(self, module: nn.Module) -> bool:
        """Whether it is one, with a weight."""
        return is_plain(module, nn.LayerNorm)

    def normalized(self, module: nn.Module, layer_input: Tensor) -> Tensor:
        """(x - mean) / sqrt(var + eps) over the last dimensions."""
        assert isinstance(module, nn.LayerNorm)
        return F.layer_norm(layer_input, module.normalized_shape, eps=module.eps)


class RMSNormAdapter(ElementwiseNormAdapter):
    """Exact for `nn.RMSNorm`."""

    bias_name = ""

    def matches(self, module: nn.Module) -> bool:
        """Whether it is one, with a weight."""
        return is_plain(module, nn.RMSNorm)

    def normalized(self, module: nn.Module, layer_input: Tensor) -> Tensor:
        """Over the last dimensions x / sqrt(mean(x^2) + eps); eps None is float32's for half precision too."""
        assert isinstance(module, nn.RMSNorm)
        return F.rms_norm(layer_input, module.normalized_shape, eps=module.eps)


class HuggingFaceRMSNormAdapter(ElementwiseNormAdapter):
    """RMS norms of the `transformers` library, such as `LlamaRMSNorm`, known by name and attributes.

    y = weight * xhat, or (1 + weight) * xhat as in Gemma, whose gradient is the same. Of the 190 such classes
    in transformers 5.23 this is right for all but one, which the check in each run leaves out.
    """

    bias_name = ""

    def matches(self, module: nn.Module) -> bool:
        """Whether it is called so, and has one vector `weight` and an epsilon."""
        weight = module._parameters.get("weight")
        return (
            type(module).__name__.endswith(_RMS_NAMES)
            and not isinstance(module, nn.RMSNorm)
            and not parametrize.is_parametrized(module)
            and weight is not None
            and weight.ndim == 1
            and len(list(module.parameters())) == 1
            and _epsilon(module) is not None
        )

    def gradient(self, module: nn.Module, layer_input: Tensor, output_grad: Tensor) -> DenseGradient:
        """Of the weight; xhat is rounded to the input's dtype, as it is before it meets the weight."""
        self.by_position(module, output_grad)
        xhat = self.normalized(module, _wide(layer_input)).to(layer_input.dtype)
        return self._summed(module, _wide(xhat) * _wide(output_grad), output_grad.dtype)

    def normalized(self, module: nn.Module, layer_input: Tensor) -> Tensor:
        """Over the last dimension x / sqrt(mean(x^2) + eps)."""
        return F.rms_norm(layer_input, layer_input.shape[-1:], eps=_epsilon(module))


def _epsilon(module: nn.Module) -> float | None:
    found = (getattr(module, name, None) for name in ("variance_epsilon", "eps"))
    return next((epsilon for epsilon in found if isinstance(epsilon, float)), None)


class ChannelNormAdapter(NormAdapter):
    """A weight for each channel: inputs [n, c, ...]."""

    def by_position(self, module: nn.Module, values: Tensor) -> Tensor:
        """[n, c, ...] as [n, c, s]."""
        c = module.get_parameter(self.weight_name).numel()
        if values.ndim < 2 or values.shape[1] != c:
            raise LayerError(
                f"expected inputs [n, {c}, ...] with the batch first, got shape {tuple(values.shape)}; "
                "add a batch dimension, or move it to the front."
            )
        return values.reshape(len(values), c, -1)


class GroupNormAdapter(ChannelNormAdapter):
    """Exact for `nn.GroupNorm`."""

    def matches(self, module: nn.Module) -> bool:
        """Whether it is one, with a weight."""
        return is_plain(module, nn.GroupNorm)

    def normalized(self, module: nn.Module, layer_input: Tensor) -> Tensor:
        """(x - mean) / sqrt(var + eps) over each group of an example's channels."""
        assert isinstance(module, nn.GroupNorm)
        return F.group_norm(layer_input, module.num_groups, eps=module.eps)


register_adapter(LayerNormAdapter())
register_adapter(RMSNormAdapter())
register_adapter(HuggingFaceRMSNormAdapter())
register_adapter(GroupNormAdapter())
