"""What a file says of each layer's training, as penalties on its weights in the units of its rows."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from lightning_influence.errors import CorruptStoreError
from lightning_influence.store import StoreReader

DOCUMENT = "penalties"


class Penalties(NamedTuple):
    """Of one layer; NaN where one is not known.

    Args:
        decay: l of the penalty l/2 |weights|^2 on each example that acts as the weight decay did.
        stopping: likewise, of the penalty on the way from the first weights that acts as training's end did.
        note: why one may not be known, and what to do.
    """

    decay: float
    stopping: float
    note: str


def read_penalties(store: StoreReader, layers: Iterable[str]) -> dict[str, Penalties]:
    """By layer.

    Raises:
        CorruptStoreError: if what the file says of them cannot be read.
    """
    try:
        described = store.document(DOCUMENT)
    except ValueError:  # of an older version, of `capture` or of final rows
        why = f"{store.path} does not say how its layers were trained; capture in training with this version"
        return dict.fromkeys(layers, Penalties(math.nan, math.nan, _advice(why)))
    try:
        return {name: _read(store, described["layers"].get(name, {})) for name in layers}
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise CorruptStoreError(
            f"{store.path}: the document {DOCUMENT!r} cannot be read: {type(error).__name__}: {error}. Restore a "
            "copy or capture again."
        ) from error


def _read(store: StoreReader, entry: Mapping[str, Any]) -> Penalties:
    optimizer = entry.get("optimizer", "no optimizer")
    why = (
        f"{store.path} was captured with {optimizer}, and it is known of SGD, Adam and AdamW only, in a run that "
        "was not resumed, whose steps Lightning sees and whose layers share a loss; train and capture so"
    )
    return Penalties(_number(entry.get("decay")), _number(entry.get("stopping")), _advice(why))


def _number(value: float | None) -> float:
    if value is None:
        return math.nan
    if isinstance(value, bool) or not 0 <= float(value) < math.inf:
        raise ValueError(f"a penalty must be >= 0 and finite, found {value!r}")
    return float(value)


def _advice(why: str) -> str:
    return f"{why}, or pass HeuristicDamping() or a number."
