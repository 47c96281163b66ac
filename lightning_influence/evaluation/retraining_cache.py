"""What became of models that were trained on subsets, in a file that grows while they are.

Format: an `.npz` without pickles; `identity`, a JSON object of strings that says what was trained; `probe`, what
untrained models say; and one entry a model: `subsets` uint8 [r, ceil(N / 8)] (bits), `seeds` int64 [r], `outputs`
[r, q]. It is replaced as a whole, so it is whole whenever the process ends; of two that write at a time, the last
one wins.

Entries are found by their subset and seed, so more subsets and seeds can be asked for later. A file of another
model, recipe, measure or data set is refused, as far as it can be told: by their descriptions, by the data, and by
what untrained models say, which also shows a change inside a function.
"""

from __future__ import annotations

import json
import os
import time
import zipfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

SECONDS_BETWEEN_WRITES = 2.0
Key = tuple[bytes, int]


class RetrainingCache:
    """Outputs by subset and seed; use it as a context, at whose end they are written.

    Args:
        path: of the file; None keeps them in memory alone.
        identity: what is trained, by names of its parts.
        probe: what untrained models say, [p]; equal to 1e-3, as machines round differently.

    Raises:
        ValueError: if the file cannot be read, or holds other trainings.
    """

    def __init__(self, path: str | os.PathLike[str] | None, identity: Mapping[str, str], probe: Tensor) -> None:
        self._path = None if path is None else Path(path)
        self._identity, self._probe = dict(identity), probe.double().numpy()
        self._outputs: dict[Key, np.ndarray] = {}
        self._is_written, self._last_write = True, time.monotonic()
        if self._path is not None and self._path.exists():
            self._read(self._path)

    def __enter__(self) -> RetrainingCache:
        return self

    def __exit__(self, *exception: object) -> None:
        if not self._is_written:
            self._write()

    def __len__(self) -> int:
        return len(self._outputs)

    def get(self, mask: Tensor, seed: int) -> Tensor | None:
        """The outputs [q] of the model that was trained on the mask's examples [N], if it was."""
        found = self._outputs.get(_key(mask, seed))
        return None if found is None else torch.from_numpy(found)

    def put(self, mask: Tensor, seed: int, outputs: Tensor) -> None:
        """Keep a model's outputs [q]; every few seconds all of them are written."""
        self._outputs[_key(mask, seed)] = outputs.numpy()
        self._is_written = False
        if time.monotonic() - self._last_write > SECONDS_BETWEEN_WRITES:
            self._write()

    def _write(self) -> None:
        self._is_written, self._last_write = True, time.monotonic()
        if self._path is None or not self._outputs:
            return
        self._path.parent.mkdir(parents=True, exist_ok=True)
        part = self._path.with_name(f"{self._path.name}.{os.getpid()}.partial")
        with part.open("wb") as file:
            np.savez(
                file,
                identity=np.array(json.dumps(self._identity)),
                probe=self._probe,
                subsets=np.stack([np.frombuffer(bits, np.uint8) for bits, _ in self._outputs]),
                seeds=np.array([seed for _, seed in self._outputs], np.int64),
                outputs=np.stack(list(self._outputs.values())),
            )
            file.flush()
            os.fsync(file.fileno())
        part.replace(self._path)

    def _read(self, path: Path) -> None:
        try:
            with np.load(path, allow_pickle=False) as file:
                found = {name: file[name] for name in ("identity", "probe", "subsets", "seeds", "outputs")}
            identity = json.loads(str(found["identity"]))
            rows = len(found["seeds"])
            if len(found["subsets"]) != rows or len(found["outputs"]) != rows:
                raise ValueError("its arrays do not fit together")
        except (OSError, KeyError, ValueError, EOFError, zipfile.BadZipFile) as error:
            raise ValueError(
                f"`cache`: {path} cannot be read as a file of retrainings: {error}. Delete it, or pass another."
            ) from error
        self._refuse_others(path, identity, found["probe"])
        for bits, seed, outputs in zip(found["subsets"], found["seeds"], found["outputs"], strict=True):
            self._outputs[bits.tobytes(), int(seed)] = outputs

    def _refuse_others(self, path: Path, identity: dict[str, str], probe: np.ndarray) -> None:
        names = sorted({*identity, *self._identity})
        other = [
            f"{name} ({_short(identity.get(name))} in the file, {_short(self._identity.get(name))} asked for)"
            for name in names
            if identity.get(name) != self._identity.get(name)
        ]
        if not other and (probe.shape != self._probe.shape or not np.allclose(probe, self._probe, 1e-3, 1e-3)):
            other = ["what untrained models say (the measure, its queries, the loss or the first weights)"]
        if other:
            raise ValueError(
                f"`cache`: {path} holds retrainings of something else; these differ: {'; '.join(other)}. "
                "Delete it, or pass another path."
            )


def _key(mask: Tensor, seed: int) -> Key:
    return np.packbits(mask.numpy()).tobytes(), seed


def _short(text: str | None) -> str:
    return "none" if text is None else " ".join(text.split())[:80]
