"""How a small model is trained again: the recipe, its random numbers, and the plain loop.

Data format: the whole dataset as one batch in memory, any nesting of tensors [N, ...], of which rows are
picked by index.

Random numbers belong to the seed alone. A seed makes the first weights and one permutation of all N examples
an epoch, of which a subset keeps its own; so models that were trained on similar subsets with the same seed
differ by the subset, as little as can be by chance, and nothing depends on which models were trained beside.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.data import default_collate

from lightning_influence.training.asking import kept_random_states

MakeModel = Callable[[], nn.Module]
Measure = Callable[[nn.Module], Tensor]


@dataclass(frozen=True)
class Recipe:
    """Training by minibatches, of as many models at once as one likes.

    Args:
        loss: `loss(model, batch) -> scalar`, the mean over the batch, as `training_step` gives it.
        optimizer: makes one from parameters, such as `functools.partial(torch.optim.SGD, lr=0.1, momentum=0.9)`.
        epochs: over the subset.
        batch_size: the last batch of an epoch may be smaller.
        scheduler: makes a schedule from the optimizer and the number of steps, stepped after each of them, such as
            `torch.optim.lr_scheduler.CosineAnnealingLR`; None for a constant learning rate.

    Raises:
        ValueError: if `epochs` or `batch_size` is not positive.
    """

    loss: Callable[[nn.Module, Any], Tensor]
    optimizer: Callable[[Iterable[Tensor]], Optimizer]
    epochs: int
    batch_size: int
    scheduler: Callable[[Optimizer, int], LRScheduler] | None = None

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be positive, got {getattr(self, name)}.")

    def num_steps(self, num_examples: int) -> int:
        """Of a whole training."""
        return self.epochs * math.ceil(num_examples / self.batch_size)

    def batches(self, chosen: Tensor, seed: int) -> Iterator[Tensor]:
        """Indices of each batch of a training on the chosen examples, a mask [N]."""
        generator = torch.Generator().manual_seed(seed)
        for _ in range(self.epochs):
            order = torch.randperm(len(chosen), generator=generator)
            yield from order[chosen[order]].split(self.batch_size)

    def schedule(self, optimizer: Optimizer, num_examples: int) -> Callable[[], None]:
        """What to call after each step."""
        if self.scheduler is None:
            return lambda: None
        return self.scheduler(optimizer, self.num_steps(num_examples)).step


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Random numbers of torch, NumPy and Python come from the seed; their generators are left as they were."""
    with kept_random_states():
        torch.manual_seed(seed)
        np.random.seed(seed % 2**32)
        random.seed(seed)
        yield


def seeded_model(make_model: MakeModel, seed: int) -> nn.Module:
    """A new model whose first weights come from the seed."""
    with seeded(seed):
        return make_model()


def device_of(model: nn.Module) -> torch.device:
    """Of the first parameter or buffer."""
    return next((tensor.device for tensor in (*model.parameters(), *model.buffers())), torch.device("cpu"))


def pick(data: Any, indices: Tensor) -> Any:
    """Those rows of every tensor."""
    return tree_map(lambda tensor: tensor[indices], data)


def read_whole(dataset: Any, device: torch.device) -> Any:
    """All examples of a dataset as one batch.

    Raises:
        TypeError: if its examples cannot be stacked.
    """
    try:
        whole = default_collate([dataset[n] for n in range(len(dataset))])
    except (TypeError, RuntimeError) as error:
        raise TypeError(
            f"`dataset`: its examples cannot be stacked into tensors: {str(error).splitlines()[0]} "
            "Pad them to one shape, or pass a function `train(model, subset, seed)` that loads batches itself."
        ) from error
    leaves = tree_leaves(whole)
    if not leaves or not all(isinstance(leaf, Tensor) and len(leaf) == len(dataset) for leaf in leaves):
        found = sorted({type(leaf).__name__ for leaf in leaves})
        raise TypeError(f"`dataset` must give tensors or numbers, got {found}; drop or encode the others.")
    return tree_map(lambda tensor: tensor.to(device), whole)


def train_alone(
    model: nn.Module, recipe: Recipe, data: Any, chosen: Tensor, seed: int, *, max_steps: int | None = None
) -> None:
    """Train one model in place on the chosen examples, a mask [N]; `max_steps` breaks off early."""
    model.train()
    optimizer = recipe.optimizer([parameter for parameter in model.parameters() if parameter.requires_grad])
    after_step = recipe.schedule(optimizer, int(chosen.sum()))
    with seeded(seed), torch.enable_grad():  # of dropout and the like
        for indices in itertools.islice(recipe.batches(chosen, seed), max_steps):
            optimizer.zero_grad()
            recipe.loss(model, pick(data, indices.to(device_of(model)))).backward()
            optimizer.step()
            after_step()


def measured(model: nn.Module, measure: Measure) -> Tensor:
    """What the measure says of a trained model, float32 or better [q], on the CPU.

    Raises:
        ValueError: if it is not a vector of numbers.
    """
    model.eval()
    with torch.no_grad():
        values = measure(model)
    if not isinstance(values, Tensor) or values.ndim != 1 or not values.is_floating_point():
        found = list(values.shape) if isinstance(values, Tensor) else type(values).__name__
        raise ValueError(f"`measure` must return one floating-point number a query, shape [q], got {found}.")
    return values.detach().cpu()
