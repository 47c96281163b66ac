"""One epoch of a plain PyTorch loop with capture, as someone without Lightning would write it.

Of `nn.Linear` layers, which the dense references know.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_influence.gradients import LayerGradient
from lightning_influence.layer_plan import LayerPlan, plan_layers
from lightning_influence.layers import track_layers
from lightning_influence.query import InfluenceQuery
from lightning_influence.recorder import Recorder
from lightning_influence.scoring import ScoredLayer
from lightning_influence.step import StepCapture, StepGradients
from lightning_influence.store import StoreReader, StoreWriter
from tests.reference.gradients import linear_layer_names
from tests.reference.models import Example

STORE_ID = "plain-loop-0001"


def capture_step(model: nn.Module, examples: Sequence[Example]) -> StepGradients:
    """Forward and backward of one batch with mean cross-entropy."""
    tracked, _ = track_layers(model, linear_layer_names(model))
    inputs = torch.stack([x for x, _ in examples])
    targets = torch.stack([y for _, y in examples])
    with StepCapture(tracked) as capture:
        logits = model(inputs)
        F.cross_entropy(logits.flatten(0, -2), targets.flatten(), ignore_index=-100).backward()
    model.zero_grad()
    return capture.gradients(len(examples))


def query_gradients(model: nn.Module, examples: Sequence[Example]) -> dict[str, LayerGradient]:
    return capture_step(model, examples).gradients


def make_plans(model: nn.Module, examples: Sequence[Example], codec: str) -> dict[str, LayerPlan]:
    tracked, _ = track_layers(model, linear_layer_names(model))
    return plan_layers(tracked, capture_step(model, examples).gradients, codec)  # type: ignore[arg-type]


def train_epoch(
    path: str | os.PathLike[str],
    model: nn.Module,
    examples: Sequence[Example],
    *,
    codec: str = "pairs-float32",
    batch_size: int = 5,
    order: Sequence[int] | None = None,
    num_examples: int | None = None,
    **options: Any,
) -> Recorder:
    """A recorder that has seen the examples, in the order given, at fixed weights."""
    order = list(range(len(examples)) if order is None else order)
    recorder = Recorder(
        StoreWriter(path, num_examples=num_examples or len(examples), store_id=STORE_ID),
        make_plans(model, examples[:1], codec),
        **options,
    )
    for number, start in enumerate(range(0, len(order), batch_size)):
        indices = order[start : start + batch_size]
        step = capture_step(model, [examples[index] for index in indices])
        recorder.update(step, np.array(indices), step_index=number, learning_rate=0.1 / (1 + number))
    return recorder


def finish(recorder: Recorder, model: nn.Module) -> dict[str, ScoredLayer]:
    """Put the file into place; returns its factors."""
    layers = recorder.factors()
    _, coverage = track_layers(model, linear_layer_names(model))
    recorder.finish(layers, attributes={}, documents={"coverage": coverage.to_builtins(), "loss": recorder.loss})
    return layers


def record(
    path: str | os.PathLike[str], model: nn.Module, examples: Sequence[Example], **options: Any
) -> InfluenceQuery:
    """Train one epoch, write the file and open it for queries."""
    finish(train_epoch(path, model, examples, **options), model)
    return InfluenceQuery(StoreReader(path))


def decoded_rows(query: InfluenceQuery, layer: str) -> Tensor:
    """The gradients [N, o, i] that the file holds."""
    arrays = {name: torch.from_numpy(np.array(rows)) for name, rows in query.store.rows(layer).items()}
    return query.layers[layer].codec.decode(arrays)
