"""`capture`: the file of a model that was trained without the callback."""

from __future__ import annotations

import math
import os
import uuid
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import nn

from lightning_influence.fisher import FisherKind
from lightning_influence.layer_plan import CodecName
from lightning_influence.layers import NOT_CHOSEN
from lightning_influence.recorder import RecordedCounts, Recorder
from lightning_influence.step import LossKind
from lightning_influence.store import StoreWriter
from lightning_influence.training import report
from lightning_influence.training.asking import Measurement, kept_random_states
from lightning_influence.training.example_batches import ExampleBatches
from lightning_influence.training.options import CaptureOptions, IndexFn
from lightning_influence.training.staleness import Agreement
from lightning_influence.training.sweep import Sweep, finish_sweep


def capture(
    model: nn.Module,
    loader: Iterable[Any],
    path: str | os.PathLike[str] = "influence.h5",
    *,
    layers: list[str] | None = None,
    codec: CodecName = "auto",
    loss: LossKind = "auto",
    training_loss: Measurement | None = None,
    fisher: FisherKind = "empirical",
    fisher_samples: int = 1,
    bytes_per_example: int | None = None,
    error_budget: float | None = None,
    covariance_positions: int | None = 32,
    index_fn: IndexFn | None = None,
    num_examples: int | None = None,
) -> Path:
    """Build the file of a model that was trained without the callback, at the weights that it has now.

    The model is asked in eval mode about every example that the loader's sampler can draw; no optimizer
    steps, and weights, buffers, `.grad`, modes and random states are left as they were. Row k is of
    `loader.dataset[k]`, in whatever order the loader shuffles; of random augmentation, rows hold what this
    sweep draws. The examples are visited twice if a layer is stored as "eigen", else once.

    The file's attribute `rows` is "final". There is no `epoch`, and rows have no step and no learning rate.

    Args:
        model: a `LightningModule`, a copy of which gives the losses by its `training_step` (without its trainer,
            so that `self.current_epoch` is 0); or any module with `training_loss`.
        loader: for training. The examples of a map-style dataset are loaded in batches of the same size, by as
            many workers.
        path: of the file; an older file there is replaced when the new one is complete.
        layers: as in `InfluenceCallback`, like the other options.
        codec: how gradients are stored.
        loss: how the scale of what `training_step` returns is known.
        training_loss: `training_loss(model, batch) -> [n]`, each example's own loss, summed over its positions;
            element n must depend on example n only. Queries then need a `measurement`.
        fisher: of which labels the curvature is; "sampled" and "exact" need the losses of a `training_step`.
        fisher_samples: labels drawn for each example, with "sampled".
        bytes_per_example: budget of the eigen codec.
        error_budget: of scores, which chooses the bytes. What rows keep is chosen by the first 256 examples, so
            shuffle data that is in an order.
        covariance_positions: how many positions of an example enter the covariances.
        index_fn: from a batch to the dataset index of each row, for data that has no indices of its own, such as
            an `IterableDataset`. The loader is then iterated as it is.
        num_examples: length of the dataset, where it does not say.

    Returns:
        The path of the file.

    Raises:
        CaptureError: one of its children, if the gradients or their indices cannot be had.
        StoreError: if the file cannot be written.

    Example:
        >>> import tempfile
        >>> import torch
        >>> from torch import Tensor
        >>> import torch.nn.functional as F
        >>> from torch.utils.data import DataLoader, TensorDataset
        >>> from lightning_influence import InfluenceModule
        >>> model = nn.Sequential(nn.Linear(3, 2))
        >>> data = TensorDataset(torch.eye(3), torch.tensor([0, 1, 1]))
        >>> def losses(model: nn.Module, batch: list[Tensor]) -> Tensor:
        ...     return F.cross_entropy(model(batch[0]), batch[1], reduction="none")
        >>> folder = tempfile.mkdtemp()
        >>> path = capture(model, DataLoader(data, batch_size=2), f"{folder}/influence.h5", training_loss=losses)
        >>> influence = InfluenceModule.attach(model, path)
        >>> influence.scores(data[:2], measurement=lambda model, batch: -losses(model, batch)).shape
        torch.Size([2, 3])
    """
    target = Path(path).absolute()
    options = CaptureOptions(  # checks the arguments
        target,
        layers=layers,
        codec=codec,
        loss=loss,
        fisher=fisher,
        fisher_samples=fisher_samples,
        bytes_per_example=bytes_per_example,
        error_budget=error_budget,
        covariance_positions=covariance_positions,
        index_fn=index_fn,
        num_examples=num_examples,
    )
    labels = options.label_source
    if labels is not None and training_loss is not None:
        raise ValueError(
            f"`fisher={fisher!r}` draws labels from what a recognised loss function says of the prediction, which "
            '`training_loss` does not tell; pass `fisher="empirical"`, or leave out `training_loss`.'
        )
    model = getattr(model, "_orig_mod", model)  # of `torch.compile(model)`
    with kept_random_states():
        sweep = Sweep(
            model,
            layers=layers,
            codec=codec,
            loss=loss,
            training_loss=training_loss,
            labels=labels,
            error_budget=error_budget,
        )
        batches = ExampleBatches(loader, model, index_fn=index_fn, num_examples=num_examples)
        bases, visited = {}, sweep.begin(batches)
        if any(plan.needs_basis for plan in sweep.plans.values()):
            covariances = sweep.covariances(visited, positions=covariance_positions)
            bases = {name: metric.eigenbasis() for name, metric in covariances.items()}
            visited = iter(batches)
        recorder = Recorder(
            StoreWriter(target, num_examples=batches.num_examples, store_id=uuid.uuid4().hex),
            sweep.plans,
            bases=bases,
            bytes_per_example=options.most_bytes,
            error_budget=error_budget,
            covariance_positions=covariance_positions,
            has_own_labels=labels is not None,
        )
        try:
            sweep.rows(visited, recorder)
            agreement, counts = finish_sweep(recorder, sweep, model, {"loss": loss, **options.facts})
        except BaseException:
            recorder.discard()
            raise
    _report(target, sweep, agreement, counts, options)
    return target


def _report(
    path: Path, sweep: Sweep, agreement: Agreement, counts: RecordedCounts, options: CaptureOptions
) -> None:
    """What the user should know of the file."""
    coverage, rounded = sweep.tracking.coverage, report.coarseness(agreement)
    rank_zero_info(
        f"capture: {path} holds {counts.written:,} rows at the model's weights, {counts.missing:,} missing, "
        f"{counts.invalid:,} invalid, {path.stat().st_size / 1e6:.1f} MB, {rounded}; "
        f"{coverage.share:.1%} of the trainable parameters are attributed"
    )
    if any(layer.reason != NOT_CHOSEN for layer in coverage.uncovered):
        rank_zero_warn(f"capture: {coverage}")
    if counts.invalid:
        rank_zero_warn(
            f"capture: {counts.invalid:,} rows have non-finite gradients; they are marked invalid and are in no "
            "factor."
        )
    report.warn_of_losses(replace(agreement, staleness=math.nan), sweep.plans, (), options)
