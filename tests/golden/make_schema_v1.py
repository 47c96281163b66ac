"""Wrote `schema_v1.h5` and `schema_v1.json`. Never run again: old files open for ever, as they are."""

import json
from pathlib import Path

import numpy as np
import torch
from torch import nn

from lightning_influence.curvature import HeuristicDamping
from lightning_influence.functional.weights import weights_hash
from lightning_influence.layer_plan import LayerPlan
from lightning_influence.layers import track_layers
from lightning_influence.query import InfluenceQuery
from lightning_influence.recorder import Recorder
from lightning_influence.step import StepCapture
from lightning_influence.store import StoreReader, StoreWriter

FOLDER = Path(__file__).parent


class Net(nn.Module):
    """One layer on sequences, one on vectors."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.head = nn.Linear(5, 4), nn.Linear(4, 3, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.tokens(x).tanh().mean(1))


def golden_net() -> Net:
    """Weights that are the same bits on every machine."""
    net = Net()
    for parameter in net.parameters():
        parameter.data = scattered(0, parameter.numel()).view_as(parameter)
    return net


def scattered(start: int, stop: int) -> torch.Tensor:
    """Sixteenths from -1/2 to 1/2 in a fixed disorder."""
    return ((torch.arange(start, stop) * 37 % 101 * 7 % 17) - 8) / 16


def golden_batch(n: int, first: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """N examples of 6 positions, and their labels."""
    x = scattered(first * 30, (first + n) * 30).view(n, 6, 5)
    return x, torch.arange(first, first + n) % 3


def captured(net: Net, n: int, first: int = 0) -> StepCapture:
    x, y = golden_batch(n, first)
    capture = StepCapture(track_layers(net)[0])
    with capture:
        nn.functional.cross_entropy(net(x), y).backward()
    return capture


def main() -> None:
    net = golden_net()
    plans = {
        "tokens": LayerPlan((4, 6), True, "eigen", 6),
        "head": LayerPlan((3, 4), False, "pairs", 1),
    }
    recorder = Recorder(
        StoreWriter(FOLDER / "schema_v1.h5", num_examples=20, store_id="0123456789abcdef"),
        plans,
        bytes_per_example=16,
    )
    step = captured(net, 18).gradients(18)
    recorder.update(step, np.arange(18), step_index=0, learning_rate=0.1)
    recorder.finish(
        recorder.factors(),
        attributes={"weights_hash_end": weights_hash(net)},
        documents={"coverage": track_layers(net)[1].to_builtins(), "loss": recorder.loss},
    )
    query = InfluenceQuery(StoreReader(FOLDER / "schema_v1.h5"))
    asked = captured(net, 2, first=40).gradients(2).gradients
    answers = {
        curvature: query.scores(asked, damping=HeuristicDamping(0.1), curvature=curvature).tolist()
        for curvature in ("ekfac", "kfac", "identity")
    }
    (FOLDER / "schema_v1.json").write_text(json.dumps(answers))


if __name__ == "__main__":
    main()
