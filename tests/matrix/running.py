"""Trains a situation three times: without capture, with it, and with it while the weights stand still."""

from __future__ import annotations

import hashlib
import logging
import os
import random
import sys
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_influence import InfluenceCallback
from tests.matrix.children import run_command, run_forked, tail_of
from tests.matrix.situation import Run, Situation


@dataclass(frozen=True)
class Trained:
    """What one training left.

    Args:
        digest: SHA-256 of the weights, the optimizers' states and the random states, after training.
        weights: the module's state.
        said: our warnings.
        flaw: what the situation's own check has found.
    """

    digest: str
    weights: dict[str, Tensor]
    said: list[str]
    flaw: str


def train(situation: Situation, folder: Path, *, is_captured: bool, is_still: bool) -> Trained:
    """Train where the situation says."""
    folder.mkdir(parents=True, exist_ok=True)
    if situation.process == "this":
        return train_here(situation, folder, is_captured=is_captured, is_still=is_still)
    output = folder / "output"
    if situation.process == "forked":
        code = run_forked(
            partial(train_and_save, situation, folder, is_captured=is_captured, is_still=is_still), output
        )
    else:
        flags = ["captured"] * is_captured + ["still"] * is_still
        code = run_command(
            [sys.executable, "-m", "tests.matrix.script", situation.name, str(folder), str(os.getpid()), *flags],
            output,
        )
    if code:
        raise RuntimeError(f"the process ended with {code}: {tail_of(output)}")
    return Trained(**torch.load(folder / "trained.pt"))


def train_and_save(situation: Situation, folder: Path, *, is_captured: bool, is_still: bool) -> None:
    """Train in this process, whose rank 0 saves what there is to know."""
    trained = train_here(situation, folder, is_captured=is_captured, is_still=is_still)
    if os.environ.get("LOCAL_RANK", "0") == "0":
        torch.save(vars(trained), folder / "trained.pt")


def train_here(situation: Situation, folder: Path, *, is_captured: bool, is_still: bool) -> Trained:
    """Train in this process."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch._dynamo.reset()
    run = Run(situation, folder, InfluenceCallback if is_captured else None, is_still=is_still)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run.fit()
    said = [str(each.message) for each in caught if "InfluenceCallback" in str(each.message)]
    assert run.trainer is not None
    states = [optimizer.state_dict() for optimizer in run.trainer.optimizers]
    weights = {name: value.detach().clone() for name, value in run.module.state_dict().items()}
    summed = digest([weights, states, *random_states()])
    flaw = situation.check(run) if is_captured and not is_still else ""
    return Trained(summed, weights, said, flaw)


def random_states() -> list[Any]:
    """Of the three global generators."""
    return [torch.get_rng_state(), np.random.get_state(legacy=False), random.getstate()]


def digest(value: Any) -> str:
    """SHA-256 over nested values, to the last bit."""
    summed = hashlib.sha256()
    for part in _flat(value):
        summed.update(part)
    return summed.hexdigest()


def _flat(value: Any) -> Iterable[bytes]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield repr(key).encode()
            yield from _flat(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _flat(inner)
    elif isinstance(value, Tensor):
        yield value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    elif isinstance(value, np.ndarray):
        yield value.tobytes()
    else:
        yield repr(value).encode()
