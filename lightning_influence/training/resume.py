"""What a run that is resumed from a checkpoint needs of the one before: kept beside the file, not in it.

A checkpoint would grow by all covariances. So they go to a file of their own for each process, which the
next checkpoint's replaces, and which names the step that it belongs to.
"""

from __future__ import annotations

import os
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from lightning_influence.processes import Processes

VERSION = 1


def resume_path(path: Path, store_id: str, processes: Processes) -> Path:
    """Where this process keeps what a resumed run needs."""
    return path.with_name(f"{path.name}.{store_id[:8]}.resume{processes.rank}")


def save_state(target: Path, state: Mapping[str, Any], *, epoch: int, step: int, processes: Processes) -> None:
    """Replace what is kept, in one step.

    Args:
        target: of `resume_path`.
        state: plain values and tensors.
        epoch: that is running.
        step: optimizer steps taken.
        processes: that train together.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    unfinished = target.with_name(f"{target.name}.new")
    facts = {"version": VERSION, "epoch": epoch, "step": step, "processes": processes.size}
    torch.save({**facts, **state}, unfinished)
    os.replace(unfinished, target)


def load_state(target: Path, *, step: int, processes: Processes) -> dict[str, Any] | None:
    """What was kept at the checkpoint of this step; None, with a warning, if it is not there or of another."""
    try:
        state = torch.load(target, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        return None
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        _refuse(target, f"it cannot be read ({type(error).__name__}: {error})")
        return None
    found = tuple(state.get(key) for key in ("version", "step", "processes"))
    expected = (VERSION, step, processes.size)
    if found != expected:
        _refuse(target, f"it is of (version, step, processes) {found}, expected {expected}")
        return None
    return state


def _refuse(target: Path, reason: str) -> None:
    rank_zero_warn(
        f"InfluenceCallback: {target} does not help to resume capture: {reason}. Capture goes on without, and "
        "examples from before the checkpoint will be missing where the epoch had begun to be captured."
    )
