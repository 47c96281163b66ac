"""Where the patches of a convolution lie."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

from torch import Tensor


@dataclass(frozen=True)
class ConvGeometry:
    """Where a convolution's patches lie; its padding is the input's.

    Args:
        kernel_size: one number for each spatial dimension, as all but the last.
        stride: between neighbouring patches.
        dilation: between neighbouring places in a patch.
        groups: of output channels, each with input channels of its own.
    """

    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int = 1

    @property
    def places(self) -> int:
        """Numbers in a patch for each of its channels."""
        return prod(self.kernel_size)

    def spans(self, output_size: Sequence[int]) -> tuple[int, ...]:
        """The input's size that outputs of a size need."""
        sizes = zip(output_size, self.kernel_size, self.stride, self.dilation, strict=True)
        return tuple((out - 1) * stride + dilation * (k - 1) + 1 for out, k, stride, dilation in sizes)

    def patches(self, inputs: Tensor) -> Tensor:
        """A view of inputs [n, c, *spatial] as [n, c, *kernel_size, *output_size]."""
        dims = len(self.kernel_size)
        for k, stride, dilation in zip(self.kernel_size, self.stride, self.dilation, strict=True):
            inputs = inputs.unfold(2, dilation * (k - 1) + 1, stride)[..., ::dilation].movedim(2, -2)
        # now [n, c, out, k, out, k, ...]
        last = range(2, 2 + 2 * dims)
        return inputs.permute(0, 1, *last[1::2], *last[::2])
