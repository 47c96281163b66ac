"""The dataset of a run with several training dataloaders: their datasets, one after the other.

The order is that of `CombinedLoader(...).flattened`, depth first. Datasets are not compared: the
same one in two loaders stands there twice.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from lightning.pytorch.utilities import CombinedLoader

from lightning_influence.errors import RowIndexError


class DatasetRange(NamedTuple):
    """The indices of one loader's dataset.

    Attributes:
        name: The loader's place in the collection, such as `labeled` or `0/images`; empty for a
            loader that stands alone.
        offset: Index of its first example.
        length: Number of its examples; None only for the one dataset of a run, whose length nobody said.
    """

    name: str
    offset: int
    length: int | None


class PlacedLoader(NamedTuple):
    """A loader and the keys that lead to it, and from a batch to its part of it."""

    path: tuple[Any, ...]
    loader: Any

    @property
    def name(self) -> str:
        """The keys, joined."""
        return "/".join(map(str, self.path))

    def part(self, batch: Any) -> Any:
        """This loader's part of a batch; None once the loader is exhausted.

        Raises:
            RowIndexError: The batch has another structure than the loaders.
        """
        for key in self.path:
            try:
                batch = batch[key]
            except (KeyError, IndexError, TypeError) as err:
                raise RowIndexError(
                    f"The batch has no part {self.name!r}, as the training dataloaders have, but is a "
                    f"{type(batch).__name__}; leave their structure to batches in `on_before_batch_transfer` "
                    "and the like."
                ) from err
        return batch


def place_loaders(collection: Any) -> list[PlacedLoader]:
    """Find the loaders in what Lightning was given, in Lightning's order.

    Raises:
        RowIndexError: The collection is of a kind whose keys are unknown, or has a loader twice.
    """
    flattened = CombinedLoader(collection).flattened
    ids = [id(loader) for loader in flattened]
    placed = list(_walk(collection, (), set(ids)))
    if [id(each.loader) for each in placed] != ids:
        raise RowIndexError(
            "Training dataloaders must be nested in lists, tuples and dicts for their rows to be told, "
            f"found {type(collection).__name__}."
        )
    if len(set(ids)) < len(ids):
        raise RowIndexError("A training dataloader is there twice; make two, so that their batches can be told.")
    return placed


def lay_out(loaders: Sequence[PlacedLoader], num_examples: int | None) -> tuple[DatasetRange, ...]:
    """Give each loader's dataset its range of indices.

    Args:
        loaders: In order.
        num_examples: What the user said, for all of them together. It makes up for one dataset
            without a length; the length of a dataset that stands alone may be smaller.

    Raises:
        RowIndexError: A range has no end, or the user's number does not fit.
    """
    lengths = [_length(each.loader) for each in loaders]
    known = sum(length or 0 for length in lengths)
    unknown = [place for place, length in enumerate(lengths) if length is None]
    if len(unknown) > 1 or (unknown and len(loaders) > 1 and num_examples is None):
        raise RowIndexError(
            f"The datasets of the loaders {', '.join(repr(loaders[place].name) for place in unknown)} have no "
            "length, so the ranges of indices of several datasets have no bounds; give each a `__len__`, "
            "or one of them by `num_examples=` of all together."
        )
    if num_examples is not None:
        if num_examples < known or (num_examples > known and not unknown and len(loaders) > 1):
            raise RowIndexError(
                f"`num_examples` is {num_examples}, but the training datasets have {known} examples; "
                "leave it out, or correct it."
            )
        if len(loaders) == 1:
            unknown, known = [0], 0
        for place in unknown:
            lengths[place] = num_examples - known
    ranges, offset = [], 0
    for each, length in zip(loaders, lengths, strict=True):
        ranges.append(DatasetRange(each.name, offset, length))
        offset += length or 0
    return tuple(ranges)


def _walk(node: Any, path: tuple[Any, ...], leaves: set[int]) -> Iterator[PlacedLoader]:
    if id(node) in leaves or not isinstance(node, dict | list | tuple | deque):
        yield PlacedLoader(path, node)
        return
    for key, child in node.items() if isinstance(node, dict) else enumerate(node):
        yield from _walk(child, (*path, key), leaves)


def _length(loader: Any) -> int | None:
    try:
        return len(loader.dataset)
    except (AttributeError, TypeError, NotImplementedError):
        return None
