"""Per-example gradients of one layer, in the form in which they are cheapest.

Index letters, the same everywhere in the package: `n` example, `q` query, `s` shared position
(token, pixel, repeated call), `i` input (with the bias's 1 appended), `o` output, `g` group.

A layer's gradient is a matrix [o, i] for each example, whatever the shape of its parameters; a bias
is the matrix's last column. Back-propagation yields it in other forms, of which each has its class
here; all of them answer the same few questions.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Hashable, Iterator, Sequence, Set
from typing import ClassVar

import torch
from torch import Tensor

CHUNK_ELEMENTS = 16 * 2**20  # of dense gradients held at a time: 64 MB in float32


def chunk_elements(device: torch.device) -> int:
    """Elements of dense gradients to hold at a time: on a CPU few enough to stay in its cache."""
    return min(CHUNK_ELEMENTS, 2**20) if device.type == "cpu" else CHUNK_ELEMENTS


class LayerGradient(ABC):
    """Gradients of one layer's matrix of parameters [o, i] for n examples.

    Attributes:
        known_finite: what `is_finite` answers, if that was found out before.
    """

    known_finite: ClassVar[Tensor | None] = None

    @property
    @abstractmethod
    def shape(self) -> tuple[int, int]:
        """(o, i)."""

    @property
    @abstractmethod
    def positions(self) -> int:
        """The number s of outer products that an example's gradient is the sum of; 0 for another form."""

    @property
    @abstractmethod
    def tensors(self) -> tuple[Tensor, ...]:
        """What the gradients are made of, each with n first; the last is linear in the loss."""

    @abstractmethod
    def with_tensors(self, tensors: Sequence[Tensor]) -> LayerGradient:
        """Gradients of the same form, of other tensors."""

    @property
    def form(self) -> Hashable:
        """What gradients have in common, beside their tensors' shapes, if batches of them can be stacked."""
        return type(self)

    @abstractmethod
    def dense(self) -> Tensor:
        """The gradients themselves, shape [n, o, i]."""

    @abstractmethod
    def projections(self, U: Tensor, V: Tensor) -> Tensor:
        """sum_oi U_op G_oi V_ip in the parts at hand, shape [parts, p]; G summed over n is their sum.

        Args:
            U: shape [o, p].
            V: shape [i, p].
        """

    def __len__(self) -> int:
        return len(self.tensors[-1])

    def __getitem__(self, rows: Tensor | slice) -> LayerGradient:
        """The same layer's gradients for some of the examples."""
        return self.with_tensors([tensor[rows] for tensor in self.tensors])

    @property
    def device(self) -> torch.device:
        """Where the gradients are."""
        return self.tensors[-1].device

    @property
    def dtype(self) -> torch.dtype:
        """Of the gradients."""
        return self.tensors[-1].dtype

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors."""
        return sum(tensor.nbytes for tensor in self.tensors)

    def to(self, device: torch.device) -> LayerGradient:
        """The same gradients on a device."""
        return self.with_tensors([tensor.to(device) for tensor in self.tensors])

    def rescaled(self, factor: Tensor, shared: Set[int] | None = None) -> LayerGradient:
        """Float32, each example's gradient times its factor, without memory in common with the `shared`.

        Args:
            factor: shape [] or [n].
            shared: addresses of the storages that somebody else may change; None for all.
        """
        *others, linear = self.tensors
        factor = factor.float().to(linear.device)
        if factor.ndim:
            factor = factor.reshape(-1, *[1] * (linear.ndim - 1))
        return self.with_tensors([*(_own(tensor, shared) for tensor in others), linear.float() * factor])

    def finite(self) -> LayerGradient:
        """The examples that can enter sums of squares; the gradients themselves if all can."""
        is_finite = self.is_finite()
        return self if is_finite.all() else self[is_finite]

    def is_finite(self, factor: Tensor | None = None) -> Tensor:
        """Whether an example can enter sums of squares: bool [n], False for NaN, infinity and overflow.

        Args:
            factor: of what is asked about, shape [] or [n], as for `rescaled`.
        """
        if factor is None and self.known_finite is not None:
            return self.known_finite
        floats = [tensor for tensor in self.tensors if tensor.is_floating_point()]
        norms = torch.stack([_norms(tensor) for tensor in floats])  # [tensors, n]
        if factor is not None:
            norms[-1] *= factor.to(norms)
        return (norms.square().sum(0) + norms.prod(0).square()).isfinite()

    def knowing(self, is_finite: Tensor) -> LayerGradient:
        """The gradients themselves, which answer `is_finite` so from now on."""
        self.__dict__["known_finite"] = is_finite.to(self.device)  # is frozen
        return self

    def dense_chunks(self) -> Iterator[tuple[slice, Tensor]]:
        """Some examples at a time and their dense gradients, of at most 64 MB unless one alone is larger."""
        o, i = self.shape
        step = max(1, chunk_elements(self.device) // (o * i))
        for start in range(0, len(self), step):
            rows = slice(start, start + step)
            yield rows, self[rows].dense()

    def position_chunks(self) -> Iterator[tuple[Tensor, Tensor]]:
        """The factors of the outer products, some examples' at a time.

        Yields:
            Inputs [m, i] and output gradients [m, o] of m positions; of a layer with groups [g, m, i] and
            [g, m, o/g].

        Raises:
            TypeError: if the gradients are not in the form of outer products.
        """
        raise TypeError(f"{type(self).__name__} is not in the form of outer products.")

    def sampled(self, positions: int, generator: torch.Generator) -> tuple[LayerGradient, float]:
        """Some of each example's positions, for covariances of which a sample is enough.

        Drawn are positions that carry gradient in any of the examples: where the loss looks at one position, as
        at a classification token, all of what it says is taken.

        Returns:
            Gradients of at most that many positions, drawn without replacement, and how many times as many
            carried gradient. The gradients themselves where nothing is gained by a sample.
        """
        return self, 1.0

    def with_ones(self) -> LayerGradient:
        """The gradients with a last column for a bias that is added to every output position.

        Raises:
            TypeError: if the form has no inputs to append a 1 to.
        """
        raise TypeError(f"{type(self).__name__} has no inputs; override the adapter's `append_bias`.")


def _norms(tensor: Tensor) -> Tensor:
    """Of each example's entries, float32 as after `rescaled`."""
    dtype = torch.promote_types(tensor.dtype, torch.float32)
    return torch.linalg.vector_norm(tensor.flatten(1), dim=1, dtype=dtype).float()


def _own(tensor: Tensor, shared: Set[int] | None) -> Tensor:
    """The tensor, in float32 unless it counts something; a copy of it if it lies in a shared storage."""
    found = tensor.float() if tensor.is_floating_point() else tensor
    is_shared = shared is None or tensor.untyped_storage().data_ptr() in shared
    return found.clone() if found is tensor and is_shared else found


def draw_positions(carries_gradient: Tensor, positions: int, generator: torch.Generator) -> tuple[Tensor, float]:
    """Some of the positions that carry gradient, on the CPU.

    Args:
        carries_gradient: bool [s], whether a position does in any example.
        positions: at most how many.
        generator: of the draw.

    Returns:
        Their places int64 [k] with k >= 1, and how many positions each stands for.
    """
    candidates = carries_gradient.nonzero().flatten().cpu()
    if not len(candidates):
        return torch.zeros(1, dtype=torch.int64), 1.0
    chosen = candidates[torch.randperm(len(candidates), generator=generator)[:positions]]
    return chosen, len(candidates) / len(chosen)
