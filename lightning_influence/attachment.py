"""How a checkpoint and its file find each other: by id and path in one, weights' hash in the other."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lightning_influence.errors import StoreError, StoreNotFoundError, WeightsMismatchError
from lightning_influence.functional.weights import parameters_hash, weights_hash
from lightning_influence.store import StoreReader

STATE_KEY = "lightning_influence_store_id"  # marks our state among a checkpoint's callbacks
CHECKPOINT_KEY = "lightning_influence"  # a list of our states, in a checkpoint without callbacks' states
_TRAINED_KEY = "current_model_state"  # where `WeightAveraging` keeps the weights that are trained
_NOT_FOUND = (
    "Load the checkpoint saved at the end of that epoch; none was found near. A `ModelCheckpoint()` without "
    "`monitor` keeps it (with `monitor`, last.ckpt may be no newer than the best)."
)
_MOST_SEARCHED = 50  # checkpoints that are read for the sake of an error message


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


def matching_segment(model: nn.Module, store: StoreReader, *, checkpoint: Path | None = None) -> StoreReader:
    """The part of a file that was captured for a model's weights.

    Args:
        model: with the weights at the end of capture.
        store: a file, of whose epochs one is to match; the latest if several do.
        checkpoint: where the weights came from. If they do not match, the checkpoints beside it and beside
            the file are searched for one that does.

    Raises:
        WeightsMismatchError: naming the file, its epochs, both hashes and the right checkpoint, if it is near.
        StoreError: if the file has no hash.
    """
    epochs = [store.segment(number) for number in store.segments]
    by_hash = {segment.attributes.get("weights_hash_end"): segment for segment in [*epochs, store]}
    expected = [key for key in by_hash if isinstance(key, str)]
    if not expected:
        raise StoreError(f"{store.path} has no attribute 'weights_hash_end'; capture again.")
    found = weights_hash(model)
    if found in expected:
        return by_hash[found]
    raise WeightsMismatchError(
        f"The model's weights are not those of {store.path}: expected "
        f"{_listed([by_hash[key] for key in expected])}; found {found[:16]}…. "
        + " ".join(_advice(model, expected, store.path, checkpoint))
    )


def _listed(segments: list[StoreReader]) -> str:
    """The last three segments' weights, in words."""
    texts = [
        f"SHA-256 {str(facts['weights_hash_end'])[:16]}…, the weights at the end of epoch "
        f"{facts.get('epoch', '?')} (step {facts.get('step_end', '?')})"
        for facts in (segment.attributes for segment in segments[-3:])
    ]
    earlier = f", or {len(segments) - 3} earlier ones" if len(segments) > 3 else ""
    return ", or ".join(reversed(texts)) + earlier


def _advice(model: nn.Module, expected: Collection[str], store: Path, checkpoint: Path | None) -> list[str]:
    """Why a checkpoint has other weights, which one to load instead, and what else to do."""
    names = [name for name, _ in model.named_parameters()]
    given = {} if checkpoint is None else _loaded(checkpoint)
    if _hash_of(given.get("state_dict"), names) in expected:
        return [
            f"{checkpoint} has them, but {type(model).__name__} changed them as it loaded them: look at its dtype "
            "and its `on_load_checkpoint`."
        ]
    sentences = []
    if any(state.get("status") != "complete" for state in _states(given)):
        sentences.append("The checkpoint was saved before capture was complete.")
    if _is_of_averages(given):
        sentences.append("Its run averages weights, which replaces those that were trained.")
    paths = [*([] if checkpoint is None else [checkpoint]), *_checkpoints_near(store, checkpoint)]
    found = next((text for path in paths if (text := _what_to_load(path, names, expected))), None)
    return [
        *sentences,
        found or _NOT_FOUND,
        "For the weights that you have, make a file with `capture(model, loader, path)`, or train with "
        '`InfluenceCallback(rows="final")`.',
    ]


def _what_to_load(path: Path, names: Collection[str], expected: Collection[str]) -> str | None:
    """What to do with a checkpoint; None if it has other weights."""
    loaded = _loaded(path)
    if _hash_of(loaded.get("state_dict"), names) in expected:
        return f"Load {path}, which has them."
    if _hash_of(loaded.get(_TRAINED_KEY), names) in expected:
        return (
            f"{path} has them beside their average: load its `{_TRAINED_KEY}` into the model, and use "
            "`InfluenceModule.attach`."
        )
    return None


def _is_of_averages(checkpoint: Mapping[str, Any]) -> bool:
    """Whether Lightning's `WeightAveraging` or `StochasticWeightAveraging` had a part in it."""
    callbacks = checkpoint.get("callbacks")
    names = callbacks if isinstance(callbacks, Mapping) else ()
    return "averaging_state" in checkpoint or any("WeightAveraging" in str(name) for name in names)


def _checkpoints_near(store: Path, checkpoint: Path | None) -> list[Path]:
    """Others in the checkpoint's folder and near the file, the latest first."""
    folders = [store.absolute().parent, store.absolute().parent / "checkpoints"]
    if checkpoint is not None:
        folders.append(checkpoint.absolute().parent)
    try:
        paths = {path for folder in folders for path in folder.glob("*.ckpt") if path.is_file()}
        paths -= set() if checkpoint is None else {checkpoint.absolute()}
        return sorted(paths, key=lambda path: path.stat().st_mtime_ns, reverse=True)[:_MOST_SEARCHED]
    except OSError:  # a run that goes on may replace them meanwhile
        return []


def _loaded(path: Path) -> Mapping[str, Any]:
    """What is in a checkpoint; nothing if it cannot be read."""
    try:
        loaded = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except Exception:  # whatever is wrong with it: a hint must not hide the error that it belongs to
        return {}
    return loaded if isinstance(loaded, Mapping) else {}


def _hash_of(state: Any, names: Collection[str]) -> str | None:
    """Of the parameters among a `state_dict`; None if it is of another model."""
    try:
        return parameters_hash({name: state[name] for name in names})
    except (KeyError, TypeError, AttributeError, RuntimeError):
        return None
