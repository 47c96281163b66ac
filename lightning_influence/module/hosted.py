"""A model and its file as a `LightningModule`: batches are prepared as the model's own hooks do it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

import numpy as np
import torch
from lightning.pytorch import LightningModule
from torch import nn

from lightning_influence.errors import WeightsMismatchError
from lightning_influence.exports import example_columns, known_of_examples, ranked_columns
from lightning_influence.gradients import LayerGradient
from lightning_influence.layers import TrackedLayer, find_layers
from lightning_influence.query import Attribution, InfluenceQuery, ScoreOptions, described_layers
from lightning_influence.step import LossKind
from lightning_influence.store import StoreReader
from lightning_influence.training.asking import Measurement, example_gradients, without_other_processes

TOP_K_OPTIONS = frozenset({"k", "largest", "measurement"}) | ScoreOptions.__optional_keys__


def checked_options(query_options: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of `query_options`.

    Raises:
        ValueError: if one is no argument of `top_k`.
    """
    if unknown := query_options.keys() - TOP_K_OPTIONS:
        raise ValueError(
            f"`query_options` must be arguments of `top_k`, which are {', '.join(sorted(TOP_K_OPTIONS))}; got "
            f"{', '.join(map(repr, sorted(unknown)))}."
        )
    return dict(query_options)


class HostedModel(LightningModule):
    """Holds a trained model and its file, and makes the gradients of queries.

    Args:
        model: the trained model.
        store: its file.
    """

    def __init__(self, model: nn.Module, store: StoreReader) -> None:
        super().__init__()
        self.model = model
        self.store = store
        self.query_options: dict[str, Any] = {}
        self._tracked = _find_layers(model, store)
        self._query: InfluenceQuery | None = None

    def predict_step(self, batch: Any, batch_idx: int = 0, dataloader_idx: int = 0) -> Attribution:
        """`top_k` of a batch with `query_options`; called by `trainer.predict`."""
        options = checked_options(self.query_options)
        k, largest = options.pop("k", 10), options.pop("largest", True)
        self._engine().check_k(k, options.get("segments"))
        gradients = self._gradients(batch, options.pop("measurement", None))
        return self._engine().top_k(gradients, k, largest=largest, **options)

    def to_columns(self, answers: Attribution | Sequence[Attribution] | None = None) -> dict[str, np.ndarray]:
        """A table, as a dict from names to arrays of one length: `pandas.DataFrame(influence.to_columns())`.

        Args:
            answers: of `top_k`, or a list of them, as `trainer.predict` returns it.

        Returns:
            Without answers a row for each training example: `index` and all that the file knows of it (`written`,
            `valid`, `loss`, `step`, `learning_rate`, `label`, `occurrences`). Else a row for each query and each
            of its examples: `query` (counted from 0 over all answers), `rank` (from 1), `index`, `score`, `label`,
            `loss`, `step`. What the file does not know is -1 in `label` and `step`, and NaN in the others.
        """
        if answers is None:
            return example_columns(self.store)
        answers = [answers] if isinstance(answers, Attribution) else answers
        return ranked_columns(answers, known_of_examples(self.store))

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """The model's own hook: its batches are prepared as in training."""
        return _hook(self.model, "on_before_batch_transfer", batch, dataloader_idx)

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """The model's own hook."""
        return _hook(self.model, "on_after_batch_transfer", batch, dataloader_idx)

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """The model's own hook."""
        if isinstance(self.model, LightningModule):
            return self.model.transfer_batch_to_device(batch, device, dataloader_idx)
        return super().transfer_batch_to_device(batch, device, dataloader_idx)

    def _transferred(self, batch: Any) -> Any:
        batch = self.on_before_batch_transfer(batch, 0)
        batch = self.transfer_batch_to_device(batch, self.device, 0)
        return self.on_after_batch_transfer(batch, 0)

    def _engine(self) -> InfluenceQuery:
        device = next(self.model.parameters()).device
        if self._query is None or self._query.device != device:
            self._query = InfluenceQuery(self.store, device)
        return self._query

    def _gradients(self, batch: Any, measurement: Measurement | None) -> dict[str, LayerGradient]:
        """Gradients of minus the measurement, of each query and layer."""
        loss = cast(LossKind, self.store.attributes.get("loss", "auto"))
        with without_other_processes():  # `predict` may give processes different numbers of batches
            asked = example_gradients(self.model, self._tracked, batch, loss=loss, measurement=measurement)
        return asked.gradients


def _find_layers(model: nn.Module, store: StoreReader) -> dict[str, TrackedLayer]:
    known, reasons = find_layers(dict(model.named_modules()), model, trainable_only=False)
    tracked = {}
    for entry in described_layers(store):
        name = entry["name"]
        if name not in known:
            why = next((f": {r}" for n, r in reasons.items() if name == n or name.startswith(f"{n}.")), "")
            raise WeightsMismatchError(
                f"{store.path} has gradients of layer {name!r}, which {type(model).__name__} does not have{why}; "
                "pass the model as it was trained."
            )
        has_bias = bool(entry.get("has_bias"))
        layer = known[name].with_bias(has_bias)
        if layer.has_bias != has_bias:  # as when modules share the weight and one of their biases was frozen
            raise WeightsMismatchError(
                f"{store.path} has gradients of the bias of layer {name!r}, which cannot be told from other "
                f"biases on its weight in {type(model).__name__}; pass the model as it was trained."
            )
        tracked[name] = replace(layer, batch_dim=int(entry.get("batch_dim", 0)))
    return tracked


def _hook(model: nn.Module, name: str, batch: Any, dataloader_idx: int) -> Any:
    return getattr(model, name)(batch, dataloader_idx) if isinstance(model, LightningModule) else batch
