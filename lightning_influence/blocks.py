"""Blocks of examples on their way to the file, and the spool that holds them until there is a basis."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from types import TracebackType

import numpy as np
import torch
from torch import Tensor

from lightning_influence.functional.quantize import dequantize_float16, quantize_float16
from lightning_influence.gradients import DenseGradient, LayerGradient, concatenate
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
        return next(iter(self.gradients.values())).device

    @property
    def nbytes(self) -> int:
        """Bytes of the gradients."""
        return sum(gradient.nbytes for gradient in self.gradients.values())

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
        if len(blocks) == 1:
            return first
        return cls(
            np.concatenate([block.indices for block in blocks]),
            {name: np.concatenate([block.columns[name] for block in blocks]) for name in first.columns},
            {name: concatenate([block.gradients[name] for block in blocks]) for name in first.gradients},
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


def joined_until(is_enough: Callable[[int, int], bool], blocks: Iterator[Block]) -> Block | None:
    """The first of the blocks as one, as many as are enough; None if there are none.

    Args:
        is_enough: of so many examples and bytes.
        blocks: of which those that are taken are used up.
    """
    taken: list[Block] = []
    for block in blocks:
        taken.append(block)
        if is_enough(sum(len(b) for b in taken), sum(b.nbytes for b in taken)):
            break
    return Block.concatenate(taken) if taken else None


class Spool:
    """Blocks on disk in float16, beside the file that they are for, deleted when done with."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._near = Path(path).absolute()
        self._folder: TemporaryDirectory | None = None
        self._forms: list[dict[str, LayerGradient]] = []  # of each block's gradients, without their tensors

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
        gradients = {name: _smaller(gradient) for name, gradient in block.gradients.items()}
        tensors = {name: [_rounded(tensor) for tensor in g.tensors] for name, g in gradients.items()}
        columns = {name: torch.from_numpy(column) for name, column in block.columns.items()}
        torch.save((torch.from_numpy(block.indices), columns, tensors), self._file(len(self._forms)))
        self._forms.append({name: g.with_tensors([_empty(t) for t in g.tensors]) for name, g in gradients.items()})

    def blocks(self) -> Iterator[Block]:
        """The blocks in the order in which they were written."""
        for number, forms in enumerate(self._forms):
            indices, columns, tensors = torch.load(self._file(number), weights_only=True)
            gradients = {
                name: form.with_tensors([_restored(*rounded) for rounded in tensors[name]])
                for name, form in forms.items()
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


def _smaller(gradient: LayerGradient) -> LayerGradient:
    """The gradients in the form that takes fewer bytes."""
    o, i = gradient.shape
    return DenseGradient(gradient.dense()) if 4 * len(gradient) * o * i < gradient.nbytes else gradient


def _rounded(tensor: Tensor) -> tuple[Tensor, Tensor | None]:
    return quantize_float16(tensor) if tensor.is_floating_point() else (tensor, None)


def _restored(values: Tensor, scales: Tensor | None) -> Tensor:
    return values if scales is None else dequantize_float16(values, scales)


def _empty(tensor: Tensor) -> Tensor:
    return tensor.new_empty([0] * tensor.ndim)
