"""Covariances and eigenvalues of gradients under labels that are not the rows' own.

Rows stay gradients of the training labels; A, S and Lambda are means over all passes of all examples. A layer
whose eigenbasis is known sums Lambda as passes come: of all coordinates at first, then of those that rows keep.
Any other layer's gradients wait on disk, in float16, until its basis is made.
"""

from __future__ import annotations

import os
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from lightning_influence.blocks import Block, Spool
from lightning_influence.codecs import EigenCodec
from lightning_influence.errors import CaptureError
from lightning_influence.factors import KroneckerCovariance
from lightning_influence.fisher.effective_size import EffectiveSize, squared_norms, squared_output_norms
from lightning_influence.functional.eigenvalues import second_moment_sum
from lightning_influence.functional.kronecker import Eigenbasis
from lightning_influence.gradients import DenseGradient, LayerGradient, concatenate
from lightning_influence.layer_plan import LayerPlan
from lightning_influence.processes import Processes

SPOOLED_BYTES = 4 * 2**20  # at a time


class LabelFactors:
    """Sums over the passes of one epoch.

    Args:
        plans: of the layers.
        covariances: of the layers that need any, which this updates.
        bases: of the layers that have one from the start.
        path: beside which gradients wait.
    """

    def __init__(
        self,
        plans: Mapping[str, LayerPlan],
        covariances: Mapping[str, KroneckerCovariance],
        bases: Mapping[str, Eigenbasis],
        path: str | os.PathLike[str],
    ) -> None:
        self._plans, self._covariances = plans, covariances
        self._eigenvalues = {name: _Eigenvalues(bases[name]) for name in plans if name in bases}
        self._spool = Spool(path)
        self._buffers: dict[str, list[LayerGradient]] = {name: [] for name in plans if name not in bases}
        self._buffered = 0  # bytes
        self._examples, self._first = 0, True
        self._sizes_S = {name: EffectiveSize() for name in plans}
        self._sizes_Lambda = {name: EffectiveSize() for name in plans}
        self._has_selected: set[str] = set()

    def add(self, gradients: Mapping[str, LayerGradient], codecs: Mapping[str, EigenCodec]) -> None:
        """Take in one pass of a step.

        Args:
            gradients: of its examples; layers that it did not use have none.
            codecs: of the layers of which it is known what rows keep.
        """
        n = max((len(gradient) for gradient in gradients.values()), default=0)
        if n == 0:
            return
        for name, plan in self._plans.items():
            gradient = gradients.get(name)
            if gradient is None:  # it is zero for all examples
                self._count_zeros(name, n, plan, codecs.get(name))
            else:
                self._add(name, gradient, codecs.get(name))
        if self._buffered >= SPOOLED_BYTES:
            self._flush()
        self._examples += n if self._first else 0
        self._first = False

    def end_step(self) -> None:
        """After the last pass of a step."""
        self._first = True
        for size in (*self._sizes_S.values(), *self._sizes_Lambda.values()):
            size.end_step()

    def finish(self, bases: Mapping[str, Eigenbasis], processes: Processes) -> None:
        """Sum up what waited, and all processes' sums; all must call this together.

        Args:
            bases: of all layers.
            processes: that record together.
        """
        with processes.together():
            self._flush()
            self._eigenvalues |= {name: _Eigenvalues(bases[name]) for name in self._buffers}
            for block in self._spool.blocks():
                for name, gradient in block.gradients.items():
                    self._eigenvalues[name].add(gradient.to(self._eigenvalues[name].device))
            self.close()
            device = processes.device
            for name in self._plans:
                self._eigenvalues[name].to(device)
            sizes = [each[name] for name in self._plans for each in (self._sizes_S, self._sizes_Lambda)]
            for size in sizes:
                size.sums = size.sums.to(device)
        processes.sum_(t for name in self._plans for t in self._eigenvalues[name].sums)
        processes.sum_(size.sums for size in sizes)
        (self._examples,) = map(int, processes.total(self._examples))

    def Lambda(self, name: str, codec: object) -> Tensor:  # noqa: N802 (the papers' symbol)
        """A layer's eigenvalues [o, i], after `finish`.

        Raises:
            CaptureError: if no pass had a finite gradient.
        """
        return self._eigenvalues[name].value(name, codec.coordinates if isinstance(codec, EigenCodec) else None)

    def effective_sizes(self) -> dict[str, dict[str, float]]:
        """By layer, the effective sample sizes of S and Lambda, after `finish`."""
        return {
            name: {
                "S": self._sizes_S[name].value(self._examples),
                "Lambda": self._sizes_Lambda[name].value(self._examples),
            }
            for name in self._plans
        }

    def close(self) -> None:
        """Delete what waits; may be called more than once."""
        self._spool.close()

    def _add(self, name: str, gradient: LayerGradient, codec: EigenCodec | None) -> None:
        finite = gradient.is_finite()
        is_finite = None if finite.all() else finite
        if is_finite is not None:
            gradient = gradient[is_finite]
        if name in self._covariances:
            metric = self._covariances[name]
            if metric.A_sum.device != gradient.device:
                metric.to(gradient.device)
            metric.update(gradient)
        self._sizes_S[name].add(squared_output_norms(gradient), is_finite)
        if name in self._buffers:
            norms = squared_norms(gradient)
            self._buffers[name].append(gradient.rescaled(torch.ones((), dtype=torch.float32)))  # a copy
            self._buffered += gradient.nbytes
        elif codec is None:
            norms = squared_norms(gradient)
            self._eigenvalues[name].add(gradient)
        else:
            self._begin_selected(name)
            coordinates = codec.selection.of(gradient)
            norms = coordinates.square().sum(1)
            self._eigenvalues[name].add_some(coordinates, codec.coordinates)
        self._sizes_Lambda[name].add(norms, is_finite)

    def _begin_selected(self, name: str) -> None:
        """From now on, sizes are of the coordinates that rows keep."""
        if name not in self._has_selected:
            self._has_selected.add(name)
            self._sizes_Lambda[name].restart()

    def _count_zeros(self, name: str, n: int, plan: LayerPlan, codec: EigenCodec | None) -> None:
        if name in self._covariances:
            self._covariances[name].examples += n
        if name in self._buffers:
            o, i = plan.shape
            self._buffers[name].append(DenseGradient(torch.zeros(n, o, i, dtype=torch.float32)))
        elif codec is None:
            self._eigenvalues[name].count(n)
        else:
            self._begin_selected(name)
            self._eigenvalues[name].count_some(n)
        for sizes in (self._sizes_S, self._sizes_Lambda):
            sizes[name].add(torch.zeros(n, dtype=torch.float32))

    def _flush(self) -> None:
        waiting = {name: concatenate(buffer) for name, buffer in self._buffers.items() if buffer}
        if waiting:
            self._spool.append(Block(np.empty(0, np.int64), {}, waiting))
        self._buffers, self._buffered = {name: [] for name in self._buffers}, 0


class _Eigenvalues:
    """Sums of squared coordinates: of all of them over `whole` passes of examples, of some over `examples`."""

    def __init__(self, basis: Eigenbasis) -> None:
        self._basis = basis
        self._squares = torch.zeros(basis.shape, device=basis.eigenvalues_A.device, dtype=torch.float32)
        self._counts = torch.zeros(2, dtype=torch.int64, device=basis.eigenvalues_A.device)  # whole, examples

    @property
    def device(self) -> torch.device:
        return self._squares.device

    @property
    def sums(self) -> list[Tensor]:
        """To be added up over processes, in place."""
        return [self._squares, self._counts]

    def to(self, device: torch.device) -> None:
        self._basis, self._squares = self._basis.to(device), self._squares.to(device)
        self._counts = self._counts.to(device)

    def add(self, gradient: LayerGradient) -> None:
        """All coordinates of the examples."""
        if self.device != gradient.device:
            self.to(gradient.device)
        self._squares += second_moment_sum(gradient, self._basis)
        self.count(len(gradient))

    def add_some(self, coordinates: Tensor, kept: Tensor) -> None:
        """Coordinates [n, k] at the places [k]."""
        if self.device != coordinates.device:
            self.to(coordinates.device)
        self._squares.view(-1)[kept] += coordinates.square().sum(0)
        self.count_some(len(coordinates))

    def count(self, n: int) -> None:
        """Examples whose coordinates are zero, or were added."""
        self._counts += n

    def count_some(self, n: int) -> None:
        """Examples whose coordinates at the places of `add_some` are zero, or were added."""
        self._counts[1] += n

    def value(self, name: str, kept: Tensor | None) -> Tensor:
        """Lambda [o, i], with `kept` the places of which `add_some` was told."""
        whole, examples = self._counts.tolist()
        if not whole:
            raise CaptureError(
                f"Layer {name!r}: no gradient under the model's own labels is finite; did the loss become NaN?"
            )
        Lambda = self._squares / whole
        if kept is not None and examples > whole:
            kept = kept.to(Lambda.device)
            Lambda.view(-1)[kept] = self._squares.view(-1)[kept] / examples
        return Lambda
