"""What `trainer.predict` finds, in all processes, as one table in a file."""

from __future__ import annotations

import itertools
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter
from torch import Tensor

from lightning_influence.errors import QueryError
from lightning_influence.exports import check_table_path, write_table
from lightning_influence.processes import Processes
from lightning_influence.query import Attribution

Found = dict[tuple[int, int], tuple[Tensor, Tensor]]  # by loader and query: indices and scores, [k] each


class AttributionWriter(BasePredictionWriter):
    """Writes the answers of `trainer.predict(influence, loader)` to one table, whichever process found them.

    With several processes, `trainer.predict` returns to each of them what it has found itself, and nothing at all
    where processes are spawned. This callback gives it to the first one, which orders it by query, counts a query
    that a sampler has repeated once, and writes the columns of `InfluenceModule.to_columns`, where `query` is the
    index in the loader's dataset. Of several loaders there is a column `dataloader`, too.

    Args:
        path: of the table, ending in .csv, .npz, .parquet or .arrow (these two need pyarrow).

    Raises:
        ValueError: if the path has another suffix, or there is no such folder.

    Example:
        >>> writer = AttributionWriter("answers.csv")  # Trainer(callbacks=[writer], strategy="ddp", devices=2)
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        super().__init__(write_interval="epoch")
        self.path = Path(path)
        check_table_path(self.path, "`path`")

    def write_on_epoch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        predictions: Sequence[Any],
        batch_indices: Sequence[Any],
    ) -> None:
        """Collect and write; called by Lightning, in all processes.

        Raises:
            QueryError: if the model is not ours, or the loader does not say which queries are in a batch.
        """
        if not hasattr(pl_module, "to_columns"):
            raise QueryError(f"AttributionWriter needs an InfluenceModule, got {type(pl_module).__name__}.")
        processes = Processes(trainer.global_rank, trainer.world_size, device=trainer.strategy.root_device)
        loaders = [predictions] if len(batch_indices) == 1 else predictions
        with processes.together():
            found = _by_query(loaders, batch_indices, are_alone=processes.is_alone)
        everything: Found = {}
        for part in processes.gather(found):
            everything |= part
        with processes.together():
            if processes.is_first:
                write_table(self.path, _columns(pl_module, everything, len(loaders)))


def _by_query(loaders: Sequence[Sequence[Attribution]], batches: Sequence[Any], *, are_alone: bool) -> Found:
    """This process's answers by loader and query."""
    found: Found = {}
    for loader, (answers, known) in enumerate(zip(loaders, batches, strict=True)):
        numbers: Sequence[Sequence[int]] = known
        if not known and answers:
            if not are_alone:
                raise QueryError(
                    "the loader of queries does not tell which of them are in a batch, so those of several "
                    "processes cannot be put together; pass a DataLoader of a dataset with a length."
                )
            ends = np.cumsum([0, *(len(answer.indices) for answer in answers)]).tolist()
            numbers = [range(start, end) for start, end in itertools.pairwise(ends)]
        for answer, queries in zip(answers, numbers, strict=True):
            if len(answer.indices) != len(queries):
                raise QueryError(
                    f"a batch of {len(queries)} items made {len(answer.indices)} queries, which cannot be "
                    "numbered; let the loader give one item a query."
                )
            for query, indices, scores in zip(queries, answer.indices.cpu(), answer.scores.cpu(), strict=True):
                found[loader, int(query)] = indices, scores
    return found


def _columns(influence: Any, found: Found, num_loaders: int) -> dict[str, np.ndarray]:
    keys = sorted(found)
    answers = [Attribution(*(part[None] for part in found[key])) for key in keys]
    table = influence.to_columns(answers)
    loader, query = np.array(keys, np.int64).reshape(-1, 2).T
    table["query"], numbers = query[table["query"]], loader[table["query"]]
    return table if num_loaders == 1 else {"dataloader": numbers, **table}
