"""`nn.Embedding` and `nn.EmbeddingBag`: tables [o, i] of which an example looks up rows.

The gradient by a looked-up row is the gradient at the output, so an example's gradient is the sum of its
look-ups' (`RowGradient`). Rows of `padding_idx` get none, as in autograd. A table's rows count as outputs,
so that it has the shape of an output layer that shares it; S is diagonal and counts look-ups.

Indices that are the same for all examples, as those of positions, [t] or [1, t], come with an output
gradient [n, t, i] if the output was added to the examples (`layers.uses` sees this).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from lightning_influence.errors import LayerError
from lightning_influence.functional.structure import KroneckerStructure
from lightning_influence.gradients import RowGradient
from lightning_influence.layers.base import LayerAdapter, LayerCall, register_adapter
from lightning_influence.layers.reasons import is_plain

LOOKED_UP = KroneckerStructure(full_S=False)


class TableAdapter(LayerAdapter):
    """What `nn.Embedding` and `nn.EmbeddingBag` have in common."""

    bias_name = ""
    is_table = True

    def shape(self, module: nn.Module) -> tuple[int, int]:
        """(num_embeddings, embedding_dim)."""
        assert isinstance(module, nn.Embedding | nn.EmbeddingBag)
        return module.num_embeddings, module.embedding_dim

    def structure(self, module: nn.Module) -> KroneckerStructure:
        """S is diagonal."""
        return LOOKED_UP

    def matrix(self, module: nn.Module, weight: Tensor) -> Tensor:
        """The weight, or a `.grad` of `sparse=True`, as a dense matrix."""
        return weight.to_dense()


def _only_looks_up(module: nn.Module) -> bool:
    """Whether it neither rescales rows that it meets nor divides gradients by the batch's counts."""
    return module.max_norm is None and not module.scale_grad_by_freq


class EmbeddingAdapter(TableAdapter):
    """Exact for `nn.Embedding` with indices of any shape, with `padding_idx` and `sparse`."""

    keeps_positions = True

    def matches(self, module: nn.Module) -> bool:
        """Whether it is one that only looks up."""
        return is_plain(module, nn.Embedding) and _only_looks_up(module)

    def gradient(self, module: nn.Module, layer_input: Tensor, output_grad: Tensor) -> RowGradient:
        """Indices [n, ...], or such as broadcast to the output gradient [n, ..., i], become rows [n, s]."""
        assert isinstance(module, nn.Embedding)
        if output_grad.ndim < 2:
            raise LayerError(
                "expected indices [n, ...] with the batch first, got one index; add a batch dimension."
            )
        n, leading = len(output_grad), output_grad.shape[:-1]
        rows = layer_input.expand(leading).reshape(n, -1)
        grads = output_grad.reshape(n, -1, module.embedding_dim)
        if module.padding_idx is not None:
            grads = grads * (rows != module.padding_idx).unsqueeze(-1)
        return RowGradient(module.num_embeddings, rows.long(), grads)


class EmbeddingBagAdapter(TableAdapter):
    """Exact for `nn.EmbeddingBag`: an example is a bag; its output is the sum, mean or maximum of its rows.

    For `mode="max"` the rows that were largest are found from the weight, just after the call. Of rows with
    the same value the first is taken, as torch does.
    """

    def matches(self, module: nn.Module) -> bool:
        """Whether it is one that only looks up."""
        return is_plain(module, nn.EmbeddingBag) and _only_looks_up(module)

    def remember(self, module: nn.Module, layer_input: Tensor) -> Tensor | None:
        """The weight, where the largest rows are asked for."""
        assert isinstance(module, nn.EmbeddingBag)
        return module.weight.detach().clone() if module.mode == "max" else None

    def gradient(self, module: nn.Module, layer_input: Tensor, output_grad: Tensor) -> RowGradient:
        """Of bags [n, s] without further arguments."""
        return self.gradient_of_call(module, LayerCall((layer_input,), {}, output_grad))

    def gradient_of_call(self, module: nn.Module, call: LayerCall) -> RowGradient:
        """Bags [n, s], or [m] with n offsets, become rows [n, s] with their shares of the output gradient."""
        assert isinstance(module, nn.EmbeddingBag)
        rows, weights, is_inside = _bags(module, call)
        if call.output_grad.shape != (len(rows), module.embedding_dim):
            raise LayerError(
                f"expected gradients of {len(rows)} bags, got shape {tuple(call.output_grad.shape)}; "
                "look up one bag for each example."
            )
        if module.padding_idx is not None:
            is_inside = is_inside & (rows != module.padding_idx)
        if module.mode == "max":
            weight = module.weight.detach() if call.memory is None else call.memory
            return RowGradient(module.num_embeddings, rows, _to_largest(weight, rows, is_inside, call.output_grad))
        shares = is_inside.to(call.output_grad)  # [n, s]
        if module.mode == "mean":
            shares = shares / shares.sum(1, keepdim=True).clamp(min=1)
        if weights is not None:
            shares = shares * weights
        return RowGradient(module.num_embeddings, rows, shares.unsqueeze(-1) * call.output_grad.unsqueeze(1))


def _bags(module: nn.EmbeddingBag, call: LayerCall) -> tuple[Tensor, Tensor | None, Tensor]:
    """Rows int64 [n, s], their weights [n, s] if there are any, and which of them are in a bag, bool [n, s]."""
    indices, offsets, weights = (
        call.argument(place, name) for place, name in enumerate(("input", "offsets", "per_sample_weights"))
    )
    if indices.ndim == 2:
        return indices.long(), weights, torch.ones_like(indices, dtype=torch.bool)
    bounds = offsets.long() if module.include_last_offset else pad(offsets.long(), (0, 1), value=len(indices))
    starts, sizes = bounds[:-1].unsqueeze(1), bounds.diff().unsqueeze(1)  # [n, 1]
    places = torch.arange(max(1, int(sizes.max())), device=indices.device)
    is_inside = places < sizes
    places = (starts + places).where(is_inside, len(indices))  # outside of a bag: one more index, of row 0
    return (
        pad(indices.long(), (0, 1))[places],
        None if weights is None else pad(weights, (0, 1))[places],
        is_inside,
    )


def _to_largest(weight: Tensor, rows: Tensor, is_inside: Tensor, output_grad: Tensor) -> Tensor:
    """Each feature's gradient at the look-up with the largest value, shape [n, s, i]."""
    values = weight[rows].masked_fill(~is_inside.unsqueeze(-1), -torch.inf)
    grads = output_grad * is_inside.any(1, keepdim=True)  # an empty bag's output is a constant
    return torch.zeros_like(values, dtype=grads.dtype).scatter_(
        1, values.argmax(1, keepdim=True), grads.unsqueeze(1)
    )


register_adapter(EmbeddingAdapter())
register_adapter(EmbeddingBagAdapter())
