"""What a run that is resumed from a checkpoint needs of the one before: kept beside the file, not in it.

A checkpoint would grow by all covariances. So they go to a file of their own for each process, which the
next checkpoint's replaces, and which names the step that it belongs to.
"""

from __future__ import annotations

import os
import pickle
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from lightning_influence.errors import StoreError
from lightning_influence.layer_plan import LayerPlan
from lightning_influence.processes import Processes
from lightning_influence.store import StoreReader

VERSION = 1


def resume_path(path: Path, store_id: str, processes: Processes) -> Path:
    """Where this process keeps what a resumed run needs."""
    return path.with_name(f"{path.name}.{store_id[:8]}.resume{processes.rank}")


def is_file_of(path: Path, store_id: str) -> bool:
    """Whether there is a finished file of this run, whose rows are one epoch's or segments."""
    try:
        reader = StoreReader(path)
        return reader.store_id == store_id and reader.attributes.get("trajectory") != "merge"
    except StoreError:
        return False


class Resumption:
    """What is kept for a run that is resumed, and what this run has of the one that it resumes.

    Attributes:
        is_wanted: whether this run was started from a checkpoint of a run with capture.
        state: what that run has kept; None if there is nothing.
        is_within_epoch: whether this run goes on in the middle of an epoch, until its capture has begun.
        capture: what this run has saved of an epoch whose unfinished file a resumed run will need.
    """

    def __init__(self) -> None:
        self.is_wanted = False
        self.state: dict[str, Any] | None = None
        self.is_within_epoch = False
        self.capture: dict[str, Any] | None = None
        self._taken: dict[str, Any] | None = None

    def load(self, target: Path, *, step: int, processes: Processes) -> None:
        """Read what the other run has kept for the checkpoint of this step, all processes together."""
        with processes.together():
            self.state = _load(target, step, processes)
        if not all(processes.gather(self.state is not None)):  # each has its own part
            self.state = None

    def fitting(self, plans: Mapping[str, LayerPlan]) -> dict[str, Any] | None:
        """What that run has kept, if it stored the layers as this one does; otherwise it is forgotten."""
        if self.state is not None and plans and self.state["plans"] != _described(plans):
            is_used = self.state["capture"] is not None or any(self.state["bases"].values())
            if is_used:
                rank_zero_warn(
                    "InfluenceCallback: layers are stored in another way than in the run that is resumed "
                    "(`layers`, `codec`, or what is trainable), so what it has captured is of no use. Capture "
                    "begins anew."
                )
            self.state = None
        return self.state if plans else None

    def start_epoch(self) -> None:
        """An epoch that starts at its beginning has nothing to do with what was saved of another."""
        self.is_within_epoch, self.capture = False, None

    def take_capture(self, epoch: int, folder: Path, processes: Processes) -> dict[str, Any] | None:
        """What was kept of this epoch's rows, once, if the unfinished file is still there."""
        state, self.state = self.state, None
        self._taken = state
        capture = None if state is None else state["capture"]
        is_there = capture is not None and (folder / capture["recorder"]["unfinished"]).exists()
        if processes.from_first(is_there and capture["attributes"]["epoch"] == epoch):  # type: ignore[index]
            self.capture = capture
        return self.capture

    def rename(self, target: Path, unfinished: Path | None) -> None:
        """What was taken has another name now, which a run needs that resumes from the same checkpoint."""
        if self.capture is not None and self._taken is not None and unfinished is not None:
            self.capture["recorder"]["unfinished"] = unfinished.name
            _replace(target, self._taken)

    def save(
        self,
        target: Path,
        plans: Mapping[str, LayerPlan],
        parts: Mapping[str, Any],
        capture: dict[str, Any] | None,
        *,
        step: int,
        processes: Processes,
    ) -> None:
        """Replace what is kept, in one step.

        Args:
            target: of `resume_path`.
            plans: how layers are stored.
            parts: what else is kept, plain values and tensors.
            capture: state of the epoch's capture; None keeps what was saved of it before.
            step: optimizer steps taken.
            processes: that train together.
        """
        self.capture = capture or self.capture
        state: dict[str, Any] = {"version": VERSION, "step": step, "processes": processes.size}
        state |= {"plans": _described(plans), "capture": self.capture}
        _replace(target, {**state, **parts})


def _replace(target: Path, state: Mapping[str, Any]) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    unfinished = target.with_name(f"{target.name}.new")
    torch.save(dict(state), unfinished)
    os.replace(unfinished, target)


def _described(plans: Mapping[str, LayerPlan]) -> dict[str, str]:
    """What must be the same in both runs; the positions of the first batch matter to pairs only."""
    return {
        name: repr(plan if plan.codec == "pairs" else replace(plan, positions=0)) for name, plan in plans.items()
    }


def _load(target: Path, step: int, processes: Processes) -> dict[str, Any] | None:
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
