"""Which features of a training example make it influential: derivatives of its scores by its own inputs.

With the preconditioned query V_q = (G + damping)⁻¹ grad(-f_q), made of the file's factors alone, the score of an
example that is handed in is <V_q, grad L(x)>, and its derivative by x is had by differentiating that inner product
once more, through the model's own backward (perturbation influence: Koh & Liang 2017, arXiv:1703.04730, Section
2.2). No row is read.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, MutableMapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from lightning_influence.errors import QueryError
from lightning_influence.layers import TrackedLayer
from lightning_influence.solvers.objective import twice_differentiable
from lightning_influence.step import LossKind
from lightning_influence.training.asking import (
    Measurement,
    asked_of,
    example_gradients,
    summed_objective,
    training_objective,
)


def input_derivatives(
    model: nn.Module,
    layers: Mapping[str, TrackedLayer],
    directions: Mapping[str, Tensor],
    batch: Any,
    *,
    loss: LossKind,
    training_loss: Measurement | None,
    inputs: int | str,
) -> Tensor:
    """Derivatives of <V_q, grad L_n> by the inputs of each example n, shape [q, n, *features].

    Args:
        model: in any mode; asked in eval mode, and left as it was.
        layers: those that are covered.
        directions: V by layer, shape [q, o, i].
        batch: n examples, on the model's device.
        loss: how the scale of the model's own loss is known.
        training_loss: each example's loss, of a model without a `training_step`.
        inputs: index or key of the features in the batch.

    Raises:
        QueryError: if the features are not numbers that can be moved, or the model does not depend on them.
    """
    features = _features(batch, inputs)
    if training_loss is None:
        seen = example_gradients(model, layers, batch, loss=loss)
        count, factor = len(seen), seen.scale.factor
    else:
        count, factor = len(features), torch.ones((), dtype=torch.float32)
    if len(features) != count:
        raise QueryError(f"`inputs` {inputs!r} has {len(features)} rows in a batch of {count} examples.")
    with torch.inference_mode(False), torch.enable_grad(), asked_of(model, layers), twice_differentiable():
        moved = features.detach().clone().requires_grad_()
        batch = tree_map(_usable_in_autograd, batch)
        batch = _with_features(batch, inputs, moved)
        scores = _scores(model, layers, directions, _total(model, batch, training_loss))
        derivatives = [
            torch.autograd.grad(score, moved, retain_graph=True, allow_unused=True)[0]
            if score.requires_grad
            else None
            for score in scores
        ]
    if len(derivatives) < len(scores) or any(derivative is None for derivative in derivatives):
        raise QueryError(
            f"The gradients of {type(model).__name__} do not depend on `inputs` {inputs!r}; name the part of the "
            "batch that holds the features, and do not detach it in the model."
        )
    stacked = torch.stack(cast(list[Tensor], derivatives))
    return stacked * factor.to(stacked).reshape(-1, *[1] * (features.ndim - 1))


def _total(model: nn.Module, batch: Any, training_loss: Measurement | None) -> Tensor:
    if training_loss is None:
        return training_objective(model, batch, instead="`training_loss=`").total
    expected = (
        "`training_loss(model, batch)` must return a differentiable tensor of shape [n], one loss an example"
    )
    return summed_objective(training_loss, expected, model, batch).total


def _scores(
    model: nn.Module, layers: Mapping[str, TrackedLayer], directions: Mapping[str, Tensor], total: Tensor
) -> list[Tensor]:
    """<V_q, grad total> of each query, differentiable."""
    parameters = {id(p): p for layer in layers.values() for p in layer.parameters.values()}
    grads = torch.autograd.grad(total, list(parameters.values()), create_graph=True, allow_unused=True)
    by_parameter = dict(zip(parameters, grads, strict=True))
    matrices = {
        name: layer.matrix({key: by_parameter[id(p)] for key, p in layer.parameters.items()})
        for name, layer in layers.items()
    }
    scores = sum(torch.einsum("qoi,oi->q", directions[name].to(M), M) for name, M in matrices.items())
    return list(cast(Tensor, scores))


def _features(batch: Any, inputs: int | str) -> Tensor:
    where = f"`inputs` {inputs!r}"
    try:
        features = batch if isinstance(batch, Tensor) else batch[inputs]
    except (KeyError, IndexError, TypeError) as error:
        kind = f"keys {list(batch)}" if isinstance(batch, Mapping) else type(batch).__name__
        raise QueryError(f"{where} is not in the examples ({kind}); name where the features are.") from error
    if isinstance(features, Tensor) and features.is_floating_point():
        return features
    is_tensor = isinstance(features, Tensor)
    found = f"{features.dtype} {tuple(features.shape)}" if is_tensor else type(features).__name__
    raise QueryError(
        f"{where} must be a tensor of floating-point numbers, which can be moved a little, got {found}; "
        "tokens and other integers have no derivative."
    )


def _with_features(batch: Any, inputs: int | str, features: Tensor) -> Any:
    if isinstance(batch, Tensor):
        return features
    if isinstance(batch, MutableMapping):
        changed = copy.copy(batch)  # of its own kind, which its class alone need not make
        changed[inputs] = features
        return changed
    if isinstance(batch, Mapping):
        return type(batch)({**batch, inputs: features})  # type: ignore[call-arg]
    parts = list(batch)
    parts[cast(int, inputs)] = features
    return type(batch)(*parts) if hasattr(batch, "_fields") else type(batch)(parts)


def _usable_in_autograd(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) and value.is_inference() else value
