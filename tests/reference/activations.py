"""Inputs and output gradients of `nn.Linear` layers, one example at a time in float64.

Format: inputs a [n, s, i] (a last column of ones with a trainable bias, then i + 1) and
output gradients d [n, s, o] of each example's own summed loss. The positions of a layer that is
called several times are joined in call order. Examples with fewer positions are padded with zeros
at the end, where d = 0 marks the padding.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from tests.reference.gradients import LossFn, double_copy, double_example, has_trainable_bias


@dataclass(frozen=True)
class LayerActivations:
    """What one layer saw.

    Attributes:
        inputs: a, shape [n, s, i] or with the ones column [n, s, i + 1], float64.
        output_grads: d loss_n / d y of the summed loss, shape [n, s, o], float64.
    """

    inputs: Tensor
    output_grads: Tensor

    def gradients(self) -> Tensor:
        """G_n = sum_s d aᵀ, shape [n, o, i], by loops."""
        pairs = zip(self.inputs, self.output_grads, strict=True)
        return torch.stack([_sum_of_outer_products(d, a) for a, d in pairs])


def collect_activations(
    model: nn.Module, examples: Iterable[Any], loss_fn: LossFn, layers: Sequence[str]
) -> dict[str, LayerActivations]:
    """Run each example alone and keep each layer's inputs and output gradients.

    Args:
        model: Any module; a float64 deep copy is run.
        examples: What `loss_fn` takes, one at a time.
        loss_fn: `loss_fn(model, example)`, the summed loss of one example.
        layers: Names of `nn.Linear` layers.

    Returns:
        Layer name to its activations.
    """
    model = double_copy(model)
    inputs: dict[str, list[Tensor]] = {name: [] for name in layers}
    output_grads: dict[str, list[Tensor]] = {name: [] for name in layers}
    for example in examples:
        for name in layers:
            a, d = _one_example(model, double_example(example), loss_fn, model.get_submodule(name))
            inputs[name].append(a)
            output_grads[name].append(d)
    return {
        name: LayerActivations(
            pad_sequence(inputs[name], batch_first=True), pad_sequence(output_grads[name], batch_first=True)
        )
        for name in layers
    }


def _one_example(model: nn.Module, example: Any, loss_fn: LossFn, layer: nn.Module) -> tuple[Tensor, Tensor]:
    """Inputs [s, i] and output gradients [s, o] of one layer for one example."""
    if not isinstance(layer, nn.Linear):
        raise TypeError(f"expected an nn.Linear layer, got {type(layer).__name__}")
    calls: list[tuple[Tensor, Tensor]] = []

    def keep(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        calls.append((args[0].detach().clone(), output))
        return output.clone()  # later in-place operations change the clone, not what we keep

    handle = layer.register_forward_hook(keep)
    try:
        loss = loss_fn(model, example)
    finally:
        handle.remove()
    a = [torch.zeros(0, layer.in_features, dtype=torch.float64)]  # a layer never called: s = 0
    d = [torch.zeros(0, layer.out_features, dtype=torch.float64)]
    for layer_input, output in calls:
        (output_grad,) = torch.autograd.grad(
            loss, output, retain_graph=True, allow_unused=True, materialize_grads=True
        )
        a.append(layer_input.reshape(-1, layer.in_features))
        d.append(output_grad.reshape(-1, layer.out_features))
    joined = torch.cat(a)
    if has_trainable_bias(layer):
        joined = torch.cat([joined, torch.ones(len(joined), 1, dtype=torch.float64)], dim=1)
    return joined, torch.cat(d)


def _sum_of_outer_products(d: Tensor, a: Tensor) -> Tensor:
    """sum_s d aᵀ of one example: d [s, o], a [s, i] -> [o, i]."""
    total = torch.zeros(d.shape[1], a.shape[1], dtype=torch.float64)
    for position in range(len(a)):
        total += torch.outer(d[position], a[position])
    return total
