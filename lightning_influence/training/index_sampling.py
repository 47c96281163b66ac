"""What one loader's sampler has drawn for batches that are still to come.

The loader's batch sampler is wrapped (its sampler, if `batch_size=None`). The wrapper hands on what
it is given, draws no random number, and keeps a copy of the indices in a queue.

Lightning may open several passes over a loader and abandon some, as with
`reload_dataloaders_every_n_epochs`, or start a short loader anew beside a longer one. Passes are
held weakly: the one that is still alive when a batch arrives is the one the batch came from.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any, NamedTuple
from weakref import WeakSet

from torch.utils.data import DataLoader, IterableDataset

from lightning_influence.errors import RowIndexError
from lightning_influence.training.index_padding import find_padding

FIX = (
    "pass `index_fn=`, a function from a batch to one dataset index per row, or `index_key=`, "
    "the key under which the batch holds them"
)
_MISSING = object()


class Drawn(NamedTuple):
    """What a sampler drew for one batch, and how many rows it had drawn before in this pass."""

    indices: Any
    num_rows: int
    first: int


class Pass(Iterator[Any]):
    """One iteration of a sampler: hands on what it draws and queues it until its batch arrives."""

    def __init__(self, iterator: Iterator[Any]) -> None:
        self._iterator = iterator
        self._num_rows = 0
        self.drawn: deque[Drawn] = deque()
        self.is_exhausted = False

    def __next__(self) -> Any:
        try:
            indices = next(self._iterator)
        except StopIteration:
            self.is_exhausted = True
            raise
        # A batch sampler may refill the list that it yields.
        kept = list(indices) if isinstance(indices, list) else indices
        num_rows = _num_rows(indices)
        self.drawn.append(Drawn(kept, num_rows, self._num_rows))
        self._num_rows += num_rows
        return indices

    def take(self, skipped: int) -> Drawn | None:
        """Take the next batch's indices out, after those of batches that were skipped; None if there are none."""
        for _ in range(min(skipped, len(self.drawn))):
            self.drawn.popleft()
        return self.drawn.popleft() if self.drawn else None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._iterator, name)


class _RecordingSampler:
    """A sampler's stand-in that behaves as the sampler does: isinstance, len, get, set, pickle."""

    __slots__ = ("_is_recording", "_original", "_passes")

    def __init__(self, original: Any, is_recording: Callable[[], bool]) -> None:
        object.__setattr__(self, "_original", original)
        object.__setattr__(self, "_is_recording", is_recording)
        object.__setattr__(self, "_passes", WeakSet())

    def __iter__(self) -> Iterator[Any]:
        iterator = iter(self._original)
        if not self._is_recording():  # validation on the same loader object
            return iterator
        opened = Pass(iterator)
        self._passes.add(opened)
        return opened

    def __len__(self) -> int:
        return len(self._original)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._original, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._original, name, value)

    @property  # type: ignore[misc]
    def __class__(self) -> type:  # isinstance(loader.batch_sampler, TheirSampler)
        return self._original.__class__

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        # A dataset may refer to its loader, and spawned workers are sent the dataset.
        return _itself, (self._original,)


class LoaderRecording:
    """Records what one loader's sampler draws, until it is closed.

    Args:
        loader: Of a map-style dataset.
        is_recording: Whether an iteration that begins now is one of training.

    Attributes:
        padding: Which of the rows are padding; None if none are.
    """

    def __init__(self, loader: DataLoader, is_recording: Callable[[], bool]) -> None:
        self._patches = ExitStack()
        name = "sampler" if loader.batch_sampler is None else "batch_sampler"
        original = getattr(loader, name)
        self.padding = find_padding(original)
        self._sampler = _RecordingSampler(original, is_recording)
        # Through vars(), because DataLoader.__setattr__ forbids it.
        replace(vars(loader), name, self._sampler, self._patches)
        # Persistent workers started before `fit` keep the sampler of their first iteration.
        if (workers := getattr(loader, "_iterator", None)) is not None:
            replace(vars(workers), "_index_sampler", self._sampler, self._patches)

    @property
    def passes(self) -> list[Pass]:
        """The iterations that are alive."""
        return list(self._sampler._passes)

    def current(self, skipped: int) -> Pass:
        """The iteration that the next batch comes from, after so many that were skipped.

        Raises:
            RowIndexError: The indices of that batch were not recorded.
        """
        passes = self.passes
        if len(passes) > 1:
            raise RowIndexError(
                f"The training dataloader is being iterated {len(passes)} times at once, so which "
                "iterator made this batch is unknown; let go of iterators over "
                f"`trainer.train_dataloader`, or {FIX}."
            )
        if passes and skipped >= 0 and (skipped < len(passes[0].drawn) or passes[0].is_exhausted):
            return passes[0]
        raise RowIndexError(f"The dataloader's iterator does not ask its sampler, or was made too early; {FIX}.")

    def skip_rest(self) -> None:
        """Forget what was drawn and keep no more of it, in the passes that are open."""
        for current in self.passes:
            current.drawn = deque(maxlen=0)

    def close(self) -> None:
        """Put the loader's sampler back."""
        self._patches.close()
        self.skip_rest()  # a live iterator keeps its pass: let it forget


def check_recordable(loader: object) -> None:
    """Refuse loaders whose sampler does not say what is in a batch.

    Raises:
        RowIndexError: With the reason and the way out.
    """
    if not isinstance(loader, DataLoader):
        raise RowIndexError(f"Row indices need a torch `DataLoader`, found {type(loader).__name__}; {FIX}.")
    if isinstance(loader.dataset, IterableDataset):
        raise RowIndexError(
            f"{type(loader.dataset).__name__} is an IterableDataset, whose rows have no index; "
            f"use a map-style dataset, or {FIX}."
        )
    # Older torch has no `in_order` and always keeps the order.
    if loader.num_workers > 0 and not getattr(loader, "in_order", True):
        raise RowIndexError(
            "`DataLoader(in_order=False)` returns batches in another order than it asks for "
            f"them; set `in_order=True`, or {FIX}."
        )


def replace(attributes: dict[str, Any], name: str, new: Any, patches: ExitStack) -> None:
    """Set an entry until `patches` is closed, unless someone else has set it by then."""
    old = attributes.get(name, _MISSING)

    def undo() -> None:
        if attributes.get(name) is new:
            del attributes[name]
            if old is not _MISSING:
                attributes[name] = old

    attributes[name] = new
    patches.callback(undo)


def _itself(sampler: Any) -> Any:
    return sampler


def _num_rows(indices: Any) -> int:
    try:
        return len(indices)
    except TypeError:  # one bare index, with `batch_size=None`
        return 1
