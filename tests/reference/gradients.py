"""Gradients of one example at a time, by autograd in float64.

The loss function is `loss_fn(model, example) -> scalar`: the loss of ONE example, summed over its
positions. It adds the batch dimension that the model wants. Models keep their train or eval mode;
every call works on a deep copy.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

LossFn = Callable[[nn.Module, Any], Tensor]


def double_copy(model: nn.Module) -> nn.Module:
    """Deep copy of the model in float64; the caller's model stays as it is."""
    return copy.deepcopy(model).double()


def double_example(example: Any) -> Any:
    """The example with each floating-point tensor in float64, through tuples, lists and dicts."""
    if isinstance(example, Tensor):
        return example.double() if example.is_floating_point() else example
    if isinstance(example, dict):
        return {key: double_example(value) for key, value in example.items()}
    if isinstance(example, (tuple, list)):
        return type(example)(double_example(value) for value in example)
    return example


def linear_layer_names(model: nn.Module) -> list[str]:
    """Names of all `nn.Linear` layers in `named_modules` order."""
    return [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]


def has_trainable_bias(layer: nn.Module) -> bool:
    """Whether the layer has a bias that receives a gradient."""
    bias = getattr(layer, "bias", None)
    return isinstance(bias, Tensor) and bias.requires_grad


def parameter_gradients(model: nn.Module, examples: Iterable[Any], loss_fn: LossFn) -> dict[str, Tensor]:
    """Gradient of each example's summed loss by every trainable parameter.

    A parameter that an example does not use has gradient zero.

    Returns:
        Parameter name to tensor of shape [n, *parameter.shape], float64.
    """
    model = double_copy(model)
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    rows: dict[str, list[Tensor]] = {name: [] for name in parameters}
    for example in examples:
        loss = loss_fn(model, double_example(example))
        gradients = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
        for (name, parameter), gradient in zip(parameters.items(), gradients, strict=True):
            rows[name].append(torch.zeros_like(parameter) if gradient is None else gradient)
    return {name: torch.stack(list_of_rows).detach() for name, list_of_rows in rows.items()}


def flat_gradients(model: nn.Module, examples: Iterable[Any], loss_fn: LossFn) -> Tensor:
    """All trainable parameters' gradients, flattened and joined in `named_parameters` order.

    Returns:
        Tensor of shape [n, number of trainable parameters], float64.
    """
    gradients = parameter_gradients(model, examples, loss_fn)
    return torch.cat([gradient.flatten(1) for gradient in gradients.values()], dim=1)


def per_example_gradients(
    model: nn.Module, examples: Iterable[Any], loss_fn: LossFn, layers: Sequence[str]
) -> dict[str, Tensor]:
    """Per-example gradients of whole layers, the bias gradient as the last column.

    Meant for `nn.Linear`; any layer whose weight has the outputs on its first axis (convolutions)
    works too, its other axes flattened into i. A weight tied to another layer has the gradient of
    all its uses.

    Returns:
        Layer name to G_n of shape [n, o, i], or [n, o, i + 1] with a trainable bias, float64.
    """
    by_layer = {}
    model = double_copy(model)
    examples = list(examples)
    for name in layers:
        layer = model.get_submodule(name)
        wanted = [layer.weight, layer.bias] if has_trainable_bias(layer) else [layer.weight]
        rows = []
        for example in examples:
            loss = loss_fn(model, double_example(example))
            gradients = torch.autograd.grad(loss, wanted, allow_unused=True, materialize_grads=True)
            # weight [o, ...] -> [o, i]; bias [o] -> [o, 1]
            rows.append(torch.cat([g.reshape(len(g), -1) for g in gradients], dim=1))
        by_layer[name] = torch.stack(rows).detach()
    return by_layer
