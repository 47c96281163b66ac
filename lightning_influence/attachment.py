"""How a checkpoint and its file find each other: by id and path in one, weights' hash in the other."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from lightning_influence.errors import StoreError, StoreNotFoundError, WeightsMismatchError
from lightning_influence.functional.weights import weights_hash
from lightning_influence.store import StoreReader

STATE_KEY = "lightning_influence_store_id"  # marks our state among a checkpoint's callbacks
CHECKPOINT_KEY = "lightning_influence"  # a list of our states, in a checkpoint without callbacks' states


def attachment_state(store_id: str, path: Path, relative_to: Path, status: str) -> dict[str, str]:
    """What a checkpoint says of its file, in plain strings.

    Args:
        store_id: the file's id.
        path: where the file is or will be.
        relative_to: the folder in which checkpoints are expected.
        status: "capturing" or "complete" at the time of the checkpoint.
    """
    try:
        relative_path = os.path.relpath(path.absolute(), relative_to.absolute())
    except ValueError:  # on another drive
        relative_path = path.name
    return {
        STATE_KEY: store_id,
        "path": str(path.absolute()),
        "relative_path": relative_path,
        "status": status,
    }


def find_store(checkpoint_path: str | os.PathLike[str], checkpoint: Mapping[str, Any]) -> StoreReader:
    """Open the file that a checkpoint was saved with.

    It is looked for at its path relative to the checkpoint, at its absolute path of the time, and by
    its name in the checkpoint's folder and the three above it.

    Raises:
        StoreNotFoundError: if the checkpoint names no file, or several, or it is in none of these places.
        StoreError: if a file there is damaged or incomplete.
    """
    states = _states(checkpoint)
    if not states:
        raise StoreNotFoundError(
            f"{checkpoint_path} names no file of gradients (a checkpoint of a run without the callback has none); "
            "pass `store=` with the file's path."
        )
    if len(states) > 1:
        paths = ", ".join(str(state["path"]) for state in states)
        raise StoreNotFoundError(
            f"{checkpoint_path} names {len(states)} files of gradients, expected 1: {paths}; pass `store=` with "
            "the path of one."
        )
    (state,) = states
    candidates = _candidates(Path(checkpoint_path).absolute().parent, state)
    others = []
    for path in candidates:
        if not path.is_file():
            continue
        reader = StoreReader(path)
        if reader.store_id == state[STATE_KEY]:
            return reader
        others.append(f"{path} (of another run, id {reader.store_id})")
    raise StoreNotFoundError(
        f"{checkpoint_path} belongs to the file with id {state[STATE_KEY]}, which is at none of: "
        f"{', '.join(str(path) for path in candidates)}. "
        + (f"Found instead: {', '.join(others)}. " if others else "")
        + ("The checkpoint was saved before capture was complete. " if state.get("status") != "complete" else "")
        + "Pass `store=` with the file's path."
    )


def _candidates(folder: Path, state: Mapping[str, str]) -> list[Path]:
    name = Path(state["path"]).name
    nearby = [parent / name for parent in [folder, *folder.parents][:4]]
    paths = [folder / state["relative_path"], Path(state["path"]), *nearby]
    return list(dict.fromkeys(Path(os.path.normpath(path)) for path in paths))


def _states(checkpoint: Mapping[str, Any]) -> list[Mapping[str, str]]:
    callbacks, own = checkpoint.get("callbacks"), checkpoint.get(CHECKPOINT_KEY)
    found = [
        *(callbacks.values() if isinstance(callbacks, Mapping) else ()),
        *(own if isinstance(own, list) else ()),
    ]
    return [state for state in found if isinstance(state, Mapping) and STATE_KEY in state]


def check_weights(model: nn.Module, store: StoreReader) -> None:
    """Refuse a model whose weights are not those at the end of capture.

    Raises:
        WeightsMismatchError: naming the file, its epoch and both hashes.
        StoreError: if the file has no hash.
    """
    expected = store.attributes.get("weights_hash_end")
    if not isinstance(expected, str):
        raise StoreError(f"{store.path} has no attribute 'weights_hash_end'; capture again.")
    found = weights_hash(model)
    if found != expected:
        raise WeightsMismatchError(
            f"The model's weights are not those of {store.path}: expected SHA-256 {expected[:16]}…, the "
            f"weights at the end of epoch {store.attributes.get('epoch', '?')} (step "
            f"{store.attributes.get('step_end', '?')}), found {found[:16]}…. Load the checkpoint saved at "
            "the end of that epoch (often last.ckpt; a best or averaged one has other weights)."
        )
