"""Per-example gradients of one layer, in the form that back-propagation yields them.

Index letters, the same everywhere in the package: `n` example, `q` query, `s` shared position
(token, pixel, repeated call), `i` input (with the bias's 1 appended), `o` output.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad


@dataclass(frozen=True)
class LayerGradient:
    """Gradients of one layer's weight for a batch of examples, kept as factors.

    The gradient of example n is `sum_s output_grads[n, s] inputs[n, s]^T`, of shape [o, i]. A bias
    is the last column: `inputs` then ends in a 1.

    Args:
        inputs: the layer's inputs a, shape [n, s, i].
        output_grads: d loss_n / d y at the layer's output, shape [n, s, o], of the *summed* loss
            (no batch mean, accumulation or AMP scale in it).

    Example:
        >>> gradient = LayerGradient(torch.ones(2, 3, 4), torch.ones(2, 3, 5))
        >>> gradient.dense().shape, gradient.dense()[0, 0, 0].item()
        (torch.Size([2, 5, 4]), 3.0)
    """

    inputs: Tensor
    output_grads: Tensor

    def __post_init__(self) -> None:
        if self.inputs.ndim != 3 or self.inputs.shape[:2] != self.output_grads.shape[:2]:
            raise ValueError(
                "`inputs` and `output_grads` must be [n, s, i] and [n, s, o], got "
                f"{tuple(self.inputs.shape)} and {tuple(self.output_grads.shape)}."
            )

    def __len__(self) -> int:
        return self.inputs.shape[0]

    def __getitem__(self, rows: Tensor | slice) -> LayerGradient:
        """The same layer's gradients for some of the examples."""
        return LayerGradient(self.inputs[rows], self.output_grads[rows])

    @property
    def positions(self) -> int:
        """Number of shared positions s."""
        return self.inputs.shape[1]

    def dense(self) -> Tensor:
        """The gradients themselves, shape [n, o, i]."""
        return torch.einsum("nso,nsi->noi", self.output_grads, self.inputs)

    def is_finite(self) -> Tensor:
        """Whether an example can enter sums of squares: bool [n], False for NaN, infinity and overflow."""
        a, d = self.inputs.flatten(1).norm(dim=1), self.output_grads.flatten(1).norm(dim=1)
        return (a.square() + d.square() + (a * d).square()).isfinite()

    @classmethod
    def concatenate(cls, parts: Sequence[LayerGradient]) -> LayerGradient:
        """The examples of several batches; those with fewer positions are padded with zeros."""
        longest = max(part.positions for part in parts)
        return cls(
            torch.cat([_padded(part.inputs, longest) for part in parts]),
            torch.cat([_padded(part.output_grads, longest) for part in parts]),
        )


def _padded(values: Tensor, positions: int) -> Tensor:
    missing = positions - values.shape[1]
    return pad(values, (0, 0, 0, missing)) if missing else values
