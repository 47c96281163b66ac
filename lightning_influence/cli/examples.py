"""Which training examples a command is about, and their self-influence."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_influence.cli.progress import progress
from lightning_influence.curvature import RowCurvature
from lightning_influence.query import InfluenceQuery
from lightning_influence.store import StoreReader

STEPS = 20  # of a progress bar
HELP = "the training examples to ask about: dataset indices and ranges without their ends, such as 0:100,205"


def subset_of(text: str, num_examples: int) -> np.ndarray:
    """Dataset indices of a text, in its order.

    Raises:
        ValueError: if it is none, or an index is out of range or named twice.

    Example:
        >>> subset_of("2:4,9", 10).tolist()
        [2, 3, 9]
    """
    try:
        parts = [[int(number) for number in part.split(":")] for part in text.split(",")]
        indices = np.concatenate([np.arange(*part) if len(part) > 1 else np.array(part) for part in parts])
    except (ValueError, TypeError) as error:
        raise ValueError(f"`--subset` must be indices and ranges such as 0:100,205, got {text!r}.") from error
    if not len(indices) or indices.min() < 0 or indices.max() >= num_examples:
        raise ValueError(f"`--subset {text}` must name examples from 0 to {num_examples - 1}.")
    if len(np.unique(indices)) < len(indices):
        raise ValueError(f"`--subset {text}` names an example twice; name each once.")
    return indices


def self_influence_of(store: StoreReader, asked: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """Self-influence of the examples that are asked about, with a progress bar in a terminal.

    Args:
        store: the file.
        asked: options of `InfluenceQuery.self_influence`.

    Returns:
        Dataset indices and values, [n] each.
    """
    query, options = InfluenceQuery(store), dict(asked)
    subset = options.pop("subset", None)
    examples = np.arange(store.num_examples) if subset is None else subset
    if isinstance(options["curvature"], RowCurvature):  # which needs all rows at once
        return torch.from_numpy(examples), query.self_influence(**options, subset=examples)
    parts = np.array_split(examples, min(STEPS, len(examples)))
    found = [query.self_influence(**options, subset=part) for part in progress(parts, desc="self-influence")]
    return torch.from_numpy(examples), torch.cat(found)
