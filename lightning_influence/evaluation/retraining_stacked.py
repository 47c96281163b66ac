"""Many small models trained as one: their parameters are stacked, and `vmap` runs them side by side.

The step of a small model is mostly overhead, which all of them share then. The sum of the models' losses has for
each stacked parameter [models, ...] the models' own gradients, and an optimizer that works on each number by
itself updates the stack as it would update each model.

Format: parameters and buffers by name, [models, ...]; batches by index, [models, B, ...].
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn, optim
from torch.func import functional_call, stack_module_state, vmap

from lightning_influence.evaluation.retraining_recipe import (
    MakeModel,
    Measure,
    Recipe,
    device_of,
    measured,
    pick,
    seeded_model,
    train_alone,
)

# Of these each number's update depends on its own gradients and the step count alone.
ELEMENTWISE = (
    optim.SGD,
    optim.Adam,
    optim.AdamW,
    optim.Adamax,
    optim.NAdam,
    optim.RAdam,
    optim.RMSprop,
    optim.Adagrad,
    optim.Adadelta,
)
PROBED_STEPS, TOLERANCE = 2, 1e-3


class _Loss(nn.Module):
    """A loss as a module, so that `functional_call` can put other parameters into the model."""

    def __init__(self, model: nn.Module, recipe: Recipe) -> None:
        super().__init__()
        self.model, self._recipe = model, recipe

    def forward(self, batch: Any) -> Tensor:
        return self._recipe.loss(self.model, batch)


def train_stacked(
    make_model: MakeModel,
    recipe: Recipe,
    data: Any,
    masks: Tensor,
    seeds: Sequence[int],
    *,
    max_steps: int | None = None,
) -> list[nn.Module]:
    """Train one model for each mask and seed, all with the same number of examples.

    Args:
        make_model: makes a model from torch's own generator.
        recipe: of all of them.
        data: the whole dataset as one batch.
        masks: which examples each is trained on, bool [models, N].
        seeds: of each.
        max_steps: breaks off early.

    Returns:
        The trained models.

    Raises:
        Exception: whatever `vmap` raises where the model, its loss or its optimizer is not for it.
    """
    models = [seeded_model(make_model, seed).train() for seed in seeds]
    parameters, buffers = stack_module_state(models)
    trainable = [tensor for tensor in parameters.values() if tensor.requires_grad]
    optimizer = recipe.optimizer(trainable)
    after_step = recipe.schedule(optimizer, int(masks[0].sum()))
    loss = _Loss(models[0], recipe)

    def one(parameters: dict[str, Tensor], buffers: dict[str, Tensor], batch: Any) -> Tensor:
        named = {f"model.{name}": tensor for name, tensor in (*parameters.items(), *buffers.items())}
        return functional_call(loss, named, (batch,))

    device = device_of(models[0])
    with torch.enable_grad():
        steps = zip(*(recipe.batches(m, s) for m, s in zip(masks, seeds, strict=True)), strict=True)
        for rows in itertools.islice(steps, max_steps):
            optimizer.zero_grad()
            batch = pick(data, torch.stack(rows).to(device))
            vmap(one)(parameters, buffers, batch).sum().backward()
            optimizer.step()
            after_step()
    for number, model in enumerate(models):
        state = {name: tensor[number].detach() for name, tensor in (*parameters.items(), *buffers.items())}
        model.load_state_dict(state, strict=False)
    return models


def why_not_stacked(
    make_model: MakeModel, recipe: Recipe, data: Any, masks: Tensor, seeds: Sequence[int], measure: Measure
) -> str:
    """Why models cannot be trained as one; empty if they can.

    Two models are trained for a few steps in both ways, and must come out the same: a model may run under `vmap`
    and still not be itself there, such as one whose buffers change.
    """
    single = [parameter for parameter in seeded_model(make_model, 0).parameters() if parameter.requires_grad]
    optimizer = recipe.optimizer(single)
    if type(optimizer) not in ELEMENTWISE:
        return f"{type(optimizer).__name__} is not known to update each number by itself"
    several = [parameter.detach()[None].requires_grad_() for parameter in single]
    if _groups(optimizer, single) != _groups(recipe.optimizer(several), several):
        return "the optimizer's groups depend on the parameters' shapes"
    try:
        stacked = train_stacked(make_model, recipe, data, masks, seeds, max_steps=PROBED_STEPS)
    except Exception as error:  # whatever the model and its loss do under vmap
        return f"`vmap` refuses: {(str(error).splitlines() or [type(error).__name__])[0]}"
    for model, mask, seed in zip(stacked, masks, seeds, strict=True):
        alone, first = seeded_model(make_model, seed), _numbers(seeded_model(make_model, seed))
        train_alone(alone, recipe, data, mask, seed, max_steps=PROBED_STEPS)
        for (name, one), other in zip(_numbers(model).items(), _numbers(alone).values(), strict=True):
            moved = other - first[name]
            if float((one - other).norm()) > TOLERANCE * float(moved.norm()):
                return f"{name!r} moves otherwise than in a model that is trained alone"
        if not torch.allclose(measured(model, measure), measured(alone, measure), rtol=TOLERANCE, atol=TOLERANCE):
            return "a model that is trained with others is measured otherwise than alone"
    return ""


def _numbers(model: nn.Module) -> dict[str, Tensor]:
    """Copies of all parameters and buffers."""
    named = (*model.named_parameters(), *model.named_buffers())
    return {name: tensor.detach().double().clone() for name, tensor in named}


def _groups(optimizer: optim.Optimizer, parameters: Sequence[Tensor]) -> list[list[int]]:
    """Which parameters are in each of the optimizer's groups."""
    number = {id(parameter): n for n, parameter in enumerate(parameters)}
    return [[number.get(id(parameter), -1) for parameter in group["params"]] for group in optimizer.param_groups]
