"""Normalizations with statistics of their own: `nn.BatchNorm1d/2d/3d` and `nn.InstanceNorm1d/2d/3d`."""

from __future__ import annotations

import torch.nn.functional as F  # noqa: N812 (the name that torch's documentation uses)
from torch import Tensor, nn

from lightning_influence.layers.base import register_adapter
from lightning_influence.layers.norm import ChannelNormAdapter
from lightning_influence.layers.reasons import is_plain


class BatchNormAdapter(ChannelNormAdapter):
    """`nn.BatchNorm1d/2d/3d`: exact given the statistics that the call used.

    In training these are the mean and the biased variance of the batch, so an example's loss depends on the
    other examples too. Its gradient is taken as autograd has it when the batch's statistics are held: by the
    weight and bias at the example's own positions. The sum over the batch is exactly `.grad`. (What an
    example does to the others' outputs through the statistics is in the gradients of the layers below.) In
    eval mode the running statistics are used, and the examples are independent.
    """

    def matches(self, module: nn.Module) -> bool:
        """Whether it is one, with a weight; not `nn.SyncBatchNorm`, whose statistics are of all processes."""
        return is_plain(module, nn.modules.batchnorm._BatchNorm)

    def normalized(self, module: nn.Module, layer_input: Tensor) -> Tensor:
        """(x - mean) / sqrt(var + eps) by channel."""
        assert isinstance(module, nn.modules.batchnorm._BatchNorm)
        of_batch = module.training or module.running_mean is None
        return F.batch_norm(
            layer_input, *_running(module, of_batch, layer_input), training=of_batch, eps=module.eps
        )


class InstanceNormAdapter(ChannelNormAdapter):
    """Exact for `nn.InstanceNorm1d/2d/3d`; statistics are each example's, or running ones in eval mode."""

    def matches(self, module: nn.Module) -> bool:
        """Whether it is one, with a weight."""
        return is_plain(module, nn.modules.instancenorm._InstanceNorm)

    def normalized(self, module: nn.Module, layer_input: Tensor) -> Tensor:
        """(x - mean) / sqrt(var + eps) by channel of each example."""
        assert isinstance(module, nn.modules.instancenorm._InstanceNorm)
        of_example = module.training or not module.track_running_stats
        running = _running(module, of_example, layer_input)
        return F.instance_norm(layer_input, *running, use_input_stats=of_example, eps=module.eps)


def _running(
    module: nn.modules.batchnorm._NormBase, are_own: bool, layer_input: Tensor
) -> tuple[Tensor | None, Tensor | None]:
    """Running mean and variance in the dtype of the input; none where the input's own are used."""
    if are_own:
        return None, None
    assert module.running_mean is not None
    assert module.running_var is not None
    return module.running_mean.to(layer_input.dtype), module.running_var.to(layer_input.dtype)


register_adapter(BatchNormAdapter())
register_adapter(InstanceNormAdapter())
