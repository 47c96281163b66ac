"""Blocks of examples on their way to the file, and the spool that holds them until there is a basis."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from types import TracebackType

import numpy as np
import torch

from lightning_influence.codecs import PairsCodec
from lightning_influence.gradients import LayerGradient
from lightning_influence.layer_record import LayerPlan
from lightning_influence.step import StepGradients


@dataclass(frozen=True)
class Block:
    """Some examples' gradients and what else their rows say.

    Args:
        indices: dataset indices, int64 [n].
        columns: values for the file's columns, each [n].
        gradients: by layer, n examples each.
    """

    indices: np.ndarray
    columns: dict[str, np.ndarray]
    gradients: dict[str, LayerGradient]

    def __len__(self) -> int:
        return len(self.indices)

    @property
    def device(self) -> torch.device:
        """Where the gradients are."""
        return next(iter(self.gradients.values())).inputs.device

    @property
    def nbytes(self) -> int:
        """Bytes of the gradients."""
        return sum(g.inputs.nbytes + g.output_grads.nbytes for g in self.gradients.values())

    @classmethod
    def of_step(cls, step: StepGradients, indices: np.ndarray, step_index: int, learning_rate: float) -> Block:
        """One training step's examples."""
        n, scale = len(indices), step.scale
        labels = np.full(n, -1) if scale.labels is None else scale.labels.cpu().numpy()
        columns = {
            "loss": scale.losses.cpu().numpy(),
            "label": labels,
            "step": np.full(n, step_index),
            "learning_rate": np.full(n, learning_rate, np.float32),
            "valid": np.ones(n, np.uint8),
        }
        return cls(indices, columns, step.gradients)

    @classmethod
    def concatenate(cls, blocks: Sequence[Block]) -> Block:
        """One block of several; examples with fewer positions are padded with zeros."""
        first = blocks[0]
        return cls(
            np.concatenate([block.indices for block in blocks]),
            {name: np.concatenate([block.columns[name] for block in blocks]) for name in first.columns},
            {
                name: LayerGradient.concatenate([block.gradients[name] for block in blocks])
                for name in first.gradients
            },
        )

    def split_invalid(self) -> tuple[Block, Block]:
        """The examples whose gradients are all finite, and the others, marked and without any."""
        finite = torch.stack([gradient.is_finite() for gradient in self.gradients.values()]).all(0)
        if finite.all():
            return self, self._rows(np.zeros(len(self), bool), {})
        kept = {name: gradient[finite] for name, gradient in self.gradients.items()}
        mask = finite.cpu().numpy()
        invalid = self._rows(~mask, {})
        invalid.columns["valid"][:] = 0
        return self._rows(mask, kept), invalid

    def _rows(self, mask: np.ndarray, gradients: dict[str, LayerGradient]) -> Block:
        columns = {name: column[mask] for name, column in self.columns.items()}
        return Block(self.indices[mask], columns, gradients)


class Spool:
    """Blocks on disk as float16 pairs, beside the file that they are for, deleted when done with."""

    def __init__(self, path: str | os.PathLike[str], plans: Mapping[str, LayerPlan]) -> None:
        self._plans = plans
        self._near = Path(path).absolute()
        self._folder: TemporaryDirectory | None = None
        self._count = 0

    def __enter__(self) -> Spool:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None = None,
        error: BaseException | None = None,
        traceback: TracebackType | None = None,
    ) -> None:
        self.close()

    def append(self, block: Block) -> None:
        """Write one block."""
        if self._folder is None:
            self._near.parent.mkdir(parents=True, exist_ok=True)
            self._folder = TemporaryDirectory(dir=self._near.parent, prefix=f".{self._near.name}.spool-")
        pairs = {
            name: (gradient.positions, self._codec(name, gradient.positions).encode(gradient))
            for name, gradient in block.gradients.items()
        }
        columns = {name: torch.from_numpy(column) for name, column in block.columns.items()}
        torch.save((torch.from_numpy(block.indices), columns, pairs), self._file(self._count))
        self._count += 1

    def blocks(self) -> Iterator[Block]:
        """The blocks in the order in which they were written."""
        for number in range(self._count):
            indices, columns, pairs = torch.load(self._file(number), weights_only=True)
            gradients = {
                name: self._codec(name, positions).decode_factors(arrays)
                for name, (positions, arrays) in pairs.items()
            }
            yield Block(indices.numpy(), {k: column.numpy() for k, column in columns.items()}, gradients)

    def close(self) -> None:
        """Delete everything; may be called more than once."""
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None

    def _file(self, number: int) -> Path:
        assert self._folder is not None
        return Path(self._folder.name) / f"{number:06d}.pt"

    def _codec(self, name: str, positions: int) -> PairsCodec:
        plan = self._plans[name]
        return PairsCodec(plan.shape, positions=positions, has_bias=plan.has_bias, dtype="float16")
