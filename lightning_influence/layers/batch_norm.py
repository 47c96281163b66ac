"""Normalizations with statistics of their own: `nn.BatchNorm1d/2d/3d` and `nn.InstanceNorm1d/2d/3d`."""

from __future__ import annotations

from abc import abstractmethod
from typing import NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812 (the name that torch's documentation uses)
from torch import Tensor, nn

from lightning_influence.gradients import DenseGradient
from lightning_influence.layers.base import LayerCall, register_adapter
from lightning_influence.layers.norm import ChannelNormAdapter
from lightning_influence.layers.reasons import is_plain


class Statistics(NamedTuple):
    """What a call normalized by.

    Args:
        are_own: whether by the mean and variance of its own input.
        running: running mean and variance if not.
    """

    are_own: bool
    running: tuple[Tensor, Tensor] | None


class StatisticsNormAdapter(ChannelNormAdapter):
    """What both have in common: the statistics are those that the call used, whatever the module does later."""

    @abstractmethod
    def uses_own(self, module: nn.Module) -> bool:
        """Whether a call now would normalize by statistics of its own input."""

    @abstractmethod
    def normalized_by(self, module: nn.Module, layer_input: Tensor, statistics: Statistics) -> Tensor:
        """(x - mean) / sqrt(var + eps) by channel."""

    def remember(self, module: nn.Module, layer_input: Tensor) -> Statistics:
        """The mode, and a copy of the running statistics if they are used."""
        if self.uses_own(module):
            return Statistics(True, None)
        mean, var = module.get_buffer("running_mean"), module.get_buffer("running_var")
        return Statistics(False, (mean.clone(), var.clone()))

    def normalized(self, module: nn.Module, layer_input: Tensor) -> Tensor:
        """As a call would do it now."""
        return self.normalized_by(module, layer_input, self.remember(module, layer_input))

    def gradient_of_call(self, module: nn.Module, call: LayerCall) -> DenseGradient:
        """By the statistics that the call used."""
        if call.memory is None:
            return self.gradient(module, call.layer_input, call.output_grad)
        self.by_position(module, call.output_grad)
        layer_input = call.layer_input.to(torch.promote_types(call.layer_input.dtype, torch.float32))
        normalized = self.normalized_by(module, layer_input, call.memory)
        return self._of_normalized(module, normalized, call.output_grad)


class BatchNormAdapter(StatisticsNormAdapter):
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

    def uses_own(self, module: nn.Module) -> bool:
        """In training, or without running statistics."""
        assert isinstance(module, nn.modules.batchnorm._BatchNorm)
        return module.training or module.running_mean is None

    def normalized_by(self, module: nn.Module, layer_input: Tensor, statistics: Statistics) -> Tensor:
        """(x - mean) / sqrt(var + eps) by channel."""
        assert isinstance(module, nn.modules.batchnorm._BatchNorm)
        running = _running(statistics, layer_input)
        return F.batch_norm(layer_input, *running, training=statistics.are_own, eps=module.eps)


class InstanceNormAdapter(StatisticsNormAdapter):
    """Exact for `nn.InstanceNorm1d/2d/3d`; statistics are each example's, or running ones in eval mode."""

    def matches(self, module: nn.Module) -> bool:
        """Whether it is one, with a weight."""
        return is_plain(module, nn.modules.instancenorm._InstanceNorm)

    def uses_own(self, module: nn.Module) -> bool:
        """In training, or without running statistics."""
        assert isinstance(module, nn.modules.instancenorm._InstanceNorm)
        return module.training or not module.track_running_stats

    def normalized_by(self, module: nn.Module, layer_input: Tensor, statistics: Statistics) -> Tensor:
        """(x - mean) / sqrt(var + eps) by channel of each example."""
        assert isinstance(module, nn.modules.instancenorm._InstanceNorm)
        running = _running(statistics, layer_input)
        return F.instance_norm(layer_input, *running, use_input_stats=statistics.are_own, eps=module.eps)


def _running(statistics: Statistics, layer_input: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """Running mean and variance in the dtype of the input; none where the input's own are used."""
    if statistics.running is None:
        return None, None
    mean, var = statistics.running
    return mean.to(layer_input.dtype), var.to(layer_input.dtype)


register_adapter(BatchNormAdapter())
register_adapter(InstanceNormAdapter())
