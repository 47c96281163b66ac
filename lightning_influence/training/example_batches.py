"""A training loader's batches outside of training, each with the dataset indices of its rows.

A loader's own order is of no use then: shuffling, sampling with replacement and dropped last batches are
for training. So a loader over a map-style dataset is replaced by one that visits each example once, with
the same batch size, collation and workers. The order is random, with a fixed seed, because the first
examples decide which coordinates rows keep, and datasets are often sorted by class.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import Any

import numpy as np
import torch
from lightning.fabric.utilities import move_data_to_device
from lightning.pytorch import LightningModule
from torch import nn
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    WeightedRandomSampler,
)

from lightning_influence.errors import RowIndexError
from lightning_influence.training.index_lookup import to_indices
from lightning_influence.training.indices import NO_ROW
from lightning_influence.training.options import IndexFn

DEFAULT_BATCH_SIZE = 32  # where a batch sampler of one's own does not say


class ExampleBatches:
    """Pairs of (dataset indices int64 [n], batch as `training_step` takes it), anew at each iteration.

    Args:
        loader: for training.
        model: to whose device, and by whose hooks, batches are moved.
        index_fn: from a batch to the dataset index of each row; the loader is then iterated as it is.
        num_examples: length of the dataset, where it does not say.
        wanted: indices of the examples to visit; None takes those that the loader's sampler can draw. With
            `index_fn` the others have index -1, and batches without a wanted example are left out.

    Raises:
        RowIndexError: if the indices of the rows cannot be known.
        TypeError: if the loader can be iterated only once.
    """

    def __init__(
        self,
        loader: Iterable[Any],
        model: nn.Module,
        *,
        index_fn: IndexFn | None = None,
        num_examples: int | None = None,
        wanted: np.ndarray | None = None,
    ) -> None:
        if isinstance(loader, Iterator):
            raise TypeError(f"`loader` must be iterable more than once, got the iterator {type(loader).__name__}.")
        self._model, self._index_fn, self._wanted = model, index_fn, wanted
        self._loader = loader
        self._chunks: list[np.ndarray] | None = None
        given = _map_style(loader) if index_fn is None else None
        self.num_examples = _num_examples(loader, num_examples)
        if given is not None:
            self._chunks = _chunks(given, drawn_by_sampler(given, self.num_examples) if wanted is None else wanted)
            self._loader = _own_loader(given, self._chunks)

    def __iter__(self) -> Iterator[tuple[np.ndarray, Any]]:
        if self._chunks is not None:
            for indices, batch in zip(self._chunks, self._loader, strict=True):
                yield indices, moved(self._model, batch)
            return
        assert self._index_fn is not None
        with _kept_generators(self._loader):
            for batch in self._loader:
                batch = moved(self._model, batch)
                indices = to_indices(self._index_fn(batch), "`index_fn`", self.num_examples)
                if self._wanted is not None:
                    indices = np.where(np.isin(indices, self._wanted), indices, NO_ROW)
                if (indices != NO_ROW).any():
                    yield indices, batch

    def __len__(self) -> int:
        """Number of batches.

        Raises:
            TypeError: if it is not known, as with `index_fn`.
        """
        if self._chunks is None:
            raise TypeError("The number of batches is not known.")
        return len(self._chunks)


def moved(model: nn.Module, batch: Any) -> Any:
    """The batch as `training_step` gets it: through the model's (or data module's) hooks, in eval mode."""
    if not isinstance(model, LightningModule):
        return move_data_to_device(batch, next(model.parameters()).device)
    with _evaluating(model):
        if model._trainer is not None:
            batch = model._trainer.precision_plugin.convert_input(batch)
        batch = model._on_before_batch_transfer(batch)
        return model._apply_batch_transfer_handler(batch)


def drawn_by_sampler(loader: DataLoader, num_examples: int) -> np.ndarray:
    """The indices that the loader's sampler can draw, ascending.

    Of samplers that are not torch's own, those that they draw in one iteration.
    """
    source: Any = loader.sampler if loader.batch_sampler is None else loader.batch_sampler
    if type(source) is BatchSampler:
        source = source.sampler
    if type(source) is DistributedSampler:
        return np.arange(num_examples)
    if type(source) is RandomSampler:
        return np.arange(len(source.data_source))
    if type(source) is WeightedRandomSampler:
        return np.flatnonzero(np.asarray(source.weights) > 0)
    with _kept_generators(loader, source):
        draws = [to_indices(drawn, "The sampler", num_examples) for drawn in islice(source, num_examples)]
    if not draws:
        raise RowIndexError(f"The sampler {type(source).__name__} draws no index; pass a loader with examples.")
    return np.unique(np.concatenate(draws))


def _map_style(loader: Iterable[Any]) -> DataLoader:
    fix = "pass `index_fn=`, a function from a batch to one dataset index per row"
    if not isinstance(loader, DataLoader):
        raise RowIndexError(f"Row indices need a torch `DataLoader`, got {type(loader).__name__}; {fix}.")
    if isinstance(loader.dataset, IterableDataset):
        raise RowIndexError(
            f"{type(loader.dataset).__name__} is an IterableDataset, whose rows have no index; {fix}."
        )
    if type(loader).__iter__ is not DataLoader.__iter__:
        raise RowIndexError(
            f"{type(loader).__name__} makes batches by its own `__iter__`, so they cannot be made in another "
            f"order; {fix}."
        )
    return loader


def _num_examples(loader: Iterable[Any], given: int | None) -> int:
    try:
        found = len(loader.dataset)  # type: ignore[attr-defined]
    except (AttributeError, TypeError, NotImplementedError):
        found = 0
    if not found and given is None:
        raise RowIndexError(
            f"The dataset of {type(loader).__name__} has no length, so its rows have no place; give it a "
            "`__len__`, or pass `num_examples=`."
        )
    if given is not None and given < max(found, 1):
        raise ValueError(f"`num_examples` must be at least the dataset's length {max(found, 1)}, got {given}.")
    return found if given is None else given


def _chunks(loader: DataLoader, wanted: np.ndarray) -> list[np.ndarray]:
    """The indices of each batch, in random order."""
    order = np.random.default_rng(0).permutation(np.asarray(wanted, dtype=np.int64))  # an own generator
    size = _batch_size(loader)
    return [order[start : start + size] for start in range(0, len(order), size)]


def _batch_size(loader: DataLoader) -> int:
    if loader.batch_sampler is None and not _draws_batches(loader.sampler):  # batch_size=None
        return 1
    source = loader.sampler if loader.batch_sampler is None else loader.batch_sampler
    size = getattr(source, "batch_size", None)
    return size if isinstance(size, int) and size > 0 else DEFAULT_BATCH_SIZE


def _draws_batches(sampler: Any) -> bool:
    return isinstance(sampler, BatchSampler) or hasattr(sampler, "batch_size")


def _own_loader(loader: DataLoader, chunks: Sequence[np.ndarray]) -> DataLoader:
    """A loader of these batches, which makes them as the given one does."""
    options: dict[str, Any] = {
        "collate_fn": loader.collate_fn,
        "num_workers": loader.num_workers,
        "pin_memory": loader.pin_memory,
        "timeout": loader.timeout,
        "worker_init_fn": loader.worker_init_fn,
        "multiprocessing_context": loader.multiprocessing_context,
        "prefetch_factor": loader.prefetch_factor,
    }
    batches = [chunk.tolist() for chunk in chunks]
    if loader.batch_sampler is not None:
        return DataLoader(loader.dataset, batch_sampler=batches, **options)
    if not _draws_batches(loader.sampler):
        return DataLoader(loader.dataset, batch_size=None, sampler=[index for (index,) in batches], **options)
    return DataLoader(loader.dataset, batch_size=None, sampler=batches, **options)


@contextmanager
def _evaluating(model: LightningModule) -> Iterator[None]:
    """Eval mode, and a trainer that says that it does not train: what hooks do in training only is left out."""
    modes = [(module, module.training) for module in model.modules()]
    trainer = model._trainer if model._trainer is not None and model._trainer.training else None
    try:
        model.eval()
        if trainer is not None:
            trainer.training = False
        yield
    finally:
        for module, mode in modes:
            module.training = mode
        if trainer is not None:
            trainer.training = True


@contextmanager
def _kept_generators(*owners: Any) -> Iterator[None]:
    """The states of the own generators of loaders and samplers are put back."""
    owners = (*owners, *(getattr(owner, "sampler", None) for owner in owners))
    found = {id(g): g for owner in owners if isinstance(g := getattr(owner, "generator", None), torch.Generator)}
    states = [(generator, generator.get_state()) for generator in found.values()]
    try:
        yield
    finally:
        for generator, state in states:
            generator.set_state(state)
