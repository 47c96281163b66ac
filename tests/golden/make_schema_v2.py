"""Wrote `schema_v2.h5` and `schema_v2.json`. Never run again: old files open for ever, as they are."""

import json
from pathlib import Path

import numpy as np
import torch
from torch import nn

from lightning_influence.curvature import HeuristicDamping
from lightning_influence.functional.weights import weights_hash
from lightning_influence.layer_plan import plan_layers
from lightning_influence.layers import track_layers
from lightning_influence.query import InfluenceQuery
from lightning_influence.recorder import Recorder
from lightning_influence.step import StepCapture
from lightning_influence.store import StoreReader, StoreWriter
from tests.golden.make_schema_v1 import scattered

FOLDER = Path(__file__).parent


class Net(nn.Module):
    """A table, attention, a normalization, a convolution with groups, and a layer on vectors."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(5, 4), nn.Embedding(6, 4)
        self.attention, self.norm = nn.MultiheadAttention(4, 2, batch_first=True), nn.LayerNorm(4)
        self.conv, self.head = nn.Conv1d(4, 6, 3, groups=2), nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.tokens(x) + self.positions(torch.arange(x.shape[1]))
        x = self.norm(x + self.attention(x, x, x, need_weights=False)[0])
        return self.head(self.conv(x.transpose(1, 2)).tanh().mean(-1))


def golden_net() -> Net:
    """Weights that are the same bits on every machine."""
    net, start = Net(), 0
    for parameter in net.parameters():
        parameter.data = scattered(start, start + parameter.numel()).view_as(parameter)
        start += parameter.numel()
    return net


def golden_batch(n: int, first: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """N examples of 6 tokens, and their labels."""
    tokens = torch.arange(first * 6, (first + n) * 6) * 31 % 23 % 5
    return tokens.view(n, 6), torch.arange(first, first + n) % 3


def captured(net: Net, n: int, first: int = 0) -> StepCapture:
    x, y = golden_batch(n, first)
    capture = StepCapture(track_layers(net)[0])
    with capture:
        nn.functional.cross_entropy(net(x), y).backward()
    return capture


def main() -> None:
    net = golden_net()
    step = captured(net, 18).gradients(18)
    layers, coverage = track_layers(net)
    pairs, eigen = (plan_layers(layers, step.gradients, codec) for codec in ("pairs-float16", "eigen"))
    plans = {name: (pairs if name in ("positions", "head", "norm") else eigen)[name] for name in layers}
    recorder = Recorder(
        StoreWriter(FOLDER / "schema_v2.h5", num_examples=20, store_id="0123456789abcdef"),
        plans,
        bytes_per_example=160,
    )
    recorder.update(step, np.arange(18), step_index=0, learning_rate=0.1)
    recorder.finish(
        recorder.factors(),
        attributes={"weights_hash_end": weights_hash(net)},
        documents={"coverage": coverage.to_builtins(), "loss": recorder.loss},
    )
    query = InfluenceQuery(StoreReader(FOLDER / "schema_v2.h5"))
    asked = captured(net, 2, first=40).gradients(2).gradients
    answers = {
        curvature: query.scores(asked, damping=HeuristicDamping(0.1), curvature=curvature).tolist()
        for curvature in ("ekfac", "kfac", "identity")
    }
    (FOLDER / "schema_v2.json").write_text(json.dumps(answers))


if __name__ == "__main__":
    main()
