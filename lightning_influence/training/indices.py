"""Which dataset index each row of a training batch has.

A `DataLoader` does not say which examples it put into a batch, and by `on_train_start` its workers
have already been sent the first ones. So the loader's batch sampler is wrapped (its sampler, if
`batch_size=None`) in `strategy.process_dataloader`, the one call that Lightning makes for every
loader after it has injected a distributed sampler and before it asks for an iterator. The wrapper
hands on what it is given, draws no random number, and keeps a copy of the indices in a queue.

Lightning may open several passes over a loader and abandon some, as with
`reload_dataloaders_every_n_epochs`. Passes are held weakly: the one that is still alive when a
batch arrives is the one the batch came from.

Indices are those of `DataLoader.dataset`: for a `Subset`, positions in the subset.
"""

import inspect
import reprlib
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from typing import Any
from weakref import WeakSet

import numpy as np
from lightning.pytorch import Trainer
from lightning.pytorch.utilities import CombinedLoader
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from lightning_influence.errors import RowIndexError

_FIX = "pass `index_fn=`, a function from a batch to one dataset index per row"
_MISSING = object()


class _Pass(Iterator[Any]):
    """One iteration of a sampler: hands on what it draws and queues it until its batch arrives."""

    def __init__(self, iterator: Iterator[Any]) -> None:
        self._iterator = iterator
        self.drawn: deque[Any] = deque()

    def __next__(self) -> Any:
        indices = next(self._iterator)
        # A batch sampler may refill the list that it yields.
        self.drawn.append(list(indices) if isinstance(indices, list) else indices)
        return indices

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
        opened = _Pass(iterator)
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
        return type(self._original)

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        # A dataset may refer to its loader, and spawned workers are sent the dataset.
        return _itself, (self._original,)


class IndexRecorder:
    """Tells the dataset index of every row of every training batch.

    Call `install` in `setup("fit")`, `start_epoch` in `on_train_epoch_start`, `next_batch` in every
    `on_train_batch_start` (or `skip_rest` once, for the rest of an epoch), and `uninstall` in
    `teardown` and in `on_exception`. Training sees the same batches in the same order and the same
    random numbers as without it.

    Args:
        index_fn: A function from a batch, as `training_step` gets it, to one dataset index per row.
            Replaces recording, for data whose indices no sampler knows.

    Attributes:
        num_examples: `len` of the training loader's dataset; None before the loader was made, and
            for a dataset without a length.
    """

    def __init__(self, index_fn: Callable[[Any], Sequence[int] | Tensor] | None = None) -> None:
        self.num_examples: int | None = None
        self._index_fn = index_fn
        self._trainer: Trainer | None = None
        self._recording: _RecordingSampler | None = None
        self._next_batch_idx: int | None = None
        self._problem: str | None = None  # None: not looked for yet; empty: none found
        self._patches = ExitStack()
        self._loader_patches = ExitStack()

    def install(self, trainer: Trainer) -> None:
        """Watch the training loaders that `trainer` is about to make."""
        self.uninstall()
        self._trainer, self._problem, self.num_examples = trainer, None, None
        self._next_batch_idx = None
        original = trainer.strategy.process_dataloader
        patches = self._patches

        def is_recording() -> bool:  # not validating, and not uninstalled since
            return trainer.training and self._patches is patches

        def process_dataloader(dataloader: object) -> object:
            processed = original(dataloader)
            if is_recording():
                self._watch(processed, is_recording)
            return processed

        attributes = vars(trainer.strategy)
        _replace(attributes, "process_dataloader", process_dataloader, patches)

    def uninstall(self) -> None:
        """Put everything back; may be called at any time and more than once."""
        self._unwatch()
        self._patches.close()
        self._patches, self._trainer = ExitStack(), None

    def start_epoch(self) -> None:
        """Expect batch 0 next.

        Lightning skips `on_train_epoch_start` when it resumes in the middle of an epoch; the first
        batch may then have any number.
        """
        self._next_batch_idx = 0

    def next_batch(self, batch: Any, batch_idx: int) -> np.ndarray:
        """Return the dataset index of each row of `batch`.

        Args:
            batch: The batch, looked at by `index_fn` only.
            batch_idx: Its number in the epoch, as Lightning counts.

        Returns:
            Shape [n], int64, each in `0..num_examples - 1`; a sampler may repeat an index. That n
            is the number of rows is for the caller to check.

        Raises:
            RowIndexError: The indices cannot be known. Training is not harmed.
        """
        if self._problem is None:
            self._problem = self._find_problem()
        if self._problem:
            raise RowIndexError(self._problem)
        if self._index_fn is None:
            return _to_indices(self._pop(batch_idx), "The sampler", self.num_examples)
        try:
            found = self._index_fn(batch)
        except Exception as err:  # user code: whatever it raises must not end the run
            raise RowIndexError(f"`index_fn` raised {type(err).__name__}: {err}") from err
        return _to_indices(found, "`index_fn`", self.num_examples)

    def skip_rest(self) -> None:
        """Keep no more indices of this epoch: `next_batch` will be called again in the next one."""
        for current in self._recording._passes if self._recording is not None else ():
            current.drawn = deque(maxlen=0)

    def _watch(self, loader: object, is_recording: Callable[[], bool]) -> None:
        self._unwatch()  # an earlier loader is done with, or is one of several, which is refused
        self._problem, self.num_examples = None, _length(getattr(loader, "dataset", None))
        if self._index_fn is not None or not isinstance(loader, DataLoader):
            return
        name = "sampler" if loader.batch_sampler is None else "batch_sampler"
        self._recording = _RecordingSampler(getattr(loader, name), is_recording)
        # Through vars(), because DataLoader.__setattr__ forbids it.
        _replace(vars(loader), name, self._recording, self._loader_patches)
        # Persistent workers started before `fit` keep the sampler of their first iteration.
        if (workers := getattr(loader, "_iterator", None)) is not None:
            _replace(vars(workers), "_index_sampler", self._recording, self._loader_patches)

    def _unwatch(self) -> None:
        self._loader_patches.close()
        for left in self._recording._passes if self._recording is not None else ():
            left.drawn = deque(maxlen=0)  # a live iterator keeps its pass: let it forget
        self._recording = None

    def _pop(self, batch_idx: int) -> Any:
        passes = list(self._recording._passes) if self._recording is not None else []
        if len(passes) > 1:
            raise RowIndexError(
                f"The training dataloader is being iterated {len(passes)} times at once, so which "
                "iterator made this batch is unknown; let go of iterators over "
                f"`trainer.train_dataloader`, or {_FIX}."
            )
        expected = batch_idx if self._next_batch_idx is None else self._next_batch_idx
        self._next_batch_idx = batch_idx + 1
        skipped = batch_idx - expected  # Lightning counts a batch that is None, but calls no hook
        if not passes or not 0 <= skipped < len(passes[0].drawn):
            raise RowIndexError(
                f"No indices are recorded for batch {batch_idx} (batch {expected} comes next): the "
                f"dataloader's iterator does not ask its sampler, or was made too early; {_FIX}."
            )
        for _ in range(skipped):
            passes[0].drawn.popleft()
        return passes[0].drawn.popleft()

    def _find_problem(self) -> str:
        """Say why the rows of this run have no indices; empty if they have."""
        trainer = self._trainer
        if trainer is None:
            return "`next_batch` works between `install` and `uninstall` only."
        training_step = inspect.signature(trainer.lightning_module.training_step)
        if "dataloader_iter" in training_step.parameters:
            return (
                "`training_step(dataloader_iter)` fetches its own batches, so their indices are "
                "unknown; write `training_step(batch, batch_idx)`."
            )
        loaders = CombinedLoader(trainer.train_dataloader).flattened
        if len(loaders) != 1:
            return (
                f"Row indices need one training dataloader, found {len(loaders)}; join the "
                "datasets with `torch.utils.data.ConcatDataset`."
            )
        loader = loaders[0]
        if self._index_fn is not None:
            return ""
        if not isinstance(loader, DataLoader):
            return f"Row indices need a torch `DataLoader`, found {type(loader).__name__}; {_FIX}."
        if isinstance(loader.dataset, IterableDataset):
            return (
                f"{type(loader.dataset).__name__} is an IterableDataset, whose rows have no index; "
                f"use a map-style dataset, or {_FIX}."
            )
        # Older torch has no `in_order` and always keeps the order.
        if loader.num_workers > 0 and not getattr(loader, "in_order", True):
            return (
                "`DataLoader(in_order=False)` returns batches in another order than it asks for "
                f"them; set `in_order=True`, or {_FIX}."
            )
        return ""


def _itself(sampler: Any) -> Any:
    return sampler


def _replace(attributes: dict[str, Any], name: str, new: Any, patches: ExitStack) -> None:
    """Set an entry until `patches` is closed, unless someone else has set it by then."""
    old = attributes.get(name, _MISSING)

    def undo() -> None:
        if attributes.get(name) is new:
            del attributes[name]
            if old is not _MISSING:
                attributes[name] = old

    attributes[name] = new
    patches.callback(undo)


def _length(dataset: Any) -> int | None:
    try:
        return len(dataset)
    except (TypeError, NotImplementedError):
        return None


def _to_indices(found: Any, source: str, num_examples: int | None) -> np.ndarray:
    """Check and convert to int64 [n]; with `batch_size=None` a sampler gives one bare index."""
    try:
        indices = np.atleast_1d(found.cpu() if isinstance(found, Tensor) else found)
    except (TypeError, ValueError, RuntimeError):  # ragged, or not convertible
        indices = np.empty(0, dtype=object)
    if indices.ndim != 1 or indices.dtype.kind not in "iu":
        raise RowIndexError(
            f"{source} must give one integer index per row, got {type(found).__name__} "
            f"{reprlib.repr(found)}; {_FIX}."
        )
    limit = np.inf if num_examples is None else num_examples
    outside = indices[(indices < 0) | (indices >= limit)]
    if outside.size:
        raise RowIndexError(
            f"{source} must give indices from 0 and below the dataset's length {limit}, got {outside[0]}; {_FIX}."
        )
    return indices.astype(np.int64)
