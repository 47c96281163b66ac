"""Gradients of convolutions, which unfold their inputs only when asked.

A convolution multiplies the weight [o, i] with a patch of the input at every output position, so that its
gradient is a sum of outer products of output gradients and patches. Patches repeat each input as often as
the kernel has places; what is kept is the input. Further letters: `c` input channels, `k` places in the
kernel, so that i = c / g * k (and the bias's 1).
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, replace
from math import prod

import torch
from torch import Tensor
from torch.nn.functional import conv1d, conv2d, conv3d
from torch.nn.grad import conv2d_weight

from lightning_influence.gradients.base import CHUNK_ELEMENTS, LayerGradient, draw_positions
from lightning_influence.gradients.geometry import ConvGeometry

CACHED_ELEMENTS = 2**20  # of patches at a time on a CPU, where what stays in the cache is used sooner


@dataclass(frozen=True)
class ConvGradient(LayerGradient):
    """The gradient of example n is `sum_s output_grads[n, :, s] patch[n, s]^T`, of shape [o, i].

    Args:
        inputs: the layer's inputs, padded, shape [n, c, *spatial].
        output_grads: d loss_n / d y at the layer's output, shape [n, o, *output_size].
        geometry: where the patches lie.
        has_ones: whether patches end in a 1, for a bias.

    Example:
        >>> geometry = ConvGeometry((3,), (1,), (1,))
        >>> gradient = ConvGradient(torch.ones(2, 4, 7), torch.ones(2, 6, 5), geometry)
        >>> gradient.dense().shape, gradient.dense()[0, 0, 0].item()
        (torch.Size([2, 6, 12]), 5.0)
    """

    inputs: Tensor
    output_grads: Tensor
    geometry: ConvGeometry
    has_ones: bool = False

    def __post_init__(self) -> None:
        spatial, needed = self.inputs.shape[2:], self.geometry.spans(self.output_grads.shape[2:])
        strides = self.geometry.stride
        if self.inputs.numel() and not all(
            0 <= found - least < stride for found, least, stride in zip(spatial, needed, strides, strict=True)
        ):
            raise ValueError(
                f"`inputs` must be padded: outputs {tuple(self.output_grads.shape)} of {self.geometry} need "
                f"{needed} of them, got {tuple(spatial)}."
            )

    @property
    def shape(self) -> tuple[int, int]:
        """(o, i)."""
        channels = self.inputs.shape[1] // self.geometry.groups
        return self.output_grads.shape[1], channels * self.geometry.places + self.has_ones

    @property
    def positions(self) -> int:
        """Number of output positions s."""
        return prod(self.output_grads.shape[2:])

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """Inputs and output gradients."""
        return self.inputs, self.output_grads

    def with_tensors(self, tensors: Sequence[Tensor]) -> ConvGradient:
        """Of other inputs and output gradients, in the same geometry."""
        inputs, output_grads = tensors
        return replace(self, inputs=inputs, output_grads=output_grads)

    @property
    def form(self) -> Hashable:
        """A shared weight may be used in several geometries."""
        return type(self), self.geometry, self.has_ones

    def with_ones(self) -> ConvGradient:
        """A 1 appended to the patches."""
        return replace(self, has_ones=True)

    def dense(self) -> Tensor:
        """The gradients themselves, shape [n, o, i]."""
        dtype = torch.promote_types(self.inputs.dtype, self.output_grads.dtype)  # autocast mixes them
        dense = self.inputs.new_empty(len(self), *self.shape, dtype=dtype)
        weights = dense[..., :-1] if self.has_ones else dense
        if self._is_faster_by_convolution:
            weights.copy_(self._by_convolution())
        else:
            self._by_patches(weights)
        if self.has_ones:
            dense[..., -1] = self.output_grads.flatten(2).sum(-1, dtype=dtype)
        return dense

    def projections(self, U: Tensor, V: Tensor) -> Tensor:
        """Of each example, shape [n, p]: the inputs convolved with V as p filters, times U^T d."""
        groups, p = self.geometry.groups, U.shape[1]
        o, i = self.shape
        if o <= groups * p:  # as for depthwise layers, whose gradients are small
            return torch.einsum("op,noi,ip->np", U, self.dense().float(), V)
        weights, *ones = V.T.split([i - self.has_ones, 1] if self.has_ones else [i], dim=1)
        filters = weights.unflatten(1, (-1, *self.geometry.kernel_size)).repeat(groups, *[1] * (self._dims + 1))
        convolve = (conv1d, conv2d, conv3d)[self._dims - 1]
        products = convolve(
            self.inputs.float(),
            filters,
            stride=self.geometry.stride,
            dilation=self.geometry.dilation,
            groups=groups,
        ).reshape(len(self), groups, p, self.positions)
        for column in ones:
            products = products + column
        grads = U.unflatten(0, (groups, -1)).mT @ self._grouped_grads.float()  # [n, g, p, s]
        return (products * grads).sum((1, 3))

    def position_chunks(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Patches and output gradients of some examples; both are views of transposed copies, fast to multiply."""
        groups, (_, i), grouped_grads = self.geometry.groups, self.shape, self._grouped_grads
        for rows in self._chunks():
            inputs, grads = self.inputs[rows], grouped_grads[rows]
            patches = self.geometry.patches(inputs).movedim(0, self._dims + 1)  # [c, *k, n, *s]
            columns = inputs.new_ones(groups, i, len(inputs) * self.positions)
            split = columns[:, : i - self.has_ones].unflatten(2, patches.shape[self._dims + 1 :])
            split.unflatten(1, (-1, *self.geometry.kernel_size)).copy_(patches.unflatten(0, (groups, -1)))
            factors = columns.mT, grads.permute(1, 2, 0, 3).flatten(2).mT  # [g, m, i], [g, m, o / g]
            yield (factors[0][0], factors[1][0]) if groups == 1 else factors

    def sampled(self, positions: int, generator: torch.Generator) -> tuple[ConvGradient, float]:
        """The same positions of all examples, as a convolution of their patches with one place in each row."""
        if positions >= self.positions:
            return self, 1.0
        carries_gradient = (self.output_grads != 0).any(1).any(0).flatten()
        chosen, weight = draw_positions(carries_gradient, positions, generator)
        spatial = self.inputs.shape[2:]
        places = self.geometry.patches(torch.arange(prod(spatial)).reshape(1, 1, *spatial))
        places = places.flatten(2, self._dims + 1).flatten(3)[0, 0]  # [k, s]
        within, first = places[:, :1], places[0, chosen]  # a patch is the first one, moved
        index = (within + first).flatten()  # [k positions]
        return replace(
            self,
            inputs=_columns(self.inputs, index),
            output_grads=_columns(self.output_grads, chosen),
            geometry=ConvGeometry((len(within),), (1,), (len(chosen),), self.geometry.groups),
        ), weight

    @property
    def _dims(self) -> int:
        return len(self.geometry.kernel_size)

    @property
    def _grouped_grads(self) -> Tensor:
        """Output gradients [n, g, o / g, s]."""
        return self.output_grads.flatten(2).unflatten(1, (self.geometry.groups, -1))

    def _chunks(self) -> Iterator[slice]:
        """Examples whose patches take little memory together; at least one chunk."""
        elements = self.inputs.shape[1] * self.geometry.places * self.positions
        limit = CACHED_ELEMENTS if self.device.type == "cpu" else CHUNK_ELEMENTS
        step = max(1, limit // max(1, elements))
        for start in range(0, max(1, len(self)), step):
            yield slice(start, start + step)

    def _by_patches(self, weights: Tensor) -> None:
        """Fill [n, o, i], without the bias's column: one matrix product for each example and group."""
        groups = self.geometry.groups
        grads = self._grouped_grads.to(weights.dtype)
        weights = weights.unflatten(1, (groups, -1))
        for rows in self._chunks():
            patches = self.geometry.patches(self.inputs[rows].to(weights.dtype))
            patches = patches.reshape(-1, weights.shape[-1], self.positions)  # [n g, i, s]
            torch.bmm(grads[rows].flatten(0, 1), patches.mT, out=weights[rows].flatten(0, 1))

    @property
    def _is_faster_by_convolution(self) -> bool:
        """Where PyTorch's backward, which does not unfold, was measured to be faster (oneDNN, one core).

        That is for channels in blocks of 8, few beside the positions, and for depthwise layers.
        """
        geometry = self.geometry
        c, o = (tensor.shape[1] // geometry.groups for tensor in (self.inputs, self.output_grads))
        in_blocks = c % 8 == o % 8 == 0 and c * o <= 16 * self.positions
        is_depthwise = c == o == 1 < geometry.groups and geometry.places <= 9
        return (
            self.device.type == "cpu"
            and torch.backends.mkldnn.is_available()
            and self.inputs.dtype == self.output_grads.dtype == torch.float32
            and self._dims == 2
            and geometry.places > 1
            and set(geometry.dilation) == {1}
            and len(self) > 0
            and (in_blocks or is_depthwise)
        )

    def _by_convolution(self) -> Tensor:
        """Without the bias's column: one backward of a convolution with each example's channels as groups."""
        n, c = self.inputs.shape[:2]
        o, groups = self.output_grads.shape[1], self.geometry.groups
        weights = conv2d_weight(
            self.inputs.reshape(1, n * c, *self.inputs.shape[2:]),
            (n * o, c // groups, *self.geometry.kernel_size),
            self.output_grads.reshape(1, n * o, *self.output_grads.shape[2:]),
            stride=self.geometry.stride,
            groups=n * groups,
        )
        return weights.reshape(n, o, -1)


@dataclass(frozen=True)
class TransposedConvGradient(ConvGradient):
    """Of a transposed convolution, whose weight's gradient is that of a convolution with the roles exchanged.

    `inputs` are the padded gradients at the layer's output and `output_grads` the layer's inputs, so that
    it is the *inputs* here that are linear in the loss. Rows are the layer's input channels.
    """

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The layer's inputs and the gradients at its output."""
        return self.output_grads, self.inputs

    def with_tensors(self, tensors: Sequence[Tensor]) -> TransposedConvGradient:
        """Of other inputs and gradients, in the same geometry."""
        output_grads, inputs = tensors
        return replace(self, inputs=inputs, output_grads=output_grads)

    def position_chunks(self) -> Iterator[tuple[Tensor, Tensor]]:
        """With zeros for a layer's input whose whole patch of gradients is zero, so that it counts nowhere."""
        for patches, layer_inputs in super().position_chunks():
            yield patches, layer_inputs * (patches != 0).any(-1, keepdim=True)


def _columns(values: Tensor, index: Tensor) -> Tensor:
    """Some places of values [n, c, *spatial], as [n, c, len(index)]."""
    rows = values.flatten(2)
    return rows.flatten(0, 1).index_select(1, index.to(values.device)).unflatten(0, rows.shape[:2])
