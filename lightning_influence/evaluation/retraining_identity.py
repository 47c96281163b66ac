"""What can be said of a training in words and digests, so that a file of others is known when it is met."""

from __future__ import annotations

import functools
import hashlib
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from lightning_influence.evaluation.retraining_recipe import Recipe, seeded

MOST_STEPS = 10_000  # of a schedule, which are looked at
READ = 8  # examples of a dataset that is not read as a whole


def identity_of(train: Any, model: nn.Module, dataset: Any, data: Any) -> dict[str, str]:
    """What is trained, by names of its parts.

    Args:
        train: a `Recipe`, or a function.
        model: untrained.
        dataset: of N examples.
        data: the dataset as one batch; None if a function reads it.
    """
    said = {"dataset": f"{len(dataset)} examples", "model": str(model)}
    if not isinstance(train, Recipe):
        return {**said, "train": _name_of(train), "data": _digest_of_some(dataset)}
    optimizer = train.optimizer(list(model.parameters()))
    before = str(optimizer)
    said["recipe"] = f"{train.epochs} epochs, {train.batch_size} a batch, {_schedule(train, optimizer, dataset)}"
    return {**said, "optimizer": before, "data": _digest(tree_leaves(data))}


def _schedule(train: Recipe, optimizer: torch.optim.Optimizer, dataset: Any) -> str:
    """By its learning rates, for functions of the same name may make different ones."""
    if train.scheduler is None:
        return "no schedule"
    after_step, rates = train.schedule(optimizer, len(dataset)), []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that no step of the optimizer comes before
        for _ in range(min(MOST_STEPS, train.num_steps(len(dataset)))):
            rates += [f"{group['lr']:.5g}" for group in optimizer.param_groups]
            after_step()
    return f"a schedule of rates {hashlib.sha256(' '.join(rates).encode()).hexdigest()}"


def _name_of(train: Callable[..., Any]) -> str:
    if isinstance(train, functools.partial):
        given = [*map(str, map(_plain, train.args)), *(f"{k}={_plain(v)}" for k, v in train.keywords.items())]
        return f"{_name_of(train.func)}({', '.join(given)})"
    return str(getattr(train, "__qualname__", type(train).__qualname__))


def _plain(value: Any) -> str:
    """Other things may print their address, which is never the same."""
    return repr(value) if isinstance(value, int | float | str | None) else type(value).__qualname__


def _digest_of_some(dataset: Any) -> str:
    """Of a few examples, if they are the same whenever they are read."""
    places = np.unique(np.linspace(0, len(dataset) - 1, READ).astype(int)).tolist()

    def read() -> str:
        with seeded(0):
            return _digest(tree_leaves([dataset[place] for place in places]))

    found = read()
    return found if read() == found else "of other examples whenever it is read"


def _digest(leaves: Iterable[Any]) -> str:
    digest = hashlib.sha256()
    for leaf in leaves:
        if isinstance(leaf, Tensor):
            digest.update(leaf.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
        elif isinstance(leaf, np.ndarray) and leaf.dtype != object:
            digest.update(leaf.tobytes())
        else:
            digest.update(_plain(leaf).encode())
    return digest.hexdigest()
