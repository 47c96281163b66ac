"""From names on the command line to a model, its file and batches of queries.

A name is `module:attribute`, looked for from the current folder on, as `python` does. What goes wrong in code
that is not ours is told with the argument that named it.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader, Dataset, IterableDataset

from lightning_influence.cli.dampings import damping_of
from lightning_influence.cli.examples import subset_of
from lightning_influence.cli.progress import progress
from lightning_influence.curvature import get_curvature
from lightning_influence.errors import InfluenceError, QueryError
from lightning_influence.module import InfluenceModule
from lightning_influence.store import StoreReader

if TYPE_CHECKING:
    from jsonargparse import Namespace

_END = object()  # of the batches


def load_influence(options: Namespace) -> InfluenceModule:
    """The model of `--model` with the weights of `--checkpoint`, joined to the file.

    Raises:
        QueryError: if an argument is missing, or what it names cannot be loaded.
        StoreError, WeightsMismatchError: as `InfluenceModule.from_checkpoint`.
    """
    for name in ("checkpoint", "model", "data"):
        if not options[name]:
            raise QueryError(f"`--{name}` is missing: queries need `--checkpoint`, `--model` and `--data`.")
    kind = imported(options.model, "--model")
    if not (isinstance(kind, type) and hasattr(kind, "load_from_checkpoint")):
        raise QueryError(f"`--model` must name a LightningModule's class, got {options.model!r}, {kind!r}.")
    _check_model_args(kind, options.model_args)
    with _told(f"`--checkpoint {options.checkpoint}` cannot be loaded as {kind.__name__}"):
        influence = InfluenceModule.from_checkpoint(
            options.checkpoint,
            kind,
            store=options.file,
            weights_only=options.weights_only,
            **options.model_args,
        )
    with _told(f"`--device {options.device}` cannot be used"):
        return influence.to(torch.device(options.device))


def _check_model_args(kind: type, given: Mapping[str, Any]) -> None:
    """Refuse names that `load_from_checkpoint` would silently leave out."""
    parameters = inspect.signature(kind).parameters.values()
    known = [parameter.name for parameter in parameters if parameter.kind is not parameter.VAR_KEYWORD]
    unknown = sorted(set(given) - set(known))
    if unknown and len(known) == len(parameters):
        raise QueryError(
            f"`--model_args` has {unknown[0]!r}, which {kind.__name__} does not take; it takes: "
            f"{', '.join(known) or 'nothing'}."
        )


def batches(options: Namespace) -> Iterator[Any]:
    """The batches of queries that `--data` names, with a progress bar in a terminal.

    Raises:
        QueryError: if there are none, or the code that makes them fails.
    """
    make = imported(options.data, "--data")
    where = f"`--data {options.data}`"
    if not callable(make):
        raise QueryError(f"{where} must name a function that returns queries, got {type(make).__name__}.")
    with _told(f"{where} failed"):
        data = make()
        found = iter(progress(_batched(data, options.batch_size, where)))
        batch = next(found, _END)
    if batch is _END:
        raise QueryError(f"{where} gave no queries; return at least one batch.")
    while batch is not _END:
        if _is_empty(batch):
            raise QueryError(f"{where} gave a batch without any query (a tensor of no rows); leave it out.")
        yield batch
        with _told(f"{where} failed"):
            batch = next(found, _END)


def asked(options: Namespace) -> dict[str, Any]:
    """`damping`, `curvature`, `segments` and `layers`, as queries take them.

    Raises:
        ValueError: if there is no such damping or curvature.
    """
    return {
        "damping": damping_of(options.damping),
        "curvature": get_curvature(options.curvature),
        "segments": options.segments,
        "layers": options.layers,
    }


def asked_subset(options: Namespace, store: StoreReader) -> dict[str, Any]:
    """`subset`, as queries take it, if there is one.

    Raises:
        ValueError: if it names no examples of the file.
    """
    return {} if options.subset is None else {"subset": subset_of(options.subset, store.num_examples)}


def measured(options: Namespace) -> dict[str, Callable | None]:
    """`measurement`, as queries take it.

    Raises:
        QueryError: if its name leads to no function.
    """
    if not options.measurement:
        return {"measurement": None}
    measurement = imported(options.measurement, "--measurement")
    if not callable(measurement):
        raise QueryError(
            f"`--measurement {options.measurement}` must name a function of (model, batch), got "
            f"{type(measurement).__name__}."
        )

    @functools.wraps(measurement)
    def told(model: Any, batch: Any) -> Tensor:
        with _told(f"`--measurement {options.measurement}` failed"):
            return measurement(model, batch)

    return {"measurement": told}


def imported(name: str, argument: str) -> Any:
    """What `module:attribute` names.

    Args:
        name: of the object.
        argument: that it was passed as, for messages.

    Raises:
        QueryError: if there is no such thing, or its module cannot be imported.
    """
    module_name, _, attribute = name.partition(":")
    if not module_name or not attribute or module_name.endswith(".py") or "/" in module_name:
        raise QueryError(
            f"`{argument}` must be module:name, such as train:Digits for Digits in train.py, got {name!r}."
        )
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    with _told(f"`{argument} {name}`: the module {module_name!r} cannot be imported from {os.getcwd()}"):
        found: Any = importlib.import_module(module_name)
    for part in attribute.split("."):
        if not hasattr(found, part):
            raise QueryError(f"`{argument} {name}`: {module_name!r} has no {attribute!r}.")
        found = getattr(found, part)
    return found


def _batched(data: Any, batch_size: int, where: str) -> Iterable[Any]:
    """An iterable of batches; a tuple, mapping or tensor is one batch."""
    if isinstance(data, DataLoader):
        return data
    if isinstance(data, Dataset | IterableDataset):
        return DataLoader(data, batch_size=batch_size)
    if isinstance(data, Tensor | tuple | Mapping):
        return [data]
    if isinstance(data, Iterable) and not isinstance(data, str | bytes):
        return data
    raise QueryError(
        f"{where} must return a DataLoader, a Dataset, one batch (a tuple, mapping or tensor) or an iterable of "
        f"batches, got {type(data).__name__}."
    )


def _is_empty(batch: Any) -> bool:
    """Whether the first tensor of a batch has no rows."""
    leaf = next((leaf for leaf in tree_leaves(batch) if isinstance(leaf, Tensor)), None)
    return leaf is not None and leaf.ndim > 0 and len(leaf) == 0


@contextmanager
def _told(what: str) -> Iterator[None]:
    """Errors that are not ours become one of ours, which says what failed."""
    try:
        yield
    except InfluenceError:
        raise
    except Exception as error:  # the user's code, or a checkpoint that it does not fit
        raise QueryError(f"{what}: {type(error).__name__}: {error}") from error
